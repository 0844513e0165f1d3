"""A small program that uses every part of the memory pool on a GPU, for compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/pool_cases.py      (gpu_check.py runs it)

Every block is written and read to its last byte: what the pool hands out must be there, and what
it takes back must not be touched any more.
"""

import torch

from fastgpt import _C
from fastgpt.memory import GPTMemoryPool

SIZES = (1, 255, 4097, 300_000, 3_000_001)


def check(tensor: torch.Tensor, value: int) -> None:
    if int((tensor != value).sum()) != 0:
        raise SystemExit(f"pool_cases: a block does not hold {value} any more")


def blocks_on_two_streams(pool: GPTMemoryPool) -> None:
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for round_ in range(6):
        held = []
        for i, size in enumerate(SIZES):
            with torch.cuda.stream(streams[(i + round_) % 2]):
                tensor = pool.allocate((size,), None, torch.uint8).fill_(i + 1)
                held.append((tensor, i + 1))
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in held:
            check(tensor, value)
            pool.record_use(tensor)


def names(pool: GPTMemoryPool) -> None:
    for size in SIZES:
        tensor = pool.allocate((size,), "grows", torch.uint8, contents="keep")
        tensor[-1] = 5
        del tensor
    check(pool.allocate((100,), "zero", torch.int32, contents="zero"), 0)
    pool.free("grows")


def eviction(pool: GPTMemoryPool) -> None:
    entries = [f"layers.{i}" for i in range(4)]
    for i, name in enumerate(entries):
        pool.allocate((2_500_000 + i,), name, torch.uint8).fill_(i + 1)
        pool.freeze(name)
    for _ in range(2):
        pool.evict(*entries)
        pool.restore(*entries)
        for i, name in enumerate(entries):
            check(pool.allocate((2_500_000 + i,), name, torch.uint8), i + 1)


def window(pool: GPTMemoryPool) -> None:
    entries = [f"layers.{i}" for i in range(4)]
    pool.evict(*entries)
    sizes = [2_500_000 + i for i in range(4)]
    memory = pool.allocate((_C.WeightWindow.bytes_for([[size] for size in sizes]),), None,
                           torch.uint8)  # fmt: skip
    passing = pool.open_window(memory, [[name] for name in entries])
    total = torch.zeros((), dtype=torch.int64, device="cuda")

    def run() -> None:
        stream = pool.current_stream
        passing.begin(stream())
        for i, size in enumerate(sizes):
            passing.acquire(i, stream())
            start = passing.address(i, 0) - memory.data_ptr()
            total.add_(memory[start : start + size].sum(dtype=torch.int64))
            passing.release(i, stream())

    expected = sum((i + 1) * size for i, size in enumerate(sizes))
    run()
    check(total, expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    total.zero_()
    for i in range(3):
        graph.replay()
        check(total, (i + 1) * expected)
    passing.close()


def mempool(pool: GPTMemoryPool) -> None:
    with torch.cuda.use_mem_pool(pool.as_mempool()):
        held = [torch.full((size,), 9, dtype=torch.uint8, device="cuda") for size in SIZES]
    for tensor in held:
        check(tensor, 9)


CASES = (blocks_on_two_streams, names, eviction, window, mempool)


def main() -> None:
    pool = GPTMemoryPool("cuda", budget="96MiB", host_budget="64MiB")
    for case in CASES:
        case(pool)
        torch.cuda.synchronize()
        pool.check_integrity()
    torch.cuda.synchronize()
    print(f"{len(CASES)} ops ran")


if __name__ == "__main__":
    main()
