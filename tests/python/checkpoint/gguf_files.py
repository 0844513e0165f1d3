"""A writer of GGUF files and scalar decoders of its blocks: struct and NumPy alone."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12,
         "Q5_K": 13, "Q6_K": 14, "BF16": 30}  # fmt: skip
SIZES = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
         "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}  # fmt: skip
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
          "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # fmt: skip


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """Return a metadata value with its type before it."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    items = [_value(item) for item in value]
    kind = items[0][:4] if items else struct.pack("<I", 4)
    return (
        struct.pack("<I", 9)
        + kind
        + struct.pack("<Q", len(items))
        + b"".join(item[4:] for item in items)
    )


def encode(array: np.ndarray, kind: str) -> bytes:
    """Return the bytes of a tensor of plain numbers."""
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
    return np.ascontiguousarray(array.astype(dtype)).tobytes()


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]],
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    alignment: int = 32,
) -> Path:
    """Write a file; tensors: name -> (type, shape with columns last, bytes)."""
    out = magic + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += _string(key) + _value(value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        out += _string(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", TYPES.get(kind, 0) if isinstance(kind, str) else kind, len(data))
        data += raw + b"\0" * (-len(raw) % alignment)
    out += b"\0" * (-len(out) % alignment)
    path.write_bytes(out + data)
    return path


def random_blocks(kind: str, rows: int, cols: int, seed: int = 0) -> bytes:
    """Return blocks of random bytes whose float16 numbers are small and of either sign."""
    values, size = SIZES[kind]
    rng = np.random.default_rng([seed, TYPES[kind], rows, cols])
    raw = rng.integers(0, 256, (rows * cols // values, size), dtype=np.uint8)
    for at in HALVES[kind]:
        half = rng.uniform(-0.01, 0.01, (len(raw), 1)).astype(np.float16)
        raw[:, at : at + 2] = half.view(np.uint8).reshape(-1, 2)
    return raw.tobytes()


def decode(kind: str, raw: bytes, rows: int, cols: int) -> np.ndarray:
    """Return the values of blocks, one at a time, float32."""
    values, size = SIZES[kind]
    out = np.empty(rows * cols, np.float32)
    for i in range(rows * cols // values):
        out[i * values : (i + 1) * values] = _block(kind, raw[i * size : (i + 1) * size])
    return out.reshape(rows, cols)


def _half(raw: bytes, at: int) -> np.float32:
    return np.float32(np.frombuffer(raw, np.float16, 1, at)[0])


def _six_bits(s: bytes, j: int) -> tuple[int, int]:
    """Return scale and minimum of part j of a K block, as ggml-quants.c's get_scale_min_k4."""
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (
        (s[j + 4] & 0xF) | ((s[j - 4] >> 6) << 4),
        (s[j + 4] >> 4) | ((s[j] >> 6) << 4),
    )


def _block(kind: str, raw: bytes) -> list[np.float32]:
    d = _half(raw, HALVES[kind][0])
    if kind in ("Q4_0", "Q4_1"):
        q = raw[2 if kind == "Q4_0" else 4 :]
        codes = [b & 15 for b in q] + [b >> 4 for b in q]
        if kind == "Q4_0":
            return [np.float32(c - 8) * d for c in codes]
        return [np.float32(c) * d + _half(raw, 2) for c in codes]
    if kind in ("Q5_0", "Q5_1"):
        at = 2 if kind == "Q5_0" else 4
        (high,) = struct.unpack_from("<I", raw, at)
        q = raw[at + 4 :]
        codes = [b & 15 for b in q] + [b >> 4 for b in q]
        codes = [c | (high >> j & 1) << 4 for j, c in enumerate(codes)]
        if kind == "Q5_0":
            return [np.float32(c - 16) * d for c in codes]
        return [np.float32(c) * d + _half(raw, 2) for c in codes]
    if kind == "Q8_0":
        return [np.float32(c) * d for c in struct.unpack("<32b", raw[2:])]
    if kind == "Q6_K":
        ql, qh, scales = raw[:128], raw[128:192], struct.unpack("<16b", raw[192:208])
        out = [np.float32(0)] * 256
        for half in range(2):
            for pos in range(32):
                low, far = ql[64 * half + pos], ql[64 * half + 32 + pos]
                top = qh[32 * half + pos]
                fours = (low & 15, far & 15, low >> 4, far >> 4)
                for part, four in enumerate(fours):
                    code = (four | (top >> 2 * part & 3) << 4) - 32
                    scale = d * np.float32(scales[8 * half + 2 * part + pos // 16])
                    out[128 * half + 32 * part + pos] = scale * np.float32(code)
        return out
    dmin, six = _half(raw, 2), raw[4:16]
    high, q = (raw[16:48], raw[48:]) if kind == "Q5_K" else (bytes(32), raw[16:])
    out = []
    for part in range(8):
        s, m = _six_bits(six, part)
        scale, offset = d * np.float32(s), dmin * np.float32(m)
        for pos in range(32):
            byte = q[32 * (part // 2) + pos]
            code = (byte >> 4 if part % 2 else byte & 15) | (high[pos] >> part & 1) << 4
            out.append(scale * np.float32(code) - offset)
    return out


LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.block_count": 1,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def one(
    path: Path,
    kind: str,
    rows: int = 3,
    cols: int = 512,
    name: str = "blk.0.ffn_up.weight",
    raw: bytes | None = None,
) -> tuple[Path, bytes]:
    """Write a file with one weight of this type, and an embedding that makes it a model."""
    raw = random_blocks(kind, rows, cols) if raw is None else raw
    tensors = {
        "token_embd.weight": ("F32", (4, 64), encode(np.ones((4, 64)), "F32")),
        name: (kind, (rows, cols), raw),
    }
    return write(path / "m.gguf", LLAMA, tensors), raw


def with_embedding(path: Path, metadata: dict[str, Any]) -> Path:
    raw = encode(np.ones((4, 64)), "F32")
    return write(path / "m.gguf", metadata, {"token_embd.weight": ("F32", (4, 64), raw)})
