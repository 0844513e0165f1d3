"""The HTTP endpoints, in OpenAI's form."""

import asyncio
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fastgpt.errors import RequestError
from fastgpt.logging import get_logger
from fastgpt.server.chat import Answer, starts_in_reasoning
from fastgpt.server.client import EngineClient, EngineDied
from fastgpt.server.generation import (
    ChatForm,
    CompletionForm,
    Generation,
    streamed_answer,
    whole_answer,
)
from fastgpt.server.http import (
    BodyLimit,
    EventStream,
    JsonResponse,
    RequestIds,
    run_until_disconnect,
)
from fastgpt.server.metrics import Metrics
from fastgpt.server.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    describe_validation_errors,
    error_body,
)

__all__ = ["MAX_BODY_BYTES", "create_app"]

_logger = get_logger(__name__)

MAX_BODY_BYTES = 8 << 20
_CLIENT_CLOSED_REQUEST = 499


class _Service:
    """What the endpoints share: the engine, the text threads, the metrics, the model's names."""

    def __init__(
        self,
        client: EngineClient,
        metrics: Metrics,
        model_path: str,
        text_threads: ThreadPoolExecutor,
    ) -> None:
        self.client = client
        self.metrics = metrics
        self.model_path = model_path
        self.text_threads = text_threads

    @property
    def model_name(self) -> str:
        assert self.client.ready is not None
        return self.client.ready.info.name

    def check(self, model: str | None) -> None:
        """Raise unless the engine is ready and serves this model."""
        if not self.client.is_ready:
            raise ApiError(503, self.client.reason, kind="server_error", code="engine_not_ready")
        if model is not None and model not in (self.model_name, self.model_path):
            raise ApiError(
                404, f"the model {model!r} is not served here; it is {self.model_name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip

    async def respond(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        form: ChatForm | CompletionForm,
        token_ids: list[int],
        in_reasoning: bool | None,
    ) -> Response:
        """Run the request and return its response, streamed or whole."""
        client = self.client
        params = body.sampling()
        if params.stop and client.tokenizer is None:
            raise ApiError(400, "stop needs a tokenizer; the model has none", param="stop")
        request_id: str = request.state.request_id
        _logger.debug(
            "%s: %s, %d prompt tokens, max_tokens %s, stream %s, user %r",
            request_id, request.url.path, len(token_ids), params.max_tokens, body.stream, body.user,
        )  # fmt: skip
        # The client's id may come twice; the engine's must not.
        job = client.submit(f"{request_id}/{secrets.token_hex(6)}", token_ids, params)
        answer = Answer(client.tokenizer, params.stop, in_reasoning)
        generation = Generation(job, answer, params, self.metrics)
        answer_id = form.prefix + secrets.token_hex(12)
        if body.stream:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(
                streamed_answer(
                    form, generation, answer_id, self.model_name, include_usage=include_usage
                )
            )
        result = await run_until_disconnect(
            request, lambda: whole_answer(form, generation, answer_id, self.model_name)
        )
        if result is None:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return JsonResponse(result)

    async def encode(self, function: Callable[..., list[int]], text: Any) -> list[int]:
        """Encode a prompt in a thread, so that a long one does not hold up the others."""
        assert self.client.limits is not None
        encode = partial(function, text, max_tokens=self.client.limits.max_length - 1)
        return await asyncio.get_running_loop().run_in_executor(self.text_threads, encode)


def create_app(
    client: EngineClient, metrics: Metrics, *, model_path: str, num_workers: int
) -> FastAPI:
    """Return the ASGI application.

    Args:
        client: the engine; may still be loading, requests then get 503.
        metrics: what /metrics shows.
        model_path: accepted as the model's name beside its file name.
        num_workers: threads that render and tokenize prompts.
    """
    app = FastAPI(title="FastGPT", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(RequestIds)
    service = _Service(
        client, metrics, model_path, ThreadPoolExecutor(num_workers, thread_name_prefix="text")
    )
    _add_error_handlers(app, metrics)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check(body.model)
        tokenizer = client.tokenizer
        if tokenizer is None:
            raise ApiError(400, "the model has no tokenizer; send token ids to /v1/completions")
        messages = [message.for_template() for message in body.messages]
        token_ids = await service.encode(tokenizer.encode_chat, messages)
        in_reasoning = starts_in_reasoning(token_ids, tokenizer)
        return await service.respond(request, body, ChatForm(), token_ids, in_reasoning)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check(body.model)
        token_ids = body.prompt
        if isinstance(token_ids, str):
            tokenizer = client.tokenizer
            if tokenizer is None:
                raise ApiError(
                    400, "the model has no tokenizer; send the prompt as token ids", param="prompt"
                )
            token_ids = await service.encode(tokenizer.encode_prompt, token_ids)
        form = CompletionForm(with_token_ids=client.tokenizer is None)
        return await service.respond(request, body, form, token_ids, None)

    @app.get("/v1/models")
    async def models() -> Response:
        service.check(None)
        assert client.ready is not None
        entry = {
            "id": service.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "fastgpt",
            "max_model_len": client.ready.info.max_length,
        }
        return JsonResponse({"object": "list", "data": [entry]})

    @app.get("/health")
    async def health() -> Response:
        if client.is_ready:
            return JsonResponse({"status": "ok"})
        return JsonResponse({"status": "unavailable", "reason": client.reason}, 503)

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Turn every failure of a request into OpenAI's error object."""

    def refuse(
        request: Request,
        status: int,
        body: dict[str, Any],
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        metrics.count_rejected(status)
        _logger.debug("%s: %d: %s", request.state.request_id, status, body["error"]["message"])
        return JsonResponse(body, status, headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return refuse(request, error.status, error.body)

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> Response:
        return refuse(request, 400, error_body(str(error)))

    @app.exception_handler(EngineDied)
    async def engine_died(request: Request, error: EngineDied) -> Response:
        body = error_body(str(error), kind="server_error", code=error.code)
        return refuse(request, 503, body)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        message, field = describe_validation_errors([dict(e) for e in error.errors()])
        # Taken for text, whatever it holds: a page of another site may send that.
        kind = request.headers.get("content-type", "")
        if isinstance(error.body, bytes):
            message, field = f"content-type is {kind!r}; send the body as application/json", None
        return refuse(request, 400, error_body(message, param=field))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        if isinstance(error.__cause__, ValueError | RecursionError):  # of the JSON parser
            message = f"the body is not valid JSON: {str(error.__cause__).partition(';')[0]}"
        return refuse(request, error.status_code, error_body(message), error.headers)

    @app.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> Response:
        _logger.error("%s: unexpected error", request.state.request_id, exc_info=error)
        body = error_body("internal error; see the server's log", kind="server_error")
        return refuse(request, 500, body)
