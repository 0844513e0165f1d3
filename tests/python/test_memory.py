"""GPTMemoryPool: what a name means, the budget, lifetimes, and exact bookkeeping."""

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastgpt.errors import ConfigError, InvalidArgument, OutOfMemory
from fastgpt.memory import GPTMemoryPool


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def pool(request: pytest.FixtureRequest) -> Iterator[GPTMemoryPool]:
    pool = GPTMemoryPool(request.param, budget="256MiB")
    yield pool
    pool.check_integrity()


def test_pool_same_name_same_shape_is_the_same_storage(pool: GPTMemoryPool) -> None:
    first = pool.allocate((8, 16), "layers.3.ffn")
    first.fill_(7)
    second = pool.allocate((8, 16), "layers.3.ffn")
    assert second.data_ptr() == first.data_ptr()
    assert bool((second == 7).all())


def test_pool_other_shape_of_a_held_name_never_aliases(pool: GPTMemoryPool) -> None:
    """A naive pool reshapes the cached tensor, so two layers write over each other."""
    held = pool.allocate((4, 8), "layer")
    held.fill_(1)
    other = pool.allocate((8, 4), "layer")
    other.fill_(2)
    assert other.shape == (8, 4)
    assert other.data_ptr() != held.data_ptr()
    assert bool((held == 1).all())


def test_pool_other_dtype_counts_as_other_shape(pool: GPTMemoryPool) -> None:
    held = pool.allocate((4,), "layer", dtype=torch.float32)
    other = pool.allocate((4,), "layer", dtype=torch.int32)
    assert other.data_ptr() != held.data_ptr()


def test_pool_other_shape_of_an_unheld_name_reuses_the_memory(pool: GPTMemoryPool) -> None:
    address = pool.allocate((64, 64), "layer").data_ptr()
    assert pool.allocate((32, 32), "layer").data_ptr() == address
    assert pool.allocate((64, 64), "layer").data_ptr() == address


def test_pool_grows_in_place_when_the_neighbour_is_free(pool: GPTMemoryPool) -> None:
    address = pool.allocate((64,), "layer").data_ptr()
    grown = pool.allocate((1 << 16,), "layer")
    assert grown.data_ptr() == address
    assert pool.stats().num_blocks == 1


def test_pool_growth_moves_when_the_neighbour_is_taken_and_keeps_bytes(pool: GPTMemoryPool) -> None:
    small = pool.allocate((64,), "layer")
    small.copy_(torch.arange(64.0))
    address = small.data_ptr()
    neighbour = pool.allocate((64,))
    del small
    grown = pool.allocate((128,), "layer", contents="keep")
    assert grown.data_ptr() != address
    assert neighbour.data_ptr() == address + 256
    expected = torch.cat([torch.arange(64.0), torch.zeros(64)])
    assert torch.equal(grown.cpu(), expected)


def test_pool_contents_zero_clears_at_every_call(pool: GPTMemoryPool) -> None:
    pool.allocate((100,), "layer").fill_(3)
    assert bool((pool.allocate((100,), "layer", contents="zero") == 0).all())


def test_pool_unnamed_memory_returns_with_the_last_view(pool: GPTMemoryPool) -> None:
    tensor = pool.allocate((1000,))
    view = tensor[10:20]
    del tensor
    assert pool.stats().num_blocks == 1
    del view
    assert pool.stats().num_blocks == 0


def test_pool_free_name_keeps_memory_of_live_tensors(pool: GPTMemoryPool) -> None:
    tensor = pool.allocate((10,), "layer")
    tensor.fill_(5)
    pool.free("layer")
    assert "layer" not in pool
    assert pool.stats().num_blocks == 1
    assert float(tensor.sum()) == 50
    del tensor
    assert pool.stats().num_blocks == 0
    with pytest.raises(InvalidArgument, match="no entry 'layer'"):
        pool.free("layer")


def test_pool_deleted_before_its_tensors(pool: GPTMemoryPool) -> None:
    other = GPTMemoryPool(pool.device, budget="64MiB")
    tensor = other.allocate((10,), "layer", contents="zero")
    del other
    assert float(tensor.sum()) == 0


def test_pool_budget_is_never_exceeded_and_the_error_names_the_holders(pool: GPTMemoryPool) -> None:
    big = pool.allocate((128 << 20,), "weights", dtype=torch.uint8)
    with pytest.raises(OutOfMemory, match=r"'kv_cache'.*budget.*'weights' 134217728"):
        pool.allocate((200 << 20,), "kv_cache", dtype=torch.uint8)
    assert pool.stats().reserved_bytes <= pool.budget_bytes
    assert "kv_cache" not in pool
    del big
    pool.free("weights")
    assert pool.allocate((200 << 20,), "kv_cache", dtype=torch.uint8).numel() == 200 << 20


@pytest.mark.parametrize("shape", [(0,), (0, 5), ()])
def test_pool_empty_and_scalar_shapes(pool: GPTMemoryPool, shape: tuple[int, ...]) -> None:
    tensor = pool.allocate(shape, "layer", contents="zero")
    assert tensor.shape == shape
    assert tensor.device == pool.device


def test_pool_rejects_bad_arguments(pool: GPTMemoryPool) -> None:
    with pytest.raises(InvalidArgument, match="negative"):
        pool.allocate((-1, 3))
    with pytest.raises(InvalidArgument, match="contents is 'zeros'"):
        pool.allocate((1,), contents="zeros")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="empty"):
        pool.allocate((1,), "")
    with pytest.raises(InvalidArgument, match="expected cpu or cuda"):
        GPTMemoryPool("meta")
    with pytest.raises(ConfigError, match="'lots'"):
        GPTMemoryPool("cpu", budget="lots")


def test_pool_budget_forms() -> None:
    assert GPTMemoryPool("cpu", budget="24MB").budget_bytes == 24_000_000
    assert GPTMemoryPool("cpu", budget="24MiB").budget_bytes == 24 << 20
    assert GPTMemoryPool("cpu", budget="0.5").budget_bytes > 1 << 20
    # More than the machine has: lowered, so that "24GB" works on a smaller device.
    assert GPTMemoryPool("cpu", budget="900TB").budget_bytes < 10**15


def test_pool_random_operations_keep_contents_and_bookkeeping(pool: GPTMemoryPool) -> None:
    """Every live tensor holds its own number whatever is allocated and freed around it."""
    rng = random.Random(11)
    live: dict[int, tuple[torch.Tensor, int]] = {}
    for step in range(2000):
        if live and rng.random() < 0.45:
            tensor, stamp = live.pop(rng.choice(list(live)))
            assert bool((tensor == stamp).all()), f"step {step}: overwritten"
        else:
            name = rng.choice([None, None, f"layer{rng.randrange(20)}_{step}"])
            tensor = pool.allocate((rng.randrange(1, 20000),), name, dtype=torch.int32)
            tensor.fill_(step)
            live[step] = (tensor, step)
        if step % 50 == 0:
            pool.check_integrity()
    stats = pool.stats()
    assert stats.reserved_bytes == stats.allocated_bytes + stats.free_bytes
    assert 0 <= stats.fragmentation < 1


def test_pool_two_threads(pool: GPTMemoryPool) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for step in range(500):
                tensor = pool.allocate((rng.randrange(1, 5000),), f"thread{seed}", torch.int32)
                tensor.fill_(seed)
                other = pool.allocate((rng.randrange(1, 5000),), dtype=torch.int32)
                other.fill_(-1)
                assert bool((tensor == seed).all()), step
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_pool_trim_gives_unused_memory_back(pool: GPTMemoryPool) -> None:
    tensor = pool.allocate((100 << 20,), dtype=torch.uint8)
    reserved = pool.stats().reserved_bytes
    assert pool.trim() == reserved - (100 << 20) or pool.stats().reserved_bytes >= 100 << 20
    del tensor
    pool.trim()
    assert pool.stats().reserved_bytes == 0


@pytest.mark.parametrize("num_hits", [0, 1])
def test_pool_survives_interpreter_exit_with_live_tensors_and_refuses_fork(num_hits: int) -> None:
    code = f"""
import os
from fastgpt.memory import GPTMemoryPool
from fastgpt.errors import InvalidArgument
pool = GPTMemoryPool("cpu", "64MiB")
tensor = pool.allocate((10,), "layer", contents="zero")
for _ in range({num_hits}):
    pool.allocate((10,), "layer")
pid = os.fork()
if pid == 0:
    try:
        pool.allocate((10,), "layer")
    except InvalidArgument as error:
        os._exit(0 if "after the fork" in str(error) else 2)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert float(pool.allocate((10,), "layer").sum()) == 0
globals()["kept"] = tensor
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def swapping(request: pytest.FixtureRequest) -> Iterator[GPTMemoryPool]:
    pool = GPTMemoryPool(request.param, budget="128MiB", host_budget="256MiB")
    yield pool
    pool.check_integrity()


MIB = 1 << 20


def test_pool_evict_restores_the_bytes_at_the_same_address(swapping: GPTMemoryPool) -> None:
    tensor = swapping.allocate((50 * MIB,), "layer", torch.uint8)
    tensor.copy_(torch.arange(50 * MIB, dtype=torch.int64).to(torch.uint8))
    address = tensor.data_ptr()
    with pytest.raises(InvalidArgument, match="held by 1 tensors"):
        swapping.evict("layer")
    del tensor
    swapping.evict("layer")
    assert swapping.entries()[0].is_evicted
    assert swapping.stats().reserved_bytes < 20 * MIB
    back = swapping.allocate((50 * MIB,), "layer", torch.uint8)
    assert back.data_ptr() == address
    assert torch.equal(back.cpu(), torch.arange(50 * MIB, dtype=torch.int64).to(torch.uint8))


def test_pool_frozen_entry_is_copied_out_once(swapping: GPTMemoryPool) -> None:
    swapping.allocate((8 * MIB,), "layer", torch.uint8).fill_(9)
    swapping.freeze("layer")
    for _ in range(3):
        swapping.evict("layer")
        assert bool((swapping.allocate((8 * MIB,), "layer", torch.uint8) == 9).all())
    assert swapping.stats().num_clean_evictions == 2
    swapping.thaw("layer")
    assert swapping.stats().host_bytes == 0


def test_pool_larger_than_its_budget_serves_a_schedule(swapping: GPTMemoryPool) -> None:
    """Six layers of 32 MiB in 128 MiB, their tensors held as a module holds its weights."""
    names = [f"layers.{i}" for i in range(6)]
    weights = []
    for i, name in enumerate(names):
        weights.append(swapping.allocate((32 * MIB,), name, torch.uint8).fill_(i))
        swapping.freeze(name)
        swapping.set_schedule(names[: i + 1])
    for _ in range(2):
        for i, name in enumerate(names):
            with swapping.lease(name):
                assert int(weights[i][::4096].sum()) == i * 8192
    stats = swapping.stats()
    assert stats.reserved_bytes <= stats.budget_bytes
    assert stats.num_restores < 12  # the least recently used of six would always be the next


def test_pool_pin_and_lease_keep_an_entry_on_the_device(swapping: GPTMemoryPool) -> None:
    swapping.allocate((MIB,), "layer", torch.uint8)
    swapping.pin("layer")
    with pytest.raises(InvalidArgument, match="'layer' is pinned"):
        swapping.evict("layer")
    swapping.unpin("layer")
    with swapping.lease("layer"), pytest.raises(InvalidArgument, match="'layer' is leased"):
        swapping.evict("layer")
    swapping.evict("layer")
    with pytest.raises(InvalidArgument, match="no entry 'other'"), swapping.lease("layer", "other"):
        pass
    swapping.evict("layer")  # the failed lease let it go


def test_pool_without_host_budget_refuses_to_evict(pool: GPTMemoryPool) -> None:
    pool.allocate((10,), "layer")
    with pytest.raises(InvalidArgument, match="no host memory to evict 'layer'"):
        pool.evict("layer")


def test_pool_snapshot_has_the_form_of_torch_and_every_byte(pool: GPTMemoryPool) -> None:
    held = pool.allocate((1000,), "layer")
    snapshot = pool.snapshot()
    stats = pool.stats()
    assert sum(segment["total_size"] for segment in snapshot["segments"]) == stats.reserved_bytes
    assert sum(s["allocated_size"] for s in snapshot["segments"]) == stats.allocated_bytes
    assert sum(s["requested_size"] for s in snapshot["segments"]) == stats.requested_bytes == 4000
    for segment in snapshot["segments"]:
        at = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == at
            assert block["state"] in {"active_allocated", "active_pending_free", "inactive"}
            at += block["size"]
        assert at == segment["address"] + segment["total_size"]
    states = {
        block["address"]: block["state"] for s in snapshot["segments"] for block in s["blocks"]
    }
    assert states[held.data_ptr()] == "active_allocated"


def test_pool_stats_identity_holds_after_every_operation(swapping: GPTMemoryPool) -> None:
    rng = random.Random(3)
    live: list[torch.Tensor] = []
    for step in range(300):
        kind = rng.randrange(5)
        if kind < 2 or not live:
            live.append(swapping.allocate((rng.randrange(1, 300_000),), dtype=torch.uint8))
        elif kind == 2:
            live.pop(rng.randrange(len(live)))
        elif kind == 3:
            swapping.allocate((rng.randrange(1, 20) * MIB,), f"n{step % 3}", torch.uint8)
        elif f"n{step % 3}" in swapping:
            swapping.evict(f"n{step % 3}")
        s = swapping.stats()
        parts = (
            s.requested_bytes, s.rounding_bytes, s.pending_bytes, s.returnable_bytes,
            s.scattered_bytes, s.lane_bytes, s.evicted_bytes,
        )  # fmt: skip
        assert s.reserved_bytes == sum(parts)
        assert s.reserved_bytes <= s.budget_bytes


@pytest.mark.parametrize(
    ("shape", "dtype", "name", "message"),
    [
        ((2**40, 2**40), torch.float32, None, "less than 2\\^63 bytes"),
        ((2**63,), torch.uint8, None, "less than 2\\^63 bytes"),
        ((0, 2**64), torch.uint8, None, "less than 2\\^63 bytes"),
        ([1.5], torch.float32, None, "sequence of integers"),
        ("12", torch.float32, None, "sequence of integers"),
        (3, torch.float32, None, "sequence of integers"),
        ((3,), "float32", None, "expected a torch.dtype"),
        ((3,), torch.float32, 5, "expected a str or None"),
        ((3,), torch.float32, "layer\ud800", "UTF-8 cannot hold it"),
    ],
)
def test_arguments_no_tensor_can_have_are_named(
    shape: Any, dtype: Any, name: Any, message: str
) -> None:
    pool = GPTMemoryPool("cpu", budget="1MiB")
    with pytest.raises(InvalidArgument, match=message):
        pool.allocate(shape, name, dtype)
    assert pool.entries() == []


@pytest.mark.parametrize("device", ["foo", None, "cpu:3", "meta"])
def test_devices_without_a_pool_are_named(device: Any) -> None:
    with pytest.raises(InvalidArgument, match="expected cpu or cuda"):
        GPTMemoryPool(device, budget="1MiB")
