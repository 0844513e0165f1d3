"""Codes of other toolkits in FastGPT's own form: taken over one by one, or dequantized.

Every toolkit stores the same three things per weight: integer codes, a scale per group of input
columns and a code that means zero; they differ in how codes fill 32-bit words and along which axis.
What an integer format of `fastgpt.scheme` can hold exactly keeps its codes; the rest is computed in
float32 and rounded once to a floating-point type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.scheme import BLOCK, Format, QuantizedTensor

__all__ = [
    "from_codes",
    "from_fp8",
    "held_as",
    "pack_stream",
    "read_padded",
    "read_stream",
    "round_to",
]

Stored = Tensor | QuantizedTensor

INT8 = Format.parse("int8")
_CHUNK_VALUES = 1 << 18  # dequantized at once: their float32 steps stay in the core's cache
_FORMAT_OF_BITS = {4: "int4", 3: "int3", 2: "int2"}
_GROUP_SIZES = {4: (128, 64, 32), 3: (64, 32), 2: (64, 32)}  # of those formats, largest first


def read_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes of every row of words, uint8 [rows, count].

    Code j lies at bit j * bits of its row, lowest bits first, across the borders of words.

    Args:
        words: int32 or uint8 [rows, n], at least count * bits bits a row.
        bits: of one code, 1 .. 8.
    """
    row_bytes = words.shape[1] * words.element_size()
    raw = words.flatten().view(torch.uint8).view(words.shape[0], row_bytes)
    if bits == 8:
        return raw[:, :count]
    if bits == 4:
        return torch.stack((raw & 0xF, raw >> 4), -1).flatten(1)[:, :count]
    places = torch.arange(8, dtype=torch.uint8)
    stream = (raw.unsqueeze(-1) >> places & 1).flatten(1)[:, : count * bits]
    codes: Tensor = stream.unflatten(1, (count, bits)) << places[:bits]
    return codes.sum(-1, dtype=torch.uint8)


def read_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes of words that hold 32 // bits whole codes each, uint8 [rows, count]."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes: Tensor = words.unsqueeze(-1) >> shifts & (2**bits - 1)
    return codes.flatten(1)[:, :count].to(torch.uint8)


def pack_stream(codes: Tensor, bits: int, row_bytes: int, pad: Tensor | int = 0) -> Tensor:
    """Return codes, uint8 [rows, count], as a stream of `row_bytes` bytes a row: see read_stream.

    pad: the code that fills the rest of a row, one for all or [rows, 1].
    """
    rows, count = codes.shape
    missing = -(-row_bytes * 8 // bits) - count  # the last may reach past the row's end
    tail = torch.as_tensor(pad, dtype=torch.uint8, device=codes.device).expand(rows, missing)
    whole = torch.cat((codes, tail), 1)
    if bits == 4:
        return whole[:, 0::2] | (whole[:, 1::2] << 4)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    stream = (whole.unsqueeze(-1) >> places[:bits] & 1).flatten(1)[:, : row_bytes * 8]
    packed: Tensor = stream.unflatten(1, (row_bytes, 8)) << places
    return packed.sum(-1, dtype=torch.uint8)


def held_as(bits: int, group_size: int | None, *, symmetric: bool) -> Format | None:
    """Return the format that holds codes of this kind exactly; None if none does.

    group_size: columns that share a scale; None: all of a row. Longer groups are held as several
    of ours with the same scale.

    >>> str(held_as(4, 256, symmetric=True))
    'int4 g128'
    """
    if bits == 8 and group_size is None and symmetric:
        return INT8
    for size in _GROUP_SIZES.get(bits, ()):
        if group_size is None or group_size % size == 0:
            return Format.parse(
                {"format": _FORMAT_OF_BITS[bits], "group_size": size, "symmetric": symmetric}
            )
    return None


def from_codes(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    group_of: Tensor | None = None,
) -> Stored:
    """Return the weight (code - zero) * scale: its codes as they are where a format holds them.

    Args:
        codes: uint8 [rows, cols].
        scale: floating point [rows, groups].
        zero: uint8 [rows, groups], the code that means 0.0; None: 2^(bits - 1). Experts of a layer
            share one format, so it is kept even where all zero points lie in the middle.
        bits: of one code.
        group_size: columns that share a scale, the last group may be short; None: all.
        dtype: of the result where no format holds the weight: other group sizes or bits, scales
            that float16 does not hold exactly, columns out of order.
        group_of: int64 [cols], the group of every column; None: in order.
    """
    cols = codes.shape[1]
    in_order = torch.arange(cols) // (group_size or max(cols, 1))
    if group_of is not None and torch.equal(group_of, in_order):
        group_of = None
    fmt = held_as(bits, group_size, symmetric=zero is None)
    if fmt == INT8 and bool((scale >= 0).all()):
        packed = (codes ^ 128).view(torch.int8)  # code - 128 in two's complement
        parts = {"packed": packed, "scale": scale.to(torch.float32).flatten().contiguous()}
        return QuantizedTensor(INT8, (codes.shape[0], cols), parts)
    if fmt is not None and fmt != INT8 and group_of is None and _fits_float16(scale):
        return _in_groups(codes, scale, zero, group_size, fmt)
    group_of = in_order if group_of is None else group_of
    if zero is None:
        zero = torch.tensor([[2 ** (bits - 1)]], dtype=torch.uint8).expand(scale.shape)
    dense = _dequantized(codes, scale, zero, group_of, dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(dense).all()):
        dense = _dequantized(codes, scale, zero, group_of, torch.bfloat16)
    return dense


def _in_groups(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int | None, fmt: Format
) -> QuantizedTensor:
    """Return codes in an integer format whose groups divide the source's."""
    rows, cols = codes.shape
    assert fmt.group_size is not None
    groups = -(-cols // fmt.group_size)
    repeats = groups if group_size is None else group_size // fmt.group_size
    scale = scale.repeat_interleave(repeats, 1)[:, :groups].contiguous()
    parts = {"scale": scale.to(torch.float16)}
    pad: Tensor | int = 2 ** (fmt.bits - 1)
    if zero is not None:
        parts["zero_point"] = zero.repeat_interleave(repeats, 1)[:, :groups].contiguous()
        pad = parts["zero_point"][:, -1:]
    row_bytes = fmt.parts((rows, cols))["packed"].shape[-1]
    parts["packed"] = pack_stream(codes, fmt.bits, row_bytes, pad).contiguous()
    return QuantizedTensor(fmt, (rows, cols), parts)


def _dequantized(
    codes: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return (code - zero) * scale in `dtype`; a few rows at a time are in float32."""
    rows, cols = codes.shape
    out = torch.empty((rows, cols), dtype=dtype)
    step = max(1, _CHUNK_VALUES // max(cols, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = codes[part].to(torch.float32)
        values -= zero[part].to(torch.float32)[:, group_of]
        values *= scale[part].to(torch.float32)[:, group_of]
        out[part] = values
    return out


def from_fp8(
    codes: Tensor, scale: Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> Stored:
    """Return the weight e4m3(code) * scale: kept per row or per 128 x 128 block.

    Args:
        codes: float8_e4m3fn [rows, cols].
        scale: floating point; one value, one a row, or with `block` one a block.
        block: rows and columns of a block.
        dtype: of the result for blocks of another size, which no format holds.
    """
    rows, cols = codes.shape
    scale = scale.to(torch.float32)
    if block is None:
        kind, per_part = "channel", scale.flatten().expand(rows).contiguous()
    elif block == (BLOCK, BLOCK):
        kind, per_part = "block", scale.contiguous()
    else:
        per_row = scale.repeat_interleave(block[0], 0)[:rows]
        values = codes.to(torch.float32) * per_row.repeat_interleave(block[1], 1)[:, :cols]
        return round_to(values, dtype)
    fmt = Format.parse({"format": "fp8", "scale": kind})
    parts = {"packed": codes.contiguous().view(torch.uint8), "scale": per_part}
    return QuantizedTensor(fmt, (rows, cols), parts)


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 values in `dtype`; a value beyond float16 makes that bfloat16."""
    rounded = values.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(rounded).all()):
        return values.to(torch.bfloat16)
    return rounded


def _fits_float16(scale: Tensor) -> bool:
    """Tell whether every scale is a float16 number, and none is negative."""
    exact = scale.to(torch.float32)
    return bool((exact.to(torch.float16).to(torch.float32) == exact).all() and (exact >= 0).all())
