"""Weights to and from their canonical quantized forms: fp8, int8, int4, binary (fastgpt.scheme).

x = (code - zero_point) * scale            int4; fp8, int8: zero_point 0
x = offset + (bit ? scale : -scale)        binary
"""

import torch
from torch import Tensor

from fastgpt.ops._library import call

__all__ = [
    "dequantize_binary",
    "dequantize_fp8",
    "dequantize_int4",
    "dequantize_int8",
    "gptq_round",
    "quantize_binary",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
]

_ops = torch.ops.fastgpt
_BLOCK = 128


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def quantize_fp8(x: Tensor, *, per_block: bool = False) -> tuple[Tensor, Tensor]:
    """Return (packed, scale): e4m3fn codes with scale = amax / 448, rounded to nearest even.

    Args:
        x: [rows, cols]; float32, bfloat16 or float16, last dimension contiguous, finite.
        per_block: one scale per 128 x 128 block instead of one per row.

    Returns:
        packed: uint8 [rows, cols]; scale: float32 [rows] or [ceil(rows/128), ceil(cols/128)],
        1 where all values are zero.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU also if a value is NaN
            or infinite (on CUDA its codes are NaN).
    """
    rows, cols = x.shape
    shape = (_ceil_div(rows, _BLOCK), _ceil_div(cols, _BLOCK)) if per_block else (rows,)
    packed = torch.empty((rows, cols), dtype=torch.uint8, device=x.device)
    scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    call(_ops.quantize_fp8.default, x, packed, scale)
    return packed, scale


def dequantize_fp8(
    packed: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Return e4m3(packed) * scale, computed in float32 and rounded once.

    Args:
        packed: uint8 [rows, cols], contiguous.
        scale: float32 [rows] or [ceil(rows/128), ceil(cols/128)], contiguous.
        dtype: of the result when out is None.
        out: where to write, [rows, cols], rows may be strided; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit.
    """
    if out is None:
        out = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    call(_ops.dequantize_fp8.default, packed, scale, out)
    return out


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (packed, scale): codes -127 .. 127 with scale = amax / 127, rounded to nearest even.

    Args:
        x: [rows, cols]; float32, bfloat16 or float16, last dimension contiguous, finite.

    Returns:
        packed: int8 [rows, cols]; scale: float32 [rows], 1 where all values are zero.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU also if a value is NaN
            or infinite (on CUDA the row's scale is NaN).
    """
    packed = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    call(_ops.quantize_int8.default, x, packed, scale)
    return packed, scale


def dequantize_int8(
    packed: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Return packed * scale, computed in float32 and rounded once.

    Args:
        packed: int8 [rows, cols], contiguous.
        scale: float32 [rows], contiguous.
        dtype: of the result when out is None.
        out: where to write, [rows, cols], rows may be strided; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit.
    """
    if out is None:
        out = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    call(_ops.dequantize_int8.default, packed, scale, out)
    return out


def quantize_int4(
    x: Tensor, *, group_size: int = 128, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (packed, scale, zero_point): 4-bit codes by groups of columns.

    symmetric: zero_point is None and means 8, scale = amax / 7, codes 1..15; else zero stays
    representable, scale = (max(x, 0) - min(x, 0)) / 15. Scales are rounded to float16 first, codes
    are rounded to nearest even with the rounded scale. The last group of a row may be short.

    Args:
        x: [rows, cols]; float32, bfloat16 or float16, last dimension contiguous, finite.
        group_size: columns that share a scale, even.

    Returns:
        packed: uint8 [rows, round_up(ceil(cols / 2), 16)], column 2b in the low nibble of byte b,
        padded with the code that means zero; scale: float16 [rows, ceil(cols / group_size)];
        zero_point: uint8, shape of scale, or None.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU also if a value is NaN
            or infinite or a scale leaves float16's range.

    Source: affine quantization, r = S (q - Z), arXiv:1712.05877, section 2.1.
    """
    rows, cols = x.shape
    groups = _ceil_div(cols, max(group_size, 1))
    row_bytes = _ceil_div(_ceil_div(cols, 2), 16) * 16
    packed = torch.empty((rows, row_bytes), dtype=torch.uint8, device=x.device)
    scale = torch.empty((rows, groups), dtype=torch.float16, device=x.device)
    zero_point = None if symmetric else torch.empty_like(scale, dtype=torch.uint8)
    call(_ops.quantize_int4.default, x, group_size, packed, scale, zero_point)
    return packed, scale, zero_point


def dequantize_int4(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    group_size: int,
    cols: int | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Return (code - zero_point) * scale, computed in float32 and rounded once.

    Args:
        packed: uint8 [rows, round_up(ceil(cols / 2), 16)], contiguous.
        scale: float16 [rows, ceil(cols / group_size)], contiguous.
        zero_point: uint8, shape of scale; None = 8.
        group_size: columns that share a scale.
        cols: columns of the result when out is None; default scale's groups times group_size.
        dtype: of the result when out is None.
        out: where to write, [rows, cols], rows may be strided; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit.
    """
    if out is None:
        cols = scale.shape[1] * group_size if cols is None else cols
        out = torch.empty((packed.shape[0], cols), dtype=dtype, device=packed.device)
    call(_ops.dequantize_int4.default, packed, scale, zero_point, group_size, out)
    return out


def quantize_binary(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (packed, scale, offset): the two values of least squared error per group of 128.

    Args:
        x: [numel]; float32, bfloat16 or float16, contiguous, finite.

    Returns:
        packed: uint8 [ceil(numel / 8)], value i is bit i % 8 of byte i // 8;
        scale, offset: float32 [ceil(numel / 128)], scale >= 0.

    Raises:
        InvalidArgument: if shape, dtype or stride do not fit; on the CPU also if a value is NaN or
            infinite.
    """
    (numel,) = x.shape
    packed = torch.empty(_ceil_div(numel, 8), dtype=torch.uint8, device=x.device)
    scale = torch.empty(_ceil_div(numel, _BLOCK), dtype=torch.float32, device=x.device)
    offset = torch.empty_like(scale)
    call(_ops.quantize_binary.default, x, packed, scale, offset)
    return packed, scale, offset


def dequantize_binary(
    packed: Tensor,
    scale: Tensor,
    offset: Tensor,
    *,
    numel: int | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Return offset + (bit ? scale : -scale), computed in float32 and rounded once.

    Args:
        packed: uint8 [ceil(numel / 8)], contiguous.
        scale, offset: float32 [ceil(numel / 128)], contiguous.
        numel: length of the result when out is None; default 8 times packed's.
        dtype: of the result when out is None.
        out: where to write, [numel], contiguous; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit.
    """
    if out is None:
        numel = 8 * packed.shape[0] if numel is None else numel
        out = torch.empty(numel, dtype=dtype, device=packed.device)
    call(_ops.dequantize_binary.default, packed, scale, offset, out)
    return out


def gptq_round(
    left: Tensor,
    scale: Tensor,
    zero: Tensor,
    spread: Tensor,
    top: int,
    *,
    codes: Tensor | None = None,
    errors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (codes, errors) of a block of a weight's columns, rounded one after another.

    What rounding a column loses is taken from the block's columns behind it; `errors` is what the
    columns behind the block must take over: left[behind] -= spread[block, behind].T @ errors.

    Args:
        left: the block, a column of the weight in each row, float32 [cols, rows], cols <= 128.
        scale: float32 [cols, rows], > 0.
        zero: integers in float32 [cols, rows]; codes are round(left / scale) + zero in 0 .. top.
        spread: float32 [cols, cols], upper; inverse(Gram matrix) = spread.T @ spread.
        top: the largest code.
        codes: uint8 [cols, rows]; allocated if None.
        errors: float32 [cols, rows]; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit.

    Source: GPTQ, arXiv:2210.17323, algorithm 1.
    """
    if codes is None:
        codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    if errors is None:
        errors = torch.empty(left.shape, dtype=torch.float32, device=left.device)
    call(_ops.gptq_round.default, left, scale, zero, spread, top, codes, errors)
    return codes, errors


@torch.library.register_fake("fastgpt::quantize_fp8")
def _(x: Tensor, packed: Tensor, scale: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::dequantize_fp8")
def _(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::quantize_int8")
def _(x: Tensor, packed: Tensor, scale: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::dequantize_int8")
def _(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::quantize_int4")
def _(x: Tensor, group_size: int, packed: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    return None


@torch.library.register_fake("fastgpt::dequantize_int4")
def _(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, out: Tensor
) -> None:
    return None


@torch.library.register_fake("fastgpt::quantize_binary")
def _(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::dequantize_binary")
def _(packed: Tensor, scale: Tensor, offset: Tensor, out: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::gptq_round")
def _(
    left: Tensor,
    scale: Tensor,
    zero: Tensor,
    spread: Tensor,
    top: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    return None
