"""FastGPT's own file: safetensors inside, checksummed, memory-mapped; nothing in it is executed.

    u64 header length | header (JSON, padded with spaces) | tensors, each starting at 64 bytes

The header is a safetensors header, so any safetensors reader opens the file. Its `__metadata__`
holds `xxh3`, the checksum of the header itself (computed with those 16 digits set to "0"), and
`fastgpt`, the JSON of `Metadata`. Tensors named `__padding__.N` hold the zero bytes between
aligned tensors, because the format allows no gaps. So every byte of the file is accounted for: the
header by its own checksum, tensors by theirs, padding by being zero.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
import xxhash

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.safetensors import SafetensorsFile, TensorEntry
from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.scheme import Format, QuantizedTensor, part_name

__all__ = [
    "FORMAT_VERSION",
    "Container",
    "Metadata",
    "TensorRecord",
    "part_sha256",
]

FORMAT_VERSION = 1
ALIGNMENT = 64

PADDING = "__padding__."
NO_SUM = "0" * 16
_PIECE_BYTES = 4 << 20  # hashed at once
HEADER_PREFIX = '{"__metadata__":{"xxh3":"'  # every header starts so; the 16 digits follow
SUM_AT = len(HEADER_PREFIX)


class TensorRecord(msgspec.Struct, frozen=True):
    """What the metadata says of one tensor.

    Attributes:
        format: the mapping of `Format.to_json`, or None for a tensor that is stored as it is in a
            type that is no format (integers, booleans).
        shape: shape of the weight.
        parts: suffix ("" for a plain tensor) -> xxh3 of the part's bytes, 16 hexadecimal digits.
        sha256: suffix -> SHA-256 of the part's bytes; empty in files of before it was kept.
    """

    format: dict[str, Any] | None
    shape: tuple[int, ...]
    parts: dict[str, str]
    sha256: dict[str, str] = {}


class Metadata(msgspec.Struct, kw_only=True):
    """Everything in a container besides tensor bytes.

    Attributes:
        format_version: integer; a file with a newer one is refused.
        model_config: the fields of the Hugging Face config.json, None for a foreign module.
        policy: the quantizer's configuration as it was applied.
        tensors: name -> record; filled in by `ContainerWriter`.
        tokenizer_json: the text of tokenizer.json, None when the file serves token ids only.
        tokenizer_config: the fields of tokenizer_config.json.
        chat_template: jinja source, None when there is none.
        generation_config: the fields of generation_config.json.
        report: sizes by format and the loss summary.
        certificate: what was measured of the model's answers, on which tokens, of which source.
        fp16_overflows: module or weight name -> largest activation seen there, where it comes too
            near to float16's largest value; the dtype `auto` avoids float16 then.
    """

    format_version: int = FORMAT_VERSION
    model_config: dict[str, Any] | None = None
    policy: dict[str, Any] = {}
    tensors: dict[str, TensorRecord] = {}
    tokenizer_json: str | None = None
    tokenizer_config: dict[str, Any] = {}
    chat_template: str | None = None
    generation_config: dict[str, Any] = {}
    report: dict[str, Any] = {}
    certificate: dict[str, Any] = {}
    fp16_overflows: dict[str, float] = {}


class Container(Checkpoint):
    """A container opened for reading.

    The header is checked completely when the object is made; tensor bytes are checked against their
    checksum when they are read. Tensors are copy-on-write views of the mapped file.

    Attributes:
        metadata: what the header says; the attributes of every `Checkpoint` come from it.
        header_bytes: length of the header, its eight-byte length field included.

    Raises:
        CheckpointError: the file is missing, damaged, newer, or not a container.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = SafetensorsFile(self.path)
        self.header_bytes = self._check_header_sum()
        self.metadata = self._parse_metadata(self._file.metadata["fastgpt"])
        self._formats = self._check_entries()
        self._check_layout()
        self.config = self.metadata.model_config
        self.tokenizer_json = self.metadata.tokenizer_json
        self.tokenizer_config = self.metadata.tokenizer_config
        self.chat_template = self.metadata.chat_template
        self.generation_config = self.metadata.generation_config
        self.fp16_overflows = self.metadata.fp16_overflows

    def names(self) -> list[str]:
        """Return the names of all weights, sorted, a quantized one once."""
        return sorted(self._formats)

    def __contains__(self, name: object) -> bool:
        """Tell whether the file has a weight of this name."""
        return name in self._formats

    def format(self, name: str) -> Format | None:
        """Return how a weight is stored; None for integer and boolean tensors."""
        self._require(name)
        return self._formats[name]

    def read(self, name: str) -> torch.Tensor | QuantizedTensor:
        """Return one weight after its bytes were checked against their checksum.

        Raises:
            CheckpointError: no such weight, or its bytes are damaged.
        """
        self._require(name)
        record, fmt = self.metadata.tensors[name], self._formats[name]
        parts = {}
        for suffix, checksum in record.parts.items():
            part = self._file.read(stored_name(name, suffix))
            if part_xxh3(part) != checksum:
                self._fail(
                    f"is damaged: the bytes of {stored_name(name, suffix)!r} do not match their "
                    "checksum; copy or quantize it again"
                )
            parts[suffix] = part
        if fmt is None or fmt.is_plain:
            return parts[""]
        return QuantizedTensor(fmt, record.shape, parts)

    def _require(self, name: str) -> None:
        if name not in self._formats:
            self._fail(f"has no tensor {name!r}")

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {what}") from None

    def _check_header_sum(self) -> int:
        """Compare the header with its own checksum; return the header's length with its prefix."""
        if "fastgpt" not in self._file.metadata:
            self._fail(
                "is a safetensors file but no FastGPT container; give the directory that holds its "
                "config.json, or quantize it first"
            )
        with self.path.open("rb") as file:
            raw = bytearray(file.read(int.from_bytes(file.read(8), "little")))
        stored = raw[SUM_AT : SUM_AT + 16].decode("utf-8", "replace")
        raw[SUM_AT : SUM_AT + 16] = NO_SUM.encode()
        has_prefix = raw.startswith(HEADER_PREFIX.encode())
        if not has_prefix or xxhash.xxh3_64_hexdigest(bytes(raw)) != stored:
            self._fail("is damaged: its header does not match its checksum; copy it again")
        return len(raw) + 8

    def _parse_metadata(self, text: str) -> Metadata:
        try:
            version = msgspec.json.decode(text, type=dict[str, Any]).get("format_version")
            if type(version) is int and version > FORMAT_VERSION:
                self._fail(
                    f"has format version {version}; this FastGPT reads up to {FORMAT_VERSION}. "
                    "Upgrade fastgpt-optimizer"
                )
            if type(version) is not int or version != FORMAT_VERSION:
                self._fail(f"has format version {version!r}, which never existed")
            return msgspec.json.decode(text, type=Metadata)
        except (msgspec.MsgspecError, RecursionError) as error:
            self._fail(f"has metadata that cannot be read ({error})")

    def _check_entries(self) -> dict[str, Format | None]:
        """Check that metadata and header describe the same tensors; return name -> format."""
        formats: dict[str, Format | None] = {}
        known: set[str] = set()
        for name, record in self.metadata.tensors.items():
            fmt = self._format_of(name, record)
            formats[name] = fmt
            if any(size < 0 for size in record.shape):
                self._fail(f"gives tensor {name!r} the shape {record.shape}")
            expected = None if fmt is None else fmt.parts(record.shape)
            if record.parts.keys() != ({""} if expected is None else expected.keys()):
                self._fail(f"gives tensor {name!r} the parts {sorted(record.parts)}")
            for suffix in record.parts:
                stored = stored_name(name, suffix)
                entry = self._file.entries.get(stored)
                if entry is None:
                    self._fail(f"lacks {stored!r}, a part of {name!r}")
                dtype, shape = entry.dtype, record.shape
                if expected is not None:
                    dtype, shape = expected[suffix]
                if (entry.dtype, entry.shape) != (dtype, shape):
                    self._fail(
                        f"stores {stored!r} as {entry.dtype} {entry.shape}; "
                        f"{fmt or 'its record'} needs {dtype} {shape}"
                    )
                if stored in known:
                    self._fail(f"uses {stored!r} for two tensors")
                known.add(stored)
        for stored in self._file.entries:
            if stored not in known and not stored.startswith(PADDING):
                self._fail(f"holds {stored!r}, which its metadata does not know")
        return formats

    def _format_of(self, name: str, record: TensorRecord) -> Format | None:
        if record.format is None:
            return None
        try:
            fmt = Format.parse(record.format, f"tensor {name!r}")
            fmt.parts(record.shape)
            return fmt
        except ConfigError as error:
            self._fail(f"cannot be used: {error}")

    def _check_layout(self) -> None:
        """Check that entries follow each other from header to end of file, aligned, zero-padded."""
        at = self.header_bytes
        for stored, entry in sorted(self._file.entries.items(), key=_by_offset):
            if entry.start != at:
                self._fail(f"has bytes {at} to {entry.start} that belong to no tensor")
            at = entry.end
            if stored.startswith(PADDING):
                if entry.end - entry.start >= ALIGNMENT or bool(self._file.read(stored).any()):
                    self._fail(f"is damaged: its padding {stored!r} is not zero")
            elif entry.start % ALIGNMENT:
                self._fail(f"has tensor {stored!r} at byte {entry.start}, not at a multiple of 64")
        if at != self._file.file_bytes:
            self._fail(f"has {self._file.file_bytes - at} bytes after its last tensor")


def _by_offset(item: tuple[str, TensorEntry]) -> tuple[int, int]:
    return item[1].start, item[1].end


def stored_name(name: str, suffix: str) -> str:
    """Return the name under which a part lies in the file; "" is the part of a plain tensor."""
    return part_name(name, suffix) if suffix else name


def part_bytes(part: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, not copied."""
    raw = part.reshape(-1).view(torch.uint8).numpy()
    return raw.data


def part_sums(part: torch.Tensor) -> tuple[str, str]:
    """Return what `part_xxh3` and `part_sha256` do, the bytes read once.

    A piece at a time: XXH3 keeps Python's lock while it runs.
    """
    xxh3, sha256 = xxhash.xxh3_64(), hashlib.sha256()
    raw = part_bytes(part)
    for first in range(0, len(raw), _PIECE_BYTES):
        piece = raw[first : first + _PIECE_BYTES]
        xxh3.update(piece)
        sha256.update(piece)
    return xxh3.hexdigest(), sha256.hexdigest()


def part_xxh3(part: torch.Tensor) -> str:
    """Return the XXH3 of the bytes of a contiguous CPU tensor, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(part_bytes(part))


def part_sha256(part: torch.Tensor) -> str:
    """Return the SHA-256 of the bytes of a contiguous CPU tensor."""
    return hashlib.sha256(part_bytes(part)).hexdigest()
