"""Products of eight-bit rows with eight-bit weights: activations quantized as they come.

`quantize_rows` finds one scale a row, or one a row and 128 columns, and rounds the row to e4m3 or
int8 codes; `linear_eight_bit` multiplies codes with the codes of an fp8 or int8 weight, on units
that run at twice the rate of 16-bit ones. With few rows a product waits for its weights, which are
the same bytes either way: `fewest_eight_bit_rows` says from how many on it gains.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt import _C
from fastgpt.errors import InvalidArgument, UnsupportedFormat
from fastgpt.ops._library import assume_constant_result, call
from fastgpt.ops.gemm import ArrangedWeight
from fastgpt.ops.scratch import empty

__all__ = [
    "QuantizedRows",
    "fewest_eight_bit_rows",
    "has_eight_bit_product",
    "linear_eight_bit",
    "quantize_rows",
]

_ops = torch.ops.fastgpt

_CODES = {"fp8": torch.uint8, "int8": torch.int8}
_GROUP = 128  # columns that share a scale where a row has several
_ROW_PADDING = 4  # of scales
_BYTE_ORDER = (0, 2, 1, 3)  # of every four columns, in the weights' layouts

# Rows from which on codes beat 16-bit rows on weights of 1,500 to 19,000 columns; what they cost,
# quantize_rows included, is measured by benchmarks/micro/gemm_eight_bit.py and cpu_linear.py.
_FEWEST_ROWS = {"cuda": 128, "cpu": 8}


@dataclass(frozen=True)
class QuantizedRows:
    """Rows [num_rows, in_features] as codes times scales.

    Attributes:
        format: "fp8" (e4m3) or "int8".
        in_features: columns of the rows.
        codes: uint8 or int8 [num_rows, in_features padded to 128], in an order of columns that is
            private to the kernels of its device; padding is 0.
        scale: float32 [groups, num_rows padded to 4]: one group, or one per 128 columns.
        dtype: of the rows before.
    """

    format: str
    in_features: int
    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """Return what the codes stand for, float32 [num_rows, in_features]."""
        codes = self.codes
        values = codes.view(torch.float8_e4m3fn).float() if self.format == "fp8" else codes.float()
        width = codes.shape[1]
        ordered = torch.empty_like(values)
        ordered[:, _columns(codes.device.type, self.format, width)] = values
        scale = self.scale[:, : codes.shape[0]].T
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(_GROUP, dim=1)
        return (ordered * scale)[:, : self.in_features].contiguous()


def _columns(device_type: str, format: str, width: int) -> Tensor:
    """Return the column that each place of a row of codes holds."""
    places = torch.arange(width)
    in_four = torch.tensor(_BYTE_ORDER)[places % 4]
    if device_type == "cpu":
        return places if format == "fp8" else places // 4 * 4 + in_four
    # csrc/gemm/layout.cuh: 16 bytes hold eight of the first 32 of 64 columns, eight of the others.
    chunk, slot, half = places % 64 // 16, places % 16 // 8, places % 8 // 4
    return places // 64 * 64 + slot * 32 + chunk * 8 + half * 4 + in_four


def has_eight_bit_product(format: str, device: torch.device) -> bool:
    """Tell whether a device multiplies rows of this format on units made for it.

    "fp8" and "int8": GPUs of compute capability 9.0; "int8": CPUs with AVX512-VNNI. Other CPUs
    compute the same, no faster than 16-bit rows; other GPUs do not.
    """
    if device.type not in ("cpu", "cuda"):
        return False
    index = -1
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    return _has_eight_bit_product(format, index)


@assume_constant_result
def _has_eight_bit_product(format: str, cuda_device: int) -> bool:
    """Ask the core; under torch.compile it is asked while tracing."""
    return bool(_C.has_eight_bit_product(format, cuda_device))


def fewest_eight_bit_rows(device: torch.device) -> int:
    """Return from how many rows on eight-bit rows are faster than 16-bit ones."""
    return _FEWEST_ROWS[device.type]


def quantize_rows(
    x: Tensor,
    *,
    format: str,
    per_group: bool = False,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
) -> QuantizedRows:
    """Return rows as codes: x is about code * scale, scale = amax / 448 (fp8) or / 127 (int8).

    Scales are at least 2^-100; codes are rounded to nearest even. A row (group) that holds NaN or
    infinity gets scale NaN, so all that it adds to becomes NaN.

    Args:
        x: [num_rows, k], k >= 1; float32, bfloat16 or float16, last dimension contiguous.
        format: "fp8" or "int8".
        per_group: one scale per 128 columns instead of one per row; fp8 alone.
        codes, scale: where to write, shapes as QuantizedRows says; allocated if None.

    Raises:
        UnsupportedFormat: another format.
        InvalidArgument: if shapes, dtypes or strides do not fit.

    Source: DeepSeek-V3, arXiv:2412.19437, section 3.3 (scales per 128 columns).
    """
    if format not in _CODES:
        raise UnsupportedFormat(f"rows become fp8 or int8 codes, not {format!r}")
    if per_group and format != "fp8":
        raise UnsupportedFormat("int8 rows have one scale each; per_group is for fp8")
    if x.ndim != 2:
        raise InvalidArgument(f"x has {x.ndim} dimensions; expected 2")
    num_rows, k = x.shape
    groups = -(-k // _GROUP)
    if codes is None:
        codes = empty((num_rows, groups * _GROUP), _CODES[format], x.device)
    if scale is None:
        padded = -(-num_rows // _ROW_PADDING) * _ROW_PADDING
        scale = empty((groups if per_group else 1, padded), torch.float32, x.device)
    call(_ops.quantize_rows.default, x, codes, scale)
    return QuantizedRows(format, k, codes, scale, x.dtype)


def linear_eight_bit(
    rows: QuantizedRows,
    weight: ArrangedWeight,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return rows @ weight.T + bias, products and sums of codes on eight-bit units.

    int8 sums are exact. fp8 sums are exact to about 14 bits within 128 columns and float32 beyond
    (CUDA), or float32 throughout (CPU, at the speed of float32 rows).

    Args:
        rows: of the weight's format; scales per group where the weight has them per 128 x 128.
        weight: arranged, "fp8" or "int8".
        bias: [n], any float dtype.
        out: where to write, [num_rows, n], any float dtype, may be a column slice; allocated if
            None.
        dtype: of the result when out is None; default that of the rows before.

    Raises:
        UnsupportedFormat: another weight, or a GPU without these products.
        InvalidArgument: if shapes, dtypes or strides do not fit.
    """
    if weight.format != rows.format or weight.scale is None or weight.num_weights is not None:
        raise UnsupportedFormat(
            f"{rows.format} rows multiply one {rows.format} weight, not "
            f"{'a stack of ' if weight.num_weights is not None else ''}{weight.format}"
        )
    if weight.device.type == "cuda" and not has_eight_bit_product(weight.format, weight.device):
        major, minor = torch.cuda.get_device_capability(weight.device)
        raise UnsupportedFormat(
            f"{weight.device} has compute capability {major}.{minor}; products of {rows.format} "
            "rows need 9.0, so keep activations in 16 bits"
        )
    if out is None:
        out = empty((rows.codes.shape[0], weight.out_features), dtype or rows.dtype, weight.device)
    function = _ops.linear_fp8_fp8 if weight.format == "fp8" else _ops.linear_int8_int8
    call(
        function.default,
        rows.codes, rows.scale, rows.in_features, weight.packed, weight.scale, bias, out,
    )  # fmt: skip
    return out


@torch.library.register_fake("fastgpt::quantize_rows")
def _(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::linear_fp8_fp8")
@torch.library.register_fake("fastgpt::linear_int8_int8")
def _(
    codes: Tensor,
    scale: Tensor,
    in_features: int,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    return None
