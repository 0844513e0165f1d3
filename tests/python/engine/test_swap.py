"""A model larger than its memory: the same tokens, the budget kept, weights copied out once."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastgpt
from fastgpt.engine import Engine
from fastgpt.errors import ConfigError, OutOfMemory
from fastgpt.models import registry
from fastgpt.request import SamplingParams

ASSETS = Path(fastgpt.__file__).parent / "assets"
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
PROMPTS = [[5, 9, 2, 70, 33], list(range(40, 90)), [11]]


def write_model(path: Path, hidden: int, ffn: int, layers: int) -> int:
    """Write a random Qwen2 model of a small vocabulary; return the bytes of its weights."""
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    family = registry.family(config)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for spec in family.roles(family.parse_config(config)):
        values = torch.randn(spec.shape, generator=generator).mul_(2 * spec.shape[-1] ** -0.5)
        weights[spec.name] = (values + (1.0 if "norm" in spec.name else 0.0)).to(torch.bfloat16)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors")
    return sum(weight.nbytes for weight in weights.values())


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(path, bytes of weights, engine settings) of a model for each device."""
    path = tmp_path_factory.mktemp("model")
    settings = {
        "device": request.param, "dtype": "bfloat16", "max_length": 128, "max_batch": 4,
        "block_size": 16, "max_batch_tokens": 32,
    }  # fmt: skip
    hidden, layers = (256, 8) if request.param == "cpu" else (1024, 24)
    return path, write_model(path, hidden, 4 * hidden, layers), settings


def budget_for(model, share: float) -> int:
    """Return a budget that leaves `share` of the weights beside all else."""
    _, num_bytes, settings = model
    beside = 2 << 20 if settings["device"] == "cpu" else 300 << 20
    return int(num_bytes * share) + beside


@pytest.fixture(scope="module")
def expected(model):
    path, _, settings = model
    engine = Engine(path, **settings)
    return [output.token_ids for output in engine.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("share", [0.67, 0.4])
def test_swapping_engine_gives_the_same_tokens_under_its_budget(model, expected, share: float):
    path, num_bytes, settings = model
    budget = budget_for(model, share)
    with pytest.raises(OutOfMemory):
        Engine(path, memory_pool_size=budget, **settings)
    engine = Engine(path, memory_pool_size=budget, swap_to_cpu=True, **settings)
    swap = engine.loaded.memory.swap
    assert 0 < swap.bytes_per_pass < num_bytes
    assert swap.bytes_per_pass + swap.resident_bytes == swap.layer_bytes
    for _ in range(2):
        outputs = engine.generate(PROMPTS, PARAMS)
        assert [output.token_ids for output in outputs] == expected
    alone = engine.generate(PROMPTS[:1], PARAMS)[0].token_ids
    if settings["device"] == "cpu":  # where a row does not depend on the batch around it
        assert alone == expected[0]
    assert engine.generate(PROMPTS[:1], PARAMS)[0].token_ids == alone
    stats = engine.loaded.memory.pool.stats()
    assert stats.peak_reserved_bytes <= stats.budget_bytes
    assert stats.num_restores == 0, "windows copy; nothing is mapped again"
    engine.loaded.memory.pool.check_integrity()


@pytest.mark.parametrize("code", ["fp8", "int8"])
def test_swapping_engine_over_a_quantized_cache_gives_the_same_tokens(model, code: str):
    path, _, settings = model
    settings = {**settings, "kv_cache_dtype": code}
    resident = Engine(path, **settings).generate(PROMPTS, PARAMS)
    budget = budget_for(model, 0.67)
    engine = Engine(path, memory_pool_size=budget, swap_to_cpu=True, **settings)
    assert engine.loaded.memory.swap.bytes_per_pass > 0
    swapped = engine.generate(PROMPTS, PARAMS)
    assert [o.token_ids for o in swapped] == [o.token_ids for o in resident]


def test_swapping_engine_copies_weights_out_once(model):
    path, _, settings = model
    engine = Engine(path, memory_pool_size=budget_for(model, 0.67), swap_to_cpu=True, **settings)
    pool = engine.loaded.memory.pool
    before = pool.stats()
    engine.generate(PROMPTS, PARAMS)
    after = pool.stats()
    assert after.num_evictions == before.num_evictions
    assert after.host_bytes == before.host_bytes
    assert after.num_upstream_calls == before.num_upstream_calls
    assert after.num_allocations == before.num_allocations


def test_model_that_fits_is_not_swapped(model, expected, caplog: pytest.LogCaptureFixture):
    path, _, settings = model
    with caplog.at_level(logging.INFO, logger="fastgpt"):
        engine = Engine(path, memory_pool_size=budget_for(model, 1.5), swap_to_cpu=True, **settings)
    assert engine.loaded.memory.swap.bytes_per_pass == 0
    assert engine.loaded.memory.pool.stats().num_evictions == 0
    outputs = engine.generate(PROMPTS, PARAMS)
    assert [output.token_ids for output in outputs] == expected


def test_swap_log_names_what_stays_and_what_moves(model, caplog: pytest.LogCaptureFixture):
    path, _, settings = model
    with caplog.at_level(logging.INFO, logger="fastgpt"):
        Engine(path, memory_pool_size=budget_for(model, 0.5), swap_to_cpu=True, **settings)
    lines = [r.getMessage() for r in caplog.records if "swap_to_cpu" in r.getMessage()]
    assert len(lines) == 1
    assert "pass through a window" in lines[0]


def test_swap_refuses_what_cannot_work(model):
    path, _, settings = model
    engine_model = Engine(path, **settings).loaded.model
    with pytest.raises(ConfigError, match="has its weights already"):
        Engine(engine_model, swap_to_cpu=True)
    with pytest.raises(OutOfMemory):
        Engine(path, memory_pool_size="1MiB", swap_to_cpu=True, **settings)


@pytest.mark.parametrize("name", ["tiny-r1", "tiny-qwen"])
def test_swapping_trained_models_answer_the_same(name: str):
    """MLA, experts and quantizable layers take the same path."""
    settings = {"device": "cpu", "max_length": 192, "max_batch": 2, "max_batch_tokens": 64}
    chats = [[{"role": "user", "content": f"What is {3 + i} + {40 + 7 * i}?"}] for i in range(3)]
    params = SamplingParams(max_tokens=24, temperature=0.0)
    plain = Engine(ASSETS / name, **settings)
    weights = plain.loaded.memory.pool.stats().allocated_bytes
    budget = {"tiny-r1": 0.75, "tiny-qwen": 0.75}[name] * weights
    swapping = Engine(ASSETS / name, memory_pool_size=int(budget), swap_to_cpu=True, **settings)
    assert swapping.loaded.memory.swap.bytes_per_pass > 0
    expected = [output.token_ids for output in plain.generate(chats, params)]
    assert [output.token_ids for output in swapping.generate(chats, params)] == expected
