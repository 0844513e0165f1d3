"""Quantizing a model of a known family: every parameter has a role; norms fold into readers.

A binary norm stores two values per group of 128 gains. What that loses, gain / stored gain, is
multiplied in float32 into the input columns of the weights that read the norm's output, before they
are rounded: y = W (γ ⊙ x) = (W diag(γ / γ̂)) (γ̂ ⊙ x), so only the rounding of W changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.errors import CheckpointError
from fastgpt.layers.weights import Source
from fastgpt.memory import GPTMemoryPool
from fastgpt.models.placement import resolve_dtype
from fastgpt.models.registry import family
from fastgpt.quant.host import on_host
from fastgpt.quant.input_stats import InputStats
from fastgpt.quant.layerwise import LayerWeights, NormSite, layer_index, quantize_layer
from fastgpt.quant.observe import HiddenStates
from fastgpt.quant.plan import PlannedTensor, blocks_of
from fastgpt.quant.ranges import ActivationRanges
from fastgpt.quant.read_ahead import ReadAhead
from fastgpt.quant.report import Report, squared_errors
from fastgpt.quant.rounding import binary_residual, is_finite, round_tensor
from fastgpt.quant.search import Choice, choose, is_searched
from fastgpt.scheme import PLAIN_DTYPES, Format, QuantizedTensor

__all__ = ["LayerSearch", "dense_values", "quantize_family"]

Stored = torch.Tensor | QuantizedTensor

# Of input statistics on the device for one layer; wider inputs than fit keep diagonals only, so
# their codes are searched by scale and not by GPTQ. It holds 18,944 columns, not the 28,672 of a
# 70B model's down_proj: with their factors in float64 those would take 20 GB.
_GRAM_BYTES = 4 << 30


def quantize_family(
    checkpoint: Checkpoint,
    planned: list[PlannedTensor],
    report: Report,
    device: torch.device | None,
    sequences: Sequence[Sequence[int]] = (),
    *,
    pool: GPTMemoryPool | None = None,
    finished: Callable[[str], Stored | None] = lambda name: None,
    ranges: ActivationRanges | None = None,
) -> Iterator[tuple[str, Stored]]:
    """Yield name and stored form of every planned tensor; fills `report` as it goes.

    One weight at a time is on `device` (None: where it is), or one decoder layer at a time where
    `sequences`, the token ids of calibration texts, let codes be searched; results are on the CPU.

    Args:
        checkpoint: the source.
        planned: from `plan_family`.
        report: an entry is added for every tensor that is not finished.
        device: where the arithmetic runs.
        sequences: token ids; every fourth is held out.
        pool: of the device, for the weights that are on it; its own without one.
        finished: name -> stored form of what a run before this one made, None for what it did not;
            it knows all tensors of a block (see `blocks_of`) or none.
        ranges: records the activations of the calibration tokens in the quantized layers.

    Raises:
        CheckpointError: a weight has another shape than its role says, or NaN or infinite values.
        ConfigError: a value does not fit its format.
    """
    with ExitStack() as stack:
        read = checkpoint.read
        if device is not None and device.type == "cuda":
            matrices = [item.name for item in planned if _goes_to_device(item)]
            read = stack.enter_context(ReadAhead(read, matrices)).read
        if not sequences or not any(is_searched(item.format) for item in planned):
            norms, residuals = _binary_norms(checkpoint, planned)
            pool = pool or GPTMemoryPool(device or "cpu")
            one = partial(_one, checkpoint, read, norms, residuals, report, device, pool)
            for item in planned:
                stored = finished(item.name)
                yield item.name, one(item) if stored is None else stored
            return
        search = LayerSearch(
            checkpoint, planned, report, device, sequences, pool, ranges, read=read
        )
        yield from _searched(search, planned, finished)


def _goes_to_device(item: PlannedTensor) -> bool:
    return len(item.shape) > 1 and item.format is not None


def _searched(
    search: LayerSearch, planned: list[PlannedTensor], finished: Callable[[str], Stored | None]
) -> Iterator[tuple[str, Stored]]:
    """Yield name and stored form of every tensor of a model whose layers are searched."""
    embedding: dict[str, Stored] = {}
    for items in blocks_of(planned):
        index = layer_index(items[0].name)
        if index is not None and index < search.config.num_layers:
            if index == 0:
                search.start(
                    lambda n: embedding[n] if n in embedding else search.checkpoint.read(n)
                )
            yield from search.layer(index, items, finished)
            continue
        for item in items:
            stored = finished(item.name)
            if stored is None:
                is_head = item.name == "lm_head.weight" and is_searched(item.format)
                stored = search.alone(item, search.head_stats(item) if is_head else None)
            if item.name == "model.embed_tokens.weight":
                embedding[item.name] = stored
            _release(search.device)
            yield item.name, stored


def _release(device: torch.device) -> None:
    """Give back what torch keeps: blocks of the size of an embedding fit nothing in a layer."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _binary_norms(
    checkpoint: Checkpoint, planned: list[PlannedTensor]
) -> tuple[dict[str, QuantizedTensor], dict[str, torch.Tensor]]:
    """Return the norms stored in two levels, and by reader what they lose."""
    norms: dict[str, QuantizedTensor] = {}
    residuals: dict[str, torch.Tensor] = {}
    for item in planned:
        if item.format is None or not item.format.folds_residual:
            continue
        gain = dense_values(checkpoint.read(item.name), item.name).to(torch.float32)
        stored = round_tensor(gain, item.format, item.name)
        assert isinstance(stored, QuantizedTensor)
        norms[item.name] = stored
        residual = binary_residual(gain, stored)
        residuals.update(dict.fromkeys(item.consumers, residual))
    return norms, residuals


def _read(read: Source, item: PlannedTensor) -> Stored:
    source = read(item.name)
    if tuple(source.shape) != item.shape:
        raise CheckpointError(
            f"weight {item.name!r} has shape {tuple(source.shape)}; "
            f"the configuration asks for {item.shape}"
        )
    return source


def _one(
    checkpoint: Checkpoint,
    read: Source,
    norms: dict[str, QuantizedTensor],
    residuals: dict[str, torch.Tensor],
    report: Report,
    device: torch.device | None,
    pool: GPTMemoryPool,
    item: PlannedTensor,
    stats: InputStats | None = None,
) -> Stored:
    """Return the stored form of one tensor on its own."""
    source = _read(read, item)
    fold = residuals.get(item.name)
    if item.name in norms:
        _count(report, checkpoint, item, norms[item.name])  # the fold makes up for its error
        return norms[item.name]
    if item.format is None and fold is None:
        if isinstance(source, torch.Tensor):
            _check_finite(source, item)
        _count(report, checkpoint, item, source)
        return source
    wanted = dense_values(source, item.name)
    if device is not None and device.type != "cpu":
        place = pool.allocate(wanted.shape, None, wanted.dtype)
        wanted = place.copy_(wanted, non_blocking=True)
    if fold is not None:
        wanted = wanted.to(torch.float32) * fold.to(wanted.device)
    fmt = item.format or _kept_format(source, item)
    if is_searched(fmt):
        _check_finite(wanted, item)
        choice = choose(wanted, fmt, stats, item.name)
        _count(report, checkpoint, item, choice.stored, wanted, choice)
        return on_host(choice.stored)
    result = round_tensor(wanted, fmt, item.name)
    _count(report, checkpoint, item, result, wanted)
    return on_host(result)


class LayerSearch:
    """Quantizes decoder layers in order while the calibration tokens pass through them.

    Attributes:
        config: the family's configuration.
        norms: the norms that are stored in two levels.
        residuals: by reader, what it absorbs of them.
        observed: names whose inputs are watched though their codes are not searched.
        states: the tokens behind the layers that are done, all of them quantized.
        weights: the last layer between reading and rounding.
    """

    states: HiddenStates
    weights: LayerWeights

    def __init__(
        self,
        checkpoint: Checkpoint,
        planned: list[PlannedTensor],
        report: Report,
        device: torch.device | None,
        sequences: Sequence[Sequence[int]],
        pool: GPTMemoryPool | None = None,
        ranges: ActivationRanges | None = None,
        observed: Container[str] = (),
        *,
        read: Source | None = None,
    ) -> None:
        assert checkpoint.config is not None
        self.observed = observed
        self.device = device or torch.device("cpu")
        self.pool = pool or GPTMemoryPool(self.device)
        self.ranges = ranges
        self.kind = family(checkpoint.config)
        self.config = self.kind.parse_config(checkpoint.config)
        self.checkpoint = checkpoint
        self._read = read or checkpoint.read
        self.norms, self.residuals = _binary_norms(checkpoint, planned)
        self.report = report
        self.sequences = sequences
        self._one = partial(
            _one, checkpoint, self._read, self.norms, self.residuals, report, device, self.pool
        )

    def start(self, source: Source) -> None:
        """Look the tokens up in the embedding of `source`, as it is stored."""
        assert self.checkpoint.config is not None
        dtype = resolve_dtype("auto", self.device, self.checkpoint.config)
        if self.device.type == "cpu":
            dtype = torch.float32
        self.states = HiddenStates(
            self.kind, self.config, source, self.sequences, self.device, dtype, self.pool
        )
        _release(self.device)

    def alone(self, item: PlannedTensor, stats: InputStats | None = None) -> Stored:
        """Return the stored form of a tensor outside the layers."""
        return self._one(item, stats)

    def layer(
        self,
        index: int,
        items: list[PlannedTensor],
        finished: Callable[[str], Stored | None] = lambda name: None,
    ) -> Iterator[tuple[str, Stored]]:
        """Yield the stored tensors of one decoder layer, in the order of `items`."""
        stored = {item.name: finished(item.name) for item in items}
        made = {name: value for name, value in stored.items() if value is not None}
        if len(made) != len(items):
            made = self._quantized(index, items)
        self.states.advance(index, made.__getitem__, ranges=self.ranges)
        for item in items:
            yield item.name, on_host(made[item.name])

    def _quantized(self, index: int, items: list[PlannedTensor]) -> dict[str, Stored]:
        """Return the stored tensors of one layer, on the device."""
        sources = {item.name: _read(self._read, item) for item in items}
        dense: dict[str, torch.Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        for item in items:
            source = sources[item.name]
            if item.name in self.norms:
                continue
            value = self._placed(dense_values(source, item.name), item.name)
            _check_finite(value, item)
            fold = self.residuals.get(item.name)
            dense[item.name] = value if fold is None else value.mul_(fold.to(self.device))
            fmt = item.format or _kept_format(source, item)
            dtypes[item.name] = PLAIN_DTYPES.get(fmt.name, torch.float32)
        work = LayerWeights(dense, {item.name: item.format for item in items}, dtypes, {})
        self.weights = work
        before = dict(work.dense)

        def read_before(name: str) -> Stored:
            return self.norms[name] if name in self.norms else before[name]

        searched = [item.name for item in items if is_searched(item.format)]
        wanted = [i.name for i in items if is_searched(i.format) or i.name in self.observed]
        if wanted:
            work.stats = self.states.observe_layer(
                index, read_before, wanted, _gram_limit(items, wanted)
            )
        if searched:
            quantize_layer(work, self._norm_sites(items), self.kind.value_heads(self.config))
        stored = {i.name: self._store(i, sources[i.name], work, before) for i in items}
        # What is stored as it was placed lies where the next layer comes.
        placed = {value.data_ptr() for value in before.values()}
        return {
            name: value.clone()
            if isinstance(value, torch.Tensor) and value.data_ptr() in placed
            else value
            for name, value in stored.items()
        }

    def _placed(self, value: torch.Tensor, name: str) -> torch.Tensor:
        """Return a weight as float32 on the device, in memory that every layer uses anew."""
        place = self.pool.allocate(value.shape, _in_any_layer(name), torch.float32)
        # Half the bytes travel when the type changes over there.
        return place.copy_(value.to(self.device, non_blocking=True))

    def head_stats(self, item: PlannedTensor) -> InputStats:
        """Return what reaches the output matrix."""
        norm: Stored = self.norms.get("model.norm.weight") or self.checkpoint.read(
            "model.norm.weight"
        )
        limit = _gram_limit([item], [item.name])
        return self.states.observe_head(lambda _: norm, item.name, limit)

    def _norm_sites(self, items: list[PlannedTensor]) -> list[NormSite]:
        """Return the norms of a layer whose every reader is rounded anyway or kept in float32."""
        sites = []
        for item in items:
            is_plain = item.format is None or item.format.is_plain
            if not item.consumers or not is_plain:
                continue
            readers = [i for i in items if i.name in item.consumers]
            if all(
                i.role == "kept" or (i.format is not None and not i.format.is_plain)
                for i in readers
            ):
                sites.append(NormSite(item.name, tuple(i.name for i in readers)))
        return sites

    def _store(
        self,
        item: PlannedTensor,
        source: Stored,
        work: LayerWeights,
        before: dict[str, torch.Tensor],
    ) -> Stored:
        if item.name in self.norms:
            _count(self.report, self.checkpoint, item, self.norms[item.name])
            return self.norms[item.name]
        value = work.dense[item.name]
        is_changed = value is not before[item.name] or item.name in self.residuals
        choice = work.choices.get(item.name)
        if choice is not None:
            how = work.transforms.get(item.name)
            _count(self.report, self.checkpoint, item, choice.stored, value, choice, how)
            return choice.stored
        if item.format is None and not is_changed:
            _count(self.report, self.checkpoint, item, source)
            return source
        fmt = item.format or _kept_format(source, item)
        result = round_tensor(value, fmt, item.name)
        _count(self.report, self.checkpoint, item, result, value)
        return result


def _in_any_layer(name: str) -> str:
    return re.sub(r"^model\.layers\.\d+\.", "layer.", name)


def _gram_limit(items: list[PlannedTensor], wanted: list[str]) -> int:
    """Return the most columns whose Gram matrices are kept whole, within _GRAM_BYTES a layer."""
    # Weights of one input share theirs; experts do not share between experts.
    inputs: dict[tuple[str, int], None] = {}
    for item in items:
        if item.name in wanted:
            group = re.sub(r"\.(gate|up|q|k|v|q_a|kv_a)_proj(_with_mqa)?\.weight$", "", item.name)
            inputs[group, item.shape[-1]] = None
    total, limit = 0, 0
    widths = sorted(cols for _, cols in inputs)
    for cols in widths:
        total += 2 * 4 * cols * cols
        if total > _GRAM_BYTES:
            break
        limit = cols
    else:
        return max(widths, default=0)
    return limit if widths.count(limit) == 1 else limit - 1


def _kept_format(source: Stored, item: PlannedTensor) -> Format:
    """Return how a kept weight is stored after a fold: small protected ones lose nothing."""
    if item.role == "kept":
        return Format("fp32")
    plain = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if isinstance(source, QuantizedTensor):
        return source.format
    return Format(plain.get(source.dtype, "fp32"))


def dense_values(source: Stored, name: str) -> torch.Tensor:
    """Return a stored weight as floating-point numbers.

    Raises:
        CheckpointError: it holds integers.
    """
    if isinstance(source, QuantizedTensor):
        return source.dequantize(torch.float32)
    if not source.is_floating_point():
        raise CheckpointError(f"weight {name!r} is {source.dtype}, not floating point")
    return source


def _check_finite(source: torch.Tensor, item: PlannedTensor) -> None:
    if source.is_floating_point() and not is_finite(source):
        raise CheckpointError(f"{item.name} holds NaN or infinite values")


def _count(
    report: Report,
    checkpoint: Checkpoint,
    item: PlannedTensor,
    result: Stored,
    wanted: torch.Tensor | None = None,
    choice: Choice | None = None,
    transform: str | None = None,
) -> None:
    squared_error = squared_norm = 0.0
    if wanted is not None:
        squared_error, squared_norm = squared_errors(result, wanted)
    report.add(
        item.name,
        role=item.role,
        fmt=_format_name(result),
        num_values=torch.Size(item.shape).numel(),
        before_bytes=checkpoint.nbytes(item.name),
        after_bytes=result.nbytes,
        squared_error=squared_error,
        squared_norm=squared_norm,
    )
    if choice is not None:
        report.add_choice(
            item.name,
            algorithm=choice.algorithm,
            transform=transform,
            error=choice.error,
            nearest_error=choice.nearest_error,
            on_outputs=choice.on_outputs,
        )


def _format_name(result: Stored) -> str:
    if isinstance(result, QuantizedTensor):
        return str(result.format)
    plain: dict[Any, str] = {
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
    }
    return plain.get(result.dtype, str(result.dtype).removeprefix("torch."))
