"""One generation job: what was asked (`SamplingParams`), its state (`Request`), what came of it."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal

from fastgpt.errors import RequestError

__all__ = [
    "FinishReason",
    "Limits",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "Timings",
    "check_request",
]

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_TOKEN_ID = 2**31 - 1  # of any vocabulary


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. None means: the checkpoint's generation default.

    Attributes:
        max_tokens: most tokens to generate, >= 1; None: as many as max_length leaves.
        temperature: 0 is greedy; up to 2.
        top_p: smallest set of tokens whose probability reaches top_p, in (0, 1].
        top_k: the k likeliest tokens; 0 = all.
        min_p: tokens at least min_p times as likely as the likeliest; 0 = all.
        repetition_penalty: > 0; divides positive and multiplies negative logits of seen tokens.
        presence_penalty, frequency_penalty: in [-2, 2], subtracted once / per occurrence in the
            generated text.
        seed: same seed, same tokens, whatever else runs in the batch; None: a fresh one.
        stop: strings that end the text and are not part of it.
        stop_token_ids: tokens that end the text, besides the checkpoint's.
        ignore_eos: go on after the checkpoint's end tokens.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_range("max_tokens", self.max_tokens, 1, None, kind=Integral)
        _check_range("temperature", self.temperature, 0, 2)
        _check_range("top_p", self.top_p, 0, 1, exclude_low=True)
        _check_range("top_k", self.top_k, 0, 2**31 - 1, kind=Integral)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0, 10, exclude_low=True)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_range("seed", self.seed, -(2**63), 2**63 - 1, kind=Integral)
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS}")
        for text in stop:
            if not isinstance(text, str):
                raise RequestError(f"stop holds {text!r}; expected texts")
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise RequestError(
                    f"a stop string has {len(text)} characters; expected 1 to {MAX_STOP_CHARS}"
                )
        stop_token_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        for token_id in stop_token_ids:
            _check_range("a stop token id", token_id, 0, MAX_TOKEN_ID, kind=Integral)

    def resolve(self, generation_config: dict[str, Any]) -> "SamplingParams":
        """Return a copy with the checkpoint's generation_config in place of None (but max_tokens).

        A generation_config with do_sample false means greedy.

        >>> SamplingParams(top_k=5).resolve({"temperature": 0.6, "top_k": 20}).top_k
        5
        """
        default: dict[str, Any] = {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        for name in default:
            if generation_config.get(name) is not None:
                default[name] = generation_config[name]
        if generation_config.get("do_sample") is False:
            default["temperature"] = 0.0
        return replace(self, **{k: v for k, v in default.items() if getattr(self, k) is None})

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens seen so far."""
        return (
            self.repetition_penalty not in (None, 1.0)
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _check_range(
    name: str,
    value: Any,
    low: float,
    high: float | None,
    *,
    kind: Any = Real,
    exclude_low: bool = False,
) -> None:
    """Raise RequestError unless value is None or a number of this kind within the bounds."""
    if value is None:
        return
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = "an integer" if kind is Integral else "a number"
        raise RequestError(f"{name} is {value!r}; expected {expected}")
    too_low = value <= low if exclude_low else value < low
    if not math.isfinite(value) or too_low or (high is not None and value > high):
        bound = f"{'>' if exclude_low else '>='} {low}"
        if high is not None:
            bound += f" and <= {high}"
        raise RequestError(f"{name} is {value}; expected {bound}")


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, bytes | str) or not isinstance(value, Sequence):
        raise RequestError(f"{name} is {value!r}; expected a list")
    return tuple(value)


@dataclass(frozen=True)
class Limits:
    """What one engine can take. Counts are tokens.

    Attributes:
        vocab_size: token ids are 0 .. vocab_size - 1.
        max_length: most tokens of one request, prompt and generated.
        num_cache_tokens: tokens the whole KV cache holds.
    """

    vocab_size: int
    max_length: int
    num_cache_tokens: int


def check_request(prompt_token_ids: list[int], params: SamplingParams, limits: Limits) -> int:
    """Return how many tokens the request may generate at most.

    Raises:
        RequestError: if the prompt is empty, has an unknown id, or prompt and max_tokens can never
            fit. The message holds the counts.
    """
    num_prompt = len(prompt_token_ids)
    if num_prompt == 0:
        raise RequestError("the prompt is empty; send at least one token")
    if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= limits.vocab_size:
        bad = next(t for t in prompt_token_ids if not 0 <= t < limits.vocab_size)
        raise RequestError(f"token id {bad} is not in the vocabulary 0..{limits.vocab_size - 1}")
    room = limits.max_length - num_prompt
    if room < 1:
        raise RequestError(
            f"the prompt has {num_prompt} tokens; with max_length {limits.max_length} at most "
            f"{limits.max_length - 1} fit; shorten it by {1 - room}"
        )
    if params.max_tokens is not None and params.max_tokens > room:
        raise RequestError(
            f"the prompt has {num_prompt} tokens and max_tokens is {params.max_tokens}, together "
            f"{num_prompt + params.max_tokens}; max_length is {limits.max_length}; "
            f"ask for at most {room}"
        )
    # The last generated token is never fed back, so it needs no place in the cache.
    cache_room = limits.num_cache_tokens - num_prompt + 1
    wanted = room if params.max_tokens is None else params.max_tokens
    if cache_room < 1 or (params.max_tokens is not None and wanted > cache_room):
        raise RequestError(
            f"the request needs {num_prompt + wanted - 1} tokens of KV cache and can never fit: "
            f"the whole cache holds {limits.num_cache_tokens}; raise memory_pool_size"
        )
    return min(wanted, cache_room)


@dataclass(frozen=True)
class Timings:
    """Where a request's time went, in seconds.

    Attributes:
        queue_s: from arrival until first scheduled.
        ttft_s: from arrival until the first token.
        tpot_s: mean time per token after the first; 0 with fewer than two tokens.
        total_s: from arrival until the last token.
        num_preemptions: how often its blocks were taken back and recomputed.
    """

    queue_s: float
    ttft_s: float
    tpot_s: float
    total_s: float
    num_preemptions: int


@dataclass(eq=False)
class Request:
    """One job and its state. Owned by the scheduler; only the engine's thread touches it.

    `num_cached_tokens` counts the tokens whose keys and values are in the cache; the request is
    decoding when all its tokens but the last are.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams  # resolved
    max_new_tokens: int
    seed: int
    stop_token_ids: frozenset[int] = frozenset()
    token_ids: list[int] = field(default_factory=list)  # prompt, then generated
    block_table: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    sampler_slot: int = -1
    finish_reason: FinishReason | None = None
    arrival_s: float = field(default_factory=time.monotonic)
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Generated tokens."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Generated token ids, the end token included."""
        return self.token_ids[len(self.prompt_token_ids) :]

    def timings(self) -> Timings:
        """Return the timings up to the last token."""
        first = self.first_token_s if self.first_token_s is not None else self.arrival_s
        last = self.last_token_s if self.last_token_s is not None else self.arrival_s
        scheduled = self.first_scheduled_s
        n = self.num_generated
        return Timings(
            queue_s=0.0 if scheduled is None else scheduled - self.arrival_s,
            ttft_s=first - self.arrival_s,
            tpot_s=(last - first) / (n - 1) if n > 1 else 0.0,
            total_s=last - self.arrival_s,
            num_preemptions=self.num_preemptions,
        )


@dataclass(frozen=True)
class RequestOutput:
    """What one finished request produced.

    Attributes:
        request_id: the id given or made at add_request.
        prompt_token_ids: the prompt.
        token_ids: generated ids; the end token, if one came, is the last.
        text: their text without special tokens, cut before a stop string; "" without a tokenizer.
        finish_reason: stop (end token or stop string), length, abort or error.
        timings: see Timings.
    """

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    timings: Timings
