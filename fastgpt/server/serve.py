"""Running the server: bind, start the engine, serve, end everything."""

import asyncio
import contextlib
import signal
import socket
from dataclasses import dataclass

import uvicorn

from fastgpt.config import ServerConfig
from fastgpt.errors import ConfigError, FastGPTError
from fastgpt.logging import get_logger
from fastgpt.server.app import create_app
from fastgpt.server.client import EngineClient, ServerEnds
from fastgpt.server.messages import Configure, EngineInfo
from fastgpt.server.metrics import Metrics
from fastgpt.server.process import EngineProcess

__all__ = ["ServeOptions", "bind", "run_server"]

_logger = get_logger(__name__)

_GRACE_S = 2  # for answers under way when the server is asked to end
_BACKLOG = 2048  # connections that wait to be accepted


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What to serve: the flags that have no place in the configuration file."""

    model: str
    tokenizer: str | None
    device: str
    dtype: str
    log_level: str


class _Server(uvicorn.Server):
    """Ends the answers that the grace time is too short for with an error, not in mid-sentence."""

    def __init__(self, config: uvicorn.Config, client: EngineClient) -> None:
        super().__init__(config)
        self._client = client

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        error = ServerEnds("the server was asked to end; send the request again")
        timer = asyncio.get_running_loop().call_later(_GRACE_S, self._client.fail_jobs, error)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: if the address is in use, not ours, or not allowed.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            # Now: a port that is bound and not listened to can be bound again.
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from error
    return listener


def run_server(
    config: ServerConfig,
    options: ServeOptions,
    engine_module: str = "fastgpt.server.engine_process",
) -> None:
    """Serve until SIGINT or SIGTERM; when it returns no process of ours is left.

    Args:
        config: the settings.
        options: what to serve.
        engine_module: what the engine's process runs.

    Raises:
        ConfigError: if the address cannot be bound.
        FastGPTError: if the engine cannot start.
    """
    ended_by: list[int] = []
    with contextlib.ExitStack() as cleanup:
        listener = cleanup.enter_context(bind(config.service.host, config.service.port))
        # uvicorn raises the signal again when it has ended in order: it must not end us there.
        before = signal.signal(signal.SIGTERM, lambda number, frame: ended_by.append(number))
        cleanup.callback(signal.signal, signal.SIGTERM, before)
        process = EngineProcess(engine_module)
        cleanup.callback(process.close)
        with contextlib.suppress(KeyboardInterrupt):
            if not ended_by:
                asyncio.run(_serve(config, options, listener, process))
    for number in ended_by:
        signal.raise_signal(number)  # now that nothing is left, whoever started us sees it


async def _serve(
    config: ServerConfig,
    options: ServeOptions,
    listener: socket.socket,
    process: EngineProcess,
) -> None:
    client = EngineClient(on_figures=lambda figures: metrics.take_figures(figures))
    metrics = Metrics(lambda: client.load)
    app = create_app(
        client, metrics, model_path=options.model, num_workers=config.service.num_workers
    )
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            backlog=_BACKLOG,
            timeout_graceful_shutdown=_GRACE_S + 1,  # the answers have ended by then
        ),
        client,
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    engine = asyncio.create_task(_run_engine(config, options, client, metrics, process, listener))
    try:
        await asyncio.wait({serving, engine}, return_when=asyncio.FIRST_COMPLETED)
        if engine.done() and engine.exception() is not None:  # it could not start
            server.should_exit = True
            await serving
            engine.result()
        await serving
    finally:
        engine.cancel()
        client.close()


async def _run_engine(
    config: ServerConfig,
    options: ServeOptions,
    client: EngineClient,
    metrics: Metrics,
    process: EngineProcess,
    listener: socket.socket,
) -> None:
    """Start the engine, then hand out what it sends until it ends."""
    configure = Configure(
        model=options.model,
        tokenizer=options.tokenizer,
        device=options.device,
        gpu_id=config.hardware.gpu_id,
        dtype=options.dtype,
        memory_pool_size=config.hardware.memory_pool_size,
        swap_to_cpu=config.hardware.swap_to_cpu,
        max_batch=config.service.batch_size,
        max_length=config.service.max_length,
        min_batch=config.service.min_batch,
        batch_timeout_s=config.service.batch_timeout_s,
        warmup_iterations=config.optimization.warmup_iterations,
        kv_cache_dtype=config.optimization.kv_cache_dtype,
        log_level=options.log_level,
    )
    connection = await process.connect()
    try:
        ready = await client.start(connection, configure)
    except FastGPTError as error:
        raise type(error)(f"cannot serve {options.model}: {error}") from error
    metrics.set_engine(ready.info)
    _log_start(ready.info, config, listener)
    await client.run()


def _log_start(info: EngineInfo, config: ServerConfig, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    _logger.info("model: %s (%s), loaded in %.2f s", info.name, info.architecture, info.load_s)
    _logger.info("dtype: %s on %s", info.dtype, info.device)
    _logger.info("kernels: %s, warm after %.2f s", info.kernels, info.warm_up_s)
    _logger.info(
        "KV cache: %d tokens (%d blocks of %d, %s), at most %d requests of %d tokens together",
        info.num_cache_tokens, info.num_blocks, info.block_size, info.stored_cache_dtype,
        info.max_batch, info.max_length,
    )  # fmt: skip
    _logger.info("threads: %d compute, %d text", info.num_threads, config.service.num_workers)
    shown = f"[{host}]" if ":" in host else host
    _logger.info("address: http://%s:%d", shown, port)
