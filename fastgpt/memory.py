"""The memory pool: one owner for weights, KV cache and workspaces, under one budget."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastgpt import _C
from fastgpt.errors import InvalidArgument
from fastgpt.units import resolve_bytes

__all__ = ["GPTMemoryPool", "PoolEntry", "PoolStats", "device_memory"]

_CONTENTS = {"undefined": 0, "zero": 1, "keep": 2}
_HANDLE_BYTES = 64 << 20
_SWAP_HANDLE_BYTES = 16 << 20  # memory leaves in whole handles: smaller ones follow layers closer
_DEFAULT_BUDGET = "0.9"  # of what is free when the pool is made


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """Byte counts of a pool, exact at every moment.

    reserved = requested + rounding + pending + returnable + scattered + lane + evicted.

    Attributes:
        budget_bytes: reserved never exceeds it.
        reserved_bytes: physical memory held.
        allocated_bytes: handed out, requested + rounding.
        requested_bytes: handed out, as asked for.
        rounding_bytes: handed out beyond what was asked for.
        pending_bytes: free, a stream may still be using it.
        returnable_bytes: free, in handles that hold nothing else.
        scattered_bytes: free, in handles that are partly used.
        lane_bytes: free, kept aside for one thread and stream.
        evicted_bytes: under evicted entries, in handles that are partly used.
        ahead_bytes: of the free bytes, those never handed out yet.
        largest_free_bytes: the largest request served without growing.
        peak_requested_bytes, peak_allocated_bytes, peak_reserved_bytes: since reset_peaks.
        peak_touched_bytes: peak of reserved - ahead.
        num_slabs: handles of physical memory, or fixed slabs.
        num_blocks: live blocks; num_allocations: ever.
        num_upstream_calls: driver calls for memory.
        num_stream_waits, num_event_records: for reuse on another stream.
        host_bytes: host memory that holds evicted and frozen entries.
        num_evictions, num_clean_evictions: ever; clean ones copied nothing.
        num_restores: ever.
        fragmentation: 1 - peak requested / peak reserved.
        fragmentation_now: (rounding + scattered) / reserved.
    """

    budget_bytes: int
    reserved_bytes: int
    allocated_bytes: int
    requested_bytes: int
    rounding_bytes: int
    pending_bytes: int
    returnable_bytes: int
    scattered_bytes: int
    lane_bytes: int
    evicted_bytes: int
    ahead_bytes: int
    largest_free_bytes: int
    peak_requested_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_touched_bytes: int
    num_slabs: int
    num_blocks: int
    num_allocations: int
    num_upstream_calls: int
    num_stream_waits: int
    num_event_records: int
    host_bytes: int
    num_evictions: int
    num_clean_evictions: int
    num_restores: int
    fragmentation: float
    fragmentation_now: float

    @property
    def free_bytes(self) -> int:
        """Reserved and not handed out."""
        return self.reserved_bytes - self.allocated_bytes


@dataclass(frozen=True)
class PoolEntry:
    """One named buffer: its size, how many tensors hold it, and whether it is in host memory."""

    name: str
    num_bytes: int
    num_leases: int
    is_evicted: bool


def device_memory(device: torch.device | str) -> tuple[int, int]:
    """Return (free, total) bytes of a device.

    Raises:
        DeviceError: if the device is not there or this build has no CUDA.
    """
    free, total = _C.device_memory(_cuda_index(torch.device(device)))
    return int(free), int(total)


def _cuda_index(device: torch.device) -> int:
    """Return the CUDA index of a device, -1 for the CPU."""
    if device.type == "cpu":
        return -1
    if device.type != "cuda":
        raise InvalidArgument(f"device is {device}; expected cpu or cuda[:index]")
    return device.index if device.index is not None else torch.cuda.current_device()


class GPTMemoryPool:
    """A two-level memory pool of one device: an arena, and named buffers that persist.

    Level 1 hands out blocks that never move, in stream order. Level 2 remembers blocks by layer
    name, so that a layer asking again for its buffer gets the same memory. Tensors keep their
    memory alive by themselves: deleting the pool or freeing a name while a tensor lives is safe.

    Any thread may call any method. A pool belongs to the process that made it.

    Args:
        device: "cpu", "cuda" or "cuda:<index>".
        budget: limit of the bytes held from the device: an int, "24GB", "24GiB", "0.9" (of what is
            free now) or "-2GiB" (free minus that). None = "0.9". A budget above what is free is
            lowered to 0.9 of it.
        host_budget: limit of the host memory for evicted entries, in the same forms; then the pool
            evicts before it reports OutOfMemory. None: nothing is evicted.

    Raises:
        InvalidArgument: for another device or an unreadable budget.
        DeviceError: if the device is not there.

    >>> pool = GPTMemoryPool("cpu", budget="1GiB")
    >>> a = pool.allocate((2, 3), "layers.0.ffn")
    >>> b = pool.allocate((2, 3), "layers.0.ffn")
    >>> a.data_ptr() == b.data_ptr()
    True
    """

    def __init__(
        self,
        device: torch.device | str,
        budget: int | str | None = None,
        *,
        host_budget: int | str | None = None,
    ) -> None:
        self.device = torch.device(device)
        index = _cuda_index(self.device)
        if index >= 0:
            self.device = torch.device("cuda", index)
        free, _total = device_memory(self.device)
        self.budget_bytes = resolve_bytes(_DEFAULT_BUDGET if budget is None else budget, free)
        if self.budget_bytes > free:
            self.budget_bytes = int(0.9 * free)
        host_bytes = 0
        if host_budget is not None:
            host_bytes = resolve_bytes(host_budget, device_memory("cpu")[0])
        handle_bytes = _HANDLE_BYTES if host_budget is None else _SWAP_HANDLE_BYTES
        self._pool = _C.MemoryPool(index, self.budget_bytes, handle_bytes, host_bytes)
        self._pid = os.getpid()

    def allocate(
        self,
        shape: Sequence[int],
        layer_name: str | None = None,
        dtype: torch.dtype = torch.float32,
        contents: Literal["undefined", "zero", "keep"] = "undefined",
    ) -> Tensor:
        """Return a contiguous tensor of the pool's memory.

        The same name, shape and dtype give the same storage, also while other tensors hold it.
        The same name with another shape or dtype gives the same memory if it fits (or can grow in
        place) and no tensor holds it; else the name moves to new memory and the old is freed with
        its last tensor. Without a name the memory is freed with the tensor.

        Args:
            shape: sizes, each >= 0.
            layer_name: the buffer's name, or None.
            dtype: element type.
            contents: "undefined"; "zero" (cleared at every call); "keep" (the bytes the name had,
                as many as fit, then zeros).

        Raises:
            OutOfMemory: if budget or device have no room; names the largest entries.
            InvalidArgument: for a negative size, an unknown contents or an empty name.
        """
        if contents not in _CONTENTS:
            raise InvalidArgument(f"contents is {contents!r}; expected one of {list(_CONTENTS)}")
        sizes = tuple(int(size) for size in shape)
        if any(size < 0 for size in sizes):
            raise InvalidArgument(f"shape is {sizes}; sizes cannot be negative")
        if layer_name == "":
            raise InvalidArgument("layer_name is empty; pass None for a buffer without a name")
        if os.getpid() != self._pid:
            raise InvalidArgument(
                f"this pool belongs to process {self._pid}, this is {os.getpid()}; "
                "make a pool after the fork"
            )
        num_bytes = prod(sizes) * dtype.itemsize
        layout = f"{dtype}{sizes}"
        capsule = self._pool.allocate(
            num_bytes, layer_name or "", layout, _CONTENTS[contents], self._stream()
        )
        if num_bytes == 0:  # nothing to borrow; the entry exists all the same
            return torch.empty(sizes, dtype=dtype, device=self.device)
        base: Tensor = from_dlpack(capsule)
        return base.view(dtype).view(sizes)

    def free(self, layer_name: str) -> None:
        """Forget a name; its memory returns to the arena with the last tensor that holds it.

        Raises:
            InvalidArgument: if the pool has no such name.
        """
        self._pool.free(layer_name, self._stream())

    def pin(self, layer_name: str) -> None:
        """Keep an entry on the device until unpin; counts. CUDA graphs need their entries pinned.

        Raises:
            InvalidArgument: if the pool has no such name, or it is evicted.
        """
        self._pool.pin(layer_name)

    def unpin(self, layer_name: str) -> None:
        """End one pin. Raises InvalidArgument if the entry is not pinned."""
        self._pool.unpin(layer_name)

    @contextmanager
    def lease(self, *layer_names: str) -> Iterator[None]:
        """Keep entries on the device within a `with` block, bringing back those that are evicted.

        Work on the stream that is current at entry waits for the copies; the host does not.

        Raises:
            InvalidArgument: if the pool lacks a name.
            OutOfMemory: if there is no room to bring one back.
        """
        held = []
        stream = self._stream()
        try:
            for name in layer_names:
                self._pool.acquire(name, stream)
                held.append(name)
            yield
        finally:
            for name in held:
                self._pool.release(name, self._stream())

    def set_schedule(self, layer_names: Sequence[str]) -> None:
        """Name the entries that are used in this order, again and again, each within `lease`.

        Only these may leave while tensors hold them: touching such a tensor outside `lease` is an
        invalid access. When room is needed, the entry whose next use is farthest leaves first.

        Raises:
            InvalidArgument: if a name is missing or repeated.
        """
        self._pool.set_schedule(list(layer_names))

    def evict(self, layer_name: str) -> None:
        """Move an entry to host memory; its address stays its own. Returns when that is done.

        Raises:
            InvalidArgument: if the pool was made without host_budget, or the entry is pinned,
                leased, or held by tensors and not in the schedule.
            OutOfMemory: if the host budget has no room.
        """
        self._pool.evict(layer_name)

    def restore(self, layer_name: str) -> None:
        """Start to bring an entry back; work on the current stream waits for it."""
        self._pool.restore(layer_name, self._stream())

    def freeze(self, layer_name: str) -> None:
        """Promise that nobody writes to an entry until thaw: evicting it again copies nothing."""
        self._pool.freeze(layer_name)

    def thaw(self, layer_name: str) -> None:
        """End freeze."""
        self._pool.thaw(layer_name)

    def record_use(self, tensor: Tensor, stream: "torch.cuda.Stream | None" = None) -> None:
        """Say that another stream uses a tensor: whoever gets its memory next waits for that.

        Args:
            tensor: a tensor of this pool, or any view of one.
            stream: None: the current stream.

        Raises:
            InvalidArgument: if the tensor's memory is not of this pool.
        """
        handle = self._stream() if stream is None else int(stream.cuda_stream)
        self._pool.record_use(tensor.untyped_storage().data_ptr(), handle)

    def release_stream(self, stream: "torch.cuda.Stream") -> None:
        """Forget a stream before it is destroyed."""
        self._pool.release_stream(int(stream.cuda_stream))

    def snapshot(self) -> dict[str, Any]:
        """Return the layout of the pool's memory in the form of torch.cuda.memory._snapshot.

        Pickled to a file, it opens in PyTorch's memory visualiser (pytorch.org/memory_viz).
        """
        states = {"live": "active_allocated", "pending": "active_pending_free"}
        index = self.device.index or 0
        segments = []
        for address, num_bytes, blocks in self._pool.snapshot():
            live = [block for block in blocks if block[3] == "live"]
            segments.append(
                {
                    "device": index,
                    "address": address,
                    "total_size": num_bytes,
                    "allocated_size": sum(block[1] for block in live),
                    "active_size": sum(b[1] for b in blocks if b[3] in states),
                    "requested_size": sum(block[2] for block in live),
                    "stream": 0,
                    "segment_type": "large",
                    "segment_pool_id": (0, 0),
                    "is_expandable": True,
                    "frames": [],
                    "blocks": [
                        {
                            "address": block_address,
                            "size": size,
                            "requested_size": requested,
                            "state": states.get(state, "inactive"),
                            "frames": [],
                        }
                        for block_address, size, requested, state in blocks
                    ],
                }
            )
        return {
            "segments": segments,
            "device_traces": [[] for _ in range(index + 1)],
            "allocator_settings": {},
        }

    @contextmanager
    def trace(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Log what the pool does within a `with` block, one JSON object a line.

        csrc/include/fastgpt/trace.h says what a line holds; benchmarks/memory_trace.py replays it.

        Raises:
            InvalidArgument: if the file cannot be written, or a trace is running.
        """
        self._pool.start_trace(os.fspath(path))
        try:
            yield
        finally:
            self._pool.stop_trace()

    def __contains__(self, layer_name: str) -> bool:
        return bool(self._pool.contains(layer_name))

    def stats(self) -> PoolStats:
        """Return the byte counts of this moment."""
        return PoolStats(**self._pool.stats())

    def entries(self) -> list[PoolEntry]:
        """Return the named buffers, largest first."""
        return [PoolEntry(*entry) for entry in self._pool.entries()]

    def trim(self) -> int:
        """Give memory that nobody uses back, in whole handles; return how many bytes."""
        return int(self._pool.trim())

    def reset_peaks(self) -> None:
        """Start a new window for peak_allocated_bytes, peak_reserved_bytes and fragmentation."""
        self._pool.reset_peaks()

    def check_integrity(self) -> None:
        """Verify the arena's bookkeeping. Raises RuntimeError naming a broken invariant."""
        self._pool.check_integrity()

    def _stream(self) -> int:
        if self.device.type == "cpu":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"GPTMemoryPool({self.device}, {stats.allocated_bytes} of {stats.budget_bytes} bytes "
            f"in {stats.num_blocks} blocks)"
        )
