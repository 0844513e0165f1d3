"""The best codes for one weight: several algorithms, one judge.

The judge is the squared error of the weight's output on inputs that no algorithm saw (held out), or
of the weight itself where there are none. Round-to-nearest is always among the candidates, so what
is chosen is never worse than it on those inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgpt.errors import ConfigError
from fastgpt.quant.gptq import gptq_codes
from fastgpt.quant.grid import clipped_grid, encode, pack_codes
from fastgpt.quant.observe import InputStats
from fastgpt.quant.rounding import round_tensor
from fastgpt.scheme import Format, QuantizedTensor

__all__ = ["Choice", "choose", "is_searched", "output_error", "quick_error"]


_SAMPLE_ROWS = 64


@dataclass(frozen=True)
class Choice:
    """One weight in its stored form and how it got there.

    Attributes:
        stored: the weight.
        algorithm: the one that was best.
        error: its squared error over the squared size of what is exact, on held-out inputs (of
            outputs) or without inputs (of weights).
        nearest_error: the same of round-to-nearest.
        on_outputs: whether the errors are of outputs.
    """

    stored: QuantizedTensor
    algorithm: str
    error: float
    nearest_error: float
    on_outputs: bool


def is_searched(fmt: Format | None) -> bool:
    """Tell whether a format's codes are searched rather than rounded."""
    return fmt is not None and fmt.has_groups and fmt.algorithm != "rtn"


def choose(weight: Tensor, fmt: Format, stats: InputStats | None, name: str) -> Choice:
    """Return the best stored form of weight [..., rows, cols] in an integer format with groups.

    Args:
        weight: finite, any float type.
        fmt: its `algorithm` is "auto" (try all), or the one that is wanted.
        stats: inputs of the weight; None: judged by the weight itself.
        name: for messages.

    Raises:
        ConfigError: a group's scale leaves float16's range, or "gptq" without inputs.
    """
    shape = tuple(weight.shape)
    rows = weight.reshape(-1, shape[-1]).float()
    seen = stats if stats is not None and stats.num_fit and stats.num_held_out else None
    judge = None if seen is None else seen.held_out_gram()
    size = max(_energy(rows, judge), 1e-30)
    nearest = round_tensor(rows.to(weight.dtype), fmt, name)
    assert isinstance(nearest, QuantizedTensor)
    nearest_error = _energy(nearest.dequantize() - rows, judge) / size
    best, error, algorithm = nearest, nearest_error, "rtn"
    try:
        for tried, stored in _candidates(rows, fmt, seen):
            found = _energy(stored.dequantize() - rows, judge) / size
            if found < error or (fmt.algorithm == tried != algorithm):
                best, error, algorithm = stored, found, tried
    except ConfigError as problem:
        raise ConfigError(f"{name}: {problem}") from None
    if fmt.algorithm == "gptq" and seen is None:
        raise ConfigError(
            f"{name}: gptq needs calibration data that reaches this weight; give some, or ask for "
            "algorithm auto"
        )
    used = replace(fmt, algorithm=algorithm)
    specs = used.parts(shape)
    parts = {suffix: part.view(specs[suffix].shape) for suffix, part in best.parts.items()}
    return Choice(
        QuantizedTensor(used, shape, parts), algorithm, error, nearest_error, seen is not None
    )


def output_error(
    weight: Tensor, stored: QuantizedTensor | Tensor, stats: InputStats | None
) -> float:
    """Return the relative squared error of a stored weight's output on held-out inputs."""
    has_inputs = stats is not None and stats.num_held_out
    gram = stats.held_out_gram() if stats is not None and has_inputs else None
    value = stored.dequantize() if isinstance(stored, QuantizedTensor) else stored.float()
    rows = weight.float()
    return _energy(value - rows, gram) / max(_energy(rows, gram), 1e-30)


def quick_error(weight: Tensor, fmt: Format, gram: Tensor) -> float:
    """Return the output error of scales found quickly, relative to the output: for comparisons.

    A sample of rows decides: rows are rounded apart, and share the columns that are compared.
    """
    weight = weight[:: max(1, weight.shape[0] // _SAMPLE_ROWS)]
    importance = gram.diagonal() if gram.ndim == 2 else gram
    grid = clipped_grid(weight, fmt, importance, num_ratios=6)
    error = grid.values(encode(weight, grid)) - weight
    return _energy(error, gram) / max(_energy(weight, gram), 1e-30)


def _candidates(
    rows: Tensor, fmt: Format, seen: InputStats | None
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield (algorithm, stored form) of everything the format's algorithm allows."""
    if fmt.algorithm in ("auto", "clip"):
        grid = clipped_grid(rows, fmt)
        yield "clip", pack_codes(encode(rows, grid), grid, fmt)
    if seen is None or fmt.algorithm == "rtn":
        return
    gram = seen.gram()
    importance = gram.diagonal() if seen.is_full else gram
    grid = clipped_grid(rows, fmt, importance)
    if fmt.algorithm in ("auto", "clip"):
        yield "clip", pack_codes(encode(rows, grid), grid, fmt)
    if seen.is_full and fmt.algorithm in ("auto", "gptq"):
        for by_use in (True, False):
            codes = gptq_codes(rows, grid, gram, by_use=by_use)
            yield "gptq", pack_codes(codes, grid, fmt)


def _energy(rows: Tensor, gram: Tensor | None) -> float:
    """Return sum over rows of row @ gram @ rowᵀ; gram may be a diagonal, or None for identity."""
    if gram is None:
        return float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2
    if gram.ndim == 1:
        return float((rows.square() @ gram.unsqueeze(1)).double().sum())
    return max(0.0, float(((rows @ gram) * rows).sum(dtype=torch.float64)))
