"""The engine's process: requests from a Unix socket, tokens back to it, steps in between.

Started by `fastgpt.server.process` as `python -m fastgpt.server.engine_process SOCKET`. One thread
does everything, so nothing competes with the step loop for the interpreter.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from fastgpt import env, logging
from fastgpt.errors import FastGPTError, RequestError
from fastgpt.server.messages import (
    Abort,
    Configure,
    EngineInfo,
    Failed,
    Figures,
    FrameReader,
    Output,
    Outputs,
    Ready,
    Submit,
    ToEngine,
    encode_frame,
)

__all__ = [
    "EngineLoop",
    "choose_device",
    "die_with_parent",
    "load_engine",
    "main",
    "make_ready",
]

_logger = logging.get_logger("fastgpt.engine")

_PR_SET_PDEATHSIG = 1
_FIGURES_INTERVAL_S = 0.5


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when the given parent dies, however it dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the call
        sys.exit(1)


class EngineLoop:
    """Runs one engine for one connection.

    Args:
        connection: the connected socket.
        engine: a `fastgpt.engine.Engine`.
    """

    def __init__(self, connection: socket.socket, reader: FrameReader, engine: Any) -> None:
        self._connection = connection
        self._reader = reader
        self._engine = engine
        self._refused: list[Output] = []
        self._figures_s = 0.0

    def run(self) -> None:
        """Serve until the other side closes the connection."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        engine = self._engine
        while True:
            busy = engine.has_work
            if poll.poll(0 if busy else _FIGURES_INTERVAL_S * 1000) and not self._receive():
                return
            if engine.has_work or self._refused:
                self._send_outputs(engine.step() if engine.has_work else [])
            now_s = time.monotonic()
            if now_s - self._figures_s >= _FIGURES_INTERVAL_S or (busy and not engine.has_work):
                self._figures_s = now_s
                self._send_figures(now_s)

    def _receive(self) -> bool:
        """Handle what has arrived; False at the end of the stream."""
        data = self._connection.recv(1 << 18)
        for message in self._reader.feed(data):
            if isinstance(message, Submit):
                try:
                    self._engine.add_request(
                        message.token_ids, message.params, request_id=message.request_id
                    )
                except RequestError as error:
                    self._refused.append(Output(message.request_id, [], "error", error=str(error)))
            elif isinstance(message, Abort):
                self._engine.abort(message.request_id)
        return bool(data)

    def _send_outputs(self, step_outputs: list[Any]) -> None:
        outputs = [
            Output(o.request_id, o.token_ids, o.finish_reason, o.timings) for o in step_outputs
        ]
        outputs += self._refused
        self._refused = []
        scheduler, blocks = self._engine.scheduler, self._engine.blocks
        self._connection.sendall(
            encode_frame(
                Outputs(outputs, len(scheduler.running), len(scheduler.waiting), blocks.num_free)
            )
        )

    def _send_figures(self, now_s: float) -> None:
        stats = self._engine.stats()
        self._connection.sendall(
            encode_frame(
                Figures(
                    num_preemptions=stats.num_preemptions,
                    num_steps=stats.num_steps,
                    busy_s=stats.busy_s,
                    clock_s=now_s,
                    memory_fragmentation=float(stats.pool.get("fragmentation", 0.0)),
                    pool=stats.pool,
                )
            )
        )


def choose_device(device: str, gpu_id: int) -> Any:
    """Return the device: gpu_id says which, where a GPU is chosen without a number.

    Raises:
        ConfigError, DeviceError: if it names no device, or one that is not there.
    """
    from fastgpt.models.placement import resolve_device

    chosen = resolve_device(device)
    if chosen.type == "cuda" and device in ("auto", "cuda"):
        chosen = resolve_device(f"cuda:{gpu_id}")
    return chosen


def load_engine(configure: Configure) -> tuple[Any, Ready]:
    """Build the engine; heavy imports happen here, after the process is safe."""
    begin_s = time.monotonic()
    import torch

    from fastgpt.engine import Engine

    torch.set_num_threads(1)  # the kernels have their own threads
    engine = Engine(
        configure.model,
        device=choose_device(configure.device, configure.gpu_id),
        dtype=configure.dtype,
        kv_cache_dtype=configure.kv_cache_dtype,
        memory_pool_size=configure.memory_pool_size,
        swap_to_cpu=configure.swap_to_cpu,
        max_batch=configure.max_batch,
        max_length=configure.max_length,
        min_batch=configure.min_batch,
        batch_timeout_s=configure.batch_timeout_s,
        warmup_iterations=configure.warmup_iterations,
        tokenizer=configure.tokenizer,
    )
    return engine, make_ready(engine, time.monotonic() - begin_s - engine.warm_up_s)


def make_ready(engine: Any, load_s: float) -> Ready:
    """Return what the HTTP process must know of an engine."""
    loaded = engine.loaded
    info = EngineInfo(
        name=loaded.name,
        architecture=loaded.architecture,
        device=str(engine.device),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        kernels=engine.kernels,
        num_threads=env.num_threads(),
        vocab_size=engine.limits.vocab_size,
        max_length=engine.limits.max_length,
        max_batch=engine.max_batch,
        block_size=engine.blocks.block_size,
        num_blocks=engine.blocks.num_blocks,
        kv_cache_dtype=engine.kv_cache_dtype,
        load_s=load_s,
        warm_up_s=engine.warm_up_s,
    )
    return Ready(
        info=info,
        tokenizer=engine.tokenizer.files if engine.tokenizer else None,
        generation_config=loaded.generation_config,
        eos_ids=sorted(loaded.eos_ids),
    )


def main(
    path: str, parent_pid: int, load: Callable[[Configure], tuple[Any, Ready]] = load_engine
) -> int:
    """Connect to the socket at path and serve until the parent is done; return the exit status.

    Args:
        path: the parent's socket.
        parent_pid: process to die with.
        load: makes the engine.
    """
    die_with_parent(parent_pid)
    # Ctrl-C and a service manager's SIGTERM reach the whole group. The parent ends us when the
    # answers under way have ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    reader = FrameReader(ToEngine)
    messages: list[Any] = []
    while not messages:
        data = connection.recv(1 << 16)
        if not data:
            return 1
        messages = reader.feed(data)
    configure = messages[0]
    assert isinstance(configure, Configure)
    logging.setup(configure.log_level)
    try:
        engine, ready = load(configure)
        connection.sendall(encode_frame(ready))
        EngineLoop(connection, reader, engine).run()
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the parent went away
    except Exception as error:
        expected = isinstance(error, FastGPTError | ImportError)
        _logger.debug("the engine stopped", exc_info=True)
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        if not expected:
            _logger.exception("the engine stopped")
        with contextlib.suppress(OSError):
            connection.sendall(encode_frame(Failed(message)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
