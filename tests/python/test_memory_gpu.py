"""GPTMemoryPool on a GPU: MemPool, stream order under delayed kernels, graphs, lifetimes."""

import gc
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from fastgpt.errors import InvalidArgument
from fastgpt.memory import GPTMemoryPool

pytestmark = pytest.mark.gpu
MIB = 1 << 20
DELAY_CYCLES = 20_000_000  # about 10 ms: far longer than what the host queues meanwhile


@pytest.fixture
def pool() -> Iterator[GPTMemoryPool]:
    pool = GPTMemoryPool("cuda", budget="512MiB", host_budget="1GiB")
    yield pool
    torch.cuda.synchronize()
    pool.check_integrity()


def spans(pool: GPTMemoryPool) -> list[tuple[int, int]]:
    """Return [begin, end) of the pool's physical memory."""
    return [(s["address"], s["address"] + s["total_size"]) for s in pool.snapshot()["segments"]]


def is_in(pool: GPTMemoryPool, tensor: torch.Tensor) -> bool:
    return any(begin <= tensor.data_ptr() < end for begin, end in spans(pool))


# -- torch.cuda.MemPool ---------------------------------------------------------------------------


def test_mempool_routes_torch_allocations_here(pool: GPTMemoryPool) -> None:
    outside = torch.zeros(MIB, device="cuda")
    with torch.cuda.use_mem_pool(pool.as_mempool()):
        small = torch.full((100,), 3.0, device="cuda")
        large = torch.full((40 * MIB,), 7, dtype=torch.uint8, device="cuda")
        product = large[: 16 * MIB].view(4096, 4096).float() @ torch.ones(4096, 1, device="cuda")
    for tensor in (small, large, product):
        assert is_in(pool, tensor)
    assert not is_in(pool, outside)
    assert not is_in(pool, torch.zeros(MIB, device="cuda"))
    assert bool((product == 7 * 4096).all())
    assert pool.stats().requested_bytes >= 40 * MIB


def test_mempool_keeps_the_budget(pool: GPTMemoryPool) -> None:
    with torch.cuda.use_mem_pool(pool.as_mempool()):
        kept = torch.zeros(300 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(300 * MIB, dtype=torch.uint8, device="cuda")
        small = torch.ones(1000, device="cuda")  # one failure does not spoil what follows
    assert int(kept.sum()) == 0
    assert float(small.sum()) == 1000
    assert pool.stats().reserved_bytes <= pool.budget_bytes


def test_mempool_serves_graph_capture(pool: GPTMemoryPool) -> None:
    x = torch.arange(1000.0, device="cuda")
    graph = torch.cuda.CUDAGraph()
    mempool = pool.as_mempool()
    with torch.cuda.graph(graph, pool=mempool.id):
        y = (x * 2).cumsum(0)
    assert is_in(pool, y)
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert torch.equal(y, torch.full_like(x, 2 * value).cumsum(0))


def test_mempool_and_pool_die_in_any_order() -> None:
    for pool_first in (True, False):
        pool = GPTMemoryPool("cuda", budget="256MiB")
        mempool = pool.as_mempool()
        assert pool.as_mempool() is mempool
        with torch.cuda.use_mem_pool(mempool):
            tensor = torch.full((10 * MIB,), 5, dtype=torch.uint8, device="cuda")
        if pool_first:
            del pool
            gc.collect()
        else:
            del mempool
            gc.collect()
            torch.cuda.empty_cache()
        assert int((tensor == 5).sum()) == 10 * MIB
        del tensor
        if pool_first:
            del mempool
        gc.collect()
        torch.cuda.empty_cache()
        if not pool_first:
            assert pool.stats().num_blocks == 0, "the MemPool's segments came back"
            with torch.cuda.use_mem_pool(pool.as_mempool()):  # and a new one works
                assert is_in(pool, torch.ones(10, device="cuda"))


def test_mempools_come_and_go_without_using_up_their_slots() -> None:
    for _ in range(40):
        pool = GPTMemoryPool("cuda", budget="64MiB")
        mempool = pool.as_mempool()
        with torch.cuda.use_mem_pool(mempool):
            tensor = torch.ones(1000, device="cuda")
        assert float(tensor.sum()) == 1000
        del tensor, mempool, pool
        gc.collect()
        torch.cuda.empty_cache()


def test_everything_lives_at_interpreter_exit() -> None:
    code = """
import torch
from fastgpt.memory import GPTMemoryPool
pool = GPTMemoryPool("cuda", "256MiB", host_budget="256MiB")
tensor = pool.allocate((1000,), "layer", contents="zero")
pool.allocate((1 << 20,), "away")
pool.evict("away")
mempool = pool.as_mempool()
with torch.cuda.use_mem_pool(mempool):
    other = torch.ones(1 << 20, device="cuda")
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    torch.cuda._sleep(10_000_000)
    pool.record_use(tensor, side)
globals()["kept"] = (tensor, other, mempool, pool)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# -- streams --------------------------------------------------------------------------------------


def test_memory_freed_under_a_running_kernel_is_not_overwritten(pool: GPTMemoryPool) -> None:
    """Stream A is slow to read a block that is freed; stream B gets the memory and scribbles."""
    a, b = torch.cuda.Stream(), torch.cuda.Stream()
    for is_ordered in (True, False):
        with torch.cuda.stream(a):
            block = pool.allocate((8 * MIB,), dtype=torch.uint8).fill_(1)
            torch.cuda._sleep(DELAY_CYCLES)
            total = block.sum(dtype=torch.int64)
        address = block.data_ptr()
        if not is_ordered:  # the control: without the pool's order the test sees the race
            with torch.cuda.stream(b):
                block.fill_(2)
        del block
        with torch.cuda.stream(b):
            other = pool.allocate((8 * MIB,), dtype=torch.uint8)
            assert other.data_ptr() == address, "the memory was not reused: nothing is tested"
            other.fill_(2)
        torch.cuda.synchronize()
        assert (int(total) == 8 * MIB) == is_ordered
        del other


def test_record_use_orders_a_second_reader(pool: GPTMemoryPool) -> None:
    a, b = torch.cuda.Stream(), torch.cuda.Stream()
    for is_recorded in (True, False):
        with torch.cuda.stream(a):
            block = pool.allocate((8 * MIB,), dtype=torch.uint8).fill_(1)
        b.wait_stream(a)
        with torch.cuda.stream(b):
            torch.cuda._sleep(DELAY_CYCLES)
            total = block[: 4 * MIB].sum(dtype=torch.int64)
        if is_recorded:
            pool.record_use(block[10:20], b)  # any view will do
        address = block.data_ptr()
        del block
        with torch.cuda.stream(a):
            other = pool.allocate((8 * MIB,), dtype=torch.uint8)
            assert other.data_ptr() == address
            other.fill_(2)
        torch.cuda.synchronize()
        assert (int(total) == 4 * MIB) == is_recorded
        del other


def test_stamps_survive_random_streams_and_delays(pool: GPTMemoryPool) -> None:
    """Every block holds its own number until it is freed, whichever stream frees and reuses."""
    rng = random.Random(5)
    streams = [torch.cuda.Stream() for _ in range(4)]
    live: list[tuple[torch.Tensor, int, torch.cuda.Stream]] = []
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    checks = []
    for step in range(1500):
        stream = rng.choice(streams)
        if live and (rng.random() < 0.5 or len(live) > 60):
            tensor, stamp, owner = live.pop(rng.randrange(len(live)))
            with torch.cuda.stream(owner):
                if rng.random() < 0.3:
                    torch.cuda._sleep(rng.randrange(200_000))
                checks.append((tensor != stamp).sum())
            reader = rng.choice(streams)
            if reader is not owner:
                reader.wait_stream(owner)
                with torch.cuda.stream(reader):
                    checks.append((tensor != stamp).sum())
                pool.record_use(tensor, reader)
            del tensor
        else:
            with torch.cuda.stream(stream):
                size = int(2 ** rng.uniform(4, 20))
                name = f"n{step}" if rng.random() < 0.2 else None
                tensor = pool.allocate((size,), name, dtype=torch.int32).fill_(step)
                live.append((tensor, step, stream))
                if name is not None:
                    pool.free(name)
    torch.cuda.synchronize()
    wrong += torch.stack(checks).sum()
    assert int(wrong) == 0
    assert pool.stats().num_stream_waits > 0


# -- CUDA graphs and eviction ---------------------------------------------------------------------


def test_graph_replays_exactly_after_evict_and_restore(pool: GPTMemoryPool) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    weight = pool.allocate((2048, 2048), "weight", torch.bfloat16)
    weight.copy_(torch.randn(2048, 2048, generator=generator, device="cuda") / 45)
    scale = pool.allocate((2048,), "scale", torch.bfloat16)
    scale.copy_(torch.rand(2048, generator=generator, device="cuda"))
    pool.pin("scale")
    x = torch.randn(8, 2048, generator=generator, device="cuda", dtype=torch.bfloat16)

    def compute() -> torch.Tensor:
        return (x @ weight.T) * scale

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compute()
    graph.replay()
    expected = y.clone()
    pool.set_schedule(["weight", "scale"])  # tensors hold them
    address = weight.data_ptr()
    with pytest.raises(InvalidArgument, match="'scale' is pinned"):
        pool.evict("scale")
    for _ in range(3):
        pool.evict("weight")
        fillers = [pool.allocate((MIB,), dtype=torch.uint8).fill_(255) for _ in range(100)]
        pool.restore("weight")
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
        assert weight.data_ptr() == address
        del fillers
    pool.set_schedule([])
    pool.unpin("scale")


def test_many_entries_leave_and_return_together(pool: GPTMemoryPool) -> None:
    names = [f"layers.{i}" for i in range(12)]
    for i, name in enumerate(names):
        pool.allocate((30 * MIB + i,), name, torch.uint8).fill_(i)
        pool.freeze(name)
    pool.evict(*names)
    assert all(entry.is_evicted for entry in pool.entries())
    pool.restore(*names)
    for i, name in enumerate(names):
        tensor = pool.allocate((30 * MIB + i,), name, torch.uint8)
        assert bool((tensor == i).all())
        del tensor
    pool.evict(*names)
    assert pool.stats().num_clean_evictions == len(names)


def test_named_hit_belongs_to_its_stream() -> None:
    """A hit from another stream is noted, so that the memory is not reused under its kernels."""
    pool = GPTMemoryPool("cuda", budget="128MiB")
    a, b = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(a):
        first = pool.allocate((8 * MIB,), "x", torch.uint8)
    b.wait_stream(a)
    with torch.cuda.stream(b):
        second = pool.allocate((8 * MIB,), "x", torch.uint8).fill_(1)
        torch.cuda._sleep(DELAY_CYCLES)
        total = second.sum(dtype=torch.int64)
        pool.free("x")
    address = first.data_ptr()
    del first, second
    with torch.cuda.stream(a):
        other = pool.allocate((8 * MIB,), dtype=torch.uint8)
        assert other.data_ptr() == address
        other.fill_(2)
    torch.cuda.synchronize()
    assert int(total) == 8 * MIB
