"""Writing a container: tensors as they come, the header last, complete or not at all.

Bytes go to a file beside the target, which takes its name when everything is on the disk. Parts
are written and hashed by a few threads while the next ones are made: SHA-256 is the slow part.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import IO, Any

import msgspec
import torch
import xxhash

from fastgpt.checkpoint.container import (
    ALIGNMENT,
    HEADER_PREFIX,
    NO_SUM,
    PADDING,
    SUM_AT,
    Metadata,
    TensorRecord,
    part_bytes,
    part_sums,
    part_xxh3,
    stored_name,
)
from fastgpt.checkpoint.safetensors import DTYPES
from fastgpt.errors import CheckpointError
from fastgpt.scheme import PLAIN_DTYPES, Format, QuantizedTensor

__all__ = ["Commit", "ContainerWriter", "WrittenBlock", "write_container"]

Stored = torch.Tensor | QuantizedTensor

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FORMAT_OF = {dtype: name for name, dtype in PLAIN_DTYPES.items()}
_MAX_PENDING_BYTES = 4 << 30  # in memory while threads write and hash them
_MAX_WRITE_BYTES = 64 << 20  # by one thread: a new page of a file costs more than its bytes
_MAX_THREADS = 8
_MAX_CALL_BYTES = 1 << 30  # of one read; Linux takes less than 2 GiB


class WrittenBlock(msgspec.Struct, frozen=True):
    """Tensors whose bytes are on the disk.

    Attributes:
        entries: stored name -> dtype, shape and data_offsets, as in a safetensors header.
        records: name -> record of the metadata.
        end: first byte behind them, from the end of the header's room.
    """

    entries: dict[str, dict[str, Any]]
    records: dict[str, TensorRecord]
    end: int


class Commit:
    """A block that is on its way to the disk.

    Args:
        wait: returns it when it is there.
        futures: what has to be done for that.
    """

    def __init__(self, wait: Callable[[], WrittenBlock], futures: Sequence[Future[Any]]) -> None:
        self.wait = wait
        self._futures = futures

    def is_written(self) -> bool:
        """Tell whether `wait` would only have the file system to wait for."""
        return all(future.done() for future in self._futures)


class ContainerWriter:
    """Writes one container; belongs to one thread.

    Args:
        path: the file that `finish` makes; replaced if it exists.
        header_bytes: room to reserve for the header. When it suffices the tensor bytes are written
            once; otherwise they are copied behind the header when its size is known.
        body: where bytes go until then, beside `path`; by default a name of this process.
        blocks: what a run that ended early has committed to `body`: kept; else it starts empty.

    Raises:
        CheckpointError: `path` is a directory.
        OSError: the file system refused.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        header_bytes: int = 0,
        body: Path | None = None,
        blocks: Sequence[WrittenBlock] = (),
    ) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise CheckpointError(f"{path} is a directory; name a file in it, such as m.pt")
        self.body = body or self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._reserved = _align(header_bytes)
        self._entries: dict[str, dict[str, Any]] = {}
        self._records: dict[str, TensorRecord] = {}
        for block in blocks:
            self._entries.update(block.entries)
            self._records.update(block.records)
        self._end = blocks[-1].end if blocks else 0
        self._num_closed = len(self._entries)
        self._new: dict[str, _Pending] = {}  # of the open block
        self._closed: dict[str, _Pending] = {}  # of blocks that are not waited for yet
        self._file = self.body.open("r+b" if blocks else "w+b", buffering=0)
        os.ftruncate(self._file.fileno(), self._reserved + self._end)
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))
        self._waiting: deque[tuple[int, list[Future[Any]]]] = deque()

    def __contains__(self, name: object) -> bool:
        """Tell whether a tensor of this name was added."""
        return name in self._records or name in self._new or name in self._closed

    def add(self, name: str, tensor: Stored) -> None:
        """Append a tensor, on any device; its bytes must not change until its block is on the disk.

        Raises:
            CheckpointError: the name is taken or reserved, or the type has no stored form.
            OSError: the file system refused this or an earlier part.
        """
        if name in self or name.startswith(PADDING):
            raise CheckpointError(f"cannot write tensor {name!r}: the name is taken")
        fmt, shape, parts = _stored_form(tensor)
        sums: dict[str, Future[tuple[str, str]]] = {}
        writes: list[Future[None]] = []
        for suffix, part in parts.items():
            if part.dtype not in _DTYPE_NAMES:
                raise CheckpointError(f"cannot store {name!r}: {part.dtype} has no stored form")
            on_host = part.detach().cpu().contiguous()
            sums[suffix] = self._put(stored_name(name, suffix), on_host, writes)
            if self._end % ALIGNMENT:
                padding = torch.zeros(-self._end % ALIGNMENT, dtype=torch.uint8)
                self._put(f"{PADDING}{len(self._entries)}", padding, writes)
        self._new[name] = _Pending(fmt, shape, sums, writes)

    def commit(self) -> Commit:
        """Close a block: what was added since the last. More can be added at once.

        The result's `wait` is to be called before the next block's.
        """
        new, end = self._new, self._end
        entries = dict(list(self._entries.items())[self._num_closed :])
        self._new, self._num_closed = {}, len(self._entries)
        self._closed.update(new)

        def wait() -> WrittenBlock:
            records = {name: pending.record() for name, pending in new.items()}
            _sync(self._file)
            self._records.update(records)
            for name in new:
                del self._closed[name]
            return WrittenBlock(entries, records, end)

        return Commit(wait, [future for pending in new.values() for future in pending.futures()])

    def read(self, name: str) -> Stored:
        """Return a tensor of a closed block, when it is written, in memory of its own.

        Raises:
            CheckpointError: its bytes are not those that were written.
        """
        record = self._records[name] if name in self._records else self._closed[name].record()
        parts = {}
        for suffix, expected in record.parts.items():
            entry = self._entries[stored_name(name, suffix)]
            start, end = entry["data_offsets"]
            raw = torch.empty(end - start, dtype=torch.uint8)
            self._file.seek(self._reserved + start)
            if raw.numel() and _read_all(self._file, raw) != end - start:
                raise CheckpointError(f"{self.body} ends inside {name!r}; start again without it")
            part = raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])
            if part_xxh3(part) != expected:
                raise CheckpointError(
                    f"{self.body} is damaged: {name!r} does not match its checksum; start again"
                )
            parts[suffix] = part
        if parts.keys() == {""}:
            return parts[""]
        assert record.format is not None
        return QuantizedTensor(Format.parse(record.format), tuple(record.shape), parts)

    def finish(self, metadata: Metadata) -> None:
        """Write the header and give the file its name; `metadata.tensors` is computed here."""
        self.commit().wait()
        assert not self._closed
        header = _header(msgspec.structs.replace(metadata, tensors=self._records), self._entries)
        finished = self.body
        if len(header) + 8 <= self._reserved:
            self._file.seek(0)
            _write_header(self._file, header, self._reserved)
            _sync(self._file)
        else:
            finished = self.body.with_name(f"{self.body.name}.copy")
            try:
                with finished.open("wb") as copy:
                    _write_header(copy, header, _align(len(header) + 8))
                    self._file.seek(self._reserved)
                    shutil.copyfileobj(self._file, copy, 16 * 1024 * 1024)
                    _sync(copy)
            except BaseException:
                finished.unlink(missing_ok=True)
                raise
        finished.replace(self.path)
        self.close(keep=finished == self.body)

    def close(self, *, keep: bool) -> None:
        """Stop writing; without `keep` what was written is deleted."""
        self._threads.shutdown(cancel_futures=True)
        self._waiting.clear()
        self._file.close()
        if not keep:
            self.body.unlink(missing_ok=True)

    def _put(
        self, stored: str, part: torch.Tensor, writes: list[Future[None]]
    ) -> Future[tuple[str, str]]:
        """Send the bytes of a part on their way, in `writes`; the result is (xxh3, sha256)."""
        if stored in self._entries or stored == "__metadata__":
            raise CheckpointError(f"cannot write two tensors named {stored!r}")
        start, raw = self._reserved + self._end, part_bytes(part)
        sums = self._threads.submit(part_sums, part)
        mine = [
            self._threads.submit(
                _write, self._file.fileno(), start + at, raw[at : at + _MAX_WRITE_BYTES]
            )
            for at in range(0, len(raw), _MAX_WRITE_BYTES)
        ]
        writes += mine
        self._entries[stored] = {
            "dtype": _DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [self._end, self._end + part.nbytes],
        }
        self._end += part.nbytes
        self._waiting.append((part.nbytes, [sums, *mine]))
        while sum(size for size, _ in self._waiting) > _MAX_PENDING_BYTES:
            for future in self._waiting.popleft()[1]:
                future.result()
        return sums


class _Pending(msgspec.Struct):
    """A tensor whose parts are being written and hashed."""

    format: Format | None
    shape: tuple[int, ...]
    sums: dict[str, Future[tuple[str, str]]]
    writes: list[Future[None]]

    def futures(self) -> list[Future[Any]]:
        """Return everything that is under way."""
        return [*self.sums.values(), *self.writes]

    def record(self) -> TensorRecord:
        """Return the tensor's record, once its parts are written."""
        sums = {suffix: future.result() for suffix, future in self.sums.items()}
        for write in self.writes:
            write.result()
        return TensorRecord(
            self.format.to_json() if self.format else None,
            self.shape,
            {suffix: xxh3 for suffix, (xxh3, _) in sums.items()},
            {suffix: sha256 for suffix, (_, sha256) in sums.items()},
        )


def write_container(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, Stored]],
    metadata: Metadata,
    *,
    header_bytes: int = 0,
) -> None:
    """Write a container; `path` appears complete or not at all.

    Tensors are written as they come, so a generator keeps few in memory at a time. The metadata is
    read after the last tensor: a generator may complete `metadata.report` as it goes.

    Args:
        path: the file to write; replaced if it exists.
        tensors: unique names, in file order, on any device.
        metadata: its `tensors` field is ignored and computed here.
        header_bytes: room to reserve for the header; see `ContainerWriter`.

    Raises:
        CheckpointError: a name occurs twice or is reserved, or `path` is a directory.
        OSError: the file system refused; no partial file stays behind.
    """
    writer = ContainerWriter(path, header_bytes=header_bytes)
    try:
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.finish(metadata)
    except BaseException:
        with contextlib.suppress(OSError):
            writer.close(keep=False)
        raise


def _write(descriptor: int, start: int, left: memoryview) -> None:
    while len(left):
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written


def _read_all(file: FileIO, raw: torch.Tensor) -> int:
    """Fill `raw` from where the file stands; return how many bytes there were."""
    left = part_bytes(raw)
    while len(left) and (count := file.readinto(left[:_MAX_CALL_BYTES])):
        left = left[count:]
    return raw.numel() - len(left)


def _stored_form(
    tensor: Stored,
) -> tuple[Format | None, tuple[int, ...], dict[str, torch.Tensor]]:
    if isinstance(tensor, QuantizedTensor):
        return tensor.format, tensor.shape, tensor.parts
    plain = _FORMAT_OF.get(tensor.dtype)
    return Format(plain) if plain else None, tuple(tensor.shape), {"": tensor}


def _header(metadata: Metadata, entries: dict[str, dict[str, Any]]) -> bytes:
    """Return the header with its checksum missing, unpadded."""
    text = msgspec.json.encode(metadata).decode()
    head = {"__metadata__": {"xxh3": NO_SUM, "fastgpt": text}, **entries}
    encoded = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    assert encoded.startswith(HEADER_PREFIX.encode())
    return encoded


def _write_header(file: IO[bytes], header: bytes, total_bytes: int) -> None:
    """Write length, header and spaces so that they fill `total_bytes`, with the header's sum."""
    padded = bytearray(header.ljust(total_bytes - 8))
    padded[SUM_AT : SUM_AT + 16] = xxhash.xxh3_64_hexdigest(bytes(padded)).encode()
    file.write(len(padded).to_bytes(8, "little"))
    file.write(padded)


def _align(n: int) -> int:
    return math.ceil(n / ALIGNMENT) * ALIGNMENT


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
