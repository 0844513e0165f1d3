"""Rotary position embedding: the table of cosines and sines under every scaling we serve.

Pair i of a head turns by position * frequency[i]. Long-context models change the frequencies
(linear, Llama 3, YaRN); YaRN also multiplies cosines and sines by an attention factor.
Sources: RoPE, arXiv:2104.09864; YaRN, arXiv:2309.00071; DeepSeek-V2, arXiv:2405.04434.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.errors import CheckpointError

__all__ = ["RopeConfig", "cos_sin_table", "frequencies", "yarn_mscale"]

KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary settings of a checkpoint.

    `factor` stretches the context; `original_max_position` is the context of pre-training.
    `mscale` and `mscale_all_dim` are DeepSeek's; 0 means that the file does not give them.
    """

    rot_dim: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @classmethod
    def parse(cls, config: dict[str, Any], rot_dim: int) -> "RopeConfig":
        """Read the settings from config.json, in the old form or that of transformers 5.

        Old: `rope_theta` and `rope_scaling` {type or rope_type, ...}, null for plain rotary.
        New: `rope_parameters` {rope_type, rope_theta, ...}.

        Raises:
            CheckpointError: if the kind is unknown or one of its fields is missing or not a number.
        """
        fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(fields, dict):
            raise CheckpointError(f"config.json: rope settings are {fields!r}, not an object")
        kind = fields.get("rope_type") or fields.get("type") or "default"
        if kind not in KINDS:
            raise CheckpointError(
                f"config.json: rotary scaling {kind!r} is not known; known are {', '.join(KINDS)}"
            )
        if fields.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(
                "config.json: partial_rotary_factor is "
                f"{fields['partial_rotary_factor']!r}; only 1.0 is supported"
            )

        def number(name: str, default: float | None = None) -> float:
            value = fields.get(name)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(
                    f"config.json: rotary scaling {kind!r} needs a number {name!r}, got {value!r}"
                )
            return float(value)

        theta = number("rope_theta", config.get("rope_theta") or 10000.0)
        if kind == "default":
            return cls(rot_dim, theta)
        max_position = config.get("max_position_embeddings") or 0
        original = int(
            number(
                "original_max_position_embeddings",
                config.get("original_max_position_embeddings") or max_position,
            )
        )
        if original <= 0:
            raise CheckpointError("config.json gives no original_max_position_embeddings")
        stretched = max_position / original if kind == "yarn" and max_position else None
        given = fields.get("attention_factor")
        llama3 = kind == "llama3"
        return cls(
            rot_dim,
            theta,
            kind,
            factor=number("factor", stretched),
            original_max_position=original,
            low_freq_factor=number("low_freq_factor", None if llama3 else 1.0),
            high_freq_factor=number("high_freq_factor", None if llama3 else 4.0),
            beta_fast=number("beta_fast", 32.0) or 32.0,
            beta_slow=number("beta_slow", 1.0) or 1.0,
            mscale=number("mscale", 0.0),
            mscale_all_dim=number("mscale_all_dim", 0.0),
            attention_factor=None if given is None else number("attention_factor"),
            truncate=bool(fields.get("truncate", True)),
        )

    @property
    def softmax_mscale(self) -> float:
        """Factor of DeepSeek's softmax scale: mscale_all_dim's YaRN scale, squared; else 1."""
        if self.kind == "default" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2

    @property
    def table_scale(self) -> float:
        """Factor of every cosine and sine: YaRN's attention factor; else 1."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return yarn_mscale(self.factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return 0.1 * mscale * ln(factor) + 1, or 1 when the context is not stretched.

    Source: YaRN, arXiv:2309.00071, equation 22; the weight `mscale` is DeepSeek-V2's.

    >>> round(yarn_mscale(40.0), 4)
    1.3689
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(rope: RopeConfig) -> Tensor:
    """Return the angle per position of each pair, [rot_dim / 2], float32."""
    exponents = torch.arange(0, rope.rot_dim, 2, dtype=torch.float32) / rope.rot_dim
    powers = rope.theta**exponents
    plain = 1.0 / powers
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        # 1 where a pair turns often enough in the original context to be left as it is
        keep = 1.0 - _yarn_ramp(rope)
        return 1.0 / (rope.factor * powers) * (1.0 - keep) + plain * keep
    return plain


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Divide slow pairs by the factor, keep fast ones, blend between. Source: Llama 3.1."""
    wavelength = 2 * math.pi / plain
    slow = wavelength > rope.original_max_position / rope.low_freq_factor
    fast = wavelength < rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * plain / rope.factor + smooth * plain
    return torch.where(slow, plain / rope.factor, torch.where(fast, plain, blended))


def _yarn_ramp(rope: RopeConfig) -> Tensor:
    """Return YaRN's ramp over pairs, 0 = as trained, 1 = fully interpolated, [rot_dim / 2]."""

    def pair_turning(num_turns: float) -> float:
        """The (fractional) pair that turns num_turns times within the original context."""
        ratio = rope.original_max_position / (num_turns * 2 * math.pi)
        return rope.rot_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rot_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    pairs = torch.arange(rope.rot_dim // 2, dtype=torch.float32)
    return torch.clamp((pairs - low) / (high - low), 0, 1)


def cos_sin_table(rope: RopeConfig, max_position: int) -> Tensor:
    """Return cosines then sines of every position, [max_position, rot_dim], float32, CPU.

    Angles are formed in float32, as every published implementation does: a more exact angle would
    differ from what the model was trained with.
    """
    angles = torch.arange(max_position, dtype=torch.float32)[:, None] * frequencies(rope)
    table = torch.empty(max_position, rope.rot_dim, dtype=torch.float32)
    half = rope.rot_dim // 2
    torch.cos(angles, out=table[:, :half])
    torch.sin(angles, out=table[:, half:])
    return table.mul_(rope.table_scale)
