"""Tensors of a GPTMemoryPool as torch sees them: versions, autograd, lifetimes, its tools."""

import gc
import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from fastgpt.errors import InvalidArgument
from fastgpt.memory import GPTMemoryPool


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def pool(request: pytest.FixtureRequest) -> Iterator[GPTMemoryPool]:
    pool = GPTMemoryPool(request.param, budget="256MiB")
    yield pool
    pool.check_integrity()


def test_named_hits_are_fresh_tensors_of_one_storage(pool: GPTMemoryPool) -> None:
    first = pool.allocate((4, 8), "x")
    second = pool.allocate((4, 8), "x")
    third = pool.allocate(torch.Size([4, 8]), "x")
    fourth = pool.allocate([4, 8], "x")
    tensors = [first, second, third, fourth]
    assert len({id(tensor) for tensor in tensors}) == 4
    assert len({tensor.data_ptr() for tensor in tensors}) == 1
    first.squeeze_().unsqueeze_(0)  # a caller's own metadata stays its own
    second.resize_(2, 2)
    assert pool.allocate((4, 8), "x").shape == (4, 8)


def test_named_hits_share_their_version(pool: GPTMemoryPool) -> None:
    """What one holder writes, autograd notices in what another holder saved."""
    first = pool.allocate((3,), "x", contents="zero")
    second = pool.allocate((3,), "x")
    before = first._version
    second.add_(1)
    assert first._version == second._version == before + 1
    weight = torch.ones(3, device=pool.device, requires_grad=True)
    loss = (weight * first).sum()  # saves first
    second.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_holders_do_not_share_autograd_state(pool: GPTMemoryPool) -> None:
    first = pool.allocate((3,), "x", contents="zero")
    weight = torch.ones(3, device=pool.device, requires_grad=True)
    first.add_(weight)  # writes with a graph behind it
    assert first.requires_grad
    second = pool.allocate((3,), "x")
    assert not second.requires_grad
    assert second.is_leaf
    first.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_tensors_asked_for_in_inference_mode_work_outside(pool: GPTMemoryPool) -> None:
    with torch.inference_mode():
        tensor = pool.allocate((3,), "x", contents="zero")
        assert not tensor.is_inference()
        tensor.add_(1)
    tensor.add_(1)
    assert float(pool.allocate((3,), "x").sum()) == 6


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
     torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
     torch.complex64],
)  # fmt: skip
def test_every_dtype_has_its_bytes(pool: GPTMemoryPool, dtype: torch.dtype) -> None:
    before = pool.stats().requested_bytes
    tensor = pool.allocate((3, 5), "x", dtype, contents="zero")
    assert tensor.dtype == dtype
    assert tensor.shape == (3, 5)
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == 15 * dtype.itemsize
    assert pool.stats().requested_bytes - before == 15 * dtype.itemsize
    assert not bool(tensor.view(torch.uint8).any())
    assert pool.allocate((3, 5), "x", dtype).data_ptr() == tensor.data_ptr()


def test_a_hit_follows_the_name_through_every_change(pool: GPTMemoryPool) -> None:
    """The remembered tensor of a name never answers for what the name has become."""
    held = pool.allocate((4,), "x").fill_(1)
    pool.free("x")
    fresh = pool.allocate((4,), "x")
    assert fresh.data_ptr() != held.data_ptr()
    as_ints = pool.allocate((4,), "x", torch.int32)
    assert as_ints.data_ptr() != fresh.data_ptr()
    assert pool.allocate((4,), "x", torch.int32).data_ptr() == as_ints.data_ptr()
    zeros = pool.allocate((4,), "x", torch.int32, contents="zero")
    assert zeros.data_ptr() == as_ints.data_ptr()
    assert not bool(zeros.any())
    address = zeros.data_ptr()
    del as_ints, zeros
    assert pool.allocate((2,), "x", torch.int32).data_ptr() == address, "nobody held it"
    with pytest.raises(InvalidArgument, match="contents"):
        pool.allocate((2,), "x", torch.int32, contents="garbage")  # type: ignore[arg-type]


def test_leases_are_those_of_the_callers(pool: GPTMemoryPool) -> None:
    tensor = pool.allocate((4,), "x")
    view = pool.allocate((4,), "x")[1:]
    del tensor
    assert [entry.num_leases for entry in pool.entries()] == [1]
    del view
    assert [entry.num_leases for entry in pool.entries()] == [0]
    pool.free("x")
    assert pool.stats().num_blocks == 0


def test_pool_deleted_with_live_tensors_gives_all_back_with_the_last() -> None:
    pool = GPTMemoryPool("cpu", budget="64MiB")
    tensors = [pool.allocate((1 << 20,), name) for name in ("a", "b", None)]
    for i, tensor in enumerate(tensors):
        tensor.fill_(i)
    del pool
    gc.collect()
    for i, tensor in enumerate(tensors):
        assert bool((tensor == i).all())
        assert tensor[5:].clone().numel() == (1 << 20) - 5
    del tensors, tensor
    gc.collect()


@pytest.mark.parametrize("keep", ["globals()['kept'] = (pool, a, b)", "del pool"])
def test_interpreter_exit_with_live_tensors(keep: str) -> None:
    code = f"""
import atexit, threading, torch
from fastgpt.memory import GPTMemoryPool
pool = GPTMemoryPool("cpu", "64MiB", host_budget="64MiB")
a = pool.allocate((1000,), "layer", contents="zero")
pool.allocate((1 << 20,), "away").fill_(1)
pool.evict("away")
b = GPTMemoryPool("cpu", "64MiB").allocate((10,))
atexit.register(lambda: a.add_(1))
holder = threading.Thread(target=lambda t=a: t.sum(), daemon=True)
holder.start()
holder.join()
{keep}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_mempool_of_a_cpu_pool_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="needs a pool of a CUDA device"):
        GPTMemoryPool("cpu", budget="1MiB").as_mempool()


def test_snapshot_opens_in_torchs_visualiser(pool: GPTMemoryPool) -> None:
    from torch.cuda import _memory_viz as viz

    held = [pool.allocate((size,), f"n{size}") for size in (1000, 50_000, 3_000_000)]
    del held[1]
    pool.free("n50000")
    before = pool.stats()
    snapshot = pickle.loads(pickle.dumps(pool.snapshot()))
    stats = pool.stats()
    text = viz.segsum(snapshot)
    reserved = {before.reserved_bytes, stats.reserved_bytes}  # a handle may be committed meanwhile
    assert any(f"total_reserved: {viz.Bytes(num_bytes)}" in text for num_bytes in reserved)
    assert "<script" in viz.segment_plot(snapshot)
    active = sum(
        block["size"] for segment in snapshot["segments"] for block in segment["blocks"]
        if block["state"] == "active_allocated"
    )  # fmt: skip
    assert active == stats.allocated_bytes
