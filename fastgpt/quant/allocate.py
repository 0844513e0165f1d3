"""Which format each weight gets when the whole model has a budget.

For every unit of weights and every format the bytes are known and the loss is predicted (see
sensitivity.py). Small losses add up, nearly, so the choice is a knapsack. The frontier is that of
the convex hulls (Sinha and Zoltners 1979); a given size is solved exactly, by dynamic programming
over sizes in steps of its 131,072nd part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgpt.errors import ConfigError
from fastgpt.quant.plan import PlannedTensor
from fastgpt.scheme import Format
from fastgpt.units import resolve_bytes

__all__ = [
    "Additivity",
    "Budget",
    "Option",
    "Solution",
    "Unit",
    "keep_sensitive",
    "neighbours",
    "solve",
]

_MAX_CHANGES = 4096  # of single units that are tried in pairs
_CELLS = 1 << 17  # into which a size is divided


@dataclass(frozen=True)
class Budget:
    """What a quantized model may take or lose: one of the first three, the last, or both.

    Attributes:
        bytes: of all stored weights, scales and padding included.
        bits_per_weight: the same per value.
        max_kl: mean Kullback-Leibler divergence from the source, nats; checked by measuring.
        min_top1: share of positions that prefer the same token; checked by measuring.
    """

    bytes: int | None = None
    bits_per_weight: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        """Check that one size or loss is given, with a possible value."""
        sizes = (self.bytes, self.bits_per_weight, self.max_kl)
        given = [value for value in sizes if value is not None]
        if len(given) > 1 or (not given and self.min_top1 is None):
            raise ConfigError(
                "a budget names one of bytes, bits_per_weight and max_kl, or min_top1; "
                f"this one names {len(given)}"
            )
        if given and not given[0] > 0:
            raise ConfigError(f"a budget of {given[0]} is not possible; expected more than 0")
        if self.min_top1 is not None and not 0 < self.min_top1 < 1:
            raise ConfigError(f"min_top1 is {self.min_top1}; expected a share between 0 and 1")

    @staticmethod
    def parse(value: Budget | str | int) -> Budget:
        """Return a budget of "4.7GB", "4.5bpw", a number of bytes, or as it is.

        >>> Budget.parse("4.5bpw").bits_per_weight
        4.5
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str) and value.strip().lower().endswith("bpw"):
            text = value.strip()[:-3].strip()
            try:
                return Budget(bits_per_weight=float(text))
            except ValueError:
                raise ConfigError(f"budget {value!r}: {text!r} is no number") from None
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ConfigError(f"budget is {value!r}; expected '4.7GB', '4.5bpw' or a Budget")
        return Budget(bytes=resolve_bytes(value, 0))


@dataclass(frozen=True)
class Option:
    """One format of a unit; None keeps it. `loss` is in nats."""

    format: Format | None
    num_bytes: int
    loss: float


@dataclass(frozen=True)
class Unit:
    """Weights that share a format, and what each format would cost."""

    names: tuple[str, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Additivity:
    """What a sum of losses of single units is worth together: scale * sum^power."""

    scale: float = 1.0
    power: float = 1.0

    @staticmethod
    def through(sums: Sequence[float], together: Sequence[float]) -> Additivity:
        """Return the law through two measurements, the larger first; the sum itself without."""
        if not all(value > 0 for value in (*sums, *together)):
            return Additivity()
        x, y = [math.log(v) for v in sums], [math.log(v) for v in together]
        power = (y[0] - y[-1]) / (x[0] - x[-1]) if abs(x[0] - x[-1]) > 0.1 else 1.0
        power = min(max(power, 0.5), 1.5)
        # The smaller one is where budgets are: the law passes through it.
        return Additivity(math.exp(y[-1] - power * x[-1]), power)

    def loss(self, total: float) -> float:
        """Return what a sum of losses costs together."""
        return float(self.scale * total**self.power) if total > 0 else 0.0

    def total(self, loss: float) -> float:
        """Return the sum that costs so much together."""
        return float((loss / self.scale) ** (1 / self.power)) if loss > 0 else 0.0


@dataclass(frozen=True)
class Solution:
    """A choice for every unit.

    Attributes:
        options: one of each unit.
        num_bytes: of the units and of what has no choice.
        loss: predicted, nats.
        frontier: (bytes, predicted loss) of all best choices, from the smallest.
    """

    options: tuple[Option, ...]
    num_bytes: int
    loss: float
    frontier: tuple[tuple[int, float], ...]


def solve(
    units: Sequence[Unit],
    fixed_bytes: int,
    *,
    max_bytes: float | None,
    max_loss: float | None,
    together: Additivity = Additivity(),
) -> Solution:
    """Return the least loss within max_bytes, or the fewest bytes within max_loss.

    Raises:
        ConfigError: even the smallest choice is larger than max_bytes.
    """
    hulls = [_hull(unit.options) for unit in units]
    at = [0] * len(units)
    size = fixed_bytes + sum(hull[0].num_bytes for hull in hulls)
    loss = sum(hull[0].loss for hull in hulls)
    if max_bytes is not None and size > max_bytes:
        raise ConfigError(
            f"the budget is {max_bytes:,.0f} bytes; the smallest choice takes {size:,}, of which "
            f"{fixed_bytes:,} are kept by roles, overrides or sensitive names"
        )
    most = None if max_loss is None else together.total(max_loss)
    steps = [
        ((old.loss - new.loss) / (new.num_bytes - old.num_bytes), i, k + 1)
        for i, hull in enumerate(hulls)
        for k, (old, new) in enumerate(itertools.pairwise(hull))
    ]
    frontier = [(size, together.loss(loss))]
    chosen: tuple[list[int], int] | None = None
    for _, i, k in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        old, new = hulls[i][k - 1], hulls[i][k]
        is_done = most is not None and loss <= most
        is_full = max_bytes is not None and size + new.num_bytes - old.num_bytes > max_bytes
        if chosen is None and (is_done or is_full):
            chosen = list(at), size
        at[i] = k
        size += new.num_bytes - old.num_bytes
        loss = max(0.0, loss + new.loss - old.loss)
        frontier.append((size, together.loss(loss)))
    best, size = chosen or (at, size)
    picked = [hull[k] for hull, k in zip(hulls, best, strict=True)]
    if max_bytes is not None:
        exact = _knapsack(units, max_bytes - fixed_bytes)
        if exact is not None and sum(o.loss for o in exact) < sum(o.loss for o in picked):
            picked, size = exact, fixed_bytes + sum(o.num_bytes for o in exact)
        size = _fill(units, picked, size, max_bytes)
    total = sum(option.loss for option in picked)
    return Solution(tuple(picked), size, together.loss(total), tuple(frontier))


def neighbours(unit: Unit, chosen: Option) -> list[Option]:
    """Return the options of the hull next below and next above the chosen one, where there are."""
    hull = _hull(unit.options)
    below = [o for o in hull if o.num_bytes < chosen.num_bytes]
    above = [o for o in hull if o.num_bytes > chosen.num_bytes]
    return below[-1:] + above[:1]


def _knapsack(units: Sequence[Unit], max_bytes: float) -> list[Option] | None:
    """Return the choices of least loss, every size rounded up to a cell; None where none fits."""
    cell = max(1, int(max_bytes) // _CELLS)
    cells = int(max_bytes) // cell
    least = torch.zeros(cells + 1, dtype=torch.float64)  # by cells that may be used
    picks: list[Tensor] = []
    for unit in units:
        best = torch.full_like(least, math.inf)
        pick = torch.zeros(cells + 1, dtype=torch.uint8)
        for k, option in enumerate(unit.options):
            size = -(-option.num_bytes // cell)
            if size > cells:
                continue
            tried = least[: cells + 1 - size] + option.loss
            better = tried < best[size:]
            best[size:] = torch.where(better, tried, best[size:])
            pick[size:].masked_fill_(better, k)
        least = best
        picks.append(pick)
    if not math.isfinite(float(least[-1])):
        return None
    chosen, at = [], cells
    for unit, pick in zip(reversed(units), reversed(picks), strict=True):
        option = unit.options[int(pick[at])]
        chosen.append(option)
        at -= -(-option.num_bytes // cell)
    return chosen[::-1]


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of (bytes, loss), from the smallest."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.num_bytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _rate(old: Option, new: Option) -> float:
    return (old.loss - new.loss) / (new.num_bytes - old.num_bytes)


def _fill(units: Sequence[Unit], picked: list[Option], size: int, max_bytes: float) -> int:
    """Spend what the hull's steps leave, changing one unit or two at a time; return the bytes.

    Ends where no such change lowers the loss within max_bytes.
    """
    while True:
        # Changes of single units: (unit, option, more bytes, less loss), the best a byte first.
        changes = [
            (i, option, option.num_bytes - picked[i].num_bytes, picked[i].loss - option.loss)
            for i, unit in enumerate(units)
            for option in unit.options
            if option != picked[i]
            and (option.num_bytes < picked[i].num_bytes or option.loss < picked[i].loss)
        ]
        changes = sorted(changes, key=lambda c: -c[3] / max(abs(c[2]), 1))[:_MAX_CHANGES]
        if not changes:
            return size
        unit = torch.tensor([c[0] for c in changes])
        more = torch.tensor([c[2] for c in changes], dtype=torch.float64)
        gain = torch.tensor([c[3] for c in changes], dtype=torch.float64)
        room = max_bytes - size
        # Row i, column j: both changes; on the diagonal one of them alone.
        both = more + more.unsqueeze(1) - torch.diag(more)
        gains = gain + gain.unsqueeze(1) - torch.diag(gain)
        same = (unit == unit.unsqueeze(1)) & ~torch.eye(len(changes), dtype=torch.bool)
        gains[(both > room) | same] = -math.inf
        at = int(gains.argmax())
        i, j = divmod(at, len(changes))
        least = 1e-9 * sum(option.loss for option in picked)
        if float(gains[i, j]) <= least:
            return size
        for k in {i, j}:
            picked[changes[k][0]] = changes[k][1]
            size += changes[k][2]


def keep_sensitive(
    planned: Sequence[PlannedTensor], units: Sequence[Unit]
) -> tuple[list[PlannedTensor], list[str]]:
    """Return the plan with the costliest units in fp16 for at most 5 % more bytes, and their names.

    The cost of a unit is the predicted loss of its planned format per byte that fp16 adds.
    """
    formats = {item.name: item.format for item in planned}
    shapes = {item.name: item.shape for item in planned}
    fp16 = Format("fp16")
    room = 0.05 * sum(fmt.nbytes(shapes[name]) for name, fmt in formats.items() if fmt is not None)
    ranked = []
    for unit in units:
        fmt = formats[unit.names[0]]
        if fmt is None or fmt.is_plain:
            continue
        same = [o for o in unit.options if o.format is not None and o.format.name == fmt.name]
        exact = [o for o in same if o.format == fmt] or same or list(unit.options[:1])
        extra = sum(fp16.nbytes(shapes[n]) - fmt.nbytes(shapes[n]) for n in unit.names)
        ranked.append((exact[0].loss / extra, extra, unit))
    kept: list[str] = []
    for _, extra, unit in sorted(ranked, key=lambda entry: -entry[0]):
        if extra <= room:
            room -= extra
            kept += unit.names
    changed = set(kept)
    return [replace(i, format=fp16) if i.name in changed else i for i in planned], kept
