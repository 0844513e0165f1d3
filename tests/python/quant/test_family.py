"""Known families: parameters stored by role, norms folded without changing the function."""

import sys
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoint import StateDict
from fastgpt.checkpoint.experts import split_names
from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.quant.family import quantize_family
from fastgpt.quant.plan import plan_family
from fastgpt.quant.policy import Policy
from fastgpt.quant.report import Report
from fastgpt.quant.rounding import round_tensor
from fastgpt.scheme import Format, QuantizedTensor

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import CASES, reference_model, worst_error

FAMILIES = ["llama", "qwen2", "qwen3", "v2", "v2_lite", "v3"]
PROMPT = torch.tensor([[3, 1, 41, 5, 9, 26, 5, 35, 89, 79]])


@pytest.fixture(scope="module")
def references() -> dict:
    return {name: reference_model(CASES[name].hf_config) for name in FAMILIES}


def state_of(reference, **changes) -> StateDict:
    state = {k: v.detach().clone() for k, v in reference.state_dict().items()}
    return StateDict({**reference.config.to_dict(), **changes}, state)


def quantized(checkpoint: StateDict, config, **options) -> tuple[dict, Report]:
    report = Report()
    planned, _ = plan_family(checkpoint, Policy.parse(config, **options))
    return dict(quantize_family(checkpoint, planned, report, None)), report


def logits_with(reference, stored: dict, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    """Return the reference's logits with every weight replaced by what the file would give."""
    dense = {
        name: (t.dequantize() if isinstance(t, QuantizedTensor) else t.float())
        for name, t in stored.items()
    }
    before = {k: v.clone() for k, v in reference.state_dict().items()}
    try:
        with torch.no_grad():
            for name, target in reference.state_dict().items():
                parts = dict(split_names(name, tuple(target.shape)))
                for part, place in parts.items():
                    place.of(target).copy_(dense.pop(part))
                if not parts and name in dense:
                    target.copy_(dense.pop(name))
            assert not dense, f"the reference has no {list(dense)[:3]}"
            return reference(prompt).logits[0].clone()
    finally:
        reference.load_state_dict(before)


def plain_logits(reference) -> torch.Tensor:
    with torch.no_grad():
        return reference(PROMPT).logits[0].clone()


@pytest.mark.parametrize("name", FAMILIES)
def test_binary_norms_alone_leave_the_model_as_it_was(references, name: str):
    """The fold is exact: two-level norms and unrounded consumers give the same logits."""
    reference = references[name]
    stored, _ = quantized(state_of(reference), {"norm_params": "binary", "io_layers": "fp32"})
    kinds = {n: t.format.name for n, t in stored.items() if isinstance(t, QuantizedTensor)}
    assert "model.layers.0.input_layernorm.weight" in kinds
    assert "model.layers.1.post_attention_layernorm.weight" in kinds
    assert "model.norm.weight" in kinds
    assert set(kinds.values()) == {"binary"}
    error = worst_error(logits_with(reference, stored), plain_logits(reference))
    assert error < 2e-5, error  # float32 rounding of the folded weights, through the layers


@pytest.mark.parametrize("name", ["qwen2", "v3"])
def test_binary_norms_without_the_fold_change_the_model(references, name: str):
    """The test above can fail: the naive code, which folds nothing, moves the logits a lot."""
    reference = references[name]
    config = {"norm_params": {"format": "binary", "algorithm": "naive"}, "io_layers": "fp32"}
    stored, _ = quantized(state_of(reference), config)
    assert worst_error(logits_with(reference, stored), plain_logits(reference)) > 0.02


@pytest.mark.parametrize("name", FAMILIES)
def test_four_tier_stores_every_parameter_by_its_role(references, name: str):
    reference = references[name]
    checkpoint = state_of(reference)
    stored, report = quantized(checkpoint, None)
    assert set(stored) == set(checkpoint.names())
    for key, tensor in stored.items():
        kind = tensor.format.name if isinstance(tensor, QuantizedTensor) else tensor.dtype
        protected = (".gate.", "q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm", "bias")
        if any(part in key for part in protected):
            assert kind == torch.float32, key
        elif "norm" in key:
            assert kind == "binary", key
        elif "self_attn" in key:
            assert kind == "fp8", key
        elif ".mlp." in key:
            assert kind == "int4", key
        else:
            assert kind == torch.float16, key
    sizes = {(row["role"], row["format"]): row for row in report.to_json()["rows"]}
    assert sizes["residual_connections", "int4 g128"]["nmse"] == pytest.approx(0.0125, rel=0.25)
    assert sizes["attention_weights", "fp8"]["nmse"] == pytest.approx(0.0007, rel=0.2)
    assert report.after_bytes == sum(t.nbytes for t in stored.values())
    assert report.before_bytes == sum(checkpoint.read(n).nbytes for n in checkpoint.names())


def test_router_absorbs_the_fold_in_float32(references):
    reference = references["v3"]
    checkpoint = state_of(reference)
    router = "model.layers.1.mlp.gate.weight"
    norm = "model.layers.1.post_attention_layernorm.weight"
    half = {n: checkpoint.read(n).to(torch.bfloat16) for n in checkpoint.names()}
    stored, _ = quantized(StateDict(checkpoint.config, half), None)
    assert stored[router].dtype == torch.float32
    expected = half[router].float() * (half[norm].float() / stored[norm].dequantize())
    torch.testing.assert_close(stored[router], expected, rtol=1e-6, atol=0)
    # Without a binary norm the router is not touched.
    stored, _ = quantized(StateDict(checkpoint.config, half), {"attention_weights": "fp8"})
    assert torch.equal(stored[router], half[router])


def test_tied_head_keeps_the_final_norm():
    reference = reference_model(
        CASES["qwen2"].hf_config.__class__(
            **{**CASES["qwen2"].hf_config.to_dict(), "tie_word_embeddings": True}
        )
    )
    checkpoint = state_of(reference)
    planned, notes = plan_family(checkpoint, Policy.parse(None))
    formats = {item.name: item.format for item in planned}
    assert formats["model.norm.weight"] is None
    assert "lm_head.weight" not in formats
    assert any("model.norm.weight is kept" in note for note in notes)


def test_sensitive_norm_is_not_folded(references):
    stored, _ = quantized(state_of(references["qwen2"]), None, sensitive=["layers.0"])
    for key, tensor in stored.items():
        if key.startswith("model.layers.0.") and not key.endswith(".bias"):
            assert tensor.dtype == torch.float16, key


def test_experts_of_a_layer_must_share_a_format(references):
    with pytest.raises(ConfigError, match=r"experts\.3\..* share one format"):
        quantized(state_of(references["v3"]), None, sensitive=["layers.1.mlp.experts.3"])
    stored, _ = quantized(state_of(references["v3"]), None, sensitive=["layers.1.mlp.experts"])
    assert stored["model.layers.1.mlp.experts.3.up_proj.weight"].dtype == torch.float16


def test_fp8_block_source_is_requantized(references):
    """A checkpoint as DeepSeek-R1 ships: codes with a scale per 128 x 128, undone and redone."""
    checkpoint = state_of(references["v3"])
    name = "model.layers.0.self_attn.o_proj.weight"
    block = round_tensor(
        checkpoint.read(name), Format.parse({"format": "fp8", "scale": "block"}), name
    )
    tensors = {n: checkpoint.read(n) for n in checkpoint.names()}
    stored, _ = quantized(StateDict(checkpoint.config, {**tensors, name: block}), None)
    assert stored[name].format == Format.parse("fp8")
    torch.testing.assert_close(stored[name].dequantize(), block.dequantize(), rtol=0.07, atol=1e-3)
    # Kept attention keeps the codes as they came, where no norm folds into them.
    stored, _ = quantized(
        StateDict(checkpoint.config, {**tensors, name: block}), {"residual_connections": "int4"}
    )
    assert stored[name] is block


def test_mtp_weights_are_kept_in_bf16(references):
    checkpoint = state_of(references["v3"])
    tensors = {n: checkpoint.read(n) for n in checkpoint.names()}
    extra = f"model.layers.{references['v3'].config.num_hidden_layers}.eh_proj.weight"
    source = StateDict(checkpoint.config, {**tensors, extra: torch.randn(80, 160)})
    planned, notes = plan_family(source, Policy.parse(None))
    assert planned[-1].name == extra
    assert any("multi-token" in note for note in notes)
    stored, _ = quantized(source, None)
    assert stored[extra].dtype == torch.bfloat16


def test_family_missing_weight_is_named(references):
    checkpoint = state_of(references["qwen2"])
    tensors = {n: checkpoint.read(n) for n in checkpoint.names()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"first is 'model\.layers\.1\.mlp\.up_proj"):
        plan_family(StateDict(checkpoint.config, tensors), Policy.parse(None))


def test_family_weight_without_a_role_is_named(references):
    checkpoint = state_of(references["qwen2"])
    tensors = {n: checkpoint.read(n) for n in checkpoint.names()}
    source = StateDict(checkpoint.config, {**tensors, "adapter.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"no role in a qwen2 model.*adapter\.weight"):
        plan_family(source, Policy.parse(None))


@pytest.mark.parametrize("which", ["up_proj.weight", "input_layernorm.weight", "q_proj.bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_family_refuses_weights_that_are_not_numbers(references, which: str, bad: float):
    checkpoint = state_of(references["qwen2"])
    name = next(n for n in checkpoint.names() if n.startswith("model.layers.1.") and which in n)
    checkpoint.read(name).view(-1)[1] = bad
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        quantized(checkpoint, None)


def test_family_wrong_shape_is_named(references):
    checkpoint = state_of(references["qwen2"], intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"has shape \(130, 96\).* asks for \(64, 96\)"):
        quantized(checkpoint, None)


def test_role_that_took_no_bytes_is_an_error(references):
    with pytest.raises(ConfigError, match="default takes no bytes"):
        quantized(state_of(references["qwen2"]), {"default": "int4"})
