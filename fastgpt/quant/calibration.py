"""Texts that show what reaches each weight: the model's own generations, a file, or given ones."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.engine import Engine
from fastgpt.errors import ConfigError
from fastgpt.models.registry import family
from fastgpt.request import SamplingParams
from fastgpt.tokenizer import Tokenizer

__all__ = ["Calibration", "token_sequences", "tokens_sha256"]

Texts = Sequence[str] | Sequence[Sequence[int]]

_TOKENS_PER_COLUMN = 32  # from which a Gram matrix is known well
_LEAST_SEQUENCES = 16


@dataclass(frozen=True)
class Calibration:
    """Where calibration tokens come from.

    Attributes:
        source: "self": the model's own generations at temperature 0.6, from `prompts` or, without
            them, from its first token and one drawn at random; a path: a text file, cut into
            sequences; texts or lists of token ids, taken as they are; None: no data.
        prompts: for "self": texts, chats (lists of messages) or token ids.
        num_sequences: most sequences used; every fourth is held out to choose with. "self" writes
            no more than small models need: 32 tokens per column of the widest weight, at full
            length, and 16 sequences or one per prompt at least.
        num_evaluation: most sequences kept apart from them to measure the finished model on.
        length: tokens of a generated or cut sequence.
        seed: of generations and draws.
    """

    source: str | os.PathLike[str] | Texts | None = "self"
    prompts: Sequence[Any] = ()
    num_sequences: int = 64
    num_evaluation: int = 16
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for key, least in (("num_sequences", 4), ("num_evaluation", 0), ("length", 8)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"calibration {key} is {value!r}; expected {least} or more")

    def describe(self) -> str:
        """Return the source in words, for reports."""
        if self.source is None:
            return "none"
        if isinstance(self.source, (str, os.PathLike)):
            is_file = self.source != "self"
            return f"file {Path(self.source).name}" if is_file else "the model's own generations"
        return "texts given"

    def key(self) -> dict[str, Any]:
        """Return what decides the tokens, as JSON values: two equal keys give the same tokens."""
        source = self.source
        if isinstance(source, (str, os.PathLike)) and source != "self":
            source = hashlib.sha256(Path(source).read_bytes()).hexdigest()
        elif source is not None and source != "self":
            source = hashlib.sha256(json.dumps(list(source)).encode()).hexdigest()
        prompts = hashlib.sha256(json.dumps(list(self.prompts)).encode()).hexdigest()
        return {
            "source": source,
            "prompts": prompts if self.prompts else None,
            "num_sequences": self.num_sequences,
            "num_evaluation": self.num_evaluation,
            "length": self.length,
            "seed": self.seed,
        }

    @staticmethod
    def parse(value: Any) -> Calibration:
        """Return the calibration an argument describes.

        Raises:
            ConfigError: neither "self", a file, texts, token ids nor None.
        """
        if isinstance(value, Calibration):
            return value
        if value is None or value == "none":
            return Calibration(source=None)
        if isinstance(value, (str, os.PathLike)):
            if value != "self" and not Path(value).is_file():
                raise ConfigError(
                    f"calibration {os.fspath(value)!r} is no file; expected a text file, 'self' or "
                    "'none'"
                )
            return Calibration(source=value)
        if isinstance(value, Sequence) and value:
            return Calibration(source=value, num_sequences=max(4, len(value)), num_evaluation=0)
        raise ConfigError(
            f"calibration is {value!r}; expected 'self', 'none', a text file, texts or token ids"
        )


def token_sequences(
    calibration: Calibration, checkpoint: Checkpoint, device: torch.device | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens to quantize with and those to measure with; nothing without data.

    Raises:
        ConfigError: too little text for four sequences, or text for a model without a tokenizer.
    """
    assert checkpoint.config is not None
    config = family(checkpoint.config).parse_config(checkpoint.config)
    length = min(calibration.length, config.max_position)
    source = calibration.source
    if source is None:
        return [], []
    if isinstance(source, str) and source == "self":
        count = _enough_sequences(calibration, checkpoint, length)
        calibration = replace(calibration, num_sequences=count)
        sequences = _own_generations(calibration, checkpoint, device, length)
    elif isinstance(source, (str, os.PathLike)):
        try:
            text = Path(source).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source}: calibration text is not UTF-8: {error}") from None
        ids = _tokenizer(checkpoint).encode(text)
        sequences = [ids[i : i + length] for i in range(0, len(ids), length)]
    else:
        sequences = [
            _tokenizer(checkpoint).encode(item) if isinstance(item, str) else list(item)
            for item in source
        ]
        sequences = [ids[: config.max_position] for ids in sequences]
    sequences = [ids for ids in sequences if len(ids) > 1]
    # What measures must not have chosen; a short text gives a fifth of itself.
    count = min(calibration.num_evaluation, len(sequences) // 5)
    evaluation = sequences[len(sequences) - count :] if count > 1 else []
    sequences = sequences[: len(sequences) - len(evaluation)][: calibration.num_sequences]
    if len(sequences) < 4:
        raise ConfigError(
            f"calibration gives {len(sequences)} sequences of {length} tokens; 4 or more are "
            "needed, one of them held out"
        )
    for ids in (*sequences, *evaluation):
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise ConfigError(
                f"calibration holds token {max(ids)}; the model knows 0 .. {config.vocab_size - 1}"
            )
    return sequences, evaluation


def tokens_sha256(sequences: Sequence[Sequence[int]]) -> str:
    """Return the hash of token sequences: of their JSON without spaces."""
    text = json.dumps([list(ids) for ids in sequences], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _enough_sequences(calibration: Calibration, checkpoint: Checkpoint, length: int) -> int:
    """Return how many sequences of the model's own are worth their time, num_sequences at most."""
    assert checkpoint.config is not None
    kind = family(checkpoint.config)
    specs = kind.roles(kind.parse_config(checkpoint.config))
    widest = max(spec.shape[-1] for spec in specs if len(spec.shape) > 1)
    enough = max(_LEAST_SEQUENCES, -(-_TOKENS_PER_COLUMN * widest // length))
    enough = max(enough, len(calibration.prompts))  # what was asked is answered
    return min(calibration.num_sequences, enough)


def _own_generations(
    calibration: Calibration,
    checkpoint: Checkpoint,
    device: torch.device | None,
    length: int,
) -> list[list[int]]:
    """Return what the model writes. Source: data-free calibration, LLM-QAT, arXiv:2305.17888."""
    if all(_is_ids(prompt) for prompt in calibration.prompts):
        checkpoint = copy.copy(checkpoint)
        checkpoint.tokenizer_json = None  # ids in, ids out: nothing is to be turned into text
    engine = Engine(
        checkpoint,
        device="cpu" if device is None else device,
        max_batch=min(calibration.num_sequences + calibration.num_evaluation, 96),
        max_length=length,
        warmup_iterations=0,
    )
    prompts = [ids for ids in _prompts(calibration, checkpoint, engine) if len(ids) < length]
    params = [
        SamplingParams(
            max_tokens=length - len(prompt),
            temperature=0.6,
            top_p=0.95,
            seed=calibration.seed * 1_000_003 + i,
        )
        for i, prompt in enumerate(prompts)
    ]
    outputs = engine.generate(prompts, params) if prompts else []
    return [
        list(prompt) + list(output.token_ids)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def _prompts(calibration: Calibration, checkpoint: Checkpoint, engine: Engine) -> list[list[int]]:
    count = calibration.num_sequences + calibration.num_evaluation
    if calibration.prompts:
        ids = [engine.encode(prompt) for prompt in calibration.prompts]
        return [ids[i % len(ids)] for i in range(count)]
    assert checkpoint.config is not None
    vocab_size = int(checkpoint.config["vocab_size"])
    first = checkpoint.config.get("bos_token_id")
    start = [first] if isinstance(first, int) and 0 <= first < vocab_size else []
    generator = torch.Generator().manual_seed(calibration.seed)
    drawn = torch.randint(vocab_size, (count,), generator=generator).tolist()
    return [[*start, token] for token in drawn]


def _is_ids(prompt: Any) -> bool:
    return not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.tokenizer_json is None:
        raise ConfigError(
            f"{checkpoint.path or 'the model'} has no tokenizer.json, so calibration text cannot "
            "be read; give lists of token ids, or calibration=None"
        )
    return Tokenizer.from_checkpoint(checkpoint)
