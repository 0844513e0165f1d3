"""The engine on a GPU: decode graphs give the tokens that separate launches give."""

from pathlib import Path

import pytest

import fastgpt
from fastgpt.engine import Engine
from fastgpt.request import SamplingParams

MODEL = Path(fastgpt.__file__).parent / "assets" / "tiny-r1"
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
def test_gpu_decodes_what_the_cpu_decodes_in_float32():
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    settings = {"dtype": "float32", "max_length": 512, "memory_pool_size": "2GB"}
    outputs = [
        [o.token_ids for o in Engine(MODEL, device=device, **settings).generate(CHATS, params)]
        for device in ("cpu", "cuda")
    ]
    assert outputs[0] == outputs[1]
