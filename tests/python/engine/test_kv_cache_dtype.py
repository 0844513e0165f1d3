"""The engine over a quantized KV cache: tokens as whole passes give them, in half the bytes."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import Engine, SamplingParams, load
from fastgpt.config import ServerConfig
from fastgpt.errors import ConfigError
from fastgpt.models import KVLayout
from fastgpt.models.causal_lm import CausalLM

ASSETS = Path(fastgpt.__file__).parent / "assets"
MODELS = ["tiny-r1", "tiny-qwen"]
CODES = ["fp8", "int8"]
LENGTHS = [1, 15, 30, 31]
NEW_TOKENS = 40
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)


@cache
def whole_model(name: str, code: str, dtype: str) -> CausalLM:
    model = load(ASSETS / name, device="cpu", dtype=dtype)
    model.model.use_kv_cache_dtype(code)
    return model


@cache
def prompts(name: str) -> list[list[int]]:
    vocab = whole_model(name, "auto", "float32").model.vocab_size
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


def logits_of(name: str, code: str, dtype: str, ids: list[int]) -> Tensor:
    return whole_model(name, code, dtype)(torch.tensor([ids]))[0]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", MODELS)
def test_engine_decodes_what_whole_passes_predict(name: str, code: str) -> None:
    """Chunked prefill, mixed batches and preemption included: rows on the CPU are bit-identical.

    8 blocks hold the four prompts and not what follows; 24 tokens a step cut the prompts.
    """
    engine = Engine(
        ASSETS / name, device="cpu", dtype="bfloat16", kv_cache_dtype=code, max_batch=4,
        max_length=96, block_size=16, max_batch_tokens=24, num_blocks=8,
    )  # fmt: skip
    outputs = engine.generate(prompts(name), GREEDY)
    assert engine.stats().num_preemptions > 0
    for prompt, output in zip(prompts(name), outputs, strict=True):
        assert len(output.token_ids) == NEW_TOKENS
        predicted = logits_of(name, code, "bfloat16", prompt + output.token_ids).argmax(-1)
        assert predicted[len(prompt) - 1 : -1].tolist() == output.token_ids


@pytest.mark.gpu
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", MODELS)
def test_gpu_decodes_what_the_cpu_prefers(name: str, code: str) -> None:
    """Graphs, prefill and decode kernels: each token is the best of the CPU's but for rounding."""
    engine = Engine(
        ASSETS / name, device="cuda", dtype="bfloat16", kv_cache_dtype=code, max_batch=4,
        max_length=128, memory_pool_size="2GB",
    )  # fmt: skip
    outputs = engine.generate(prompts(name), GREEDY)
    for prompt, output in zip(prompts(name), outputs, strict=True):
        logits = logits_of(name, code, "float32", prompt + output.token_ids)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert bool((chosen > logits.amax(-1) - 1.0).all())


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", MODELS)
def test_predictions_stay_near_those_of_a_float_cache(name: str, code: str) -> None:
    """KL over random ids, where the models are least sure; benchmarks/kv_quality.py has more."""
    ids = [i for prompt in prompts(name) for i in prompt]
    p = logits_of(name, "auto", "float32", ids).double().log_softmax(-1)
    q = logits_of(name, code, "float32", ids).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert 0 < float(kl.mean()) < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_the_same_memory_holds_about_twice_the_tokens(name: str) -> None:
    num_blocks = {}
    for code in ("auto", *CODES):
        engine = Engine(
            ASSETS / name, device="cpu", dtype="bfloat16", kv_cache_dtype=code, max_batch=1024,
            max_length=2048, memory_pool_size="96MB",
        )  # fmt: skip
        num_blocks[code] = engine.blocks.num_blocks
        cache = engine.runner.kv_cache
        assert cache.shape[0] == num_blocks[code]
    assert num_blocks["fp8"] == num_blocks["int8"]
    # 64 columns of 2 bytes against 64 and a scale of 4; of a latent 1152 bytes against 656.
    ratio = 1152 / 656 if name == "tiny-r1" else 128 / 68
    assert num_blocks["fp8"] / num_blocks["auto"] == pytest.approx(ratio, rel=0.01)


def test_views_of_the_layers_do_not_overlap() -> None:
    """Every byte of a block belongs to one element of one view, or is padding behind a layer."""
    for layout in (
        KVLayout("gqa", 3, 2, 24, cache_dtype="fp8"),
        KVLayout("mla", 2, 1, 576, 64, cache_dtype="int8"),
        KVLayout("mla", 2, 1, 150 + 8, 8, cache_dtype="fp8"),
    ):
        for block_size in (16, 17):
            kv_cache = torch.zeros(2, *layout.block_shape(block_size), dtype=torch.uint8)
            used = 0
            for kv in layout.split(kv_cache, torch.bfloat16):
                for view in (kv.rows, kv.scale, kv.pe):
                    if view is not None:
                        view.view(torch.uint8).add_(1)
                        used += view.nbytes
            assert int(kv_cache.sum()) == used
            assert int(kv_cache.max()) == 1
            assert kv_cache.numel() - used < 4 * 2 * layout.num_layers * block_size


def test_unknown_cache_dtypes_are_refused_before_the_model_is_read() -> None:
    message = "kv_cache_dtype is 'fp4'; expected one of auto, fp8, int8"
    with pytest.raises(ConfigError, match=message):
        Engine("no-such-model", kv_cache_dtype="fp4")
    with pytest.raises(ConfigError, match=f"optimization.{message}"):
        ServerConfig.from_mapping({"optimization": {"kv_cache_dtype": "fp4"}})
    config = ServerConfig.from_mapping({"optimization": {"kv_cache_dtype": "fp8"}})
    assert config.optimization.kv_cache_dtype == "fp8"
