"""A budget's plan measured as a whole, and what one step of a unit changes in it.

Losses of units that were measured alone add up only nearly, and tokens that chose the codes flatter
them. So the solution is quantized once more as a whole. Around it, the units that cost most take
one step down and one step up, all others staying as the plan has them; the ratio of the measured
change to the predicted one scales the unit's losses. The sum is anchored on what the whole plan
costs the sequences that no search saw. A ratio measured badly is drawn to that of all units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.layers.weights import Source
from fastgpt.models.placement import resolve_dtype
from fastgpt.quant.allocate import Additivity, Option, Unit, neighbours
from fastgpt.quant.family import LayerSearch, dense_values
from fastgpt.quant.layerwise import LayerWeights, layer_index, stored_in
from fastgpt.quant.observe import HiddenStates
from fastgpt.quant.plan import PlannedTensor
from fastgpt.quant.report import Report
from fastgpt.quant.search import is_searched
from fastgpt.quant.sensitivity import (
    EMBEDDING,
    HEAD,
    changed_source,
    divergence,
    measured_tokens,
)
from fastgpt.scheme import QuantizedTensor

__all__ = ["MeasuredPlan", "Step", "measure_plan", "rescaled", "steps_around"]

Stored = Tensor | QuantizedTensor

_MOST_UNITS = 40  # that are stepped, those of the largest predicted loss
_RATIO_SPREAD = 0.5  # of measured to predicted changes between units, over their mean, about
_RATIO_LIMITS = (0.1, 10.0)


@dataclass(frozen=True)
class Step:
    """One unit in another option than the plan's.

    Attributes:
        unit: its place among the units.
        option: what it takes instead.
        predicted: change of the loss, nats.
    """

    unit: int
    option: Option
    predicted: float


@dataclass(frozen=True)
class MeasuredPlan:
    """What a plan costs, mean KL in nats.

    Attributes:
        kl: on the sequences that were held out of the search, in the arithmetic that is served as
            in a certificate.
        kl_all: on all that were measured, in float32.
        changes: of kl_all by every step, and the standard error over positions.
    """

    kl: float
    kl_all: float
    changes: list[tuple[float, float]]


def steps_around(units: Sequence[Unit], options: Sequence[Option]) -> list[Step]:
    """Return the steps to measure around a solution, one option for every unit."""
    by_loss = sorted(range(len(units)), key=lambda i: -options[i].loss)
    return [
        Step(i, option, option.loss - options[i].loss)
        for i in sorted(by_loss[:_MOST_UNITS])
        for option in neighbours(units[i], options[i])
    ]


def measure_plan(
    checkpoint: Checkpoint,
    planned: Sequence[PlannedTensor],
    units: Sequence[Unit],
    steps: Sequence[Step],
    sequences: Sequence[Sequence[int]],
    device: torch.device | None,
    *,
    rotated: Checkpoint | None = None,
) -> MeasuredPlan:
    """Quantize a plan layer by layer, and every step beside it; compare answers with the source's.

    Args:
        checkpoint: the source.
        planned: every tensor of the output with the plan's formats.
        units: the weights that may change their formats.
        steps: changes of single units to measure.
        sequences: token ids; every fourth sequence is held out of the search.
        device: where to run; None is the CPU.
        rotated: what is quantized in the source's place: a model of the same function.
    """
    on = device or torch.device("cpu")
    read = (rotated or checkpoint).read
    free = [name for unit in units for name in unit.names]
    tokens = measured_tokens(checkpoint, free, sequences, max(1, len(steps)), on)
    stepped = {name for step in steps for name in units[step.unit].names}
    items = list(planned)
    search = LayerSearch(rotated or checkpoint, items, Report(), on, tokens, observed=stepped)
    outside: dict[str, Stored] = {i.name: search.alone(i) for i in items if i.name == EMBEDDING}
    search.start(changed_source(outside, read))
    kind, config = search.kind, search.config

    def states(source: Source, dtype: torch.dtype = torch.float32) -> HiddenStates:
        return HiddenStates(kind, config, source, tokens, on, dtype)

    exact, whole = states(checkpoint.read), states(changed_source(outside, read))
    served = states(changed_source(outside, read), _served_dtype(checkpoint, on))
    runs: dict[int, HiddenStates] = {}
    tails: dict[int, Mapping[str, Stored]] = {}  # what a step changes behind the layers
    for s, step in enumerate(steps):
        if EMBEDDING in units[step.unit].names:
            dense = dense_values(read(EMBEDDING), EMBEDDING).to(on, torch.float32)
            layer = LayerWeights({EMBEDDING: dense}, {}, {}, {})
            tails[s] = stored_in(layer, [EMBEDDING], step.option.format)  # a tied head reads it
            runs[s] = states(changed_source(tails[s], read))
    for index in range(config.num_layers):
        before = list(runs.values())
        inside = [item for item in items if layer_index(item.name) == index]
        stored = dict(search.layer(index, inside))
        for s, step in enumerate(steps):
            names = units[step.unit].names
            if layer_index(names[0]) == index:
                changed = stored_in(search.weights, names, step.option.format)
                runs[s] = whole.fork()
                runs[s].advance(index, changed_source(changed, stored.__getitem__))
        whole.advance(index, stored.__getitem__, before)
        served.advance(index, stored.__getitem__)
        exact.advance(index, checkpoint.read)

    for item in items:
        if item.name in search.norms and layer_index(item.name) is None:
            outside[item.name] = search.norms[item.name]
        if item.name == HEAD:
            stats = search.head_stats(item)
            outside[HEAD] = search.alone(item, stats if is_searched(item.format) else None)
            dense = dense_values(read(HEAD), HEAD).to(on, torch.float32)
            if HEAD in search.residuals:
                dense = dense * search.residuals[HEAD].to(on)
            layer = LayerWeights({HEAD: dense}, {}, {}, {HEAD: stats})
            for s, step in enumerate(steps):
                if HEAD in units[step.unit].names:
                    runs[s] = whole
                    tails[s] = stored_in(layer, [HEAD], step.option.format)
    answers = [logits.cpu() for logits in exact.logits(checkpoint.read)]
    source = changed_source(outside, read)
    base = divergence(answers, whole.logits(source))
    changes = []
    for s in range(len(steps)):
        kl = divergence(answers, runs.pop(s).logits(changed_source(tails.get(s, {}), source)))
        change = kl - base
        error = float(change.std()) / len(change) ** 0.5 if len(change) > 1 else 0.0
        changes.append((float(change.mean()), error))
    held_out = divergence(answers, served.logits(source))[exact.is_held_out]
    return MeasuredPlan(float(held_out.mean()), float(base.mean()), changes)


def _served_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the type of activations that is served, float32 for float16 that may not hold them."""
    assert checkpoint.config is not None
    dtype = resolve_dtype("auto", device, checkpoint.config)
    return torch.float32 if dtype == torch.float16 else dtype


def rescaled(
    units: Sequence[Unit],
    options: Sequence[Option],
    steps: Sequence[Step],
    measured: MeasuredPlan,
) -> tuple[list[Unit], Additivity]:
    """Return the units with losses scaled by what their steps changed, and the anchored law.

    Args:
        units, options: the solution that was measured.
        steps, measured: what was measured around it.
    """
    tops: dict[int, float] = {}
    weights: dict[int, float] = {}
    for step, (change, error) in zip(steps, measured.changes, strict=True):
        if step.predicted == 0:
            continue
        # Regression through the origin of the measured on the predicted changes; the prediction
        # itself is uncertain by about the spread, so large steps do not count without end.
        variance = error**2 + (0.25 * step.predicted) ** 2
        tops[step.unit] = tops.get(step.unit, 0.0) + change * step.predicted / variance
        weights[step.unit] = weights.get(step.unit, 0.0) + step.predicted**2 / variance
    total = sum(weights.values())
    mean = sum(tops.values()) / total if total > 0 else 1.0
    low, high = _RATIO_LIMITS
    mean = min(max(mean, low), high)
    prior = 1 / (_RATIO_SPREAD * mean) ** 2
    scaled = []
    for i, unit in enumerate(units):
        ratio = (tops.get(i, 0.0) + prior * mean) / (weights.get(i, 0.0) + prior)
        ratio = min(max(ratio, low * mean), high * mean)
        scaled.append(
            replace(unit, options=tuple(replace(o, loss=ratio * o.loss) for o in unit.options))
        )
    loss = sum(
        unit.options[old.options.index(option)].loss
        for unit, old, option in zip(scaled, units, options, strict=True)
    )
    return scaled, Additivity(measured.kl / loss if loss > 0 else 1.0)
