"""Exact changes of a layer's weights that make them easier to quantize and cost nothing later.

Each moves a factor between a writer and the readers of what it writes, so the layer's function is
the same up to float32 rounding:

    scaling     a norm's gain, the rows of up_proj, or the values of attention are divided by s and
                the columns that read them multiplied. Source: AWQ, arXiv:2306.00978.
    rotation    the values of each attention head are rotated by an orthogonal Hadamard matrix and
                o_proj's columns rotated back; attention mixes values of tokens, not of channels,
                so it does not notice. Source: QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.models.spec import ValueHeads
from fastgpt.quant.input_stats import InputStats

__all__ = ["ALPHAS", "column_scale", "hadamard", "reading_heads", "rotated", "scaled", "value_rows"]

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def column_scale(weights: list[Tensor], gram: Tensor, alpha: float) -> Tensor:
    """Return s [cols], geometric mean 1: weights times s, inputs over s.

    alpha 0 gives the columns of the weights one size, 1 the inputs, between them a balance. A model
    whose writer and readers were scaled against each other gets the same transformed weights.
    """
    use = (gram.diagonal() if gram.ndim == 2 else gram).clamp(min=0).sqrt()
    size = torch.cat(weights).square().mean(0).sqrt()
    use, size = _above_zero(use), _above_zero(size)
    scale: Tensor = alpha * use.log() - (1 - alpha) * size.log()
    # Beyond 2^±10 fp16 scales of the weights would leave their range.
    return (scale - scale.mean()).clamp(-7.0, 7.0).exp()


def scaled(stats: InputStats, scale: Tensor) -> InputStats:
    """Return the statistics of inputs divided by scale [cols]."""
    factor = 1.0 / scale
    if stats.is_full:
        both = factor.unsqueeze(1) * factor
        fit, held_out = stats.fit * both, stats.held_out * both
    else:
        fit, held_out = stats.fit * factor.square(), stats.held_out * factor.square()
    return InputStats(fit, held_out, stats.num_fit, stats.num_held_out)


def rotated(stats: InputStats, rotation: Tensor) -> InputStats:
    """Return the statistics of inputs times `rotation` in every run of its size of columns."""
    size = rotation.shape[0]

    def rotate(gram: Tensor) -> Tensor:
        right = (gram.unflatten(1, (-1, size)) @ rotation).flatten(1)
        both: Tensor = (right.T.unflatten(1, (-1, size)) @ rotation).flatten(1)
        return both.T.contiguous()

    assert stats.is_full
    return InputStats(rotate(stats.fit), rotate(stats.held_out), stats.num_fit, stats.num_held_out)


def hadamard(size: int, device: torch.device | None = None) -> Tensor | None:
    """Return a symmetric orthogonal matrix of entries ±1/sqrt(size); None unless a power of two.

    >>> hadamard(2) * 2**0.5
    tensor([[ 1.,  1.],
            [ 1., -1.]])
    """
    if size < 2 or size & (size - 1):
        return None
    matrix = torch.ones(1, 1, dtype=torch.float64, device=device)
    while matrix.shape[0] < size:
        top = torch.cat((matrix, matrix), 1)
        matrix = torch.cat((top, torch.cat((matrix, -matrix), 1)))
    matrix /= size**0.5
    return matrix.float()


def value_rows(heads: ValueHeads, num_rows: int, device: torch.device) -> Tensor:
    """Return which rows of the writer are values, [num_kv_heads, head_dim]."""
    each = num_rows // heads.num_kv_heads
    first = torch.arange(heads.num_kv_heads, device=device).unsqueeze(1) * each + heads.first_row
    return first + torch.arange(heads.head_dim, device=device)


def reading_heads(heads: ValueHeads, per_value: Tensor) -> Tensor:
    """Return one number per column of o_proj of one per value, [num_kv_heads, head_dim]."""
    sharing = heads.num_heads // heads.num_kv_heads
    return per_value.repeat_interleave(sharing, 0).flatten()


def _above_zero(x: Tensor) -> Tensor:
    return x.clamp(min=float(x.mean()) * 1e-3 + 1e-12)
