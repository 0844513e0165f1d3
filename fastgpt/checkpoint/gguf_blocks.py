"""The numbers in GGUF's blocks: 32 or 256 values of a row with their scales, next to each other.

`q` below is a value's integer code; d, m and dmin are float16; sums and products are in float32.

    Q4_0, Q5_0   (q - 8) d, (q - 16) d        Q4_1, Q5_1   q d + m        Q8_0   q d, q signed
    Q4_K, Q5_K   q (d s) - dmin t,  s and t 6-bit per 32 values
    Q6_K         (q - 32) (d s),    s signed 8-bit per 16 values

Source: ggml, https://github.com/ggml-org/ggml, ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt.checkpoint.codes import Stored, from_codes
from fastgpt.scheme import Format

__all__ = ["BLOCK_TYPES", "TYPE_NAMES", "BlockType", "decode"]

# ggml_type -> name, of all types that files may hold
TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_CHUNK_VALUES = 1 << 18  # decoded at once: their float32 steps stay in the core's cache
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# (code - 8) d with 32 values a scale is int4; a negative d swaps the codes' order, which moves the
# zero point to 7, so the weight needs zero points.
Q4_0_FORMAT = Format.parse({"format": "int4", "group_size": 32, "symmetric": False})


@dataclass(frozen=True)
class BlockType:
    """One type of block.

    Attributes:
        num_values, num_bytes: of a block.
        decode: bytes [n, num_bytes] -> values [n, num_values] float32; None for plain numbers and
            for Q4_0, which `decode` below takes over code by code.
        becomes: what `decode` below returns.
    """

    num_values: int
    num_bytes: int
    decode: Callable[[Tensor], Tensor] | None
    becomes: Format | torch.dtype = torch.float16


def decode(raw: Tensor, kind: str, cols: int) -> Stored:
    """Return a weight [rows, cols] from its bytes [rows, row bytes].

    Plain numbers keep their type. Q4_0 becomes int4, code by code; all else float16, or bfloat16
    where a value overflows that.
    """
    if kind in PLAIN:
        return raw.contiguous().view(PLAIN[kind])
    block = BLOCK_TYPES[kind]
    blocks = raw.reshape(-1, block.num_bytes)
    if block.decode is not None:
        rounded = _rounded(block, blocks, torch.float16)
        if not bool(torch.isfinite(rounded).all()):
            rounded = _rounded(block, blocks, torch.bfloat16)
        return rounded.view(raw.shape[0], cols)
    scale = _half(blocks, 0).view(raw.shape[0], -1)
    codes = _nibbles(blocks[:, 2:]).view(raw.shape[0], -1, 32)
    is_swapped = scale < 0
    codes = torch.where(is_swapped.unsqueeze(-1), 15 - codes, codes).flatten(1)
    zero = torch.where(is_swapped, 7, 8).to(torch.uint8)
    return from_codes(codes, scale.abs(), zero, bits=4, group_size=32, dtype=torch.float16)


def _rounded(block: BlockType, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of all blocks in `dtype`, [n, num_values]."""
    assert block.decode is not None
    out = torch.empty((blocks.shape[0], block.num_values), dtype=dtype)
    step = max(1, _CHUNK_VALUES // block.num_values)
    for start in range(0, blocks.shape[0], step):
        out[start : start + step] = block.decode(blocks[start : start + step])
    return out


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at byte `at` of every block as float32, [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(packed: Tensor) -> Tensor:
    """Return codes of 16 bytes: low nibbles first, then high ones, [n, 32]."""
    return torch.cat((packed & 0xF, packed >> 4), 1)


def _fives(blocks: Tensor, at: int) -> Tensor:
    """Return 5-bit codes: a byte-packed fifth bit per value at `at`, nibbles after it, [n, 32]."""
    places = torch.arange(8, dtype=torch.uint8)
    high = (blocks[:, at : at + 4].unsqueeze(-1) >> places & 1).flatten(1)
    codes: Tensor = _nibbles(blocks[:, at + 4 :]) | high << 4
    return codes


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_fives(blocks, 2).to(torch.float32) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _fives(blocks, 4) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8)


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return d s and dmin t of a K block's eight parts, [n, 8, 1] each.

    Twelve bytes from byte 4 on hold eight 6-bit s and t: the first four of each in the low bits of
    bytes 0-3 and 4-7, the last four in nibbles of bytes 8-11 with their two high bits above those.
    """
    first, second, mixed = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scale = torch.cat((first & 0x3F, mixed & 0xF | first >> 2 & 0x30), 1)
    offset = torch.cat((second & 0x3F, mixed >> 4 | second >> 2 & 0x30), 1)
    d, dmin = _half(blocks, 0), _half(blocks, 2)
    return (d * scale).unsqueeze(-1), (dmin * offset).unsqueeze(-1)


def _k_nibbles(packed: Tensor) -> Tensor:
    """Return codes of 128 bytes, four runs of 32 low then 32 high nibbles, [n, 8, 32]."""
    runs = packed.unflatten(1, (4, 32))
    return torch.stack((runs & 0xF, runs >> 4), 2).flatten(1, 2)


def _q4_k(blocks: Tensor) -> Tensor:
    scale, offset = _scales_and_offsets(blocks)
    return (scale * _k_nibbles(blocks[:, 16:]) - offset).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, offset = _scales_and_offsets(blocks)
    parts = torch.arange(8, dtype=torch.uint8).view(8, 1)
    high = blocks[:, 16:48].unsqueeze(1) >> parts & 1  # bit i of byte j: part i, value j
    codes = _k_nibbles(blocks[:, 48:]) | high << 4
    return (scale * codes - offset).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    runs = blocks[:, :128].unflatten(1, (2, 64))
    low = torch.stack((runs & 0xF, runs >> 4), 2).reshape(-1, 8, 32)
    pairs = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> pairs & 3).reshape(-1, 8, 32)
    codes: Tensor = (low | high << 4).to(torch.float32).reshape(-1, 16, 16) - 32
    scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)
    codes *= scale.unsqueeze(-1)
    return codes.flatten(1)


BLOCK_TYPES: dict[str, BlockType] = {
    **{kind: BlockType(1, dtype.itemsize, None, dtype) for kind, dtype in PLAIN.items()},
    "Q4_0": BlockType(32, 18, None, Q4_0_FORMAT),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
}
