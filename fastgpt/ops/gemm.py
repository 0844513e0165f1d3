"""Products with weights: dense, fp8, int8 and int4, one weight, one per head, or one per expert.

A weight is stored on disk in its canonical form (fastgpt.scheme). `arrange` turns it into the
layout of the kernels of the device it lies on; that layout is private and may change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt import _C
from fastgpt.errors import InvalidArgument, UnsupportedFormat
from fastgpt.ops._library import assume_constant_result, call
from fastgpt.ops.scratch import empty

__all__ = ["ArrangedWeight", "arrange", "batched_linear", "grouped_linear", "linear"]

_ops = torch.ops.fastgpt

_DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NARROW = {"int3": 3, "int2": 2}  # computed as int4, which holds their codes
_FORMATS = (*_DENSE, "fp8", "int8", "int4", *_NARROW)

Allocate = Callable[[tuple[int, ...], torch.dtype, str], Tensor]


@dataclass(frozen=True)
class ArrangedWeight:
    """A weight [out_features, in_features] in the kernels' layout, or a stack of such weights.

    Attributes:
        format: "fp32", "bf16", "fp16", "fp8", "int8" or "int4".
        num_weights: length of the stack, None for a single weight.
        group_size: int4: values that share a scale; else 0.
        packed: codes or values, in the private layout of its device.
        scale: fp8, int8 and int4.
        zero_point: int4 asymmetric.
    """

    format: str
    out_features: int
    in_features: int
    num_weights: int | None
    group_size: int
    packed: Tensor
    scale: Tensor | None
    zero_point: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory, padding and scales included: what one product at one row reads."""
        parts = (self.packed, self.scale, self.zero_point)
        return sum(part.nbytes for part in parts if part is not None)


@assume_constant_result
def _arranged_shape(
    device_type: str, kind: str, out_features: int, in_features: int, group_size: int
) -> tuple[list[int], list[int], list[int]]:
    """Return the shapes of the arranged parts; under torch.compile it is computed while tracing."""
    return _C.arranged_shape(device_type, kind, out_features, in_features, group_size)


def arrange(
    weight: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    format: str,
    in_features: int | None = None,
    group_size: int = 0,
    allocate: Allocate | None = None,
) -> ArrangedWeight:
    """Return a canonical weight in the kernel layout of its device.

    A leading dimension on every tensor makes a stack of weights, as grouped_linear and
    batched_linear take it.

    Args:
        weight: dense values [n, k] in the format's dtype; fp8: uint8 e4m3fn codes [n, k]; int8:
            int8 codes [n, k]; int4: uint8 [n, round_up(ceil(k / 2), 16)].
        scale: fp8: float32 [n] or [ceil(n / 128), ceil(k / 128)]; int8: float32 [n]; int4: float16
            [n, ceil(k / group_size)].
        zero_point: int4 asymmetric: uint8, shape of scale.
        format: "fp32", "bf16", "fp16", "fp8", "int8", "int4", "int3" or "int2". The last two take
            the memory of int4 and its kernels: their codes are widened here.
        in_features: k; needed for integers, whose rows are padded.
        group_size: integers: values that share a scale, even.
        allocate: function of (shape, dtype, suffix) that returns an uninitialized tensor on the
            weight's device, suffix "packed", "scale" or "zero_point"; default torch.empty.

    Raises:
        UnsupportedFormat: if the format has no product.
        InvalidArgument: if shapes or dtypes do not fit, or fp8 codes hold NaN.
    """
    if format not in _FORMATS:
        raise UnsupportedFormat(f"format {format!r} has no linear kernel; it has {_FORMATS}")
    if format in _NARROW:
        if in_features is None:
            raise InvalidArgument(f"in_features is missing; {format} rows are padded, so pass k")
        weight = _widen(weight, in_features, _NARROW[format], zero_point is None)
        format = "int4"
    kind = "dense" if format in _DENSE else format
    if kind == "dense" and weight.dtype != _DENSE[format]:
        raise InvalidArgument(f"weight is {weight.dtype}; format {format} stores {_DENSE[format]}")
    if weight.ndim not in (2, 3):
        raise InvalidArgument(f"weight has {weight.ndim} dimensions; expected 2, or 3 for a stack")
    if in_features is None:
        if kind == "int4":
            raise InvalidArgument("in_features is missing; int4 rows are padded, so pass k")
        in_features = weight.shape[-1]
    stack = tuple(weight.shape[:-2])
    out_features = weight.shape[-2]
    shapes = _arranged_shape(weight.device.type, kind, out_features, in_features, group_size)

    def empty(shape: tuple[int, ...], dtype: torch.dtype, suffix: str) -> Tensor:
        if allocate is not None:
            return allocate(shape, dtype, suffix)
        return torch.empty(shape, dtype=dtype, device=weight.device)

    packed = empty((*stack, *shapes[0]), weight.dtype, "packed")
    out_scale = out_zero_point = None
    if kind != "dense" and scale is None:
        raise InvalidArgument(f"scale is missing; format {format} needs it")
    if scale is not None and kind != "dense":
        scale = scale.contiguous()
        shape = (*stack, *shapes[1]) if kind == "int4" else tuple(scale.shape)
        out_scale = empty(shape, scale.dtype, "scale")
    if zero_point is not None:
        if kind != "int4":
            raise InvalidArgument(f"zero_point is given; format {format} has none")
        zero_point = zero_point.contiguous()
        out_zero_point = empty((*stack, *shapes[2]), torch.uint8, "zero_point")
    call(
        _ops.arrange_weight.default,
        weight.contiguous(), scale if kind != "dense" else None, zero_point, kind, in_features,
        group_size, packed, out_scale, out_zero_point,
    )  # fmt: skip
    return ArrangedWeight(
        format,
        out_features,
        in_features,
        stack[0] if stack else None,
        group_size if kind == "int4" else 0,
        packed,
        out_scale,
        out_zero_point,
    )


def _widen(packed: Tensor, cols: int, bits: int, symmetric: bool) -> Tensor:
    """Return rows of 2- or 3-bit codes as rows of int4 codes that mean the same.

    A symmetric code moves from zero at 2^(bits - 1) to zero at 8; others keep their zero points.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != _ceil_div(cols * bits, 128) * 16:
        raise InvalidArgument(
            f"weight is {packed.dtype} of shape {tuple(packed.shape)}; expected uint8 with rows of "
            f"{_ceil_div(cols * bits, 128) * 16} bytes for {cols} codes of {bits} bits"
        )
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = (packed.unsqueeze(-1) >> places & 1).flatten(-2)[..., : cols * bits]
    shifted = stream.unflatten(-1, (cols, bits)) << places[:bits]
    codes = shifted.sum(-1, dtype=torch.uint8)
    if symmetric:
        codes += 8 - 2 ** (bits - 1)
    # Kernels never multiply what pads a row, so any code may stand there.
    codes = torch.nn.functional.pad(codes, (0, _ceil_div(cols, 32) * 32 - cols), value=8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _run(name: str, x: Tensor, weight: Tensor | ArrangedWeight, *rest: Any) -> None:
    """Call fastgpt::<name> or <name>_<format> by the weight's format; rest ends with out."""
    if isinstance(weight, Tensor):
        call(getattr(_ops, name).default, x, weight, *rest)
        return
    # The layout is padded: the kernel could not tell 199 columns from 200.
    features, out = (weight.in_features, weight.out_features), rest[-1]
    if features != (x.shape[-1], out.shape[-1]):
        raise InvalidArgument(
            f"x has {x.shape[-1]} columns and out {out.shape[-1]}; the weight takes {features[0]} "
            f"and gives {features[1]}"
        )
    if weight.format in _DENSE:
        call(getattr(_ops, name).default, x, weight.packed, *rest)
    elif weight.format in ("fp8", "int8"):
        function = getattr(_ops, f"{name}_{weight.format}").default
        call(function, x, weight.packed, weight.scale, *rest)
    else:
        call(
            getattr(_ops, f"{name}_int4").default,
            x, weight.packed, weight.scale, weight.zero_point, weight.group_size, *rest,
        )  # fmt: skip


def _features(weight: Tensor | ArrangedWeight) -> int:
    return weight.out_features if isinstance(weight, ArrangedWeight) else weight.shape[-2]


def linear(
    x: Tensor,
    weight: Tensor | ArrangedWeight,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x @ weight.T + bias.

    float32 x is multiplied in float32. On the CPU a row of the result has the same bits in every
    batch. bfloat16 x with a bf16 or quantized weight uses bfloat16 products (codes are exact in
    it) summed in float32.

    Args:
        x: [num_rows, k]; float32, bfloat16 or float16, last dimension contiguous.
        weight: [n, k], any float dtype, or an arranged weight.
        bias: [n], any float dtype.
        out: where to write, [num_rows, n], dtype of x or float32, may be a column slice;
            allocated if None.
        dtype: of the result when out is None; default x's.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit.
    """
    if out is None:
        out = empty((x.shape[0], _features(weight)), dtype or x.dtype, x.device)
    _run("linear", x, weight, bias, out)
    return out


def grouped_linear(
    x: Tensor,
    weight: Tensor | ArrangedWeight,
    sorted_rows: Tensor,
    offsets: Tensor,
    rows_per_token: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return out with out[i] = x[i // rows_per_token] @ weight[expert of i].T.

    Sorted position p computes row sorted_rows[p]; expert e owns positions offsets[e] up to
    offsets[e + 1], so results stay in the order of (token, j). Source: ops.moe_sort.

    Args:
        x: [num_tokens, k]; with rows_per_token = 1, [num_tokens * top_k, k].
        weight: [num_experts, n, k], any float dtype, or an arranged stack.
        sorted_rows: int32 [num_rows], a permutation of 0 .. num_rows - 1.
        offsets: int32 [num_experts + 1], from 0 to num_rows, not decreasing.
        rows_per_token: rows of out that read one row of x.
        out: where to write, [num_rows, n], dtype of x or float32; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes, strides or (on the CPU) indices do not fit.
    """
    if out is None:
        out = empty((sorted_rows.shape[0], _features(weight)), x.dtype, x.device)
    _run("grouped_linear", x, weight, sorted_rows, offsets, rows_per_token, out)
    return out


def batched_linear(
    x: Tensor, weight: Tensor | ArrangedWeight, *, out: Tensor | None = None
) -> Tensor:
    """Return out with out[i, h] = x[i, h] @ weight[h].T: one small product per head.

    Args:
        x: [num_rows, num_heads, k]; float32, bfloat16 or float16, last dimension contiguous.
        weight: [num_heads, m, k], any float dtype, last dimension contiguous, or an arranged dense
            stack.
        out: where to write, [num_rows, num_heads, m], dtype of x or float32; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit.
        UnsupportedFormat: if the weight is quantized.
    """
    if isinstance(weight, ArrangedWeight) and weight.format not in _DENSE:
        raise UnsupportedFormat(f"batched_linear takes dense weights, not {weight.format}")
    if out is None:
        out = empty((x.shape[0], x.shape[1], _features(weight)), x.dtype, x.device)
    _run("batched_linear", x, weight, out)
    return out


@torch.library.register_fake("fastgpt::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::linear_fp8")
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::linear_int8")
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::linear_int4")
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    return None


@torch.library.register_fake("fastgpt::grouped_linear")
def _(
    x: Tensor,
    weight: Tensor,
    sorted_rows: Tensor,
    offsets: Tensor,
    rows_per_token: int,
    out: Tensor,
) -> None:
    return None


@torch.library.register_fake("fastgpt::grouped_linear_fp8")
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    sorted_rows: Tensor,
    offsets: Tensor,
    rows_per_token: int,
    out: Tensor,
) -> None:
    return None


@torch.library.register_fake("fastgpt::grouped_linear_int8")
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    sorted_rows: Tensor,
    offsets: Tensor,
    rows_per_token: int,
    out: Tensor,
) -> None:
    return None


@torch.library.register_fake("fastgpt::grouped_linear_int4")
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    sorted_rows: Tensor,
    offsets: Tensor,
    rows_per_token: int,
    out: Tensor,
) -> None:
    return None


@torch.library.register_fake("fastgpt::batched_linear")
def _(x: Tensor, weight: Tensor, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::arrange_weight")
def _(
    weight: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    format: str,
    in_features: int,
    group_size: int,
    out_packed: Tensor,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> None:
    return None
