"""Models of other libraries, whole: transformers' own classes, fused experts, torch.compile."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from fastgpt.quant import Quantizer, load
from fastgpt.quant.foreign import QuantizedLinear

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import worst_error

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=16),
    "bert": lambda: transformers.BertConfig(
        **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    ),
}
CLASSES = {
    "mixtral": transformers.MixtralForCausalLM,
    "gemma": transformers.GemmaForCausalLM,
    "bert": transformers.BertForMaskedLM,
}
IDS = torch.arange(2 * 9).view(2, 9) * 5 % 101


def build(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return CLASSES[kind](CONFIGS[kind]()).eval()


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(IDS).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_model_keeps_its_class_and_answers(kind: str, tmp_path):
    model = build(kind)
    before = logits(model)
    state = copy.deepcopy(model.state_dict())
    quantized = Quantizer(model, {"default": "fp8"}).convert(progress=False)
    assert isinstance(quantized, CLASSES[kind])
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    after = logits(quantized)
    assert 0 < worst_error(after, before) < 0.2
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    replaced = [m for m in quantized.modules() if isinstance(m, QuantizedLinear)]
    tied = kind in {"gemma", "bert"}
    assert len(replaced) == len(linears) - tied
    quantized.save(tmp_path / "m.pt")
    assert (tmp_path / "m.pt").stat().st_size < sum(t.nbytes for t in state.values())
    restored = load(tmp_path / "m.pt", into=build(kind, seed=1))
    assert torch.equal(logits(restored), after)

    other = Quantizer(build(kind, seed=2), {"default": "fp8"}).convert(progress=False)
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(logits(other), after)


def test_fused_experts_are_quantized_and_read_by_the_models_own_code():
    model = build("mixtral")
    quantizer = Quantizer(model, {"default": {"format": "int4", "group_size": 32}})
    quantized = quantizer.convert(progress=False)
    names = [n for n in quantizer.report.tensors if ".experts." in n]
    assert len(names) == 2 * SIZES["num_hidden_layers"]  # gate_up and down of each layer
    assert {quantizer.report.tensors[n].format for n in names} == {"int4 g32"}
    experts = quantized.model.layers[0].mlp.experts
    assert "gate_up_proj" not in dict(experts.named_parameters())
    stored = experts.gate_up_proj
    assert stored.shape == (4, 2 * SIZES["intermediate_size"], SIZES["hidden_size"])
    # The same answers as the class itself with the stored values as weights.
    with torch.no_grad():
        for layer, twin in zip(model.model.layers, quantized.model.layers, strict=True):
            for name in ("gate_up_proj", "down_proj"):
                getattr(layer.mlp.experts, name).copy_(getattr(twin.mlp.experts, name))
        for name, module in list(model.named_modules()):
            other = quantized.get_submodule(name)
            if isinstance(other, QuantizedLinear):
                module.weight.copy_(other.stored().dequantize())
    assert worst_error(logits(quantized), logits(model)) < 1e-5


@pytest.mark.parametrize("kind", ["bert", "mixtral"])
def test_quantized_model_compiles(kind: str):
    """Traced without a graph break, before anything was arranged and after."""
    quantized = Quantizer(build(kind), {"default": "int4"}).convert(progress=False)
    expected = logits(copy.deepcopy(quantized))
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=kind == "bert")
    with torch.no_grad():
        assert worst_error(compiled(IDS).logits, expected) < 1e-5
        assert worst_error(compiled(IDS).logits, expected) < 1e-5


@pytest.mark.slow
def test_quantized_model_compiles_with_inductor():
    quantized = Quantizer(build("bert"), {"default": "fp8"}).convert(progress=False)
    expected = logits(quantized)
    with torch.no_grad():
        assert worst_error(torch.compile(quantized)(IDS).logits, expected) < 1e-4


def test_half_precision_module_and_generation():
    """bf16 modules stay bf16, and the library's own generate() runs."""
    model = build("gemma").to(torch.bfloat16)
    quantized = Quantizer(model, {"default": "fp8"}).convert(progress=False)
    assert logits(quantized).dtype == torch.bfloat16
    with torch.no_grad():
        out = quantized.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert out.shape[1] > IDS.shape[1]
