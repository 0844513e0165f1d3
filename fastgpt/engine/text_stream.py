"""One request of this process as its tokens arrive: ids, text, stop strings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fastgpt.errors import RequestError
from fastgpt.request import FinishReason, Request, RequestOutput, SamplingParams, Timings
from fastgpt.tokenizer import StopChecker, Tokenizer

__all__ = ["StepOutput", "StreamPiece", "TextStream"]


@dataclass(frozen=True)
class StepOutput:
    """What one step did for one request.

    Attributes:
        request_id: the request.
        token_ids: the new tokens.
        finish_reason: set with the last ones.
        timings: set with the last ones.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    timings: Timings | None = None


@dataclass(frozen=True)
class StreamPiece:
    """A piece of a streamed answer: whole characters and the tokens that completed them."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    timings: Timings | None = None


class RunsRequests(Protocol):
    """What a stream asks of the engine."""

    tokenizer: Tokenizer | None

    def add_request(
        self,
        prompt: list[int],
        params: SamplingParams | None = None,
        *,
        on_output: Callable[[StepOutput], None] | None = None,
    ) -> str:
        """Queue a request and return its id."""

    def abort(self, request_id: str) -> None:
        """End a request."""

    def find_request(self, request_id: str) -> Request | None:
        """Return an unfinished request."""


class TextStream:
    """One request of this process: collects its tokens and text, and applies stop strings."""

    def __init__(
        self,
        engine: RunsRequests,
        token_ids: list[int],
        params: SamplingParams | None,
        on_piece: Callable[[StreamPiece], None] | None = None,
    ) -> None:
        params = params or SamplingParams()
        if params.stop and engine.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the model file has none")
        self.prompt_token_ids = token_ids
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.timings: Timings | None = None
        self._engine = engine
        self._on_piece = on_piece
        self._detokenizer = engine.tokenizer.detokenizer() if engine.tokenizer else None
        self._stop = StopChecker(params.stop)
        self.request_id = engine.add_request(token_ids, params, on_output=self._take)

    def _take(self, output: StepOutput) -> None:
        # Another thread may run the first step before add_request has returned the id.
        if self.finish_reason:
            return  # the last tokens before the engine saw a stop string's abort
        self.token_ids += output.token_ids
        reason = output.finish_reason
        text = ""
        if self._detokenizer is not None:
            # A stop token ends the text and is not part of it.
            for token_id in output.token_ids[:-1] if reason == "stop" else output.token_ids:
                text += self._stop.push(self._detokenizer.push(token_id))
            if reason and not self._stop.stopped:
                text += self._stop.push(self._detokenizer.flush()) + self._stop.flush()
        if self._stop.stopped:
            if not reason:
                self._engine.abort(output.request_id)
            reason = "stop"
        self.text += text
        self.finish_reason = reason
        if reason:
            request = self._engine.find_request(output.request_id)
            self.timings = output.timings or (request.timings() if request else None)
        if self._on_piece is not None:
            self._on_piece(StreamPiece(text, output.token_ids, reason, self.timings))

    def output(self) -> RequestOutput:
        """Return the finished request."""
        assert self.finish_reason is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            token_ids=self.token_ids,
            text=self.text,
            finish_reason=self.finish_reason,
            timings=self.timings or Timings(0.0, 0.0, 0.0, 0.0, 0),
        )
