"""GPTMemoryPool: what a name means, the budget, lifetimes, and exact bookkeeping."""

import random
import subprocess
import sys
import threading
from collections.abc import Iterator

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


def test_pool_survives_interpreter_exit_with_live_tensors_and_refuses_fork() -> None:
    code = """
import os
from fastgpt.memory import GPTMemoryPool
from fastgpt.errors import InvalidArgument
pool = GPTMemoryPool("cpu", "64MiB")
tensor = pool.allocate((10,), "layer", contents="zero")
pid = os.fork()
if pid == 0:
    try:
        pool.allocate((10,), "layer")
    except InvalidArgument as error:
        os._exit(0 if "after the fork" in str(error) else 2)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
globals()["kept"] = tensor
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
