"""What each format of each weight costs a model's answers, by measuring a few of them.

Weights that kernels run together form a unit and share a format. Every unit is quantized alone in
two formats, the probes, and the Kullback-Leibler divergence of the model's next-token
distributions from the source's is measured. Between and beyond the probes the divergence is a power
of the squared error of the unit's output, which is known for every format:

    KL = a * error^b

b is near 1 where errors are small (HIGGS, arXiv:2411.17525, section 3) and near one half where they
change which experts a router takes. A slope that the tokens measure badly is drawn to the one that
all units share. Losses of units add up, nearly: all units quantized together at each probe give the
power law from the sum to what they cost together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.layers.weights import Source
from fastgpt.models.registry import family
from fastgpt.quant.allocate import Additivity, Option, Unit
from fastgpt.quant.family import LayerSearch, dense_values
from fastgpt.quant.input_stats import InputStats
from fastgpt.quant.layerwise import LayerWeights, layer_index
from fastgpt.quant.observe import HiddenStates
from fastgpt.quant.plan import PlannedTensor
from fastgpt.quant.report import Report
from fastgpt.quant.rounding import round_tensor
from fastgpt.quant.search import is_searched, output_error, quick_error
from fastgpt.scheme import Format, QuantizedTensor

__all__ = [
    "EMBEDDING",
    "HEAD",
    "OPTIONS",
    "changed_source",
    "divergence",
    "is_free",
    "measure_units",
    "measured_tokens",
    "unit_of",
]

Stored = Tensor | QuantizedTensor

_INT3 = {"format": "int3", "symmetric": False}
_INT4 = {"format": "int4"}
_CHOICES: tuple[str | dict[str, Any], ...] = (
    {"format": "int2"},
    _INT3,
    {**_INT3, "group_size": 32},
    *({**_INT4, "group_size": g, "symmetric": s} for g in (128, 64, 32) for s in (True, False)),
    "int8",
    "fp8",
)
# From the cheapest; a weight may also be kept as it is. int8 has a seventeenth of fp8's error.
OPTIONS = tuple(Format.parse(value) for value in _CHOICES)
PROBES = (Format.parse(_INT3), Format.parse(_INT4))
_FREE_ROLES = ("attention_weights", "residual_connections", "io_layers")
EMBEDDING, HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_LEAST_TOKENS, _MOST_TOKENS = 2048, 8192  # whose distributions are compared for every unit
_MOST_GPU_TOKENS = 1 << 16  # the same where they cost no more multiplications than _GPU_WORK
_GPU_WORK = 10**14
_STATE_BYTES = 4 << 30  # of hidden states that wait on the host, above the least tokens
_SLOPE_SPREAD = 0.15  # of b between units of one model, about
_LEAST_KL = 1e-12


def is_free(item: PlannedTensor) -> bool:
    """Tell whether a budget may choose the format of a tensor: a matrix of a layer, or of IO."""
    is_matrix = len(item.shape) == 2 and item.role in _FREE_ROLES
    inside = layer_index(item.name) is not None or item.name in (EMBEDDING, HEAD)
    return is_matrix and inside


def unit_of(name: str) -> str:
    """Return a key that weights of one unit share: kernels join them, or experts share them."""
    key = re.sub(r"\.(q|k|v)_proj\.weight$", ".qkv", name)
    key = re.sub(r"\.(q_a_proj|kv_a_proj_with_mqa)\.weight$", ".down", key)
    return re.sub(
        r"(\.experts\.)\d+(\.)", r"\1*\2", re.sub(r"\.(gate|up)_proj\.", ".gate_up.", key)
    )


@dataclass
class _Probed:
    """One unit in one probe: its output error, and what it made of the answers."""

    error: float
    kl: float = 0.0
    kl_error: float = 0.0  # standard error over positions


@dataclass(frozen=True)
class _Probe:
    """All free weights in one format: the search that quantizes them, layer by layer."""

    format: Format
    items: list[PlannedTensor]
    search: LayerSearch
    stored: dict[str, Stored]  # outside the layers

    @staticmethod
    def start(
        checkpoint: Checkpoint,
        planned: Sequence[PlannedTensor],
        free: Sequence[str],
        tokens: Sequence[Sequence[int]],
        device: torch.device,
        fmt: Format,
    ) -> _Probe:
        chosen = set(free)
        items = [replace(i, format=fmt) if i.name in chosen else i for i in planned]
        search = LayerSearch(checkpoint, items, Report(), device, tokens)
        stored = {i.name: search.alone(i) for i in items if i.name == EMBEDDING}
        search.start(changed_source(stored, checkpoint.read))
        return _Probe(fmt, items, search, stored)


def measure_units(
    checkpoint: Checkpoint,
    planned: Sequence[PlannedTensor],
    free: Sequence[str],
    sequences: Sequence[Sequence[int]],
    device: torch.device | None,
) -> tuple[list[Unit], Additivity]:
    """Return the units of the weights `free`, with the bytes and predicted loss of every option.

    Every unit and probe needs its own run through the layers behind it; all runs pass a layer
    together, so each layer is read once. The weights around a unit are exact, but transformed as
    the probe's search transforms them.

    Args:
        checkpoint: the source.
        planned: every tensor of the output, with the formats of those that are not free.
        free: names of the matrices whose format is to be chosen.
        sequences: token ids; every fourth sequence is held out of the search.
        device: where to run; None is the CPU.
    """
    assert checkpoint.config is not None
    kind = family(checkpoint.config)
    config = kind.parse_config(checkpoint.config)
    on, read = device or torch.device("cpu"), checkpoint.read
    keys: dict[str, list[str]] = {}
    for name in free:
        keys.setdefault(unit_of(name), []).append(name)
    tokens = measured_tokens(checkpoint, free, sequences, len(keys) * len(PROBES), on)
    probes = [_Probe.start(checkpoint, planned, free, tokens, on, fmt) for fmt in PROBES]
    base = HiddenStates(kind, config, read, tokens, on, torch.float32)
    runs: dict[tuple[str, int], HiddenStates] = {}
    probed: dict[str, list[_Probed]] = {key: [] for key in keys}
    errors: dict[str, dict[int, float]] = {key: {} for key in keys}  # by place in OPTIONS

    def probe_unit(key: str, p: int, stored: Mapping[str, Stored], weights: LayerWeights) -> None:
        exact = {name: weights.dense[name] for name in keys[key]}
        error = sum(output_error(w, stored[n], weights.stats.get(n)) for n, w in exact.items())
        probed[key].append(_Probed(error / len(exact)))
        errors[key] |= _option_errors(p, error / len(exact), exact, weights.stats)

    if EMBEDDING in keys:
        dense = dense_values(read(EMBEDDING), EMBEDDING).to(on, torch.float32)
        alone = LayerWeights({EMBEDDING: dense}, {}, {}, {})
        for p, probe in enumerate(probes):
            probe_unit(EMBEDDING, p, probe.stored, alone)
            source = changed_source(probe.stored, read)
            runs[EMBEDDING, p] = HiddenStates(kind, config, source, tokens, on, torch.float32)
    for index in range(config.num_layers):
        inside = [key for key, names in keys.items() if layer_index(names[0]) == index]
        before = list(runs.values())
        for p, probe in enumerate(probes):
            items = [item for item in probe.items if layer_index(item.name) == index]
            stored = dict(probe.search.layer(index, items))
            around = changed_source({**probe.search.weights.dense, **probe.search.norms}, read)
            for key in inside:
                probe_unit(key, p, stored, probe.search.weights)
                runs[key, p] = base.fork()
                changed = {name: stored[name] for name in keys[key]}
                runs[key, p].advance(index, changed_source(changed, around))
        base.advance(index, read, before)

    exact = [logits.cpu() for logits in base.logits(read)]
    together = []
    measured: list[dict[str, Tensor]] = [{} for _ in PROBES]
    for p, probe in enumerate(probes):
        norms: dict[str, Stored] = {n: q for n, q in probe.search.norms.items() if n == _NORM}
        for item in probe.items:
            if item.name == HEAD:
                stats = probe.search.head_stats(item)
                is_grouped = is_searched(item.format)
                probe.stored[HEAD] = probe.search.alone(item, stats if is_grouped else None)
            if item.name == HEAD and HEAD in keys:
                dense = dense_values(read(HEAD), HEAD).to(on, torch.float32)
                if HEAD in probe.search.residuals:
                    dense = dense * probe.search.residuals[HEAD].to(on)
                weights = LayerWeights({HEAD: dense}, {}, {}, {HEAD: stats})
                probe_unit(HEAD, p, probe.stored, weights)
        source = changed_source({**probe.stored, **norms}, read)
        together.append(float(divergence(exact, probe.search.states.logits(source)).mean()))
        for key in keys:
            states = runs.pop((key, p), base)
            source = read
            if key in (EMBEDDING, HEAD):
                changed = {key: probe.stored[key]}
                source = changed_source({**changed, **norms} if key == HEAD else changed, read)
            measured[p][key] = divergence(exact, states.logits(source))
        for key, (kl, kl_error) in _with_unseen(measured[p]).items():
            probed[key][p] = _Probed(probed[key][p].error, kl, kl_error)
    laws = _power_laws(probed)
    units = []
    for key, names in keys.items():
        shapes = [tuple(read(name).shape) for name in names]
        options = [
            Option(fmt, sum(map(fmt.nbytes, shapes)), laws[key](error))
            for fmt, error in zip(
                OPTIONS, (errors[key][i] for i in range(len(OPTIONS))), strict=True
            )
        ]
        kept = Option(None, sum(read(name).nbytes for name in names), 0.0)
        units.append(Unit(tuple(names), (*options, kept)))
    sums = [sum(points[p].kl for points in probed.values()) for p in range(len(PROBES))]
    return units, Additivity.through(sums, together)


def measured_tokens(
    checkpoint: Checkpoint,
    free: Iterable[str],
    sequences: Sequence[Sequence[int]],
    num_runs: int,
    device: torch.device,
) -> list[Sequence[int]]:
    """Return the first sequences, four or more, of so many tokens as num_runs runs can carry."""
    assert checkpoint.config is not None
    config = family(checkpoint.config).parse_config(checkpoint.config)
    most = _MOST_TOKENS
    if device.type == "cuda":
        values = sum(torch.Size(checkpoint.read(name).shape).numel() for name in free)
        most = max(most, min(_MOST_GPU_TOKENS, _GPU_WORK // max(1, values * num_runs)))
    limit = _STATE_BYTES // (4 * (config.vocab_size + num_runs * config.hidden_size))
    limit = min(most, max(_LEAST_TOKENS, limit))
    tokens: list[Sequence[int]] = []
    for ids in sequences:
        if len(tokens) < 4 or sum(map(len, tokens)) + len(ids) <= limit:
            tokens.append(ids)
    return tokens


def changed_source(changed: Mapping[str, Stored], read: Source) -> Source:
    """Return a source that has some weights changed."""
    return lambda name: changed[name] if name in changed else read(name)


def _option_errors(
    p: int, probe_error: float, weights: Mapping[str, Tensor], stats: Mapping[str, InputStats]
) -> dict[int, float]:
    """Return the mean output error of weights by place in OPTIONS, of those compared with probe p.

    Narrow formats are compared with the first probe, wider ones with the second. Searched formats
    are as much better or worse than the probe as with scales found quickly.
    """

    def quick(fmt: Format) -> float:
        total = 0.0
        for name, weight in weights.items():
            seen = stats.get(name)
            ones = torch.ones(weight.shape[1], device=weight.device)
            total += quick_error(weight, fmt, seen.gram() if seen and seen.num_fit else ones)
        return total

    probe = PROBES[p]
    scale = probe_error / max(quick(probe), 1e-30)
    errors = {}
    for i, fmt in enumerate(OPTIONS):
        if (fmt.has_groups and fmt.bits < PROBES[-1].bits) == (p > 0):
            continue
        if fmt == probe:
            errors[i] = probe_error
        elif fmt.has_groups:
            errors[i] = scale * quick(fmt)
        else:
            errors[i] = sum(
                output_error(weight, round_tensor(weight, fmt, name), stats.get(name))
                for name, weight in weights.items()
            ) / len(weights)
    return errors


def divergence(exact: list[Tensor], logits: Iterable[Tensor]) -> Tensor:
    """Return sum p log(p / q) of every position."""
    parts = []
    for a, b in zip(exact, logits, strict=True):
        log_p, log_q = a.to(b.device).double().log_softmax(-1), b.double().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).cpu())
    return torch.cat(parts)


def _with_unseen(divergences: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return by unit the mean KL and its standard error, one unseen event each included.

    A few positions hold most of a KL: a token that changes, an expert that is exchanged. A unit
    that shows none on these tokens would do so on others, so each counts one more, of the size
    that such events have in most units: the median of sum KL² / sum KL.
    """
    sizes = [float(kl.square().sum() / kl.sum().clamp(min=1e-30)) for kl in divergences.values()]
    event = sorted(sizes)[len(sizes) // 2] if sizes else 0.0
    found = {}
    for key, kl in divergences.items():
        unseen = event / len(kl)
        variance = float(kl.var()) / len(kl) if len(kl) > 1 else 0.0
        found[key] = float(kl.mean()) + unseen, math.sqrt(variance + unseen**2)
    return found


def _power_laws(
    probed: Mapping[str, Sequence[_Probed]],
) -> dict[str, Callable[[float], float]]:
    """Return by unit the KL as a function of its output error: a * error^b.

    A slope b that positions measure well is the unit's own, another is drawn to the mean of all.
    """
    slopes = {}
    for key, points in probed.items():
        x, y, variances = [], [], []
        for point in points:
            kl = max(point.kl, _LEAST_KL)
            x.append(math.log(max(point.error, 1e-30)))
            y.append(math.log(kl))
            variances.append((point.kl_error / kl) ** 2 + 1e-4)
        distance = x[0] - x[1]
        if abs(distance) > 0.1:
            slopes[key] = (y[0] - y[1]) / distance, sum(variances) / distance**2
    spread = _SLOPE_SPREAD**2
    weights = {key: 1 / (variance + spread) for key, (_, variance) in slopes.items()}
    mean = 1.0
    if slopes:
        mean = sum(weights[k] * b for k, (b, _) in slopes.items()) / sum(weights.values())
    laws = {}
    for key, points in probed.items():
        b, variance = slopes.get(key, (mean, math.inf))
        b = (b / variance + mean / spread) / (1 / variance + 1 / spread)
        b = min(max(b, 0.25), 2.0)
        total = log_a = 0.0
        for point in points:
            kl = max(point.kl, _LEAST_KL)
            weight = 1 / ((point.kl_error / kl) ** 2 + 1e-4)
            log_a += weight * (math.log(kl) - b * math.log(max(point.error, 1e-30)))
            total += weight
        laws[key] = _power_law(log_a / total, b)
    return laws


def _power_law(log_a: float, b: float) -> Callable[[float], float]:
    return lambda error: math.exp(log_a + b * math.log(max(error, 1e-30)))
