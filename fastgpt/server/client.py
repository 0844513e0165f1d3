"""The HTTP process's side of the engine: submit requests, receive their tokens."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

from fastgpt.errors import DeviceError, FastGPTError, RequestError
from fastgpt.logging import get_logger
from fastgpt.request import Limits, SamplingParams, check_request
from fastgpt.server.messages import (
    Abort,
    Configure,
    Failed,
    Figures,
    FrameReader,
    FromEngine,
    Output,
    Outputs,
    Ready,
    Submit,
    ToEngine,
    encode_frame,
)
from fastgpt.tokenizer import Tokenizer

__all__ = ["EngineClient", "EngineDied", "Job", "ServerEnds"]

_logger = get_logger(__name__)


class EngineDied(DeviceError):
    """The engine's process ended while requests were open."""

    code = "engine_died"


class ServerEnds(EngineDied):
    """The server was asked to end, and the answer took longer than it waits."""

    code = "server_ends"


class Job:
    """One request under way. Iterate over it for its outputs; leaving early must call `abort`."""

    def __init__(self, client: "EngineClient", request_id: str, token_ids: list[int]) -> None:
        self.request_id = request_id
        self.prompt_token_ids = token_ids
        self._client = client
        self._queue: asyncio.Queue[Output | EngineDied] = asyncio.Queue()
        self.is_done = False

    def put(self, item: Output | EngineDied) -> None:
        self._queue.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[Output]:
        while not self.is_done:
            item = await self._queue.get()
            if isinstance(item, EngineDied):
                self.is_done = True
                raise item
            if item.finish_reason is not None:
                self.is_done = True
            yield item
            if item.error is not None:
                raise RequestError(item.error)

    def abort(self) -> None:
        """Tell the engine to drop the request; nothing if it is finished."""
        if not self.is_done:
            self.is_done = True
            self._client.abort(self.request_id)


class EngineClient:
    """Owns the connection. Lives on the event loop; no other thread may call it.

    Attributes:
        ready: the engine's Ready message, once it came.
        tokenizer: the model's tokenizer, or None.
        reason: why the engine is not ready, for /health.
        load: the last (num_running, num_waiting, num_free_blocks).
    """

    def __init__(self, on_figures: Callable[[Figures], None] | None = None) -> None:
        self.ready: Ready | None = None
        self.tokenizer: Tokenizer | None = None
        self.limits: Limits | None = None
        self.reason = "the model is loading"
        self.load = (0, 0, 0)
        self._is_dead = False
        self._on_figures = on_figures
        self._jobs: dict[str, Job] = {}
        self._writer: asyncio.StreamWriter | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.ready is not None and not self._is_dead

    async def start(self, connection: socket.socket, configure: Configure) -> Ready:
        """Configure the engine and wait until it is ready; then call `run` to receive.

        Raises:
            FastGPTError: with the engine's own message, if it cannot start.
        """
        self._stream, self._writer = await asyncio.open_unix_connection(sock=connection)
        self._frames = FrameReader(FromEngine)
        self._send(configure)
        while True:
            data = await self._receive()
            if not data:
                raise EngineDied("the engine ended while loading")
            for message in self._frames.feed(data):
                if isinstance(message, Failed):
                    raise FastGPTError(message.message)
                if isinstance(message, Ready):
                    if message.tokenizer is not None:
                        self.tokenizer = await asyncio.to_thread(Tokenizer, message.tokenizer)
                    info = message.info
                    self.limits = Limits(info.vocab_size, info.max_length, info.num_cache_tokens)
                    self.load = (0, 0, info.num_blocks)
                    self.ready = message
                    return message

    async def run(self) -> None:
        """Hand out what the engine sends until its process ends."""
        failure = ""
        while data := await self._receive():
            for message in self._frames.feed(data):
                if isinstance(message, Outputs):
                    self._take(message)
                elif isinstance(message, Figures):
                    if self._on_figures is not None:
                        self._on_figures(message)
                elif isinstance(message, Failed):
                    failure = message.message
        self._is_dead = True
        self.reason = f"the engine died: {failure}" if failure else "the engine died"
        _logger.error("%s; %d requests lost", self.reason, len(self._jobs))
        self.load = (0, 0, self.load[2])
        self.fail_jobs(EngineDied(self.reason))

    def fail_jobs(self, error: EngineDied) -> None:
        """End every open request with this error."""
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.put(error)

    def submit(self, request_id: str, token_ids: list[int], params: SamplingParams) -> Job:
        """Start a request.

        Raises:
            RequestError: if it is invalid or can never fit.
            EngineDied: if there is no engine.
        """
        if not self.is_ready or self.limits is None:
            raise EngineDied(self.reason)
        check_request(token_ids, params, self.limits)
        self._send(Submit(request_id, token_ids, params))
        job = Job(self, request_id, token_ids)
        self._jobs[request_id] = job
        return job

    def abort(self, request_id: str) -> None:
        """Drop a request."""
        if self._jobs.pop(request_id, None) is not None and not self._is_dead:
            self._send(Abort(request_id))

    def close(self) -> None:
        """Close the connection; the engine's loop ends."""
        if self._writer is not None:
            self._writer.close()

    def _take(self, message: Outputs) -> None:
        self.load = (message.num_running, message.num_waiting, message.num_free_blocks)
        for output in message.outputs:
            job = self._jobs.get(output.request_id)
            if job is None:
                continue
            if output.finish_reason is not None:
                del self._jobs[output.request_id]
            job.put(output)

    async def _receive(self) -> bytes:
        try:
            return await self._stream.read(1 << 18)
        except ConnectionError:
            return b""

    def _send(self, message: ToEngine) -> None:
        assert self._writer is not None
        self._writer.write(encode_frame(message))
