"""Parse GGUF files: metadata and tensor table are checked whole before anything is mapped.

    "GGUF", version, tensor count, metadata count | metadata | tensor table | padding | tensors

All integers are little endian; strings carry a 64-bit length; a tensor's dimensions go from its
fastest to its slowest, so they are reversed here.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgpt.checkpoint.gguf_blocks import BLOCK_TYPES, TYPE_NAMES
from fastgpt.checkpoint.mapping import MappedFile
from fastgpt.errors import CheckpointError, UnsupportedFormat

__all__ = ["MAGIC", "GgufFile", "GgufParts", "GgufTensor"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_COUNT = 1 << 24  # of metadata entries, tensors, and array elements; vocabularies have 2^18
MAX_NESTING = 3

# value type -> struct code; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: its type by name, its shape with columns last, absolute byte offsets."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


class GgufFile:
    """One GGUF file whose header was checked.

    Attributes:
        metadata: key -> number, bool, string, or list of them.
        tensors: name -> place.

    Raises:
        CheckpointError: if the file is missing, truncated or not valid.
        UnsupportedFormat: if a tensor has a type that is not read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(24)
        except OSError as error:
            self._fail(f"cannot be read: {error.strerror or error}")
        if start[:4] != MAGIC:
            self._fail(f"is no GGUF file: it starts with {start[:4]!r}, not {MAGIC!r}")
        if len(start) < 24:
            self._fail(f"is truncated: it has {size} bytes, fewer than a header")
        version, num_tensors, num_metadata = struct.unpack("<IQQ", start[4:])
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                self._fail("is a big-endian GGUF file; convert it to little endian")
            self._fail(f"is GGUF version {version}; read are {VERSIONS}, convert it again")
        if max(num_tensors, num_metadata) > MAX_COUNT:
            self._fail(f"states {num_tensors} tensors and {num_metadata} metadata entries")
        self.mapping = MappedFile(self.path, size)
        cursor = _Cursor(self, self.mapping.read(0, size).numpy().data, 24)
        for _ in range(num_metadata):
            key = cursor.string("a metadata key")
            if key in self.metadata:
                self._fail(f"has the metadata key {key!r} twice")
            self.metadata[key] = cursor.value(f"metadata {key!r}")
        table = [self._entry(cursor) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._fail(f"has general.alignment {alignment!r}; expected a power of two")
        data = -(-cursor.at // alignment) * alignment
        for name, kind, shape, offset in table:
            self._add(name, kind, shape, data + offset, offset % alignment == 0)
        self._check_places(data)
        self.mapping.unmap()

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {what}") from None

    def _entry(self, cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
        name = cursor.string("a tensor name")
        num_dims = cursor.number("I", f"tensor {name!r}")
        if not 1 <= num_dims <= 4:
            self._fail(f"gives tensor {name!r} {num_dims} dimensions; expected 1 to 4")
        shape = tuple(cursor.number("Q", f"tensor {name!r}") for _ in range(num_dims))
        kind = cursor.number("I", f"tensor {name!r}")
        return name, kind, shape[::-1], cursor.number("Q", f"tensor {name!r}")

    def _add(
        self, name: str, kind: int, shape: tuple[int, ...], start: int, is_aligned: bool
    ) -> None:
        known = TYPE_NAMES.get(kind, f"type {kind}")
        block = BLOCK_TYPES.get(known)
        if block is None:
            raise UnsupportedFormat(
                f"{self.path} has tensor {name!r} in {known}, which is not read; read are "
                f"{', '.join(BLOCK_TYPES)}: convert the model to one of them"
            )
        if name in self.tensors:
            self._fail(f"has tensor {name!r} twice")
        if not is_aligned:
            self._fail(f"puts tensor {name!r} at an offset that is not aligned")
        if shape[-1] % block.num_values or math.prod(shape) >= 1 << 48:
            self._fail(
                f"gives tensor {name!r} the shape {shape}; {known} stores rows in blocks of "
                f"{block.num_values}"
            )
        num_bytes = math.prod(shape) // block.num_values * block.num_bytes
        self.tensors[name] = GgufTensor(known, shape, start, start + num_bytes)

    def _check_places(self, data: int) -> None:
        """Check that tensors lie behind the header, apart from each other, inside the file."""
        end = data
        for name, tensor in sorted(self.tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                self._fail(f"has overlapping tensors; {name!r} starts inside the one before it")
            end = tensor.end
            if end > self.mapping.file_bytes:
                self._fail(
                    f"is truncated: tensor {name!r} ends at byte {end}, the file at "
                    f"{self.mapping.file_bytes}; copy or download it again"
                )

    def raw(self, name: str) -> Tensor:
        """Return a tensor's bytes, uint8 [rows, row bytes], all but the last dimension as rows."""
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        if tensor.start == tensor.end:
            return torch.empty((rows, 0), dtype=torch.uint8)
        return self.mapping.read(tensor.start, tensor.end).view(rows, -1)


class GgufParts:
    """One model in one GGUF file, or in the parts that gguf-split made of it.

    Attributes:
        metadata: of the first part, which has the model's.
        tensors: name -> place in its part.

    Raises:
        CheckpointError: a part is missing, damaged, or not named as gguf-split names it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = GgufFile(path)
        count = given.metadata.get("split.count", 1)
        self._parts = [given]
        if isinstance(count, int) and count > 1:
            match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", given.path.name)
            if match is None or int(match[2]) != count:
                given._fail(
                    f"is one of {count} parts, whose names end in -00001-of-{count:05d}.gguf; give "
                    "it its name back"
                )
            names = (f"{match[1]}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count))
            self._parts = [GgufFile(given.path.with_name(name)) for name in names]
        self.metadata = self._parts[0].metadata
        self.tensors: dict[str, GgufTensor] = {}
        self._part_of: dict[str, GgufFile] = {}
        for part in self._parts:
            for name, tensor in part.tensors.items():
                if name in self.tensors:
                    part._fail(f"has tensor {name!r}, which another part has too")
                self.tensors[name] = tensor
                self._part_of[name] = part
        stated = self.metadata.get("split.tensors.count", len(self.tensors))
        if stated != len(self.tensors):
            given._fail(f"and its other parts hold {len(self.tensors)} tensors of {stated}")
        self._current = self._parts[0]

    def raw(self, name: str) -> Tensor:
        """Return a tensor's bytes, see `GgufFile.raw`; at most one part stays mapped."""
        part = self._part_of[name]
        if part is not self._current:
            self._current.mapping.unmap()
            self._current = part
        return part.raw(name)


class _Cursor:
    """Reads values one after another; a file that ends early is an error that says where."""

    def __init__(self, file: GgufFile, data: memoryview, at: int) -> None:
        self.file = file
        self.data = data
        self.at = at

    def take(self, count: int, what: str) -> memoryview:
        """Return the next `count` bytes."""
        if count > len(self.data) - self.at:
            self.file._fail(
                f"is truncated or damaged: {what} at byte {self.at} needs {count} bytes, the file "
                f"has {len(self.data) - self.at} more; copy or download it again"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        """Return the next number of a struct code."""
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))
        return value

    def string(self, what: str) -> str:
        """Return the next string."""
        raw = bytes(self.take(self.number("Q", what), what))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.file._fail(f"has {what} that is not UTF-8: {raw[:40]!r}")

    def value(self, what: str) -> Any:
        """Return the next metadata value with its type before it."""
        return self._typed(self.number("I", what), what, 0)

    def _typed(self, kind: int, what: str, depth: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY or depth == MAX_NESTING:
            self.file._fail(f"gives {what} the unknown value type {kind}")
        item, count = self.number("I", what), self.number("Q", what)
        if count > MAX_COUNT:
            self.file._fail(f"gives {what} {count} elements")
        if item in _SCALARS:
            code = _SCALARS[item]
            raw = self.take(count * struct.calcsize(f"<{code}"), what)
            return list(struct.unpack(f"<{count}{code}", raw))
        return [self._typed(item, what, depth + 1) for _ in range(count)]
