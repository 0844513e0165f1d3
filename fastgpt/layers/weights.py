"""Streaming weights from a checkpoint into a model's memory, one tensor at a time.

A source tensor is a view of a mapped file. It is checked (shape, no NaN or infinity), copied into
memory that the caller's `allocate` gives, arranged for the backend's kernels, and let go before the
next one is read: the host never holds more than the model, one shard and one joined weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import CheckpointError, UnsupportedFormat
from fastgpt.layers.linear import Linear, Projection, SplitLinear, check_activations
from fastgpt.layers.norm import RmsNorm
from fastgpt.scheme import BLOCK, PLAIN_DTYPES, Format, QuantizedTensor

__all__ = ["Allocate", "Source", "WeightLoader"]

Stored = Tensor | QuantizedTensor
Source = Callable[[str], Stored]
Allocate = Callable[[tuple[int, ...], torch.dtype, str], Tensor]

_DENSE_FORMATS = {dtype: name for name, dtype in PLAIN_DTYPES.items()}


class WeightLoader:
    """Reads, checks and places the weights of one model.

    Args:
        source: canonical name -> stored weight; raises CheckpointError for an unknown name.
        device: where the model runs.
        dtype: type of its activations.
        allocate: (shape, dtype, name) -> uninitialized tensor on `device`.

    Attributes:
        fewest_eight_bit_rows: rows of x that a layer rounds to eight bits, where its format says
            so; None: those that gain from it.
    """

    def __init__(
        self, source: Source, device: torch.device, dtype: torch.dtype, allocate: Allocate
    ) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.allocate = allocate
        self.fewest_eight_bit_rows: int | None = None

    def read(self, name: str, shape: tuple[int, ...]) -> Stored:
        """Return the stored weight after checking its shape and values.

        Raises:
            CheckpointError: if it is missing, of another shape, or holds NaN or infinity.
        """
        stored = self.source(name)
        if tuple(stored.shape) != shape:
            raise CheckpointError(
                f"weight {name!r} has shape {tuple(stored.shape)}; config.json asks for {shape}"
            )
        parts = {"": stored} if isinstance(stored, Tensor) else stored.parts
        for suffix, part in parts.items():
            _check_finite(part, f"{name} ({suffix})" if suffix else name)
        return stored

    def dense(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return one weight as a plain tensor on the device, dequantized if need be.

        dtype: of the result; by default the stored one where kernels take it as it is.
        """
        stored = self.read(name, shape)
        dtype = dtype or self.dense_dtype(stored)
        tensor = self.allocate(shape, dtype, name)
        tensor.copy_(_dense(stored))
        return tensor

    def place_table(self, name: str, table: Tensor) -> Tensor:
        """Return a computed table in the model's memory."""
        return self.allocate(tuple(table.shape), table.dtype, name).copy_(table)

    def norm(self, name: str, size: int, eps: float) -> RmsNorm:
        """Return the normalization with the gain `name`, [size]; quantized gains become float32."""
        return RmsNorm(self.dense(name, (size,)), eps)

    def linear(
        self,
        joined_name: str,
        parts: Sequence[tuple[str, int]],
        in_features: int,
        *,
        biases: Collection[str] = (),
    ) -> Projection:
        """Return one projection of the weights in `parts`, stacked along the output.

        Args:
            joined_name: name of the joined weight's memory.
            parts: (module name, out_features) of each weight, without ".weight".
            in_features: columns of every weight.
            biases: the module names that have a "<module name>.bias"; the others count as 0.

        Weights of one format become one matrix; otherwise each keeps its own.

        Raises:
            CheckpointError: as `read`.
            UnsupportedFormat: if the device cannot multiply the activations a weight asks for.
        """
        stored = [self.read(f"{name}.weight", (rows, in_features)) for name, rows in parts]
        if self._can_join(stored):
            total = sum(rows for _, rows in parts)
            weight = self._place(joined_name, stored)
            bias = self._biases(joined_name, parts, biases)
            activations = self._activations(stored[0])
            return Linear(weight, bias, total, activations, self.fewest_eight_bit_rows)
        split = []
        for (name, rows), item in zip(parts, stored, strict=True):
            bias = self._biases(name, [(name, rows)], biases)
            activations = self._activations(item)
            placed = self._place(name, [item])
            split.append(Linear(placed, bias, rows, activations, self.fewest_eight_bit_rows))
        return SplitLinear(split)

    def _activations(self, stored: Stored) -> str:
        """Return what a weight is multiplied with; raises UnsupportedFormat if it cannot be."""
        if isinstance(stored, Tensor):
            return "16bit"
        check_activations(stored.format.activations, self.device)
        return stored.format.activations

    def experts(
        self, joined_name: str, experts: Sequence[Sequence[str]], rows: int, in_features: int
    ) -> Tensor | ops.ArrangedWeight:
        """Return the stack of all experts' weights, [num_experts, parts * rows, in_features].

        Args:
            joined_name: name of the stack's memory.
            experts: for each expert the module names of its weights, stacked along the output.
            rows: out_features of every single weight.

        Raises:
            UnsupportedFormat: if the experts of one layer do not share a format.
        """
        first = self.read(f"{experts[0][0]}.weight", (rows, in_features))
        stack = _ExpertStack(self, joined_name, len(experts))
        for names in experts:
            stored = [self.read(f"{name}.weight", (rows, in_features)) for name in names]
            for name, item in zip(names, stored, strict=True):
                if self._kind(item) != self._kind(first) or not self._can_join(stored):
                    raise UnsupportedFormat(
                        f"{name}.weight is {_describe(item)} of {rows} rows beside "
                        f"{_describe(first)}; the experts of one layer share one format, and "
                        f"block scales need rows in multiples of {BLOCK}"
                    )
            stack.append(stored)
        return stack.weight()

    def _biases(
        self, joined_name: str, parts: Sequence[tuple[str, int]], biases: Collection[str]
    ) -> Tensor | None:
        """Return the biases of the parts, joined, float32 (exact for every stored type)."""
        if not any(name in biases for name, _ in parts):
            return None
        total = sum(rows for _, rows in parts)
        joined = self.allocate((total,), torch.float32, f"{joined_name}.bias").zero_()
        start = 0
        for name, rows in parts:
            if name in biases:
                joined[start : start + rows].copy_(_dense(self.read(f"{name}.bias", (rows,))))
            start += rows
        return joined

    def place(
        self, stored: Sequence[Stored], allocate: Allocate, dtype: torch.dtype | None = None
    ) -> Tensor | ops.ArrangedWeight:
        """Return weights of one kind, stacked along the rows, in the backend's layout.

        allocate: (shape, dtype, suffix) -> memory of one part.
        dtype: of weights that are not quantized; by default see dense_dtype.
        """
        first = stored[0]
        if isinstance(first, Tensor):
            return self._place_dense(
                [_dense(item) for item in stored], dtype or self.dense_dtype(first), allocate
            )
        parts = [item.parts for item in stored if isinstance(item, QuantizedTensor)]
        joined = {
            suffix: torch.cat([part[suffix] for part in parts]).to(self.device)
            for suffix in parts[0]
        }
        return ops.arrange(
            joined["packed"],
            joined["scale"],
            joined.get("zero_point"),
            format=first.format.name,
            in_features=first.shape[1],
            group_size=first.format.group_size or 0,
            allocate=allocate,
        )

    def _place_dense(
        self, weights: Sequence[Tensor], dtype: torch.dtype, allocate: Allocate
    ) -> Tensor | ops.ArrangedWeight:
        """Return dense weights as one: arranged on the CPU, row-major on a GPU.

        The CPU kernels would pack a row-major weight anew at every product; a GPU's read it.
        """
        shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
        if self.device.type != "cpu":
            joined = allocate(shape, dtype, "weight")
        elif len(weights) == 1 and weights[0].dtype == dtype:
            return self.arrange_dense(weights[0], allocate)
        else:
            joined = torch.empty(shape, dtype=dtype)
        start = 0
        for weight in weights:
            joined[start : start + weight.shape[0]].copy_(weight)
            start += weight.shape[0]
        return joined if self.device.type != "cpu" else self.arrange_dense(joined, allocate)

    def arrange_dense(self, weight: Tensor, allocate: Allocate) -> ops.ArrangedWeight:
        """Return a dense weight, or a stack of them, in the kernels' layout.

        allocate: (shape, dtype, suffix) -> memory of one part.
        """
        return ops.arrange(weight, format=_DENSE_FORMATS[weight.dtype], allocate=allocate)

    def stack(self, name: str, weight: Tensor) -> Tensor | ops.ArrangedWeight:
        """Return computed weights [num_heads, m, k] as batched_linear takes them."""
        if self.device.type == "cpu":
            return self.arrange_dense(weight.contiguous(), self._named(name))
        return self.allocate(tuple(weight.shape), weight.dtype, f"{name}.weight").copy_(weight)

    def tied_head(self, embedding: Tensor) -> Linear:
        """Return the embedding as output projection; the CPU kernels need their own copy."""
        weight: Tensor | ops.ArrangedWeight = embedding
        if self.device.type == "cpu":
            weight = self.arrange_dense(embedding, self._named("lm_head"))
        return Linear(weight, None, embedding.shape[0])

    def _named(self, joined_name: str) -> Allocate:
        """Return `allocate` for the parts of one weight."""
        return lambda shape, dtype, part: self.allocate(shape, dtype, f"{joined_name}.{part}")

    def _place(self, joined_name: str, stored: Sequence[Stored]) -> Tensor | ops.ArrangedWeight:
        return self.place(stored, self._named(joined_name))

    def router(self, name: str, num_experts: int, in_features: int) -> Linear:
        """Return a router in its stored type: what it decides is not to be rounded."""
        stored = self.read(f"{name}.weight", (num_experts, in_features))
        dtype = stored.dtype if isinstance(stored, Tensor) else torch.float32
        return Linear(self.place([stored], self._named(name), dtype), None, num_experts)

    def _can_join(self, stored: Sequence[Stored]) -> bool:
        """Tell whether weights can be one matrix: one kind, no scale block across a border."""
        if len({self._kind(item) for item in stored}) != 1:
            return False
        first = stored[0]
        if isinstance(first, QuantizedTensor) and first.format.scale == "block":
            return all(item.shape[0] % BLOCK == 0 for item in stored[:-1])
        return True

    def _kind(self, stored: Stored) -> Format | torch.dtype:
        """Return what two weights must share to be one matrix."""
        return self.dense_dtype(stored) if isinstance(stored, Tensor) else stored.format

    def dense_dtype(self, stored: Stored) -> torch.dtype:
        """Return the type a weight runs in when it is not quantized.

        Kernels take any 16-bit weight with any activations, so such a weight stays as stored;
        bfloat16 becomes float16 in a float16 model, whose devices lack bfloat16 (7.5).
        """
        if isinstance(stored, QuantizedTensor):
            return torch.float32 if len(stored.shape) == 1 else self.dtype
        if stored.dtype in (torch.float16, torch.bfloat16) and self.dtype != torch.float16:
            return stored.dtype
        if len(stored.shape) == 1 and stored.dtype == torch.float32:
            return torch.float32
        return self.dtype


class _ExpertStack:
    """Weights of a layer's experts, placed one expert at a time in memory for all of them."""

    def __init__(self, loader: WeightLoader, joined_name: str, num_experts: int) -> None:
        self.loader = loader
        self.joined_name = joined_name
        self.num_experts = num_experts
        self.num_placed = 0
        self.parts: dict[str, Tensor] = {}
        self.last: Tensor | ops.ArrangedWeight | None = None

    def append(self, stored: Sequence[Stored]) -> None:
        """Place the next expert's weights, joined along the rows."""
        self.last = self.loader.place(stored, self._part)
        self.num_placed += 1

    def _part(self, shape: tuple[int, ...], dtype: torch.dtype, suffix: str) -> Tensor:
        if suffix not in self.parts:
            self.parts[suffix] = self.loader.allocate(
                (self.num_experts, *shape), dtype, f"{self.joined_name}.{suffix}"
            )
        return self.parts[suffix][self.num_placed]

    def weight(self) -> Tensor | ops.ArrangedWeight:
        """Return the complete stack."""
        if self.last is not None and not isinstance(self.last, Tensor):
            return replace(
                self.last,
                num_weights=self.num_experts,
                packed=self.parts["packed"],
                scale=self.parts.get("scale"),
                zero_point=self.parts.get("zero_point"),
            )
        return self.parts["weight"]


def _dense(stored: Stored) -> Tensor:
    """Return a stored weight as floating-point numbers."""
    return stored if isinstance(stored, Tensor) else stored.dequantize(torch.float32)


def _describe(stored: Stored) -> str:
    return str(stored.dtype) if isinstance(stored, Tensor) else str(stored.format)


def _check_finite(part: Tensor, name: str) -> None:
    """Raise CheckpointError if a float tensor holds NaN or infinity; one pass, no copy."""
    if part.numel() == 0 or not part.is_floating_point():
        return
    if part.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise CheckpointError(f"weight {name!r} is {part.dtype} without a scale")
    low, high = torch.aminmax(part)  # NaN propagates
    if not bool(torch.isfinite(high - low)):
        raise CheckpointError(
            f"weight {name!r} holds NaN or infinity; the file is damaged or training diverged"
        )
