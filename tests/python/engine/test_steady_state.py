"""A decode step takes nothing from torch's allocators nor from the driver."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fastgpt
from fastgpt.engine import Engine
from fastgpt.request import SamplingParams

ASSETS = Path(fastgpt.__file__).parent / "assets"
PARAMS = SamplingParams(max_tokens=40, temperature=0.7, seed=1, top_k=20, ignore_eos=True)
PROMPTS = [[3 + i, 40, 7, 9] for i in range(3)]


def started(name: str, device: str, **settings: Any) -> Engine:
    """Return an engine some decode steps into three requests."""
    engine = Engine(ASSETS / name, device=device, max_length=128, max_batch=4, **settings)
    for prompt in PROMPTS:
        engine.add_request(prompt, PARAMS)
    for _ in range(6):
        engine.step()
    return engine


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", ["tiny-r1", "tiny-qwen"])
def test_cpu_decode_step_allocates_nothing(name: str, swap: bool) -> None:
    settings = {}
    if swap:
        weights = started(name, "cpu").loaded.memory.pool.stats().allocated_bytes
        settings = {"memory_pool_size": int(weights * 0.85), "swap_to_cpu": True}
    engine = started(name, "cpu", **settings)
    assert not swap or engine.loaded.memory.swap.bytes_per_pass > 0
    before = engine.loaded.memory.pool.stats()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        for _ in range(5):
            engine.step()
    after = engine.loaded.memory.pool.stats()
    taken = {e.key: e.self_cpu_memory_usage for e in profile.key_averages()}
    assert not {key: size for key, size in taken.items() if size > 0}
    assert after.num_upstream_calls == before.num_upstream_calls
    assert after.num_allocations == before.num_allocations


def test_profiler_sees_an_allocation() -> None:
    """The test above would notice."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        torch.empty(3)
    assert any(e.self_cpu_memory_usage > 0 for e in profile.key_averages())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny-r1", "tiny-qwen"])
def test_gpu_decode_step_allocates_nothing(name: str) -> None:
    engine = started(name, "cuda", memory_pool_size="2GB")
    before = torch.cuda.memory_stats()
    pool = engine.loaded.memory.pool.stats()
    for _ in range(5):
        engine.step()
    after = torch.cuda.memory_stats()
    for key in ("allocation.all.allocated", "segment.all.allocated", "num_device_alloc"):
        assert after.get(key) == before.get(key), key
    now = engine.loaded.memory.pool.stats()
    assert now.num_upstream_calls == pool.num_upstream_calls
    assert now.num_allocations == pool.num_allocations


@pytest.mark.parametrize("name", ["tiny-r1", "tiny-qwen"])
def test_results_in_fixed_places_are_those_in_new_memory(name: str) -> None:
    engine = Engine(ASSETS / name, device="cpu", max_length=128, max_batch=4)
    assert engine.runner._scratch is not None
    with_scratch = [output.token_ids for output in engine.generate(PROMPTS, PARAMS)]
    engine.runner._scratch = None
    assert [output.token_ids for output in engine.generate(PROMPTS, PARAMS)] == with_scratch
