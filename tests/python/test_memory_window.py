"""A window over evicted entries: what it copies, and what the pool refuses meanwhile."""

from collections.abc import Iterator

import pytest
import torch

from fastgpt import _C
from fastgpt.errors import InvalidArgument
from fastgpt.memory import GPTMemoryPool

MIB = 1 << 20
SIZES = {"a": 3 * MIB, "b": MIB + 7, "c": 2 * MIB, "d": MIB + 5}
PARTS = [["a", "b"], ["c"], ["d"]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def pool(request: pytest.FixtureRequest) -> Iterator[GPTMemoryPool]:
    pool = GPTMemoryPool(request.param, budget="64MiB", host_budget="64MiB")
    for i, (name, size) in enumerate(SIZES.items()):
        pool.allocate((size,), name, torch.uint8).fill_(i + 1)
        pool.freeze(name)
    yield pool
    pool.check_integrity()


def window_memory(pool: GPTMemoryPool) -> torch.Tensor:
    num_bytes = _C.WeightWindow.bytes_for([[SIZES[name] for name in part] for part in PARTS])
    return pool.allocate((num_bytes,), dtype=torch.uint8)


def test_every_pass_shows_every_part_at_its_place(pool: GPTMemoryPool) -> None:
    pool.evict(*SIZES)
    memory = window_memory(pool)
    assert memory.nbytes < sum(SIZES.values())
    window = pool.open_window(memory, PARTS)
    assert window.bytes_per_pass == sum(SIZES.values())
    stream = pool.current_stream()
    for _ in range(3):
        window.begin(stream)
        for i, part in enumerate(PARTS):
            window.acquire(i, stream)
            for j, name in enumerate(part):
                start = window.address(i, j) - memory.data_ptr()
                values = memory[start : start + SIZES[name]]
                assert bool((values == list(SIZES).index(name) + 1).all())
            window.release(i, stream)


def test_entries_of_a_window_stay_in_host_memory_until_it_closes(pool: GPTMemoryPool) -> None:
    pool.evict(*SIZES)
    window = pool.open_window(window_memory(pool), PARTS)
    for act in (
        pool.restore,
        pool.free,
        pool.thaw,
        lambda n: pool.allocate((MIB + 5,), n, torch.uint8),
    ):
        with pytest.raises(InvalidArgument, match="window"):
            act("d")
    window.close()
    window.close()
    with pytest.raises(InvalidArgument, match="closed"):
        window.begin(pool.current_stream())
    pool.restore(*SIZES)
    assert bool((pool.allocate((MIB + 5,), "d", torch.uint8) == 4).all())


def test_a_window_needs_evicted_frozen_entries_and_room(pool: GPTMemoryPool) -> None:
    with pytest.raises(InvalidArgument, match="'a' is on the device"):
        pool.open_window(window_memory(pool), PARTS)
    pool.evict("a", "b", "c")
    with pytest.raises(InvalidArgument, match="'d' is on the device"):
        pool.open_window(window_memory(pool), PARTS)
    pool.restore("a")  # the failed one let it go
    pool.thaw("d")
    pool.evict(*SIZES)
    with pytest.raises(InvalidArgument, match="'d' is not frozen"):
        pool.open_window(window_memory(pool), PARTS)
    small = pool.allocate((1000,), dtype=torch.uint8)
    with pytest.raises(InvalidArgument, match="the window has 1000 bytes; its parts need"):
        pool.open_window(small, PARTS[:2])
    with pytest.raises(InvalidArgument, match="at least one part"):
        pool.open_window(small, [])
    with pytest.raises(InvalidArgument, match="no entry 'z'"):
        pool.open_window(small, [["z"]])


def test_evict_of_many_moves_all_or_nothing(pool: GPTMemoryPool) -> None:
    held = pool.allocate((SIZES["c"],), "c", torch.uint8)
    with pytest.raises(InvalidArgument, match="'c' is held by 1 tensors"):
        pool.evict("a", "b", "c")
    assert not any(entry.is_evicted for entry in pool.entries())
    pool.evict("a", "b", "a")
    assert sum(entry.is_evicted for entry in pool.entries()) == 2
    pool.restore("a", "c", "b", "a")
    assert not any(entry.is_evicted for entry in pool.entries())
    assert bool((held == 3).all())
    assert pool.stats().num_evictions == 2


def test_restore_of_many_makes_room_for_the_last() -> None:
    pool = GPTMemoryPool("cpu", budget="32MiB", host_budget="128MiB")
    names = [f"n{i}" for i in range(4)]
    for i, name in enumerate(names):
        pool.allocate((12 * MIB,), name, torch.uint8).fill_(i)
    pool.evict(*[entry.name for entry in pool.entries() if not entry.is_evicted])
    pool.restore("n0", "n1")
    pool.restore(*names)  # two fit: the others take turns
    assert sum(not entry.is_evicted for entry in pool.entries()) == 2
    for i, name in enumerate(names):
        assert bool((pool.allocate((12 * MIB,), name, torch.uint8) == i).all())
    pool.check_integrity()
