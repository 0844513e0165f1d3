"""How much memory do allocators hold for the same program, and what does each call cost?

    python benchmarks/memory_pool.py                        (one GPU, about a minute)
    python benchmarks/memory_pool.py --device cpu --seeds 2      (our pool alone)

Utilisation is the most bytes live at once over the most bytes committed (GMLake's definition,
arXiv:2401.08156), replaying the traces of memory_traces.py, mean over seeds. "Committed" counts
physical memory up to the highest block ever handed out; what the pool commits ahead of need in the
background (one handle of 64 MiB) is reported apart. torch's figure is its peak reserved_bytes.
Every peer runs in a process of its own. Then: what a hot pair, a named hit, reuse on another
stream and growth by 1 GiB cost, and whether launches wait while memory is committed under load.
How weights leave and return: memory_swap.py.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory_peers import PEERS, article_figures, fastgpt_allocator
from memory_traces import TRACES, check, make_trace, peak_live_bytes
from report import median, print_machine

from fastgpt.memory import GPTMemoryPool

HERE = Path(__file__).parent
AT_ONCE = 4  # processes on one GPU, each of about 14 GiB at most
MIB = 1 << 20
HANDLE_BYTES = 64 * MIB  # what a pool keeps committed ahead of need

LOOP = """
#include <stddef.h>
#include <stdint.h>
#include <time.h>
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e9 + t.tv_nsec;
}
double pairs(void* (*allocate)(size_t, int, void*), void (*release)(void*, size_t, int, void*),
             size_t bytes, void* stream, int n) {
  double start = now();
  for (int i = 0; i < n; ++i) release(allocate(bytes, 0, stream), bytes, 0, stream);
  return (now() - start) / n;
}
double async_pairs(int (*allocate)(void**, size_t, void*), int (*release)(void*, void*),
                   size_t bytes, void* stream, int n) {
  double start = now();
  for (int i = 0; i < n; ++i) {
    void* data = 0;
    if (allocate(&data, bytes, stream) || release(data, stream)) return -1;
  }
  return (now() - start) / n;
}
double tensor_pairs(int (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                 void**), int (*release)(void*), int32_t dtype, int32_t device_type,
                    size_t bytes, int n) {
  int64_t size = (int64_t)bytes, stride = 1;
  double start = now();
  for (int i = 0; i < n; ++i) {
    void* tensor = 0;
    if (empty(1, &size, &stride, dtype, device_type, 0, &tensor) || release(tensor)) return -1;
  }
  return (now() - start) / n;
}
"""


def save_trace(name: str, seed: int, folder: str) -> str:
    """Make one trace, check it and write it; return its path."""
    trace = make_trace(name, seed)
    check(trace)
    path = Path(folder, f"{name.split()[0]}_{seed}.npy")
    np.save(path, trace)
    return str(path)


def run_peer(peer: str, paths: list[str], device: str) -> list[dict[str, Any]]:
    """Replay traces in a new process."""
    environment = {**os.environ, "MEMORY_PEERS_DEVICE": device}
    if PEERS[peer]:
        environment["PYTORCH_ALLOC_CONF"] = environment["PYTORCH_CUDA_ALLOC_CONF"] = PEERS[peer]
    done = subprocess.run(
        [sys.executable, str(HERE / "memory_peers.py"), peer, *paths],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) != len(paths):
        raise SystemExit(f"memory_pool: {peer} stopped:\n{done.stderr[-2000:]}")
    return lines


def utilisation(device: str, num_seeds: int) -> dict[str, Any]:
    """Replay every trace with every peer; print and return the table."""
    peers = list(PEERS) if device == "cuda" else ["fastgpt"]
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor() as makers:
        made = {
            name: [makers.submit(save_trace, name, seed, folder) for seed in range(num_seeds)]
            for name in TRACES
        }
        paths = {name: [future.result() for future in futures] for name, futures in made.items()}
        live = {p: peak_live_bytes(np.load(p)) for group in paths.values() for p in group}
        with ThreadPoolExecutor(AT_ONCE if device == "cuda" else 1) as workers:
            runs = {
                (name, peer): workers.submit(run_peer, peer, paths[name], device)
                for name in TRACES
                for peer in peers
            }
        for name in TRACES:
            for peer in peers:
                lines = runs[name, peer].result()
                if errors := [line["error"] for line in lines if "error" in line]:
                    row: dict[str, Any] = {"error": errors[0]}
                else:
                    shares = [live[line["path"]] / line["committed"] for line in lines]
                    ahead = [line["committed_with_ahead"] - line["committed"] for line in lines]
                    row = {
                        "mean": statistics.mean(shares), "min": min(shares), "max": max(shares),
                        "ahead_mib": statistics.mean(ahead) / MIB,
                        "ns_per_op_python": statistics.mean(line["ns_per_op"] for line in lines),
                    }  # fmt: skip
                table[f"{name}, {peer}"] = row
                print(f"{name:24} {peer:28} {_shown(row)}", flush=True)
            figures = article_figures(np.load(paths[name][0]), device)
            table[f"{name}, article"] = figures
            print(
                f"{name:24} {'the article, as printed':28} "
                f"{figures['share_on_top_of_a_live_tensor']:.0%} of its allocations lie on a live "
                "tensor's bytes (corrected, that is: as printed the first call raises)",
                flush=True,
            )
    return table


def _shown(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    return (
        f"{row['mean']:.1%} ({row['min']:.1%} to {row['max']:.1%}), ahead "
        f"{row['ahead_mib']:.0f} MiB"
    )


def compiled_loop(folder: str) -> ctypes.CDLL:
    source, library = Path(folder, "loop.c"), Path(folder, "loop.so")
    source.write_text(LOOP)
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("pairs", "async_pairs", "tensor_pairs"):
        getattr(loaded, name).restype = ctypes.c_double
    return loaded


def hot_pairs(device: str) -> dict[str, Any]:
    """Time allocate + free of one size, again and again, in a loop of C."""
    rows: dict[str, Any] = {}
    allocate, free, _ = fastgpt_allocator(device)
    # The closures hold the C functions.
    functions = [cell.cell_contents for f in (allocate, free) for cell in f.__closure__ or ()]
    pair = [f for f in functions if isinstance(f, ctypes._CFuncPtr)]
    stream = 0
    if device == "cuda":
        side = torch.cuda.Stream()
        stream = side.cuda_stream
    with tempfile.TemporaryDirectory() as folder:
        loop = compiled_loop(folder)
        shim = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
        kind = "cuda" if device == "cuda" else "cpu"
        device_type = getattr(shim, f"aoti_torch_device_type_{kind}")()
        dtype = shim.aoti_torch_dtype_uint8()
        for num_bytes in (1 << 10, 1 << 20, 64 << 20):
            size = ctypes.c_size_t(num_bytes)
            times: dict[str, float] = {}

            def best(call: Any) -> float:
                call(1000)
                return min(call(20000) for _ in range(7))

            times["fastgpt"] = best(
                lambda n, s=size: loop.pairs(pair[0], pair[1], s, ctypes.c_void_p(stream), n)
            )
            times["torch tensor"] = best(
                lambda n, s=size: loop.tensor_pairs(
                    shim.aoti_torch_empty_strided,
                    shim.aoti_torch_delete_tensor_object,
                    dtype,
                    device_type,
                    s,
                    n,
                )
            )
            if device == "cuda" and (runtime := _cudart()) is not None:
                times["cudaMallocAsync"] = best(
                    lambda n, s=size, r=runtime: loop.async_pairs(
                        r.cudaMallocAsync, r.cudaFreeAsync, s, ctypes.c_void_p(stream), n
                    )
                )
            rows[f"pair_ns_{num_bytes}"] = times
            shown = ", ".join(f"{name} {value:.0f} ns" for name, value in times.items())
            print(f"hot pair of {num_bytes >> 10} KiB in C: {shown}", flush=True)
    return rows


def _cudart() -> ctypes.CDLL | None:
    """Return torch's CUDA runtime, its default pool told to keep what it has."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libcudart" in line:
            runtime = ctypes.CDLL(line.split()[-1])
            pool = ctypes.c_void_p()
            runtime.cudaDeviceGetDefaultMemPool(ctypes.byref(pool), 0)
            keep = ctypes.c_uint64(2**64 - 1)
            runtime.cudaMemPoolSetAttribute(pool, 4, ctypes.byref(keep))  # ReleaseThreshold
            return runtime
    return None


def python_calls(device: str) -> dict[str, Any]:
    """Time what a Python program calls."""
    pool = GPTMemoryPool(device, budget="1GiB")
    held = pool.allocate((8, 4096), "layers.3.ffn", torch.bfloat16)

    def us(act: Any, n: int = 20000) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            for _ in range(n):
                act()
            times.append((time.perf_counter() - start) / n)
        return min(times) * 1e6

    rows = {
        "named_hit_us": us(lambda: pool.allocate((8, 4096), "layers.3.ffn", torch.bfloat16)),
        "unnamed_us": us(lambda: pool.allocate((8, 4096), dtype=torch.bfloat16)),
        "torch_empty_us": us(lambda: torch.empty((8, 4096), dtype=torch.bfloat16, device=device)),
    }
    assert pool.allocate((8, 4096), "layers.3.ffn", torch.bfloat16).data_ptr() == held.data_ptr()
    print(
        f"from Python: named hit {rows['named_hit_us']:.2f} us, without a name "
        f"{rows['unnamed_us']:.2f} us, torch.empty {rows['torch_empty_us']:.2f} us",
        flush=True,
    )
    return rows


def cross_stream() -> dict[str, Any]:
    """Hand one block from stream to stream, as tensors."""
    allocate, free, peaks = fastgpt_allocator("cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    handles = [stream.cuda_stream for stream in streams]
    free(allocate(8 * MIB, handles[0]), handles[0])
    before = peaks()
    rounds = 20000
    addresses = set()
    start = time.perf_counter()
    for i in range(rounds):
        address = allocate(8 * MIB, handles[i % 2])
        addresses.add(address)
        free(address, handles[i % 2])
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(rounds):
        address = allocate(8 * MIB, handles[0])
        addresses.add(address)
        free(address, handles[0])
    same_stream = time.perf_counter() - start
    after = peaks()
    reused = len(addresses) == 1
    torch.cuda.synchronize()
    torch_addresses = set()
    for i in range(50):
        with torch.cuda.stream(streams[i % 2]):
            tensor = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
            torch_addresses.add(tensor.data_ptr())
            del tensor
    rows = {
        "cross_stream_us": seconds / rounds * 1e6,
        "same_stream_us": same_stream / rounds * 1e6,
        "cross_stream_same_memory": reused,
        "waits_per_reuse": (after["waits"] - before["waits"]) / rounds,
        "records_per_reuse": (after["records"] - before["records"]) / rounds,
        "torch_blocks_for_two_streams": len(torch_addresses),
    }
    print(
        f"allocate + free on alternating streams, called from Python: "
        f"{rows['cross_stream_us']:.2f} us (one stream {rows['same_stream_us']:.2f}), one block: "
        f"{reused}, {rows['records_per_reuse']:.2f} records and {rows['waits_per_reuse']:.2f} "
        f"waits each; torch takes {len(torch_addresses)} blocks",
        flush=True,
    )
    return rows


def growth() -> dict[str, Any]:
    """Grow by 1 GiB on an idle device and under load; time launches meanwhile.

    After 50 ms in which nothing runs the core that asks and the card's clocks are down, too: half
    a millisecond of the driver's; so idle growth is timed at once and after such a rest.
    """

    def fresh() -> GPTMemoryPool:
        pool = GPTMemoryPool("cuda", budget="8GiB")
        kept.append(pool.allocate((MIB,), dtype=torch.uint8))
        while pool.stats().ahead_bytes < HANDLE_BYTES:  # another thread commits it
            time.sleep(1e-3)
        return pool

    def grow(pool: GPTMemoryPool) -> float:
        start = time.perf_counter()
        kept.append(pool.allocate((1 << 30,), dtype=torch.uint8))
        return (time.perf_counter() - start) * 1e3

    kept: list[torch.Tensor] = []
    torch.cuda.synchronize()
    idle_ms = [grow(fresh()) for _ in range(5)]
    kept.clear()
    rested_ms = []
    for _ in range(5):
        pool = fresh()
        time.sleep(0.05)
        rested_ms.append(grow(pool))
    del pool
    kept.clear()

    side = torch.cuda.Stream()
    x = torch.zeros(1024, device="cuda").add_(1)  # its kernel is loaded before the device is busy
    launches: list[tuple[float, float]] = []
    stop = threading.Event()

    def launch() -> None:
        with torch.cuda.stream(side):
            while not stop.is_set():
                start = time.perf_counter()
                x.add_(1)
                launches.append((start, time.perf_counter() - start))
                time.sleep(50e-6)

    pools = [fresh() for _ in range(5)]
    torch.cuda.synchronize()
    for _ in range(30):
        torch.cuda._sleep(40_000_000)  # about 20 ms each: the device is busy for 600 ms
    thread = threading.Thread(target=launch)
    thread.start()
    time.sleep(0.05)
    load_ms, windows = [], []
    for pool in pools:
        begin = time.perf_counter()
        load_ms.append(grow(pool))
        windows.append((begin, time.perf_counter()))
        time.sleep(0.01)
    # Small blocks, one after another: the thread that commits ahead is to keep off this path.
    steps = []
    for _ in range(400):
        start = time.perf_counter()
        kept.append(pools[0].allocate((MIB,), dtype=torch.uint8))
        steps.append((time.perf_counter() - start) * 1e3)
        time.sleep(100e-6)
    busy = not torch.cuda.current_stream().query()
    stop.set()
    thread.join()
    torch.cuda.synchronize()
    during = [s * 1e3 for t, s in launches if any(a <= t + s and t <= b for a, b in windows)]
    apart = [s * 1e3 for t, s in launches if not any(a <= t + s and t <= b for a, b in windows)]
    rows = {
        "grow_1gib_idle_ms": median(idle_ms),
        "grow_1gib_rested_ms": median(rested_ms),
        "grow_1gib_load_ms": median(load_ms),
        "device_was_busy": busy,
        "launch_ms_median": median(apart) if apart else 0.0,
        "launch_ms_longest_apart": max(apart, default=0.0),
        "launch_ms_longest_during_commit": max(during, default=0.0),
        "small_blocks_under_load_median_us": median(steps) * 1e3,
        "small_blocks_under_load_longest_ms": max(steps),
    }
    print(
        f"growth by 1 GiB: {rows['grow_1gib_idle_ms']:.2f} ms idle, "
        f"{rows['grow_1gib_rested_ms']:.2f} after 50 ms without work, "
        f"{rows['grow_1gib_load_ms']:.2f} ms under load (busy to the end: {busy}); the longest "
        f"launch meanwhile {rows['launch_ms_longest_during_commit']:.2f} ms, else "
        f"{rows['launch_ms_longest_apart']:.2f} (median {rows['launch_ms_median']:.3f}); "
        f"400 blocks of 1 MiB under load: median "
        f"{rows['small_blocks_under_load_median_us']:.1f} us, longest "
        f"{rows['small_blocks_under_load_longest_ms']:.2f} ms",
        flush=True,
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--skip", default="", help="utilisation, calls, growth")
    args = parser.parse_args()
    result: dict[str, Any] = print_machine(args.device)
    if "calls" not in args.skip:
        result |= hot_pairs(args.device) | python_calls(args.device)
        if args.device == "cuda":
            result |= cross_stream()
    if args.device == "cuda" and "growth" not in args.skip:
        result |= growth()
    if "utilisation" not in args.skip:
        if args.device == "cuda":
            torch.cuda.empty_cache()
        result["utilisation"] = utilisation(args.device, args.seeds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
