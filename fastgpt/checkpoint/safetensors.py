"""Read safetensors files: check the whole header ourselves, then map the file.

Layout: header length (uint64, little endian), header (JSON), tensor bytes. The header maps names to
{dtype, shape, data_offsets}, offsets counted from the end of the header, and may hold string pairs
under `__metadata__`. Nothing of the file is mapped before every entry fits the file.

Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from fastgpt.checkpoint.mapping import MappedFile
from fastgpt.errors import CheckpointError

__all__ = ["SafetensorsFile", "TensorEntry"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 256 * 1024 * 1024  # R1's largest shard header is 0.1 MB


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in the file; `start` and `end` are absolute byte offsets."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One safetensors file whose header was checked; tensors are views of a `MappedFile`.

    Raises:
        CheckpointError: if the file is missing, truncated or its header is not valid.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.entries: dict[str, TensorEntry] = {}
        self.metadata: dict[str, str] = {}
        try:
            with self.path.open("rb") as file:
                self.file_bytes = os.fstat(file.fileno()).st_size
                length = file.read(8)
                header_bytes = int.from_bytes(length, "little")
                if len(length) < 8:
                    self._fail(f"has {len(length)} bytes, too few for a safetensors header")
                if header_bytes > min(MAX_HEADER_BYTES, self.file_bytes - 8):
                    self._fail(
                        f"states a header of {header_bytes} bytes in a file of {self.file_bytes}; "
                        "it is truncated or not a safetensors file"
                    )
                text = file.read(header_bytes)
        except OSError as error:
            self._fail(f"cannot be read: {error.strerror or error}")
        if len(text) != header_bytes:
            self._fail(f"ends inside its header, after {len(text)} of {header_bytes} bytes")
        self.mapping = MappedFile(self.path, self.file_bytes)
        self._parse(text, 8 + header_bytes)

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {what}") from None

    def _parse(self, text: bytes, data_start: int) -> None:
        """Fill `entries` and `metadata` from the JSON header; each entry is checked."""
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_pairs)
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            self._fail(f"has a header that is not valid JSON ({error})")
        if not isinstance(header, dict):
            self._fail(f"has a header that is a JSON {type(header).__name__}, not an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            self._fail("has a __metadata__ that is not a map of strings")
        self.metadata = metadata
        for name, value in header.items():
            self.entries[name] = self._entry(name, value, data_start)
        end = data_start
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].start):
            if entry.start < end:
                self._fail(f"has overlapping tensors; {name!r} starts inside the one before it")
            end = entry.end
        if end > self.file_bytes:
            self._fail(
                f"is truncated: its tensors end at byte {end}, the file at {self.file_bytes}; "
                "copy or download it again"
            )

    def _entry(self, name: str, value: Any, data_start: int) -> TensorEntry:
        if not isinstance(value, dict):
            self._fail(f"describes tensor {name!r} by {value!r}, not an object")
        dtype = DTYPES.get(str(value.get("dtype")))
        if dtype is None:
            self._fail(
                f"has tensor {name!r} of dtype {value.get('dtype')!r}; known are {sorted(DTYPES)}"
            )
        shape, offsets = value.get("shape"), value.get("data_offsets")
        if not _is_counts(shape):
            self._fail(f"gives tensor {name!r} the shape {shape!r}, not a list of counts")
        if not _is_counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
            self._fail(f"gives tensor {name!r} the offsets {offsets!r}, not [start, end]")
        num_bytes = math.prod(shape) * dtype.itemsize
        if offsets[1] - offsets[0] != num_bytes:
            self._fail(
                f"gives tensor {name!r} {offsets[1] - offsets[0]} bytes, but its shape {shape} "
                f"and dtype {value['dtype']} need {num_bytes}"
            )
        return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])

    def read(self, name: str) -> Tensor:
        """Return the tensor as a CPU view of the mapping; writing to it changes memory only.

        Raises:
            CheckpointError: if the file has no such tensor or became shorter.
        """
        entry = self.entries.get(name)
        if entry is None:
            self._fail(f"has no tensor {name!r}")
        num_values = math.prod(entry.shape)
        if num_values == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        raw = self.mapping.read(entry.start, entry.end)
        if entry.start % entry.dtype.itemsize:  # legal in the format, not for a view
            raw = raw.clone()
        return raw.view(entry.dtype).view(entry.shape)

    def unmap(self) -> None:
        """Let go of the mapping; tensors read before keep it, the next `read` maps again."""
        self.mapping.unmap()


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; a repeated key would hide a tensor, so it is an error."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    """Tell whether value is a list of integers in 0 .. 2^63 - 1 whose product is one as well."""
    return (
        isinstance(value, list)
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
        and math.prod(value) < 2**63
    )
