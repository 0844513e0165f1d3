"""Scheduling without tensors: who runs, for how many tokens, and who gives blocks back."""

import pytest
from engine.fake_model import continuation, next_token

from fastgpt.engine.block_manager import BlockManager
from fastgpt.engine.scheduler import ScheduledRequest, Scheduler
from fastgpt.errors import OutOfMemory
from fastgpt.request import Request, SamplingParams

BLOCK = 4


def make_request(
    name: str, num_prompt: int, max_new_tokens: int = 8, arrival_s: float = 0.0
) -> Request:
    prompt = [(7 * i + len(name)) % 50 for i in range(num_prompt)]
    params = SamplingParams(temperature=0.0).resolve({})
    return Request(name, prompt, params, max_new_tokens, seed=0, arrival_s=arrival_s)


def make_scheduler(num_blocks: int = 64, **settings) -> Scheduler:
    settings = {"max_batch": 8, "max_batch_tokens": 32, **settings}
    return Scheduler(BlockManager(num_blocks, BLOCK), **settings)


def step(scheduler: Scheduler, now_s: float = 0.0) -> list[ScheduledRequest]:
    """Run one step with the fake model's tokens and check every invariant."""
    scheduled = scheduler.schedule(now_s)
    assert sum(s.num_tokens for s in scheduled) <= scheduler.max_batch_tokens
    assert len(scheduled) <= scheduler.max_batch
    assert len({s.request.request_id for s in scheduled}) == len(scheduled)
    for s in scheduled:
        needed = s.request.num_cached_tokens + s.num_tokens
        assert s.num_tokens > 0
        assert len(s.request.block_table) * BLOCK >= needed
    ids = [next_token(s.request.token_ids) for s in scheduled if s.needs_sample]
    scheduler.complete(scheduled, ids, now_s)
    scheduler.blocks.check_integrity(scheduler.requests())
    return scheduled


def run_all(scheduler: Scheduler) -> int:
    num_steps = 0
    while scheduler.has_work:
        assert step(scheduler, num_steps), "work is left but nothing was scheduled"
        num_steps += 1
        assert num_steps < 10_000
    return num_steps


def test_scheduler_decodes_many_requests_together():
    scheduler = make_scheduler()
    requests = [make_request(f"r{i}", 3 + i, arrival_s=i) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    assert run_all(scheduler) == 8  # one prefill step for all, then seven decodes
    for request in requests:
        assert request.output_token_ids == continuation(request.prompt_token_ids, 8)
        assert request.finish_reason == "length"
    assert scheduler.blocks.num_free == 64


def test_scheduler_splits_a_long_prompt_and_keeps_decoding():
    scheduler = make_scheduler(max_batch_tokens=8)
    short, long = make_request("short", 2, 20), make_request("long", 50, 2, arrival_s=1.0)
    scheduler.add(short)
    step(scheduler)
    scheduler.add(long)
    chunks = []
    while long.num_generated == 0:
        by_name = {s.request.request_id: s.num_tokens for s in step(scheduler, 1.0)}
        assert by_name["short"] == 1, "a prompt must not delay a decode"
        chunks.append(by_name["long"])
    assert chunks == [7] * 7 + [1]


def test_scheduler_admits_at_once_when_idle():
    scheduler = make_scheduler(min_batch=8, batch_timeout_s=10.0)
    scheduler.add(make_request("one", 3))
    assert len(step(scheduler, 0.0)) == 1


def test_scheduler_gathers_min_batch_only_while_busy():
    scheduler = make_scheduler(min_batch=3, batch_timeout_s=10.0)
    scheduler.add(make_request("busy", 3, 100))
    step(scheduler)
    scheduler.add(make_request("a", 3, arrival_s=1.0))
    scheduler.add(make_request("b", 3, arrival_s=1.0))
    assert len(step(scheduler, 1.1)) == 1
    scheduler.add(make_request("c", 3, arrival_s=1.2))
    assert len(step(scheduler, 1.2)) == 4


def test_scheduler_batch_timeout_ends_the_gathering():
    scheduler = make_scheduler(min_batch=3, batch_timeout_s=0.5)
    scheduler.add(make_request("busy", 3, 100))
    step(scheduler)
    scheduler.add(make_request("a", 3, arrival_s=1.0))
    assert len(step(scheduler, 1.4)) == 1
    assert len(step(scheduler, 1.5)) == 2


def test_scheduler_min_batch_larger_than_the_free_slots_does_not_starve():
    scheduler = make_scheduler(max_batch=2, min_batch=2, batch_timeout_s=1e9)
    scheduler.add(make_request("busy", 3, 100))
    step(scheduler)
    scheduler.add(make_request("a", 3))
    assert len(step(scheduler)) == 2


def test_scheduler_preempts_the_youngest_and_recomputes_the_same_tokens():
    scheduler = make_scheduler(num_blocks=8)
    requests = [make_request(f"r{i}", 5, 15, arrival_s=i) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    run_all(scheduler)
    assert scheduler.num_preemptions > 0
    assert requests[0].num_preemptions == 0, "the oldest is never preempted"
    assert requests[2].num_preemptions > 0
    for request in requests:
        assert request.output_token_ids == continuation(request.prompt_token_ids, 15)
    assert scheduler.blocks.num_free == 8


def test_scheduler_abort_frees_blocks_and_slot_at_once():
    scheduler = make_scheduler(max_batch=1)
    first, second = make_request("first", 9, 100), make_request("second", 3, 2, arrival_s=1.0)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    assert scheduler.blocks.num_used == 3
    assert scheduler.abort("first") is first
    assert scheduler.blocks.num_used == 0
    assert first.finish_reason == "abort"
    assert scheduler.abort("first") is None
    run_all(scheduler)
    assert second.finish_reason == "length"


def test_scheduler_abort_of_a_waiting_request():
    scheduler = make_scheduler()
    scheduler.add(make_request("waiting", 3))
    scheduler.abort("waiting")
    assert not scheduler.has_work
    assert not scheduler.waiting


def test_scheduler_stops_at_a_stop_token():
    request = make_request("r", 4, 50)
    stop = continuation(request.prompt_token_ids, 6)[5]
    request.stop_token_ids = frozenset({stop})
    scheduler = make_scheduler()
    scheduler.add(request)
    run_all(scheduler)
    expected = continuation(request.prompt_token_ids, 50)
    assert request.finish_reason == "stop"
    assert request.output_token_ids == expected[: expected.index(stop) + 1]


def test_scheduler_admission_leaves_a_block_for_each_running_request():
    scheduler = make_scheduler(num_blocks=6)
    scheduler.add(make_request("a", 4, 8))
    step(scheduler)
    scheduler.add(make_request("b", 16, 1, arrival_s=1.0))  # 4 of the 5 free blocks
    step(scheduler)
    assert scheduler.num_preemptions == 0
    run_all(scheduler)
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize("num_requests", [1, 7, 40])
@pytest.mark.parametrize("num_blocks", [9, 17, 200])
def test_scheduler_random_load_finishes_exactly(num_requests: int, num_blocks: int):
    scheduler = make_scheduler(num_blocks=num_blocks, max_batch_tokens=11)
    requests = [
        make_request(f"r{i}", 1 + (i * 13) % 23, 1 + (i * 5) % 13, arrival_s=i)
        for i in range(num_requests)
    ]
    for request in requests:
        scheduler.add(request)
        step(scheduler, request.arrival_s)
    run_all(scheduler)
    for request in requests:
        assert request.output_token_ids == continuation(
            request.prompt_token_ids, request.max_new_tokens
        )
    assert scheduler.blocks.num_free == num_blocks
    assert sorted(scheduler._free_slots) == list(range(8))


def test_block_manager_grow_beyond_the_pool_raises_and_changes_nothing():
    blocks = BlockManager(2, BLOCK)
    request = make_request("r", 3)
    with pytest.raises(OutOfMemory, match="needs 3 KV blocks, 2 of 2 are free"):
        blocks.grow(request, 9)
    assert request.block_table == []
    assert blocks.num_free == 2
