"""Quantizing a decoder layer by layer, each with the inputs that the quantized ones before it make.

One layer is in memory at a time: it is read, watched, transformed where that helps, rounded, and
the calibration tokens move on through its quantized form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastgpt.models.spec import ValueHeads
from fastgpt.quant.input_stats import InputStats
from fastgpt.quant.rounding import round_tensor
from fastgpt.quant.search import Choice, choose_joined, is_searched, quick_error
from fastgpt.quant.transforms import (
    ALPHAS,
    column_scale,
    hadamard,
    reading_heads,
    rotated,
    scaled,
    value_rows,
)
from fastgpt.scheme import Format, QuantizedTensor

__all__ = ["LayerWeights", "NormSite", "layer_index", "quantize_layer", "stored_in"]

# A transformation must lower the quick error by this share to be worth trying in full.
_LEAST_GAIN = 0.01


@dataclass(frozen=True)
class NormSite:
    """A norm gain that can be divided by a scale, and every weight that reads its output."""

    gain: str
    readers: tuple[str, ...]


@dataclass
class LayerWeights:
    """One layer between reading and rounding; changed in place by `quantize_layer`.

    Attributes:
        dense: name -> float32 values of every weight, bias and gain that may change.
        formats: name -> target format of the weights; None is kept.
        stored_dtypes: name -> type in which a gain or bias is stored.
        stats: name -> inputs of the weights that are searched.
        choices: name -> result of the searched weights.
        transforms: what was applied, in words, by the name of the reader.
    """

    dense: dict[str, Tensor]
    formats: Mapping[str, Format | None]
    stored_dtypes: Mapping[str, torch.dtype]
    stats: dict[str, InputStats]
    choices: dict[str, Choice] = field(default_factory=dict)
    transforms: dict[str, str] = field(default_factory=dict)

    def searched(self, names: Iterable[str]) -> list[str]:
        """Return those of the names whose codes are searched and whose inputs are known."""
        return [
            n
            for n in names
            if is_searched(self.formats.get(n)) and n in self.stats and self.stats[n].num_fit
        ]

    def fmt(self, name: str) -> Format:
        """Return the format of a weight that is quantized."""
        fmt = self.formats[name]
        assert fmt is not None
        return fmt


def quantize_layer(layer: LayerWeights, norms: Iterable[NormSite], heads: ValueHeads) -> None:
    """Fill `layer.choices` for every searched weight; `layer.dense` is what was rounded.

    A transformation stays only where it lowers the sum of its readers' held-out errors and leaves
    none of them above its own round-to-nearest error.
    """
    for site in norms:
        _scale_norm(layer, site)
    for name in [n for n in layer.dense if n.endswith(".down_proj.weight")]:
        _scale_gate(layer, name)
    for name in [n for n in layer.dense if n.endswith(".self_attn.o_proj.weight")]:
        _transform_values(layer, name, heads)
    names = [n for n in layer.dense if is_searched(layer.formats.get(n)) and n not in layer.choices]
    layer.choices.update(_choose(layer, {n: layer.dense[n] for n in names}, layer.stats))


def _choose(
    layer: LayerWeights, weights: Mapping[str, Tensor], stats: Mapping[str, InputStats]
) -> dict[str, Choice]:
    """Return the choices of weights; those of one input and one format are searched together."""
    groups: dict[tuple[int, Format, str | None], list[str]] = {}
    for name in weights:
        fmt = layer.fmt(name)
        seen = id(stats[name]) if name in stats else -len(groups) - 1
        groups.setdefault((seen, fmt, fmt.algorithm), []).append(name)
    choices: dict[str, Choice] = {}
    for (_, fmt, _), names in groups.items():
        joined = {name: weights[name] for name in names}
        choices.update(choose_joined(joined, fmt, stats.get(names[0])))
    return choices


def _is_auto(layer: LayerWeights, names: Iterable[str]) -> bool:
    return all(layer.fmt(name).algorithm == "auto" for name in names)


def _best_scale(layer: LayerWeights, readers: list[str]) -> Tensor | None:
    """Return the column scale of least quick error over the readers of one input; None for none."""
    stats = layer.stats[readers[0]]
    gram = stats.gram()
    weights = [layer.dense[n] for n in readers]
    fmts = [layer.fmt(n) for n in readers]
    plain = sum(quick_error(w, f, gram) for w, f in zip(weights, fmts, strict=True))
    best, least = None, plain * (1 - _LEAST_GAIN)
    for alpha in ALPHAS:
        scale = column_scale(weights, gram, alpha)
        tried = scaled(stats, scale).gram()
        error = sum(quick_error(w * scale, f, tried) for w, f in zip(weights, fmts, strict=True))
        if error < least:
            best, least = scale, error
    return best


def _keep_if_better(
    layer: LayerWeights, changed: dict[str, Tensor], stats: dict[str, InputStats], what: str
) -> bool:
    """Apply a transformation if every searched weight it changes is the better for it, in sum."""
    names = [n for n in changed if is_searched(layer.formats.get(n))]
    new = {n: layer.dense[n] for n in names if n not in layer.choices}
    layer.choices.update(_choose(layer, new, layer.stats))
    before = {n: layer.choices[n] for n in names}
    after = _choose(layer, {n: changed[n] for n in names}, {**layer.stats, **stats})
    is_better = sum(c.error for c in after.values()) < sum(c.error for c in before.values())
    if not is_better or any(after[n].error > before[n].nearest_error for n in names):
        return False
    layer.dense.update(changed)
    layer.stats.update(stats)
    for n in names:
        # Round-to-nearest of the untouched weight stays the yardstick.
        layer.choices[n] = replace(after[n], nearest_error=before[n].nearest_error)
        if n in stats:
            layer.transforms[n] = what
    return True


def stored_in(
    layer: LayerWeights, names: Iterable[str], fmt: Format | None
) -> dict[str, Tensor | QuantizedTensor]:
    """Return weights of a layer that is quantized as they would be stored in another format.

    The layer stays as it is: transformed for the formats it was quantized in.
    """
    dense = {name: layer.dense[name] for name in names}
    if fmt is None:
        return dict(dense)
    if not is_searched(fmt):
        return {name: round_tensor(weight, fmt, name) for name, weight in dense.items()}
    other = replace(layer, formats=dict.fromkeys(dense, fmt))
    return {name: c.stored for name, c in _choose(other, dense, layer.stats).items()}


def _scale_norm(layer: LayerWeights, site: NormSite) -> None:
    """Divide a norm's gain by a scale that its readers absorb."""
    searched = layer.searched(site.readers)
    if not searched or not _is_auto(layer, searched):
        return
    scale = _best_scale(layer, searched)
    if scale is None:
        return
    gain = layer.dense[site.gain]
    stored = (gain / scale).to(layer.stored_dtypes[site.gain]).float()
    if not bool(torch.isfinite(stored).all()) or bool(((stored == 0) & (gain != 0)).any()):
        return
    # What rounding the new gain loses goes into the readers with the scale itself.
    factor = torch.where(gain != 0, gain / stored, torch.ones_like(gain))
    changed = {n: layer.dense[n] * factor for n in site.readers}
    changed[site.gain] = stored
    seen = [n for n in site.readers if n in layer.stats]
    after = {id(stats): scaled(stats, factor) for stats in (layer.stats[n] for n in seen)}
    stats = {n: after[id(layer.stats[n])] for n in seen}
    _keep_if_better(layer, changed, stats, "scaled")


def _scale_gate(layer: LayerWeights, down: str) -> None:
    """Divide the rows of up_proj by a scale that down_proj absorbs."""
    up = down.replace(".down_proj.", ".up_proj.")
    if not layer.searched([down]) or not _is_auto(layer, [down]) or not _rounds(layer, up):
        return
    scale = _best_scale(layer, [down])
    if scale is None:
        return
    changed = {down: layer.dense[down] * scale, up: layer.dense[up] / scale.unsqueeze(1)}
    bias = up.replace(".weight", ".bias")
    if bias in layer.dense:
        changed[bias] = layer.dense[bias] / scale
    _keep_if_better(layer, changed, {down: scaled(layer.stats[down], scale)}, "scaled")


def _transform_values(layer: LayerWeights, out: str, heads: ValueHeads) -> None:
    """Scale or rotate attention's values; o_proj's columns undo it."""
    writer = out.replace("o_proj", heads.module)
    if not layer.searched([out]) or not _is_auto(layer, [out]) or not _rounds(layer, writer):
        return
    weight, stats, fmt = layer.dense[out], layer.stats[out], layer.fmt(out)
    rows = value_rows(heads, layer.dense[writer].shape[0], weight.device)
    bias = writer.replace(".weight", ".bias")
    gram = stats.gram()
    plain = quick_error(weight, fmt, gram)
    tried: list[tuple[float, dict[str, Tensor], InputStats, str]] = []

    sharing = heads.num_heads // heads.num_kv_heads
    for alpha in ALPHAS:
        # Heads that share values share their scale.
        raw = column_scale([weight], gram, alpha).log()
        per_value = raw.view(heads.num_kv_heads, sharing, heads.head_dim).mean(1).exp()
        scale = reading_heads(heads, per_value)
        after = scaled(stats, scale)
        changed = {out: weight * scale, writer: _rows_divided(layer.dense[writer], rows, per_value)}
        if bias in layer.dense:
            changed[bias] = _rows_divided(layer.dense[bias], rows, per_value)
        tried.append((quick_error(changed[out], fmt, after.gram()), changed, after, "scaled"))
    rotation = hadamard(heads.head_dim, weight.device)
    if rotation is not None and stats.is_full:
        after = rotated(stats, rotation)
        changed = {
            out: (weight.unflatten(1, (-1, heads.head_dim)) @ rotation).flatten(1),
            writer: _rows_rotated(layer.dense[writer], rows, rotation),
        }
        if bias in layer.dense:
            changed[bias] = _rows_rotated(layer.dense[bias], rows, rotation)
        tried.append((quick_error(changed[out], fmt, after.gram()), changed, after, "rotated"))
    if not tried:
        return
    error, changed, after, what = min(tried, key=lambda item: item[0])
    if error < plain * (1 - _LEAST_GAIN):
        _keep_if_better(layer, changed, {out: after}, what)


def _rows_divided(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    out = x.clone()
    factor = scale.flatten() if x.ndim == 1 else scale.flatten().unsqueeze(1)
    out[rows.flatten()] = x[rows.flatten()] / factor
    return out


def _rows_rotated(x: Tensor, rows: Tensor, rotation: Tensor) -> Tensor:
    out = x.clone()
    values = x[rows]  # [num_kv_heads, head_dim] or [num_kv_heads, head_dim, cols]
    if x.ndim == 1:
        out[rows.flatten()] = (values @ rotation).flatten()
    else:
        out[rows.flatten()] = (rotation @ values).flatten(0, 1)
    return out


def _rounds(layer: LayerWeights, name: str) -> bool:
    """Tell whether a weight is rounded anyway, so that changing its values costs nothing."""
    fmt = layer.formats.get(name)
    return fmt is not None and not fmt.is_plain and name in layer.dense


def layer_index(name: str) -> int | None:
    """Return the decoder layer a tensor belongs to."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return None if match is None else int(match[1])
