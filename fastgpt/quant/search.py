"""The best codes for one weight: several algorithms, one judge.

The judge is the squared error of the weight's output on inputs that no algorithm saw (held out), or
of the weight itself where there are none. Round-to-nearest is always among the candidates, so what
is chosen is never worse than it on those inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgpt.errors import ConfigError
from fastgpt.quant.gptq import gptq_codes
from fastgpt.quant.grid import Grid, clipped_grid, encode, pack_codes, row_spans, unpack_codes
from fastgpt.quant.input_stats import InputStats
from fastgpt.quant.rounding import round_tensor
from fastgpt.scheme import Format, QuantizedTensor

__all__ = ["Choice", "choose", "choose_joined", "is_searched", "output_error", "quick_error"]

_SAMPLE_ROWS = 64
_MAX_JOINED = 1 << 27  # values that are searched at once


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
    """Return the best stored form of one weight; see `choose_joined`."""
    return choose_joined({name: weight}, fmt, stats)[name]


def choose_joined(
    weights: Mapping[str, Tensor], fmt: Format, stats: InputStats | None
) -> dict[str, Choice]:
    """Return the best stored form of each weight in an integer format with groups.

    Args:
        weights: name -> [..., rows, cols], finite, any float type. All read the same input, so one
            search over the rows of all of them serves; each weight keeps what is best for itself.
        fmt: its `algorithm` is "auto" (try all), or the one that is wanted.
        stats: inputs of the weights; None: judged by the weights themselves.

    Raises:
        ConfigError: a group's scale leaves float16's range, or "gptq" without inputs.
    """
    names = list(weights)
    if len(names) > 1 and sum(weight.numel() for weight in weights.values()) > _MAX_JOINED:
        return {name: choose(weights[name], fmt, stats, name) for name in names}
    seen = stats if stats is not None and stats.num_fit and stats.num_held_out else None
    if fmt.algorithm == "gptq" and seen is None:
        raise ConfigError(
            f"{names[0]}: gptq needs calibration data that reaches this weight; give some, or ask "
            "for algorithm auto"
        )
    judge = None if seen is None else seen.held_out_gram()
    dense = [weights[name].reshape(-1, weights[name].shape[-1]).float() for name in names]
    sizes = [max(float(_energies(rows, judge).sum()), 1e-30) for rows in dense]
    found: list[Choice] = []
    for name, rows, size in zip(names, dense, sizes, strict=True):
        nearest = round_tensor(rows.to(weights[name].dtype), fmt, name)
        assert isinstance(nearest, QuantizedTensor)
        error = float(_errors(*unpack_codes(nearest), rows, judge).sum()) / size
        found.append(Choice(nearest, "rtn", error, error, seen is not None))
    joined = torch.cat(dense) if len(dense) > 1 else dense[0]
    ends = [0, *itertools.accumulate(len(rows) for rows in dense)]
    try:
        for algorithm, codes, grid in _candidates(joined, fmt, seen):
            energies = _errors(codes, grid, joined, judge)
            for at, (first, last) in enumerate(itertools.pairwise(ends)):
                error = float(energies[first:last].sum()) / sizes[at]
                before = found[at]
                if error < before.error or fmt.algorithm == algorithm != before.algorithm:
                    stored = pack_codes(codes[first:last], grid.rows(first, last), fmt)
                    found[at] = replace(before, stored=stored, algorithm=algorithm, error=error)
    except ConfigError as problem:
        raise ConfigError(f"{', '.join(names)}: {problem}") from None
    return {
        name: replace(choice, stored=_shaped(choice, fmt, tuple(weights[name].shape)))
        for name, choice in zip(names, found, strict=True)
    }


def _shaped(choice: Choice, fmt: Format, shape: tuple[int, ...]) -> QuantizedTensor:
    """Return the codes as those of a weight of this shape, under the algorithm that found them."""
    used = replace(fmt, algorithm=choice.algorithm)
    specs = used.parts(shape)
    parts = {suffix: part.view(specs[suffix].shape) for suffix, part in choice.stored.parts.items()}
    return QuantizedTensor(used, shape, parts)


def output_error(
    weight: Tensor, stored: QuantizedTensor | Tensor, stats: InputStats | None
) -> float:
    """Return the relative squared error of a stored weight's output on held-out inputs."""
    has_inputs = stats is not None and stats.num_held_out
    gram = stats.held_out_gram() if stats is not None and has_inputs else None
    value = stored.dequantize() if isinstance(stored, QuantizedTensor) else stored.float()
    rows = weight.float()
    return _relative_error(value - rows, rows, gram)


def quick_error(weight: Tensor, fmt: Format, gram: Tensor) -> float:
    """Return the output error of scales found quickly, relative to the output: for comparisons.

    A sample of rows decides: rows are rounded apart, and share the columns that are compared.
    """
    weight = weight[:: max(1, weight.shape[0] // _SAMPLE_ROWS)]
    importance = gram.diagonal() if gram.ndim == 2 else gram
    grid = clipped_grid(weight, fmt, importance, num_ratios=6)
    error = grid.values(encode(weight, grid)) - weight
    return _relative_error(error, weight, gram)


def _candidates(
    rows: Tensor, fmt: Format, seen: InputStats | None
) -> Iterator[tuple[str, Tensor, Grid]]:
    """Yield (algorithm, codes, grid) of everything the format's algorithm allows."""
    if fmt.algorithm in ("auto", "clip"):
        grid = clipped_grid(rows, fmt)
        yield "clip", encode(rows, grid), grid
    if seen is None or fmt.algorithm == "rtn":
        return
    gram = seen.gram()
    importance = gram.diagonal() if seen.is_full else gram
    grid = clipped_grid(rows, fmt, importance)
    if fmt.algorithm in ("auto", "clip"):
        yield "clip", encode(rows, grid), grid
    if seen.is_full and fmt.algorithm in ("auto", "gptq"):
        for by_use in (True, False):
            yield "gptq", gptq_codes(rows, grid, gram, by_use=by_use), grid


def _relative_error(error: Tensor, exact: Tensor, gram: Tensor | None) -> float:
    return float(_energies(error, gram).sum()) / max(float(_energies(exact, gram).sum()), 1e-30)


def _errors(codes: Tensor, grid: Grid, rows: Tensor, gram: Tensor | None) -> Tensor:
    """Return the energy of what codes on a grid lose of every row; see `_energies`."""
    parts = [
        _energies(grid.rows(first, last).values(codes[first:last]).sub_(rows[first:last]), gram)
        for first, last in row_spans(rows)
    ]
    return torch.cat(parts)


def _energies(rows: Tensor, gram: Tensor | None) -> Tensor:
    """Return row @ gram @ rowᵀ of every row, float64; gram: a matrix, a diagonal, None for one."""
    if len(spans := row_spans(rows)) > 1:
        return torch.cat([_energies(rows[first:last], gram) for first, last in spans])
    if gram is None:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
        return norms.square()
    if gram.ndim == 1:
        return (rows.square() @ gram).double()
    return (rows @ gram).mul_(rows).sum(-1, dtype=torch.float64).clamp(min=0)
