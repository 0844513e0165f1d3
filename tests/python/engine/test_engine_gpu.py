"""The engine on a GPU: decode graphs give the tokens that separate launches give."""

from pathlib import Path

import pytest

import fastgpt
from fastgpt.engine import Engine
from fastgpt.request import SamplingParams

ASSETS = Path(fastgpt.__file__).parent / "assets"
MODEL = ASSETS / "tiny-r1"
CHATS = [[{"role": "user", "content": f"What is {3 + i} + {40 + 7 * i}?"}] for i in range(11)]


@pytest.mark.gpu
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_graphs_equal_separate_launches(monkeypatch: pytest.MonkeyPatch, penalty: float):
    params = SamplingParams(
        max_tokens=32, temperature=0.8, seed=1, ignore_eos=True, repetition_penalty=penalty
    )
    settings = {"device": "cuda", "max_length": 512, "max_batch": 16, "memory_pool_size": "2GB"}
    with_graphs = Engine(MODEL, **settings)
    assert len(with_graphs.runner._graphs) == 2 * 5  # batches of 1, 2, 4, 8, 16
    replayed = [o.token_ids for o in with_graphs.generate(CHATS, params)]
    monkeypatch.setenv("FASTGPT_DISABLE_CUDA_GRAPH", "1")
    without = Engine(MODEL, **settings)
    assert not without.runner._graphs
    assert replayed == [o.token_ids for o in without.generate(CHATS, params)]


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("model", ["tiny-r1", "tiny-qwen"])
def test_overlapped_launches_equal_ordered_ones(
    monkeypatch: pytest.MonkeyPatch, model: str, graphs: bool
):
    """A kernel that did not wait for its predecessor would read what the step before left."""
    monkeypatch.setenv("FASTGPT_DISABLE_CUDA_GRAPH", "0" if graphs else "1")
    settings = {"device": "cuda", "max_length": 512, "max_batch": 16, "memory_pool_size": "2GB"}
    params = SamplingParams(max_tokens=96, temperature=0.8, top_p=0.95, seed=1, ignore_eos=True)
    tokens = []
    for disable in ("0", "1"):
        monkeypatch.setenv("FASTGPT_DISABLE_PDL", disable)
        engine = Engine(ASSETS / model, **settings)
        assert engine.runner.overlap_launches == (disable == "0")
        tokens.append([o.token_ids for o in engine.generate(CHATS, params)])
        tokens.append([engine.generate([chat], params)[0].token_ids for chat in CHATS[:3]])
    assert tokens[:2] == tokens[2:]


@pytest.mark.gpu
def test_gpu_decodes_what_the_cpu_decodes_in_float32():
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    settings = {"dtype": "float32", "max_length": 512, "memory_pool_size": "2GB"}
    outputs = [
        [o.token_ids for o in Engine(MODEL, device=device, **settings).generate(CHATS, params)]
        for device in ("cpu", "cuda")
    ]
    assert outputs[0] == outputs[1]
