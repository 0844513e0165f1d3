"""What reaches the weights of one decoder layer: Gram matrices of their inputs, layer by layer.

The hidden states of all calibration tokens stay on the host between layers; one layer at a time is
built, watched, and let go, so the memory is one layer's whatever the model's depth.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.batch import Batch
from fastgpt.layers.attention import Workspace
from fastgpt.layers.kv_cache import LayerKV
from fastgpt.layers.linear import Projection
from fastgpt.layers.mla import MlaAttention
from fastgpt.layers.moe import MixtureOfExperts
from fastgpt.layers.norm import RmsNorm
from fastgpt.layers.rotary import cos_sin_table
from fastgpt.layers.weights import Source, WeightLoader
from fastgpt.memory import GPTMemoryPool
from fastgpt.models.decoder import load_head
from fastgpt.models.model import Layer
from fastgpt.models.spec import Family
from fastgpt.quant.host_states import HostStates
from fastgpt.quant.input_stats import InputStats
from fastgpt.quant.ranges import ActivationRanges

__all__ = ["HiddenStates"]

_CHUNK_TOKENS = 4096  # of one pass through a layer, at least one sequence
_CHUNK_VALUES = 1 << 23  # of hidden states in one pass on a GPU: narrow models wait for launches
_LOGITS = 1 << 25  # that are made together, at least one sequence
_BLOCK_SIZE = 32
_HELD_OUT = 4  # every fourth sequence is held out: used to choose, never to fit


class _Watched:
    """A projection that shows its input before it runs, or both when it has."""

    def __init__(
        self,
        inner: Projection,
        before: Callable[[Tensor], None] | None,
        after: Callable[[Tensor, Tensor], None] | None,
    ) -> None:
        self.inner = inner
        self.before = before
        self.after = after
        self.out_features = inner.out_features

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        if self.before is not None:
            self.before(x)
        y = self.inner(x, out=out)
        if self.after is not None:
            self.after(x, y)
        return y


class _WatchedNorm:
    """A norm that shows its output: what kv_b_proj reads, which attention absorbs elsewhere."""

    def __init__(self, inner: RmsNorm, show: Callable[[Tensor], None]) -> None:
        self.inner = inner
        self.show = show

    def __call__(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.show(y)
        return y


@dataclass
class _Watch:
    """Collects the inputs of the weights in `wanted`; weights of one projection share theirs."""

    wanted: frozenset[str]
    max_gram_cols: int
    stats: dict[str, InputStats] = field(default_factory=dict)
    held_out: bool = False

    def show(self, names: Sequence[str], x: Tensor) -> None:
        names = [name for name in names if name in self.wanted]
        if not names:
            return
        first = self.stats.get(names[0])
        if first is None:
            cols = x.shape[-1]
            first = InputStats.empty(cols, x.device, full=cols <= self.max_gram_cols)
        first.add(x.reshape(-1, x.shape[-1]), held_out=self.held_out)
        self.stats.update(dict.fromkeys(names, first))


class _WatchingLoader(WeightLoader):
    """Loads projections that show their inputs, and their outputs' range."""

    watch: _Watch | None
    ranges: ActivationRanges | None

    def linear(self, joined_name: str, parts: Any, in_features: int, **options: Any) -> Any:
        inner = super().linear(joined_name, parts, in_features, **options)
        names = [f"{name}.weight" for name, _ in parts]
        watch, ranges = self.watch, self.ranges
        return _Watched(
            inner,
            None if watch is None else lambda x: watch.show(names, x),
            None if ranges is None else lambda x, y: ranges.add(names, x, y),
        )


class HiddenStates:
    """The residual stream of all calibration tokens, and the layers that move it on.

    Args:
        kind: the model's family.
        config: its configuration.
        source: canonical name -> stored weight of the embedding.
        sequences: token ids; every fourth is held out.
        device: where layers run.
        dtype: of activations.
        pool: where a layer's weights lie while it runs; without one they come from torch.
    """

    def __init__(
        self,
        kind: Family,
        config: Any,
        source: Source,
        sequences: Sequence[Sequence[int]],
        device: torch.device,
        dtype: torch.dtype,
        pool: GPTMemoryPool | None = None,
    ) -> None:
        self.kind = kind
        self.config = config
        self.device = device
        self.dtype = dtype
        self._pool = pool
        longest = max(len(ids) for ids in sequences)
        self._cos_sin = cos_sin_table(config.rope, longest).to(device)
        limit = _CHUNK_TOKENS
        if device.type == "cuda":
            limit = max(limit, _CHUNK_VALUES // config.hidden_size)
        chunks = list(_chunks(sequences, limit))
        self._held_out = [held_out for _, held_out in chunks]
        self._groups = [
            list(_split(chunk, sequences, max(1, _LOGITS // config.vocab_size)))
            for chunk, _ in chunks
        ]
        self._lengths = [len(ids) for ids in sequences]
        self._batches = [_batch([sequences[i] for i in chunk], device) for chunk, _ in chunks]
        loader = self._loader(source, WeightLoader)
        shape = (config.vocab_size, config.hidden_size)
        embedding = loader.dense("model.embed_tokens.weight", shape)
        self._states = HostStates(
            (
                ops.embedding(
                    batch.token_ids,
                    embedding,
                    out=torch.empty(
                        (len(batch.token_ids), config.hidden_size), dtype=dtype, device=device
                    ),
                )
                for batch, _ in self._batches
            ),
            device,
        )

    def observe_layer(
        self, i: int, source: Source, wanted: Sequence[str], max_gram_cols: int
    ) -> dict[str, InputStats]:
        """Return what reaches the weights `wanted` of layer i; the states stay as they are."""
        watch = _Watch(frozenset(wanted), max_gram_cols)
        layer, norm = self._load(i, source, watch)
        for at, residual in self._states.visit():
            watch.held_out = self._held_out[at]
            self._move(at, residual, layer, norm)
        return watch.stats

    def advance(
        self,
        i: int,
        source: Source,
        others: Sequence[HiddenStates] = (),
        ranges: ActivationRanges | None = None,
    ) -> None:
        """Move the states, and those of `others`, through layer i with the weights of `source`.

        ranges: records what its linear layers read and write, and the states behind it.
        """
        layer, norm = self._load(i, source, None, ranges)
        for moved in (self, *others):
            for at, residual in moved._states.update():
                self._move(at, residual, layer, norm)
                if ranges is not None and moved is self:
                    ranges.add([f"model.layers.{i}"], residual)

    def fork(self) -> HiddenStates:
        """Return the same states as an object of their own."""
        other = copy.copy(self)
        other._states = self._states.fork()
        return other

    def observe_head(self, source: Source, name: str, max_gram_cols: int) -> InputStats:
        """Return what reaches the output matrix `name`: the final norm's output."""
        watch = _Watch(frozenset([name]), max_gram_cols)
        loader = self._loader(source, WeightLoader)
        norm = loader.norm("model.norm.weight", self.config.hidden_size, self.config.norm_eps)
        for at, states in self._states.visit():
            watch.held_out = self._held_out[at]
            watch.show([name], norm(states))
        return watch.stats[name]

    @property
    def groups(self) -> list[list[int]]:
        """The positions of the sequences whose logits are made together, in order."""
        return [group for groups in self._groups for group in groups]

    @property
    def is_held_out(self) -> Tensor:
        """Whether each position of `logits` is of a sequence held out of the search, bool."""
        return torch.cat(
            [
                torch.full((len(batch.token_ids),), held_out)
                for (batch, _), held_out in zip(self._batches, self._held_out, strict=True)
            ]
        )

    def logits(self, source: Source) -> Iterator[Tensor]:
        """Yield the next-token logits of each of the `groups`, [tokens, vocab] float32."""
        config, loader = self.config, self._loader(source, WeightLoader)
        norm = loader.norm("model.norm.weight", config.hidden_size, config.norm_eps)
        shape = (config.vocab_size, config.hidden_size)
        tied = config.tie_word_embeddings
        embedding = loader.dense("model.embed_tokens.weight", shape) if tied else torch.empty(0)
        head = load_head(loader, embedding, *shape, tied)
        for at, states in self._states.visit():
            lengths = [sum(self._lengths[i] for i in group) for group in self._groups[at]]
            for rows in norm(states).split(lengths):
                out = torch.empty((len(rows), shape[0]), dtype=torch.float32, device=self.device)
                yield head(rows, out=out)

    def _loader(self, source: Source, cls: type[WeightLoader]) -> WeightLoader:
        loader = cls(
            source,
            self.device,
            self.dtype,
            lambda shape, dtype, name: torch.empty(shape, dtype=dtype, device=self.device),
        )
        # What many rows lose must not depend on how long the measured sequences are.
        loader.fewest_eight_bit_rows = 1
        return loader

    def _load(
        self,
        i: int,
        source: Source,
        watch: _Watch | None,
        ranges: ActivationRanges | None = None,
    ) -> tuple[Layer, RmsNorm]:
        is_watched = watch is not None or ranges is not None
        loader = self._loader(source, _WatchingLoader if is_watched else WeightLoader)
        if isinstance(loader, _WatchingLoader):
            loader.watch, loader.ranges = watch, ranges
        if (pool := self._pool) is not None:
            loader.allocate = lambda shape, dtype, name: pool.allocate(shape, None, dtype)
        layer = self.kind.load_layer(self.config, i, loader, self._cos_sin, Workspace())
        name = f"model.layers.{i}"
        norm = loader.norm(
            f"{name}.input_layernorm.weight", self.config.hidden_size, self.config.norm_eps
        )
        if watch is not None and isinstance(layer.attention, MlaAttention):
            latent = f"{name}.self_attn.kv_b_proj.weight"
            watched: Any = _WatchedNorm(layer.attention.kv_norm, lambda x: watch.show([latent], x))
            layer.attention.kv_norm = watched
        if is_watched and isinstance(layer.feed_forward, MixtureOfExperts):
            _watch_experts(layer.feed_forward, f"{name}.mlp.experts", watch, ranges)
        return layer, norm

    def _move(self, at: int, residual: Tensor, layer: Layer, norm: RmsNorm) -> None:
        """Run a layer on the states of one chunk, which become those behind it."""
        batch, num_blocks = self._batches[at]
        shape = (num_blocks, *self.kind.kv_layout(self.config).block_shape(_BLOCK_SIZE)[1:])
        kv = LayerKV(torch.zeros(shape, dtype=self.dtype, device=self.device))
        x = layer.post_norm.add(layer.attention(norm(residual), batch, kv), residual)
        residual += layer.feed_forward(x)


def _watch_experts(
    experts: MixtureOfExperts, name: str, watch: _Watch | None, ranges: ActivationRanges | None
) -> None:
    """Show every expert the rows that are routed to it; ranges are of all experts together."""

    def product(x: Tensor, weight: Any, rows: Tensor, offsets: Tensor, per_token: int) -> Tensor:
        modules = ("gate_proj", "up_proj") if weight is experts.gate_up else ("down_proj",)
        if watch is not None:
            ends = offsets.tolist()
            for e, (first, last) in enumerate(itertools.pairwise(ends)):
                names = [f"{name}.{e}.{module}.weight" for module in modules]
                if last > first:
                    watch.show(names, x[rows[first:last].long() // per_token])
        y = ops.grouped_linear(x, weight, rows, offsets, per_token)
        if ranges is not None:
            ranges.add([f"{name}.*.{module}.weight" for module in modules], x, y)
        return y

    experts.product = product


def _chunks(
    sequences: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[tuple[list[int], bool]]:
    """Yield positions of sequences that fit one pass, and whether they are held out."""
    for held_out in (False, True):
        members = [i for i in range(len(sequences)) if (i % _HELD_OUT == _HELD_OUT - 1) == held_out]
        for chunk in _split(members, sequences, max_tokens):
            yield chunk, held_out


def _split(
    members: Sequence[int], sequences: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[list[int]]:
    """Yield runs of members of so many tokens in all, at least one member each."""
    run: list[int] = []
    count = 0
    for i in members:
        if run and count + len(sequences[i]) > max_tokens:
            yield run
            run, count = [], 0
        run.append(i)
        count += len(sequences[i])
    if run:
        yield run


def _flat(chunk: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for ids in chunk for token in ids], dtype=torch.int64)


def _batch(chunk: Sequence[Sequence[int]], device: torch.device) -> tuple[Batch, int]:
    """Return whole sequences as one batch, and the cache blocks it writes."""
    lengths = [len(ids) for ids in chunk]
    blocks = [-(-length // _BLOCK_SIZE) for length in lengths]
    tables = torch.zeros((len(chunk), max(blocks)), dtype=torch.int32)
    slots, first = [], 0
    for row, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        tables[row, :count] = torch.arange(first, first + count, dtype=torch.int32)
        slots.append(torch.arange(length) + first * _BLOCK_SIZE)
        first += count
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    batch = Batch(
        token_ids=_flat(chunk).to(device),
        positions=torch.cat([torch.arange(length) for length in lengths]).to(device),
        slot_mapping=torch.cat(slots).to(device),
        block_tables=tables.to(device),
        cu_seqlens_q=torch.nn.functional.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0)).to(
            device
        ),
        seq_lens=seq_lens.to(device),
        max_seqlen_q=max(lengths),
        max_seq_len=max(lengths),
        logits_indices=torch.arange(sum(lengths), device=device),
    )
    return batch, first
