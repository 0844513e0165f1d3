"""The memory pool: one owner for weights, KV cache and workspaces, under one budget."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastgpt import _C
from fastgpt.errors import InvalidArgument
from fastgpt.units import resolve_bytes

__all__ = ["GPTMemoryPool", "PoolEntry", "PoolStats", "device_memory"]

_CONTENTS = {"undefined": 0, "zero": 1, "keep": 2}
_HANDLE_BYTES = 64 << 20
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
    fragmentation: float
    fragmentation_now: float

    @property
    def free_bytes(self) -> int:
        """Reserved and not handed out."""
        return self.reserved_bytes - self.allocated_bytes


@dataclass(frozen=True)
class PoolEntry:
    """One named buffer: its size and how many tensors hold it."""

    name: str
    num_bytes: int
    num_leases: int


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

    Raises:
        InvalidArgument: for another device or an unreadable budget.
        DeviceError: if the device is not there.

    >>> pool = GPTMemoryPool("cpu", budget="1GiB")
    >>> a = pool.allocate((2, 3), "layers.0.ffn")
    >>> b = pool.allocate((2, 3), "layers.0.ffn")
    >>> a.data_ptr() == b.data_ptr()
    True
    """

    def __init__(self, device: torch.device | str, budget: int | str | None = None) -> None:
        self.device = torch.device(device)
        index = _cuda_index(self.device)
        if index >= 0:
            self.device = torch.device("cuda", index)
        free, _total = device_memory(self.device)
        self.budget_bytes = resolve_bytes(_DEFAULT_BUDGET if budget is None else budget, free)
        if self.budget_bytes > free:
            self.budget_bytes = int(0.9 * free)
        self._pool = _C.MemoryPool(index, self.budget_bytes, _HANDLE_BYTES)
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
