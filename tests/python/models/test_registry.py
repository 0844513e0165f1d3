"""Configurations: published config.json files, what transformers 5 writes, and refusals."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import CASES

from fastgpt.errors import CheckpointError
from fastgpt.models import ROLES, family
from fastgpt.models.deepseek import DeepseekConfig

CONFIGS = Path(__file__).parent / "configs"

# Published parameter counts, without multi-token prediction and block scales.
NUM_PARAMETERS = {
    "deepseek-r1": 671_026_419_200,
    "deepseek-v2-lite": 15_706_484_224,
    "r1-distill-qwen-1.5b": 1_777_088_000,
    "r1-distill-qwen-7b": 7_615_616_512,
    "r1-distill-llama-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
}


def published(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_published_config_gives_the_published_parameter_count(name: str) -> None:
    config = published(name)
    kind = family(config)
    specs = kind.roles(kind.parse_config(config))
    assert sum(math.prod(spec.shape) for spec in specs) == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_published_config_survives_transformers(name: str) -> None:
    """The fields transformers 5 writes after reading a published file mean the same to us."""
    config = published(name)
    kind = family(config)
    config_class = getattr(
        transformers, config["architectures"][0][: -len("ForCausalLM")] + "Config"
    )
    rewritten = config_class(**{k: v for k, v in config.items() if k != "quantization_config"})
    fields = json.loads(rewritten.to_json_string(use_diff=False))
    assert "rope_parameters" in fields
    assert "rope_scaling" not in fields
    assert kind.parse_config(fields) == kind.parse_config(config)


def test_published_r1_and_lite_routing() -> None:
    r1 = family(published("deepseek-r1")).parse_config(published("deepseek-r1"))
    assert isinstance(r1, DeepseekConfig)
    assert (r1.num_groups, r1.topk_groups, r1.top_k, r1.scoring) == (8, 4, 8, "sigmoid")
    assert (r1.renormalize, r1.routed_scaling, r1.has_correction_bias) == (True, 2.5, True)
    # 192^-0.5 * (0.1 ln 40 + 1)^2, as DeepSeek's own model code computes it
    assert r1.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert r1.rope.table_scale == 1.0
    assert not r1.is_moe(2)
    assert r1.is_moe(3)
    lite = family(published("deepseek-v2-lite")).parse_config(published("deepseek-v2-lite"))
    assert isinstance(lite, DeepseekConfig)
    assert (lite.q_lora_rank, lite.num_groups, lite.top_k, lite.scoring) == (None, 1, 6, "softmax")
    assert lite.softmax_scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_roles_are_complete_and_consistent(name: str) -> None:
    config = published(name)
    kind = family(config)
    specs = kind.roles(kind.parse_config(config))
    by_name = {spec.name: spec for spec in specs}
    assert len(by_name) == len(specs)
    counts = Counter(spec.role for spec in specs)
    assert set(counts) | {"kept"} == set(ROLES)
    assert counts["io_layers"] == 2
    for spec in specs:
        if spec.role == "norm_params":
            assert spec.consumers, spec.name
            for consumer in spec.consumers:
                assert by_name[consumer].shape[1:] == spec.shape, (spec.name, consumer)
        else:
            assert not spec.consumers


def test_roles_of_r1_follow_the_article() -> None:
    config = published("deepseek-r1")
    kind = family(config)
    specs = {spec.name: spec for spec in kind.roles(kind.parse_config(config))}
    layer = "model.layers.3"
    expected = {
        "self_attn.q_a_proj.weight": "attention_weights",
        "self_attn.kv_b_proj.weight": "attention_weights",
        "self_attn.q_a_layernorm.weight": "kept",
        "self_attn.kv_a_layernorm.weight": "kept",
        "mlp.gate.weight": "kept",
        "mlp.gate.e_score_correction_bias": "kept",
        "mlp.experts.255.down_proj.weight": "residual_connections",
        "mlp.shared_experts.up_proj.weight": "residual_connections",
        "input_layernorm.weight": "norm_params",
    }
    assert {name: specs[f"{layer}.{name}"].role for name in expected} == expected
    readers = specs[f"{layer}.post_attention_layernorm.weight"].consumers
    assert len(readers) == 1 + 2 * 256 + 2  # router, experts, shared expert
    assert kind.is_mtp(kind.parse_config(config), "model.layers.61.eh_proj.weight")
    assert not kind.is_mtp(kind.parse_config(config), "model.layers.60.mlp.gate.weight")


@pytest.mark.parametrize("name", CASES)
def test_roles_name_every_parameter_of_transformers(name: str) -> None:
    """Our names and shapes are those of the reference's state, fused experts split."""
    import torch

    from fastgpt.checkpoint import StateDict

    hf_config = CASES[name].hf_config
    model_class = getattr(transformers, type(hf_config).__name__.replace("Config", "ForCausalLM"))
    with torch.device("meta"):
        state = model_class(hf_config).state_dict()
    checkpoint = StateDict(hf_config.to_dict(), state)
    kind = family(hf_config.to_dict())
    specs = kind.roles(kind.parse_config(hf_config.to_dict()))
    assert {spec.name: spec.shape for spec in specs} == {
        name: tuple(checkpoint.read(name).shape) for name in checkpoint.names()
    }


def test_tied_head_is_no_consumer() -> None:
    config = published("qwen3-8b") | {"tie_word_embeddings": True}
    specs = {spec.name: spec for spec in family(config).roles(family(config).parse_config(config))}
    assert "lm_head.weight" not in specs
    assert specs["model.norm.weight"].consumers == ()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not known; known are Llama"),
        ({"model_type": "mamba"}, "mamba is not known"),
        ({}, "None is not known"),
        ({"architectures": "Llama"}, "not a list"),
        ({"architectures": [3]}, "3 is not known"),
    ],
)
def test_family_unknown_architecture_raises(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        family(config)


@pytest.mark.parametrize(
    "config", [{"model_type": "qwen2"}, {"architectures": ["Qwen2ForCausalLM"]}]
)
def test_family_by_either_field(config: dict[str, Any]) -> None:
    assert family(config).name == "qwen2"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3-8b", {"hidden_size": None}, "has no 'hidden_size'"),
        ("qwen3-8b", {"hidden_size": "4096"}, "expected int"),
        ("qwen3-8b", {"hidden_size": True}, "expected int"),
        ("qwen3-8b", {"vocab_size": -1}, "expected 0 or more"),
        ("qwen3-8b", {"num_hidden_layers": 0}, "expected 1 or more"),
        ("qwen3-8b", {"num_key_value_heads": 5}, "evenly"),
        ("qwen3-8b", {"head_dim": 127}, "even"),
        ("qwen3-8b", {"hidden_act": "gelu"}, "only silu"),
        ("qwen3-8b", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
         "sliding-window"),
        ("qwen3-8b", {"layer_types": ["sliding_attention"]}, "sliding-window"),
        ("qwen3-8b", {"rope_scaling": {"type": "longrope"}}, "longrope"),
        ("qwen3-8b", {"rope_scaling": {"type": "linear"}}, "'factor'"),
        ("qwen3-8b", {"rope_scaling": {"type": "linear", "factor": "2"}}, "'factor'"),
        ("qwen3-8b", {"rope_scaling": [1]}, "not an object"),
        ("qwen3-8b", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("r1-distill-llama-8b", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
         "'low_freq_factor'"),
        ("deepseek-r1", {"topk_method": "greedy"}, "topk_method 'greedy'"),
        ("deepseek-r1", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("deepseek-r1", {"n_group": 7}, "not possible"),
        ("deepseek-r1", {"topk_group": 9}, "not possible"),
        ("deepseek-r1", {"num_experts_per_tok": 0}, "not possible"),
        ("deepseek-r1", {"qk_rope_head_dim": 63}, "even"),
        ("deepseek-v2-lite", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek-v2-lite", {"hidden_act": "relu"}, "only silu"),
    ],
)  # fmt: skip
def test_parse_config_refuses(name: str, changes: dict[str, Any], message: str) -> None:
    config = {k: v for k, v in (published(name) | changes).items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        family(config).parse_config(config)
