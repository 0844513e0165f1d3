"""Answering one request: from the engine's tokens to OpenAI's objects, whole or in pieces."""

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastgpt.errors import RequestError
from fastgpt.logging import get_logger
from fastgpt.request import SamplingParams
from fastgpt.server.chat import Answer, Channel
from fastgpt.server.client import EngineDied, Job
from fastgpt.server.metrics import Metrics
from fastgpt.server.protocol import error_body

__all__ = ["ChatForm", "CompletionForm", "Generation"]

_logger = get_logger(__name__)

Piece = tuple[Channel, str]


class Generation:
    """One request under way: its job, its text, its counts.

    Args:
        job: the engine's side.
        answer: turns tokens into text.
        params: as asked.
        metrics: where its end is counted.
    """

    def __init__(self, job: Job, answer: Answer, params: SamplingParams, metrics: Metrics) -> None:
        self.job = job
        self.answer = answer
        self.finish_reason = ""
        self.token_ids: list[int] = []
        self._params = params
        self._metrics = metrics

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """Yield the text as it comes. Leaving early frees the request in the engine.

        Raises:
            EngineDied: if the engine's process ends.
            RequestError: if the engine refuses the request.
        """
        reason = "abort"
        timings = None
        answer = self.answer
        try:
            async for output in self.job:
                token_ids = output.token_ids
                self.token_ids += token_ids
                timings = output.timings
                # A stop token ends the answer and is not part of its text.
                has_end = output.finish_reason == "stop"
                pieces = answer.push(token_ids[:-1] if has_end else token_ids)
                if output.finish_reason is not None and not answer.stopped:
                    answer.skip(int(has_end))
                    pieces += answer.finish()
                if answer.stopped:
                    reason = "stop"
                elif output.finish_reason is not None:
                    reason = output.finish_reason
                if pieces:
                    yield pieces
                if answer.stopped:
                    break
            self.finish_reason = reason
        except (EngineDied, RequestError):
            reason = "error"
            raise
        finally:
            self.job.abort()
            self._metrics.count_finished(
                reason, len(self.job.prompt_token_ids), self.num_tokens, timings
            )
            _logger.debug(
                "%s: %s after %d + %d tokens",
                self.job.request_id, reason, len(self.job.prompt_token_ids), self.num_tokens,
            )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        """Generated tokens that count: up to the one that completed a stop string."""
        return self.answer.num_tokens

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        num_prompt = len(self.job.prompt_token_ids)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": num_prompt + self.num_tokens,
            "completion_tokens_details": {"reasoning_tokens": self.answer.num_reasoning_tokens},
        }


class ChatForm:
    """The objects of /v1/chat/completions."""

    prefix = "chatcmpl-"
    whole, chunk = "chat.completion", "chat.completion.chunk"

    def first(self) -> dict[str, Any] | None:
        """Return the choice of the first chunk, which names the role."""
        return self._choice({"role": "assistant", "content": ""}, None)

    def piece(self, pieces: list[Piece], generation: Generation) -> dict[str, Any]:
        """Return the choice of one chunk."""
        delta: dict[str, str] = {}
        for channel, text in pieces:
            delta[channel.value] = delta.get(channel.value, "") + text
        return self._choice(delta, None)

    def last(self, finish_reason: str) -> dict[str, Any]:
        """Return the choice of the last chunk."""
        return self._choice({}, finish_reason)

    def complete(self, pieces: list[Piece], generation: Generation) -> dict[str, Any]:
        """Return the choice of a whole answer."""
        content = "".join(text for channel, text in pieces if channel is Channel.CONTENT)
        reasoning = "".join(text for channel, text in pieces if channel is Channel.REASONING)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning or generation.answer.num_reasoning_tokens:
            message["reasoning_content"] = reasoning
        return {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": generation.finish_reason,
        }

    @staticmethod
    def _choice(delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class CompletionForm:
    """The objects of /v1/completions. Without a tokenizer the choice carries token_ids."""

    prefix = "cmpl-"
    whole = chunk = "text_completion"

    def __init__(self, *, with_token_ids: bool) -> None:
        self._with_token_ids = with_token_ids

    def first(self) -> dict[str, Any] | None:
        """There is no role to name."""
        return None

    def piece(self, pieces: list[Piece], generation: Generation) -> dict[str, Any]:
        """Return the choice of one chunk."""
        return self._choice("".join(text for _, text in pieces), None)

    def last(self, finish_reason: str) -> dict[str, Any]:
        """Return the choice of the last chunk."""
        return self._choice("", finish_reason)

    def complete(self, pieces: list[Piece], generation: Generation) -> dict[str, Any]:
        """Return the choice of a whole answer."""
        choice = self._choice("".join(text for _, text in pieces), generation.finish_reason)
        if self._with_token_ids:
            choice["token_ids"] = generation.token_ids
        return choice

    @staticmethod
    def _choice(text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _envelope(kind: str, answer_id: str, model: str, created: int) -> dict[str, Any]:
    return {"id": answer_id, "object": kind, "created": created, "model": model}


async def whole_answer(
    form: ChatForm | CompletionForm, generation: Generation, answer_id: str, model: str
) -> dict[str, Any]:
    """Return the response body of a request that does not stream."""
    created = int(time.time())
    pieces = [piece async for some in generation.pieces() for piece in some]
    return {
        **_envelope(form.whole, answer_id, model, created),
        "choices": [form.complete(pieces, generation)],
        "usage": generation.usage(),
    }


async def streamed_answer(
    form: ChatForm | CompletionForm,
    generation: Generation,
    answer_id: str,
    model: str,
    *,
    include_usage: bool,
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the chunks of a streamed answer; a failure is one error object, then the end."""
    head = _envelope(form.chunk, answer_id, model, int(time.time()))
    usage: dict[str, Any] = {"usage": None} if include_usage else {}
    stream = generation.pieces()
    try:
        if (first := form.first()) is not None:
            yield {**head, "choices": [first], **usage}
        async for pieces in stream:
            yield {**head, "choices": [form.piece(pieces, generation)], **usage}
        yield {**head, "choices": [form.last(generation.finish_reason)], **usage}
        if include_usage:
            yield {**head, "choices": [], "usage": generation.usage()}
    except EngineDied as error:
        yield error_body(str(error), kind="server_error", code=error.code)
    except RequestError as error:
        yield error_body(str(error))
    finally:
        await stream.aclose()
        generation.job.abort()  # stream's own cleanup runs only if it has begun
