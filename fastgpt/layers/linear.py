"""Linear layers, alone or several that read the same input joined into one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import UnsupportedFormat
from fastgpt.ops import ArrangedWeight, scratch

__all__ = ["Linear", "Projection", "SplitLinear", "check_activations", "multiply"]


def check_activations(activations: str, device: torch.device) -> None:
    """Raise UnsupportedFormat if `device` cannot multiply activations of this kind.

    activations: as `Format.activations`. A CPU computes all of them, if need be at the speed of
    float32, so that a file's certificate can be measured anywhere.
    """
    if activations == "16bit" or device.type == "cpu":
        return
    if not ops.has_eight_bit_product(activations, device):
        major, minor = torch.cuda.get_device_capability(device)
        raise UnsupportedFormat(
            f"the file asks for {activations} activations, which GPUs of compute capability 9.0 "
            f"multiply; {device} has {major}.{minor}: quantize with activations: 16bit for it"
        )


def multiply(
    x: Tensor,
    weight: Tensor | ArrangedWeight,
    bias: Tensor | None,
    activations: str,
    *,
    fewest_rows: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return x @ weight.T + bias, x rounded to eight bits first where `activations` says so.

    Fewer rows than `fewest_rows` stay as they are: reading the weight takes their time, and that is
    the same. None: ops.fewest_eight_bit_rows.
    """
    if activations == "16bit":
        return ops.linear(x, weight, bias, out=out)
    if x.shape[0] < (ops.fewest_eight_bit_rows(x.device) if fewest_rows is None else fewest_rows):
        return ops.linear(x, weight, bias, out=out)
    assert isinstance(weight, ArrangedWeight)
    assert weight.scale is not None
    rows = ops.quantize_rows(x, format=activations, per_group=weight.scale.ndim == 2)
    return ops.linear_eight_bit(rows, weight, bias, out=out)


class Linear:
    """x @ weight.T + bias with one weight, dense or arranged for the backend.

    activations: what x becomes where it has many rows; as `Format.activations`.
    fewest_rows: how many those are; see `multiply`.
    """

    __slots__ = ("activations", "bias", "fewest_rows", "out_features", "weight")

    def __init__(
        self,
        weight: Tensor | ArrangedWeight,
        bias: Tensor | None,
        out_features: int,
        activations: str = "16bit",
        fewest_rows: int | None = None,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.out_features = out_features
        self.activations = activations
        self.fewest_rows = fewest_rows

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return [num_tokens, out_features] of x [num_tokens, in_features], in out if given."""
        if self.activations == "16bit":
            return ops.linear(x, self.weight, self.bias, out=out)
        return multiply(
            x, self.weight, self.bias, self.activations, fewest_rows=self.fewest_rows, out=out
        )


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
