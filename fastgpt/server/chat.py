"""From tokens to the two channels of an answer: reasoning and content.

The split is a state machine on token ids that starts from the rendered prompt: text that merely
looks like a tag never switches it, and no byte is lost or moved between the channels.
"""

from collections.abc import Sequence
from enum import Enum

from fastgpt.tokenizer import StopChecker, Tokenizer

__all__ = ["Answer", "Channel", "starts_in_reasoning"]


class Channel(Enum):
    """Where a piece of text belongs."""

    REASONING = "reasoning_content"
    CONTENT = "content"


class _State(Enum):
    BEFORE = 0  # nothing but white space yet; <think> may still come
    REASONING = 1
    CONTENT = 2


def starts_in_reasoning(prompt_token_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Return whether the rendered prompt ends inside an open <think>.

    Only white space may follow the tag: an unclosed one in an earlier message does not count.
    """
    if tokenizer.think_start_id is None:
        return False
    for index in range(len(prompt_token_ids) - 1, -1, -1):
        if prompt_token_ids[index] == tokenizer.think_start_id:
            return not tokenizer.decode(prompt_token_ids[index + 1 :]).strip()
        if len(prompt_token_ids) - index > 8:
            break
    return False


class Answer:
    """The text of one request as its tokens arrive. One per request; no thread shares it.

    Args:
        tokenizer: None yields no text.
        stop: strings that end the answer, in either channel.
        in_reasoning: None: one channel, tags are text; else whether the prompt opened <think>.

    Attributes:
        stopped: a stop string was reached; the rest is not part of the answer.
        num_tokens: tokens taken, up to the one that completed a stop string.
        num_reasoning_tokens: those before </think>, the tag included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: tuple[str, ...] = (),
        in_reasoning: bool | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer() if tokenizer else None
        self._stop_strings = stop
        self._stop = StopChecker(stop)
        self._splits = (
            in_reasoning is not None
            and tokenizer is not None
            and tokenizer.think_start_id is not None
            and tokenizer.think_end_id is not None
        )
        if not self._splits:
            self._state = _State.CONTENT
        else:
            self._state = _State.REASONING if in_reasoning else _State.BEFORE
        self._leading = ""  # white space before a possible <think>
        self.stopped = False
        self.num_tokens = 0
        self.num_reasoning_tokens = 0

    def push(self, token_ids: Sequence[int]) -> list[tuple[Channel, str]]:
        """Take new tokens; return the pieces of text they complete, never empty ones."""
        pieces: list[tuple[Channel, str]] = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            if self._state is _State.REASONING:
                self.num_reasoning_tokens += 1
            if self._splits and self._switch(token_id, pieces):
                continue
            if self._detokenizer is not None:
                self._emit(self._detokenizer.push(token_id), pieces)
        return pieces

    def skip(self, num_tokens: int) -> None:
        """Count tokens that end the answer and have no text."""
        self.num_tokens += num_tokens
        if self._state is _State.REASONING:
            self.num_reasoning_tokens += num_tokens

    def finish(self) -> list[tuple[Channel, str]]:
        """Return what was held back, at the end of the stream."""
        pieces: list[tuple[Channel, str]] = []
        if not self.stopped:
            self._flush(pieces)
            if self._leading:
                pieces.append((Channel.CONTENT, self._leading))
        return pieces

    def _switch(self, token_id: int, pieces: list[tuple[Channel, str]]) -> bool:
        """Change the state if the token is the tag that this state waits for."""
        assert self._tokenizer is not None
        if self._state is _State.BEFORE and token_id == self._tokenizer.think_start_id:
            self._flush(pieces)
            if self.stopped or self._state is not _State.BEFORE:
                return False  # what was held back is content, so this tag is text
            self._state = _State.REASONING
            self.num_reasoning_tokens += 1
            if self._leading:
                pieces.append((Channel.REASONING, self._leading))
                self._leading = ""
            return True
        if self._state is _State.REASONING and token_id == self._tokenizer.think_end_id:
            self._flush(pieces)
            self._state = _State.CONTENT
            return True
        return False

    def _emit(self, text: str, pieces: list[tuple[Channel, str]]) -> None:
        text = self._stop.push(text)
        self.stopped = self._stop.stopped
        if self._state is _State.BEFORE:
            text = self._leading + text
            if not text.strip() and not self.stopped:
                self._leading = text
                return
            self._leading = ""
            self._state = _State.CONTENT
        if text:
            channel = Channel.REASONING if self._state is _State.REASONING else Channel.CONTENT
            pieces.append((channel, text))

    def _flush(self, pieces: list[tuple[Channel, str]]) -> None:
        """End the channel's text: incomplete characters and possible stop strings come out."""
        if self._detokenizer is None:
            return
        self._emit(self._detokenizer.flush(), pieces)
        if not self.stopped:
            held, self._stop = self._stop.flush(), StopChecker(())
            self._emit(held, pieces)
            self._stop = StopChecker(self._stop_strings)
