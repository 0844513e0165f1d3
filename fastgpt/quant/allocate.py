"""Which format each weight gets when the whole model has a budget.

Weights that kernels run together form a unit and share a format. For every unit and format the
bytes are known and the loss is predicted: sensitivity * relative squared error of the unit's
output. The sensitivity is measured: with that one unit in the cheapest format, the Kullback-Leibler
divergence of the model's next-token distributions from the source's, over the unit's output error
then. Small errors add up, so the choice is a knapsack. Sources: HIGGS, arXiv:2411.17525
(linearity); the multiple-choice knapsack by its convex hulls, Sinha and Zoltners 1979.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.errors import ConfigError
from fastgpt.layers.weights import Source
from fastgpt.models.registry import family
from fastgpt.quant.layerwise import layer_index
from fastgpt.quant.observe import HiddenStates, InputStats
from fastgpt.quant.plan import PlannedTensor
from fastgpt.quant.rounding import round_tensor
from fastgpt.quant.search import choose, output_error
from fastgpt.scheme import Format, QuantizedTensor
from fastgpt.units import resolve_bytes

__all__ = [
    "Budget",
    "Option",
    "Solution",
    "Unit",
    "is_free",
    "keep_sensitive",
    "measure_units",
    "solve",
]

# From the cheapest; a weight may also be kept as it is.
OPTIONS = tuple(
    Format.parse(value)
    for value in (
        {"format": "int3", "symmetric": False},
        {"format": "int4"},
        {"format": "int4", "symmetric": False, "group_size": 64},
        {"format": "int4", "symmetric": False, "group_size": 32},
        "fp8",
    )
)
_FREE_ROLES = ("attention_weights", "residual_connections", "io_layers")
_TOKENS = 2048  # whose distributions are compared for every unit
_MAX_GRAM_COLS = 16384


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
    units: Sequence[Unit], fixed_bytes: int, *, max_bytes: float | None, max_loss: float | None
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
    steps = [
        ((old.loss - new.loss) / (new.num_bytes - old.num_bytes), i, k + 1)
        for i, hull in enumerate(hulls)
        for k, (old, new) in enumerate(itertools.pairwise(hull))
    ]
    frontier = [(size, loss)]
    chosen: tuple[list[int], int, float] | None = None
    for _, i, k in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        old, new = hulls[i][k - 1], hulls[i][k]
        is_done = max_loss is not None and loss <= max_loss
        is_full = max_bytes is not None and size + new.num_bytes - old.num_bytes > max_bytes
        if chosen is None and (is_done or is_full):
            chosen = list(at), size, loss
        at[i] = k
        size += new.num_bytes - old.num_bytes
        loss = max(0.0, loss + new.loss - old.loss)
        frontier.append((size, loss))
    best, size, loss = chosen or (at, size, loss)
    picked = [hull[k] for hull, k in zip(hulls, best, strict=True)]
    if max_bytes is not None:
        size, loss = _fill(units, picked, size, loss, max_bytes)
    return Solution(tuple(picked), size, loss, tuple(frontier))


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


def _fill(
    units: Sequence[Unit], picked: list[Option], size: int, loss: float, max_bytes: float
) -> tuple[int, float]:
    """Spend what the hull's steps leave: the best single upgrades, then exchanges of two."""
    while True:
        gains = [
            (picked[i].loss - option.loss, i, option)
            for i, unit in enumerate(units)
            for option in unit.options
            if option.loss < picked[i].loss
            and size + option.num_bytes - picked[i].num_bytes <= max_bytes
        ]
        if not gains:
            return size, loss
        gain, i, option = max(gains, key=lambda g: (g[0], -g[1]))
        size += option.num_bytes - picked[i].num_bytes
        loss = max(0.0, loss - gain)
        picked[i] = option


def unit_of(name: str) -> str:
    """Return a key that weights of one unit share: kernels join them, or experts share them."""
    key = re.sub(r"\.(q|k|v)_proj\.weight$", ".qkv", name)
    key = re.sub(r"\.(q_a_proj|kv_a_proj_with_mqa)\.weight$", ".down", key)
    return re.sub(
        r"(\.experts\.)\d+(\.)", r"\1*\2", re.sub(r"\.(gate|up)_proj\.", ".gate_up.", key)
    )


def measure_units(
    checkpoint: Checkpoint,
    free: Sequence[str],
    sequences: Sequence[Sequence[int]],
    device: torch.device | None,
) -> list[Unit]:
    """Return the units of the weights `free` with the bytes and predicted loss of every option.

    Every unit needs its own run through the layers behind it; all runs pass a layer together, so
    each layer is read once.
    """
    assert checkpoint.config is not None
    kind = family(checkpoint.config)
    config = kind.parse_config(checkpoint.config)
    on = device or torch.device("cpu")
    read = checkpoint.read
    tokens: list[Sequence[int]] = []
    for ids in sequences:
        if len(tokens) < 4 or sum(map(len, tokens)) + len(ids) <= _TOKENS:
            tokens.append(ids)
    base = HiddenStates(kind, config, read, tokens, on, torch.float32)
    keys: dict[str, list[str]] = {}
    for name in free:
        keys.setdefault(unit_of(name), []).append(name)
    found: dict[str, tuple[list[Option], float]] = {}
    runs: dict[str, HiddenStates] = {}
    for index in range(config.num_layers):
        inside = {k: names for k, names in keys.items() if layer_index(names[0]) == index}
        wanted = [name for names in inside.values() for name in names]
        stats = base.observe_layer(index, read, wanted, _MAX_GRAM_COLS) if wanted else {}
        before = list(runs.values())
        for key, names in inside.items():
            cheapest, found[key] = _options(checkpoint, names, stats, on)
            runs[key] = base.fork()
            runs[key].advance(index, _with(cheapest, read))
        base.advance(index, read, before)
    head_names = keys.get("lm_head.weight")
    exact = [logits.cpu() for logits in base.logits(read)]
    units = []
    for key, names in keys.items():
        if key not in runs and names is not head_names:
            continue
        if names is head_names and head_names is not None:
            stats = {names[0]: base.observe_head(read, names[0], _MAX_GRAM_COLS)}
            cheapest, found[key] = _options(checkpoint, names, stats, on)
            logits = base.logits(_with(cheapest, read))
        else:
            logits = runs.pop(key).logits(read)
        options, error = found[key]
        sensitivity = _divergence(exact, logits) / max(error, 1e-30)
        scaled = tuple(replace(o, loss=o.loss * sensitivity) for o in options)
        units.append(Unit(tuple(names), scaled))
    return units


def _with(changed: Mapping[str, QuantizedTensor], read: Source) -> Source:
    """Return a source that has some weights changed."""
    return lambda name: changed[name] if name in changed else read(name)


def _options(
    checkpoint: Checkpoint, names: Sequence[str], stats: dict[str, InputStats], device: torch.device
) -> tuple[dict[str, QuantizedTensor], tuple[list[Option], float]]:
    """Return the weights in the cheapest format; the options with output errors; its error."""
    cheapest: dict[str, QuantizedTensor] = {}
    sums = [0.0] * len(OPTIONS)
    sizes = [0] * len(OPTIONS)
    kept = 0
    for name in names:
        stored = checkpoint.read(name)
        dense = stored.dequantize() if isinstance(stored, QuantizedTensor) else stored.float()
        dense = dense.to(device)
        kept += stored.nbytes
        seen = stats.get(name)
        for i, fmt in enumerate(OPTIONS):
            if fmt.has_groups:
                choice = choose(dense, fmt, seen, name)
                result, error = choice.stored, choice.error
            else:
                rounded = round_tensor(dense, fmt, name)
                assert isinstance(rounded, QuantizedTensor)
                result = rounded
                error = output_error(dense, result, seen)
            sums[i] += error / len(names)
            sizes[i] += fmt.nbytes(tuple(stored.shape))
            if i == 0:
                cheapest[name] = result
    options = [
        Option(fmt, size, error) for fmt, size, error in zip(OPTIONS, sizes, sums, strict=True)
    ]
    return cheapest, ([*options, Option(None, kept, 0.0)], sums[0])


def _divergence(exact: list[Tensor], logits: Any) -> float:
    """Return the mean over positions of sum p log(p / q)."""
    total, count = 0.0, 0
    for a, b in zip(exact, logits, strict=True):
        log_p, log_q = a.double().log_softmax(-1), b.cpu().double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum().clamp(min=0))
        count += a.shape[0]
    return total / count


def is_free(item: PlannedTensor) -> bool:
    """Tell whether a budget may choose the format of a tensor: a matrix of a layer, or the head."""
    is_matrix = len(item.shape) == 2 and item.role in _FREE_ROLES
    return is_matrix and (layer_index(item.name) is not None or item.name == "lm_head.weight")


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
