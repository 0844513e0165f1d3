"""Integer grids: a scale and a zero point per group of columns, and the codes that fall on them.

    x = (code - zero_point) * scale,    code in 0 .. 2^bits - 1

A grid is found per group from the weights alone (`nearest_grid`) or by searching the scale of least
squared error (`clipped_grid`), where column j may count more by its importance, the mean square of
the input it multiplies. Scales are rounded to float16 before anything is measured against them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt.checkpoint.codes import pack_stream
from fastgpt.errors import ConfigError
from fastgpt.scheme import Format, QuantizedTensor

__all__ = [
    "Grid",
    "clipped_grid",
    "encode",
    "nearest_grid",
    "pack_codes",
    "row_spans",
    "unpack_codes",
]

_FP16_TINY = 2.0**-24  # smallest positive fp16, also the smallest scale
# Shares of a group's range that the search tries; below, more values are cut than the finer steps
# repay: at 2 bits a third of the range can still be best, at 4 bits nothing under a half is.
_LEAST_RATIO = {2: 0.3, 3: 0.45, 4: 0.55}
_NUM_RATIOS = 19
_MAX_VALUES = 1 << 25  # worked on at once; there are a few copies of them


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight [rows, cols].

    Attributes:
        scale: [rows, groups], float32 whose values are float16's, > 0.
        zero: [rows, groups], float32 integers in 0 .. 2^bits - 1.
        bits: of a code.
        group_size: columns of a group; the last may be short.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int

    def columns(self, cols: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of every column, [rows, cols]."""
        scale = self.scale.repeat_interleave(self.group_size, -1)[:, :cols]
        return scale, self.zero.repeat_interleave(self.group_size, -1)[:, :cols]

    def rows(self, first: int, last: int) -> Grid:
        """Return the grid of the rows first .. last - 1."""
        return Grid(self.scale[first:last], self.zero[first:last], self.bits, self.group_size)

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes [rows, cols] stand for, float32."""
        scale, zero = self.columns(codes.shape[1])
        return (codes.float() - zero) * scale


def nearest_grid(weight: Tensor, fmt: Format) -> Grid:
    """Return the grid of round-to-nearest: the largest value of a group lands on its last code."""
    return _grid(_grouped(weight, fmt), fmt, 1.0)


def clipped_grid(
    weight: Tensor,
    fmt: Format,
    importance: Tensor | None = None,
    *,
    num_ratios: int = _NUM_RATIOS,
) -> Grid:
    """Return the grid of least squared error, each group on its own.

    Args:
        weight: [rows, cols] float32.
        fmt: an integer format with groups.
        importance: [cols], >= 0, how much the error of a column counts; None: all the same.
        num_ratios: scales tried per group.

    The result is never worse than `nearest_grid` by that measure: it is one of those tried.
    """
    if len(spans := row_spans(weight)) > 1:
        parts = [
            clipped_grid(weight[first:last], fmt, importance, num_ratios=num_ratios)
            for first, last in spans
        ]
        scale, zero = torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts])
        return Grid(scale, zero, parts[0].bits, parts[0].group_size)
    groups = _grouped(weight, fmt)
    counts = None
    if importance is not None:
        # A column that is never used still takes a sane code: it counts a little.
        floor = importance.mean().clamp(min=1e-30) * 1e-6
        counts = _grouped(importance.float().clamp(min=float(floor)).unsqueeze(0), fmt)
    best = _grid(groups, fmt, 1.0)
    least = _error(groups, best, counts, low=1 if fmt.symmetric else 0)
    scale, zero = best.scale.clone(), best.zero.clone()
    for ratio in torch.linspace(_LEAST_RATIO[fmt.bits], 1.0, num_ratios).tolist():
        tried = _grid(groups, fmt, ratio, clipped=True)
        error = _error(groups, tried, counts, low=0)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, tried.scale, scale)
        zero = torch.where(better, tried.zero, zero)
    return Grid(scale, zero, best.bits, best.group_size)


def encode(weight: Tensor, grid: Grid) -> Tensor:
    """Return the nearest code of every value, uint8 [rows, cols]."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for first, last in row_spans(weight):
        scale, zero = grid.rows(first, last).columns(weight.shape[1])
        nearest = (weight[first:last] / scale).round_().add_(zero)
        codes[first:last] = nearest.clamp_(0, 2**grid.bits - 1)
    return codes


def row_spans(weight: Tensor) -> list[tuple[int, int]]:
    """Return runs of rows (first, last + 1) of [rows, cols] that are worked on at once."""
    rows = len(weight)
    step = max(1, _MAX_VALUES // max(1, weight.shape[1]))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def pack_codes(codes: Tensor, grid: Grid, fmt: Format) -> QuantizedTensor:
    """Return codes [rows, cols] on a grid in their stored form.

    The codes of a row are a stream of bits, lowest first, code j at bit j * bits, padded to whole
    16 bytes with the code that means zero.
    """
    rows, cols = codes.shape
    row_bytes = fmt.parts((rows, cols))["packed"].shape[-1]
    packed = pack_stream(codes, grid.bits, row_bytes, grid.zero[:, -1:].to(torch.uint8))
    parts = {"packed": packed.contiguous(), "scale": grid.scale.to(torch.float16)}
    if not fmt.symmetric:
        parts["zero_point"] = grid.zero.to(torch.uint8)
    return QuantizedTensor(fmt, (rows, cols), parts)


def unpack_codes(stored: QuantizedTensor) -> tuple[Tensor, Grid]:
    """Return codes, uint8 [rows, cols], and grid of a stored weight [rows, cols]."""
    fmt = stored.format
    assert fmt.group_size is not None
    scale = stored.parts["scale"].float()
    zero = stored.parts.get("zero_point")
    middle = torch.full_like(scale, 2 ** (fmt.bits - 1))
    grid = Grid(scale, middle if zero is None else zero.float(), fmt.bits, fmt.group_size)
    return stored.codes(), grid


def _grouped(weight: Tensor, fmt: Format) -> Tensor:
    """Return [rows, groups, group_size] float32; a short last group is filled with zeros."""
    assert fmt.group_size is not None
    short = -weight.shape[-1] % fmt.group_size
    whole = torch.nn.functional.pad(weight.float(), (0, short))
    groups: Tensor = whole.unflatten(-1, (-1, fmt.group_size))
    return groups


def _grid(groups: Tensor, fmt: Format, ratio: float, *, clipped: bool = False) -> Grid:
    """Return the grid that covers `ratio` of every group's range.

    clipped: a symmetric grid also uses its lowest code, which has no positive counterpart, and
    puts the range's end half a step past its last code: what is cut there is cut by half a step.
    """
    assert fmt.group_size is not None
    top = 2**fmt.bits - 1
    # Divisors are tensors: CUDA multiplies by the reciprocal of a plain number, the CPU divides.
    if fmt.symmetric:
        middle = 2 ** (fmt.bits - 1)
        amax = groups.abs().amax(-1)
        steps = middle - 0.5 if clipped else middle - 1.0
        scale = _fp16_scale(amax * ratio / amax.new_tensor(steps), amax)
        return Grid(scale, torch.full_like(scale, middle), fmt.bits, fmt.group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = _fp16_scale((high - low) * ratio / low.new_tensor(top), high - low)
    zero = torch.round(-low * ratio / scale).clamp(0, top)
    return Grid(scale, zero, fmt.bits, fmt.group_size)


def _error(groups: Tensor, grid: Grid, counts: Tensor | None, *, low: int) -> Tensor:
    """Return the weighted squared error of every group when codes start at `low`."""
    scale, zero = grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1)
    codes = (torch.round(groups / scale) + zero).clamp_(low, 2**grid.bits - 1)
    error = (codes.sub_(zero).mul_(scale).sub_(groups)).square_()
    if counts is not None:
        error.mul_(counts)
    return error.sum(-1)


def _fp16_scale(scale: Tensor, amax: Tensor) -> Tensor:
    """Return scales rounded to fp16: 1 where all values are zero, never 0, never infinite."""
    rounded = scale.to(torch.float16).float()
    if not bool(torch.isfinite(rounded).all()):
        raise ConfigError(
            f"its largest value {float(amax.amax()):.6g} needs an integer scale above fp16's "
            "range; choose fp8 or bf16 for it"
        )
    rounded = rounded.clamp(min=_FP16_TINY)
    return torch.where(amax > 0, rounded, torch.ones_like(rounded))
