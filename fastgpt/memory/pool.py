"""The pool as Python sees it: tensors in, tensors out, and what moves between device and host."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastgpt import _C
from fastgpt.errors import DeviceError, InvalidArgument
from fastgpt.memory.plug import pluggable_allocator
from fastgpt.memory.report import PoolEntry, PoolStats, torch_snapshot
from fastgpt.units import resolve_bytes

__all__ = ["GPTMemoryPool", "device_memory"]

_CONTENTS = {"undefined": 0, "zero": 1, "keep": 2}
_HANDLE_BYTES = 64 << 20
_MAX_BYTES = 2**63 - 1
_DEFAULT_BUDGET = "0.9"  # of what is free when the pool is made

# DLPack's (code, bits) of the types it knows; others travel as bytes.
_DLPACK = {
    torch.int8: (0, 8), torch.int16: (0, 16), torch.int32: (0, 32), torch.int64: (0, 64),
    torch.uint8: (1, 8), torch.float16: (2, 16), torch.float32: (2, 32), torch.float64: (2, 64),
    torch.bfloat16: (4, 16), torch.complex64: (5, 64), torch.complex128: (5, 128),
    torch.bool: (6, 8),
}  # fmt: skip
_BYTES = (1, 8)

_POOLS: "weakref.WeakSet[GPTMemoryPool]" = weakref.WeakSet()


def _forget_after_fork() -> None:
    """Let every pool notice that this process did not make it."""
    for pool in _POOLS:
        pool._lock = threading.Lock()  # another thread may have held it
        pool._recent.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def device_memory(device: torch.device | str) -> tuple[int, int]:
    """Return (free, total) bytes of a device.

    Raises:
        DeviceError: if the device is not there or this build has no CUDA.
    """
    free, total = _C.device_memory(_device(device)[1])
    return int(free), int(total)


def _device(device: torch.device | str) -> tuple[torch.device, int]:
    """Return a device with its index, and the CUDA index, -1 for the CPU.

    Raises:
        InvalidArgument: for another kind of device.
        DeviceError: if torch finds no CUDA device.
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise InvalidArgument(f"device is {device!r}; expected cpu or cuda[:index]") from None
    if parsed.type == "cpu" and not parsed.index:
        return torch.device("cpu"), -1
    if parsed.type != "cuda":
        raise InvalidArgument(f"device is {parsed}; expected cpu or cuda[:index]")
    if parsed.index is None:
        if not torch.cuda.is_available():
            raise DeviceError("device is cuda, but torch finds none; see `fastgpt doctor`")
        parsed = torch.device("cuda", torch.cuda.current_device())
    return parsed, parsed.index


def _sizes(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """Return a shape as a tuple of ints.

    Raises:
        InvalidArgument: if it is none, or its bytes are not a 63-bit number.
    """
    if not isinstance(dtype, torch.dtype):
        raise InvalidArgument(f"dtype is {dtype!r}; expected a torch.dtype, e.g. torch.float16")
    try:
        sizes = tuple(index(size) for size in shape)
    except TypeError:
        raise InvalidArgument(f"shape is {shape!r}; expected a sequence of integers") from None
    if sizes and min(sizes) < 0:
        raise InvalidArgument(f"shape is {sizes}; sizes cannot be negative")
    if prod(sizes) * dtype.itemsize > _MAX_BYTES or max(sizes, default=0) > _MAX_BYTES:
        raise InvalidArgument(f"shape is {sizes} of {dtype}; a tensor has less than 2^63 bytes")
    return sizes


def _check_name(layer_name: str | None) -> None:
    """Raise InvalidArgument unless this is None or a name that UTF-8 can hold."""
    if layer_name is None:
        return
    if not isinstance(layer_name, str):
        raise InvalidArgument(f"layer_name is {layer_name!r}; expected a str or None")
    if layer_name == "":
        raise InvalidArgument("layer_name is empty; pass None for a buffer without a name")
    try:
        layer_name.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"layer_name is {layer_name!r}; UTF-8 cannot hold it") from None


def _swap_handle_bytes(budget_bytes: int, smallest: int) -> int:
    """Return the size of one piece of physical memory in a pool that evicts.

    Memory leaves in whole pieces: small ones follow the entries closer, large ones are mapped and
    unmapped faster. A 64th of the budget, as a power of two from `smallest` to 256 MiB.

    >>> _swap_handle_bytes(1 << 30, 2 << 20) >> 20
    16
    """
    return min(256 << 20, max(smallest, 1 << max(0, (budget_bytes >> 6) - 1).bit_length()))


# What was allocated last under a name: shape, dtype, stream, and what makes a new tensor of its
# storage and version counter. It answers without native code, and holds a lease: it is dropped
# before anything whose meaning depends on who holds the name.
_Recent = tuple[tuple[int, ...], torch.dtype, int, Callable[[], Tensor]]


def _stream_getter(cuda_index: int) -> Callable[[], int]:
    """Return a function that returns the current stream of a device, 0 on the CPU (-1)."""
    if cuda_index < 0:
        return int
    return partial(torch._C._cuda_getCurrentRawStream, cuda_index)


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

    Attributes:
        current_stream: returns torch's current stream of the device as a number.

    Raises:
        InvalidArgument: for another device.
        ConfigError: for an unreadable budget.
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
        self.device, cuda_index = _device(device)
        free, _total = device_memory(self.device)
        self.budget_bytes = resolve_bytes(_DEFAULT_BUDGET if budget is None else budget, free)
        if self.budget_bytes > free:
            self.budget_bytes = int(0.9 * free)
        host_bytes = 0
        if host_budget is not None:
            host_bytes = resolve_bytes(host_budget, device_memory("cpu")[0])
        handle_bytes = _HANDLE_BYTES
        if host_budget is not None:
            handle_bytes = _swap_handle_bytes(
                self.budget_bytes, 64 << 10 if cuda_index < 0 else 2 << 20
            )
        self._pool = _C.MemoryPool(cuda_index, self.budget_bytes, handle_bytes, host_bytes)
        self._pid = os.getpid()
        self.current_stream = _stream_getter(cuda_index)
        self._recent: dict[str | None, _Recent] = {}
        self._num_changes = 0
        self._lock = threading.Lock()
        self._remembers = host_budget is None  # what may be evicted is asked for anew
        self._mempool: weakref.ref[torch.cuda.MemPool] | None = None
        _POOLS.add(self)

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
            InvalidArgument: for sizes that are negative, no integers or too large, an unknown
                contents, no dtype, or a name that is empty or no text.
        """
        recent = self._recent.get(layer_name)
        if (
            recent is not None
            and recent[0] == shape
            and recent[1] is dtype
            and contents == "undefined"
            and recent[2] == self.current_stream()
        ):
            return recent[3]()
        recent = None  # it would hold the name
        return self._allocate(shape, layer_name, dtype, contents)

    def _allocate(
        self, shape: Sequence[int], layer_name: str | None, dtype: torch.dtype, contents: str
    ) -> Tensor:
        """Do what allocate says, whatever was asked before."""
        if contents not in _CONTENTS:
            raise InvalidArgument(f"contents is {contents!r}; expected one of {list(_CONTENTS)}")
        sizes = _sizes(shape, dtype)
        _check_name(layer_name)
        if os.getpid() != self._pid:
            raise InvalidArgument(
                f"this pool belongs to process {self._pid}, this is {os.getpid()}; "
                "make a pool after the fork"
            )
        change = self._forget(layer_name)
        stream = self.current_stream()
        num_bytes = prod(sizes) * dtype.itemsize
        code, bits = _DLPACK.get(dtype, _BYTES)
        known = dtype in _DLPACK
        capsule = self._pool.allocate(
            sizes if known else (num_bytes,), code, bits, num_bytes, layer_name or "",
            f"{dtype}{sizes}" if layer_name else "", _CONTENTS[contents], stream,
        )  # fmt: skip
        if num_bytes == 0:  # nothing to borrow; the entry exists all the same
            return torch.empty(sizes, dtype=dtype, device=self.device)
        tensor: Tensor
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # a tensor like any other, whoever asks next
                tensor = from_dlpack(capsule)
        else:
            tensor = from_dlpack(capsule)
        if not known:
            tensor = tensor.view(dtype).view(sizes).detach()
        if layer_name is not None and self._remembers:
            with self._lock:
                if self._num_changes == change:  # no other thread freed the name meanwhile
                    self._recent[layer_name] = (sizes, dtype, stream, tensor.detach().detach)
        return tensor

    def _forget(self, layer_name: str | None) -> int:
        """Drop what is remembered of a name; return a number that the next such call changes."""
        with self._lock:
            self._recent.pop(layer_name, None)
            self._num_changes += 1
            return self._num_changes

    def _forget_all(self) -> None:
        """Drop what is remembered of every name."""
        with self._lock:
            self._recent.clear()
            self._num_changes += 1

    def free(self, layer_name: str) -> None:
        """Forget a name; its memory returns to the arena with the last tensor that holds it.

        Raises:
            InvalidArgument: if the pool has no such name.
        """
        self._forget(layer_name)
        self._pool.free(layer_name, self.current_stream())
        self._forget(layer_name)

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
        stream = self.current_stream()
        try:
            for name in layer_names:
                self._pool.acquire(name, stream)
                held.append(name)
            yield
        finally:
            for name in held:
                self._pool.release(name, self.current_stream())

    def set_schedule(self, layer_names: Sequence[str]) -> None:
        """Name the entries that are used in this order, again and again, each within `lease`.

        Only these may leave while tensors hold them: touching such a tensor outside `lease` is an
        invalid access. When room is needed, the entry whose next use is farthest leaves first.

        Raises:
            InvalidArgument: if a name is missing or repeated.
        """
        self._pool.set_schedule(list(layer_names))

    def evict(self, *layer_names: str) -> None:
        """Move entries to host memory; their addresses stay theirs. Returns when that is done.

        Raises:
            InvalidArgument: if the pool was made without host_budget, or an entry is pinned,
                leased, or held by tensors and not in the schedule; then nothing moves.
            OutOfMemory: if the host budget has no room.
        """
        self._forget_all()
        self._pool.evict_all(list(layer_names))

    def restore(self, *layer_names: str) -> None:
        """Start to bring entries back; work on the current stream waits for them."""
        self._pool.restore_all(list(layer_names), self.current_stream())

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
        handle = self.current_stream() if stream is None else int(stream.cuda_stream)
        self._pool.record_use(tensor.untyped_storage().data_ptr(), handle)

    def release_stream(self, stream: "torch.cuda.Stream") -> None:
        """Forget a stream before it is destroyed."""
        self._forget_all()
        self._pool.release_stream(int(stream.cuda_stream))

    def open_window(self, window: Tensor, parts: Sequence[Sequence[str]]) -> "_C.WeightWindow":
        """Return a native window that copies evicted, frozen entries, part after part.

        The entries stay in host memory until it is closed; see fastgpt/weight_window.h.

        Args:
            window: uint8 memory of this pool, at least _C.WeightWindow.bytes_for(sizes) long.
            parts: names of the entries of each part, in the order of use.

        Raises:
            InvalidArgument: if there is no part, one is empty, or an entry is not evicted and
                frozen.
        """
        names = [list(part) for part in parts]
        return _C.WeightWindow(self._pool, window.data_ptr(), window.nbytes, names)

    def as_mempool(self) -> "torch.cuda.MemPool":
        """Return a torch.cuda.MemPool that takes its memory from this pool, under its budget.

        Inside `with torch.cuda.use_mem_pool(pool.as_mempool()):` every torch allocation of this
        thread comes from here, also while a CUDA graph is captured. torch's caching allocator asks
        for segments (2 MiB, 20 MiB or more) through C functions and divides them itself; it gives
        them back when the MemPool dies. MemPool and pool may die in any order. While it lives the
        same MemPool is returned again.

        Raises:
            InvalidArgument: for a pool of the CPU, where torch has no such thing, or when 16
                MemPools of this kind live.
        """
        if self.device.type != "cuda":
            raise InvalidArgument(
                f"this pool is on {self.device}; torch.cuda.MemPool needs a pool of a CUDA device"
            )
        mempool = self._mempool() if self._mempool is not None else None
        if mempool is None:
            slot = self._pool.open_c_allocator()
            mempool = torch.cuda.MemPool(pluggable_allocator(slot).allocator())
            weakref.finalize(mempool, _C.close_c_allocator, slot).atexit = False
            self._mempool = weakref.ref(mempool)
        return mempool

    def snapshot(self) -> dict[str, Any]:
        """Return the layout of the pool's memory in the form of torch.cuda.memory._snapshot.

        Pickled to a file, it opens in PyTorch's memory visualiser (pytorch.org/memory_viz).
        """
        return torch_snapshot(self._pool.snapshot(), self.device.index or 0)

    @contextmanager
    def trace(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Log what the pool does within a `with` block, one JSON object a line.

        csrc/include/fastgpt/trace.h says what a line holds; benchmarks/memory_trace.py replays it.

        Raises:
            InvalidArgument: if the file cannot be written, or a trace is running.
        """
        self._pool.start_trace(os.fspath(path))
        remembers, self._remembers = self._remembers, False  # a hit is a line, too
        self._forget_all()
        try:
            yield
        finally:
            self._remembers = remembers
            self._pool.stop_trace()

    def __contains__(self, layer_name: str) -> bool:
        return bool(self._pool.contains(layer_name))

    def stats(self) -> PoolStats:
        """Return the byte counts of this moment."""
        return PoolStats(**self._pool.stats())

    def entries(self) -> list[PoolEntry]:
        """Return the named buffers, largest first."""
        self._forget_all()
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

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"GPTMemoryPool({self.device}, {stats.allocated_bytes} of {stats.budget_bytes} bytes "
            f"in {stats.num_blocks} blocks)"
        )
