"""Allocators that memory_pool.py compares, each behind (allocate, free) on raw addresses.

    python benchmarks/memory_peers.py PEER TRACE.npy ...

replays each trace and prints one peer's figures, a line of JSON each, in a process of its own.
"""

import ctypes
import gc
import json
import math
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["PEERS", "ArticlePool", "article_figures"]

# PEER -> PYTORCH_ALLOC_CONF; the pool is not torch's.
PEERS = {
    "fastgpt": "",
    "torch default": "",
    "torch expandable_segments": "expandable_segments:True",
    "torch cudaMallocAsync": "backend:cudaMallocAsync",
}
POOL_BUDGET = 24 << 30

Allocate = Callable[[int, int], int]  # (bytes, stream) -> address
Free = Callable[[int, int], None]  # (address, stream)


class ArticlePool:
    """The pool of the article, line by line; its CUDA tensor of floats on any device."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch = torch
        self.device = device
        self.pool = torch.empty(0, dtype=torch.float32, device=device)
        self.cache: dict[str, Any] = {}

    def allocate(self, shape: tuple[int, ...], layer_name: str) -> Any:
        if layer_name in self.cache:
            return self.cache[layer_name].reshape(shape)
        required = math.prod(shape) * 4
        if required > len(self.pool):
            new_size = max(required, len(self.pool) * 2)
            self.pool = self.torch.empty(new_size, dtype=self.torch.float32, device=self.device)
            self.pool.zero_()
        offset = len(self.pool) - required
        tensor = self.pool[offset : offset + required]
        # The listing reshapes `required` = 4 * elements floats to the shape, which cannot work: the
        # count of bytes is taken for a count of elements. Its first elements serve instead.
        tensor = tensor[: math.prod(shape)].reshape(shape)
        self.cache[layer_name] = tensor
        return tensor


def article_figures(trace: np.ndarray, device: str, num_ops: int = 2000) -> dict[str, Any]:
    """Return what the article's pool does with the first allocations of a trace.

    It has no free, so a trace's frees are dropped, and a name is an id. Counted: floats reserved
    (4 bytes each), and the live bytes that lie in another live tensor as well.
    """
    pool = ArticlePool(device)
    live: dict[int, tuple[int, int]] = {}
    shared = total = 0
    for is_allocation, i, num_bytes, _ in trace[:num_ops].tolist():
        if not is_allocation:
            live.pop(i, None)
            continue
        if num_bytes > 64 << 20:
            continue  # four times as much would be reserved; the picture does not need it
        tensor = pool.allocate((max(1, num_bytes // 4),), str(i))
        begin = tensor.data_ptr()
        end = begin + tensor.nbytes
        total += 1
        shared += any(begin < e and b < end for b, e in live.values())
        live[i] = (begin, end)
    return {
        "allocations": total,
        "share_on_top_of_a_live_tensor": shared / max(1, total),
        "reserved_gib": len(pool.pool) * 4 / 2**30,
    }


def fastgpt_allocator(device: str) -> tuple[Allocate, Free, Callable[[], dict[str, int]]]:
    """Our pool through its C functions."""
    from fastgpt import _C
    from fastgpt.memory import GPTMemoryPool

    pool = GPTMemoryPool(device, budget=POOL_BUDGET)
    slot = pool._pool.open_c_allocator()
    weakref.finalize(pool, _C.close_c_allocator, slot)
    library = ctypes.CDLL(str(Path(_C.__file__).with_name("libfastgpt.so")))
    allocate = getattr(library, f"fastgpt_allocate_{slot}")
    allocate.restype = ctypes.c_void_p
    allocate.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    free = getattr(library, f"fastgpt_free_{slot}")
    free.restype = None
    free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    index = pool.device.index or 0

    def peaks() -> dict[str, int]:
        stats = pool.stats()
        pool.check_integrity()
        return {
            "committed": stats.peak_touched_bytes,
            "committed_with_ahead": stats.peak_reserved_bytes,
            "waits": stats.num_stream_waits,
            "records": stats.num_event_records,
        }

    return (
        lambda num_bytes, stream: allocate(num_bytes, index, stream),
        lambda address, stream: free(address, 0, index, stream),
        peaks,
    )


def torch_allocator() -> tuple[Allocate, Free, Callable[[], dict[str, int]]]:
    """torch's caching allocator, without tensors around its blocks."""
    import torch

    def peaks() -> dict[str, int]:
        peak = torch.cuda.memory_stats()["reserved_bytes.all.peak"]
        return {"committed": peak, "committed_with_ahead": peak}

    raw_allocate = torch._C._cuda_cudaCachingAllocator_raw_alloc
    raw_delete = torch._C._cuda_cudaCachingAllocator_raw_delete
    return raw_allocate, lambda address, stream: raw_delete(address), peaks


def replay(trace: np.ndarray, allocate: Allocate, free: Free, streams: list[int]) -> float:
    """Run a trace and return nanoseconds an operation, the Python loop included."""
    addresses: dict[int, int] = {}
    ops = trace.tolist()
    start = time.perf_counter()
    for is_allocation, i, num_bytes, stream in ops:
        if is_allocation:
            address = allocate(num_bytes, streams[stream])
            if not address:
                raise MemoryError(f"{num_bytes} bytes were refused")
            addresses[i] = address
        else:
            free(addresses.pop(i), streams[stream])
    seconds = time.perf_counter() - start
    for i, address in addresses.items():
        free(address, streams[0] if i else 0)
    return seconds / len(ops) * 1e9


def main() -> None:
    peer, paths = sys.argv[1], sys.argv[2:]
    device = os.environ.get("MEMORY_PEERS_DEVICE", "cuda")
    import torch

    streams = [0, 0, 0, 0]
    if device == "cuda":
        torch.zeros(1, device="cuda")
        keep = [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(3))]
        streams = [stream.cuda_stream for stream in keep]
    allocate = free = peaks = None
    for path in paths:
        allocate = free = peaks = None  # one pool at a time
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        allocate, free, peaks = (
            fastgpt_allocator(device) if peer == "fastgpt" else torch_allocator()
        )
        trace = np.load(path)
        result: dict[str, Any] = {"peer": peer, "path": path}
        try:
            result["ns_per_op"] = replay(trace, allocate, free, streams)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            result["error"] = str(error).splitlines()[0]
        print(json.dumps(result | peaks()), flush=True)


if __name__ == "__main__":
    main()
