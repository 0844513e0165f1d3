"""A trace says what a pool did, and its replay does the same."""

import json
import threading
from pathlib import Path

import memory_trace
import pytest
import torch

from fastgpt.errors import InvalidArgument
from fastgpt.memory import GPTMemoryPool


def test_trace_replay_has_the_same_live_bytes_and_peak(tmp_path: Path) -> None:
    pool = GPTMemoryPool("cpu", budget="64MiB", host_budget="64MiB")
    path = tmp_path / "trace.jsonl"
    with pool.trace(path):
        pool.allocate((1000,), 'layers."0"\n')
        pool.allocate((5000,), 'layers."0"\n', contents="keep")
        tensors = [pool.allocate((n,)) for n in (1, 100_000, 3_000_000)]
        pool.evict('layers."0"\n')
        pool.restore('layers."0"\n')
        del tensors[1]
        with pytest.raises(InvalidArgument):
            pool.free("nobody")
    pool.allocate((7,))  # not in the trace
    events = list(memory_trace.read_trace(path))
    assert [event.name for event in events if event.op == "named"] == ['layers."0"\n'] * 2
    assert [event.op for event in events if event.op in {"evict", "restore"}] == [
        "evict",
        "restore",
    ]
    assert sorted(event.t_us for event in events) == [event.t_us for event in events]
    again = GPTMemoryPool("cpu", budget="64MiB", host_budget="64MiB")
    result = memory_trace.replay(events, again)
    live = 4 * (5000 + 1 + 100_000 + 3_000_000)
    assert result["peak_live_bytes"] == live
    assert pool.stats().peak_requested_bytes == live
    assert result["peak_committed_bytes"] >= live


def test_trace_of_two_threads_never_has_a_block_twice(tmp_path: Path) -> None:
    """A free is written before the block can be anybody else's."""
    pool = GPTMemoryPool("cpu", budget="64MiB")
    path = tmp_path / "trace.jsonl"
    both = threading.Barrier(2)  # a thread that ended hands its number on

    def work() -> None:
        both.wait()
        for n in range(300):
            pool.allocate((n * 7 % 100,), dtype=torch.uint8)
        both.wait()

    with pool.trace(path):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    moves = list(memory_trace.blocks(memory_trace.read_trace(path)))
    assert sum(event.op == "allocate" for event in moves) == 600
    assert len({event.thread for event in moves}) == 2


def test_trace_refuses_a_second_one_and_a_bad_path(tmp_path: Path) -> None:
    pool = GPTMemoryPool("cpu", budget="64MiB")
    with (
        pool.trace(tmp_path / "a"),
        pytest.raises(InvalidArgument, match="running"),
        pool.trace(tmp_path / "b"),
    ):
        pass
    with pytest.raises(InvalidArgument, match="cannot be written"), pool.trace(tmp_path):
        pass
    (tmp_path / "broken").write_text(json.dumps({"op": "allocate"}) + "\n")
    with pytest.raises(ValueError, match="broken:1"):
        list(memory_trace.read_trace(tmp_path / "broken"))
