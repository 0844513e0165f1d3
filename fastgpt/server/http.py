"""Plain ASGI pieces: request ids, the body limit, event streams that notice a disconnect."""

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastgpt.server.protocol import error_body

__all__ = ["BodyLimit", "EventStream", "JsonResponse", "RequestIds", "wait_for_disconnect"]

_CLIENT_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

_MAX_DISCARDED_BYTES = 64 << 20

_json = msgspec.json.Encoder()


class JsonResponse(Response):
    """A JSON response encoded by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _json.encode(content)


class RequestIds:
    """Echoes the client's X-Request-Id, or sends a new one; `scope["state"]["request_id"]`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        if not _CLIENT_REQUEST_ID.fullmatch(given):
            given = f"req_{secrets.token_hex(12)}".encode()
        scope.setdefault("state", {})["request_id"] = given.decode("ascii")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", given)]
            await send(message)

        await self.app(scope, receive, send_with_id)


class _TooLarge(Exception):
    """The body grew beyond the limit."""


class BodyLimit:
    """Answers 413 to a body above max_bytes, declared or not; the rest is discarded."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            await self._refuse(scope, receive, send)
            return
        num_bytes = 0
        started = False

        async def counted_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise _TooLarge
            return message

        async def send_unless_refused(message: Message) -> None:
            # The framework answers a body that it could not read in its own words.
            nonlocal started
            if started or num_bytes <= self.max_bytes:
                started = True
                await send(message)

        with contextlib.suppress(_TooLarge):
            await self.app(scope, counted_receive, send_unless_refused)
        if not started:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that is still sending would miss the answer: take the rest, within reason.
        num_bytes, more = 0, True
        while more and num_bytes < _MAX_DISCARDED_BYTES:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
        body = error_body(f"the body is larger than {self.max_bytes} bytes", code="body_too_large")
        response = JsonResponse(body, 413, headers={"connection": "close"})
        await response(scope, receive, send)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client is gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_until_disconnect(request: Request, work: Callable[[], Any]) -> Any:
    """Await work(); None if the client goes away first, work then being cancelled."""
    task = asyncio.ensure_future(work())
    watcher = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        watcher.cancel()
        task.cancel()


class EventStream(Response):
    """Server-sent events from an iterator of JSON objects; cancels it when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Any, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._send_all(send))
        watcher = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            watcher.cancel()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # its cleanup aborts the request

    async def _send_all(self, send: Send) -> None:
        try:
            await self._send_events(send)
        finally:
            await self._events.aclose()

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            data = b"data: " + _json.encode(event) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
