"""Linear layers, alone or several that read the same input joined into one."""

from collections.abc import Sequence

from torch import Tensor

from fastgpt import ops
from fastgpt.ops import ArrangedWeight, scratch

__all__ = ["Linear", "Projection", "SplitLinear"]


class Linear:
    """x @ weight.T + bias with one weight, dense or arranged for the backend."""

    __slots__ = ("bias", "out_features", "weight")

    def __init__(
        self, weight: Tensor | ArrangedWeight, bias: Tensor | None, out_features: int
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features = out_features

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return [num_tokens, out_features] of x [num_tokens, in_features], in out if given."""
        return ops.linear(x, self.weight, self.bias, out=out)


class SplitLinear:
    """Linear layers of different formats over one input; each fills its columns of one output."""

    __slots__ = ("columns", "out_features", "parts")

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = tuple(parts)
        self.columns: list[tuple[int, int]] = []
        start = 0
        for part in self.parts:
            self.columns.append((start, part.out_features))
            start += part.out_features
        self.out_features = start

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return [num_tokens, out_features] of x [num_tokens, in_features], in out if given."""
        if out is None:
            out = scratch.empty((x.shape[0], self.out_features), x.dtype, x.device)
        for part, (start, width) in zip(self.parts, self.columns, strict=True):
            part(x, out=out.narrow(1, start, width))
        return out


Projection = Linear | SplitLinear
