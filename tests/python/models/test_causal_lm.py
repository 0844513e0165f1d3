"""Loading: from directories and fp8 files, in mixed formats, within memory, with clear errors."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_directory import canonical, fp8_block, write_directory
from tiny_models import CASES, case, reference_logits, reference_model, worst_error

from fastgpt.checkpoint import StateDict, open_checkpoint
from fastgpt.errors import CheckpointError, ConfigError, InvalidArgument, UnsupportedFormat
from fastgpt.models import load
from fastgpt.quant.rounding import round_tensor
from fastgpt.scheme import Format, QuantizedTensor


@pytest.fixture(scope="module")
def qwen() -> Any:
    return reference_model(CASES["qwen2"].hf_config)


@pytest.fixture(scope="module")
def v3() -> Any:
    sizes = {"moe_intermediate_size": 128, "hidden_size": 144, "intermediate_size": 256}
    latent = {"kv_lora_rank": 64, "q_lora_rank": 128, "num_hidden_layers": 2}
    return reference_model(case("DeepseekV3", **sizes, **latent).hf_config)


def cpu(source: Any) -> Any:
    return load(source, device="cpu", dtype="float32")


def test_forward_batch_matches_transformers(qwen: Any, tmp_path: Path) -> None:
    path = write_directory(tmp_path, qwen.config.to_dict(), canonical(qwen), num_shards=3)
    ids = torch.randint(qwen.config.vocab_size, (3, 41), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = qwen(ids).logits
    logits = cpu(path)(ids)
    assert logits.dtype == torch.float32
    assert worst_error(logits, expected) <= 1e-5


@pytest.mark.parametrize("name", ["qwen2", "v3"])
def test_load_what_transformers_saves(name: str, tmp_path: Path) -> None:
    reference = reference_model(CASES[name].hf_config)
    reference.save_pretrained(tmp_path)
    ids = list(range(20))
    assert (
        worst_error(cpu(tmp_path)(torch.tensor([ids]))[0], reference_logits(reference, ids)) < 1e-5
    )


def test_forward_bad_input_raises(qwen: Any) -> None:
    model = cpu(StateDict(qwen.config.to_dict(), qwen.state_dict()))
    for bad in (torch.zeros(3), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(2, 2).int()):
        with pytest.raises(InvalidArgument, match=r"\[batch, length\]"):
            model(bad)
    with pytest.raises(InvalidArgument, match=r"ids 0 \.\. 156"):
        model(torch.tensor([[157]]))
    with pytest.raises(InvalidArgument, match="positions below 256"):
        model(torch.zeros(1, 257, dtype=torch.int64))


def test_save_unquantized_raises(qwen: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        cpu(StateDict(qwen.config.to_dict(), qwen.state_dict())).save(tmp_path / "m.pt")


def test_load_fp8_block_equals_its_dequantized_weights(v3: Any, tmp_path: Path) -> None:
    stored, plain = {}, {}
    for name, weight in canonical(v3).items():
        if weight.dim() == 2 and ("self_attn" in name or "_proj" in name):
            codes, scale = fp8_block(weight)
            stored[name], stored[f"{name}_scale_inv"] = codes, scale
            full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            plain[name] = codes.float() * full[: weight.shape[0], : weight.shape[1]]
        else:
            stored[name] = plain[name] = weight
    stored["model.layers.2.eh_proj.weight"] = torch.ones(4, 4)  # multi-token prediction: skipped
    config = v3.config.to_dict()
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = write_directory(tmp_path, config | {"quantization_config": fp8}, stored, num_shards=2)
    ids = torch.arange(30)[None]
    expected = cpu(StateDict(config, plain))(ids)
    assert worst_error(cpu(path)(ids), expected) <= 1e-5
    assert worst_error(cpu(StateDict(config, canonical(v3)))(ids), expected) > 1e-3


FOUR_TIERS = {"self_attn": "fp8", "mlp": "int4", "layernorm": "binary", "embed": "fp16"}


@pytest.mark.parametrize("name", ["qwen2", "v3"])
def test_load_mixed_formats_equals_their_dequantized_weights(name: str, qwen: Any, v3: Any) -> None:
    """Formats differ inside a joined projection as well: q is fp16, k and v are fp8."""
    reference = {"qwen2": qwen, "v3": v3}[name]
    quantized: dict[str, torch.Tensor | QuantizedTensor] = {}
    plain = {}
    for weight_name, weight in canonical(reference).items():
        tier = next((f for key, f in FOUR_TIERS.items() if key in weight_name), "fp32")
        if ".gate." in weight_name or weight_name.endswith("bias") or "a_layernorm" in weight_name:
            tier = "fp32"
        if "q_proj" in weight_name:
            tier = "fp16"
        stored = round_tensor(weight, Format.parse(tier), weight_name)
        quantized[weight_name] = stored
        dense = stored if isinstance(stored, torch.Tensor) else stored.dequantize(torch.float32)
        plain[weight_name] = dense.float()
    config = reference.config.to_dict()
    ids = torch.arange(40)[None]
    expected = cpu(StateDict(config, plain))(ids)
    assert worst_error(cpu(StateDict(config, quantized))(ids), expected) <= 1e-5


def test_load_experts_of_two_formats_raises(v3: Any) -> None:
    weights: dict[str, torch.Tensor | QuantizedTensor] = dict(canonical(v3))
    odd = "model.layers.1.mlp.experts.7.down_proj.weight"
    weights[odd] = round_tensor(weights[odd], Format.parse("int4"), odd)
    with pytest.raises(UnsupportedFormat, match=r"experts\.7\.down_proj.*share one format"):
        cpu(StateDict(v3.config.to_dict(), weights))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_load_not_finite_weight_raises(qwen: Any, name: str, value: float) -> None:
    weights = canonical(qwen)
    weights[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"'{name}' holds NaN or infinity"):
        cpu(StateDict(qwen.config.to_dict(), weights))


def test_load_missing_or_misshapen_weight_raises(qwen: Any) -> None:
    weights = canonical(qwen)
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name][:-1]
    with pytest.raises(CheckpointError, match=r"k_proj.weight' has shape \(31, 96\).*\(32, 96\)"):
        cpu(StateDict(qwen.config.to_dict(), weights))
    del weights[name]
    with pytest.raises(CheckpointError, match=f"no weight '{name}'"):
        cpu(StateDict(qwen.config.to_dict(), weights))


def test_load_unknown_architecture_or_place_raises(qwen: Any, tmp_path: Path) -> None:
    path = write_directory(tmp_path, {"architectures": ["NoSuchLM"]}, {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match="NoSuchLM is not known"):
        cpu(path)
    ours = StateDict(qwen.config.to_dict(), qwen.state_dict())
    with pytest.raises(ConfigError, match="'tpu'"):
        load(ours, device="tpu")
    with pytest.raises(ConfigError, match="'float13'"):
        load(ours, device="cpu", dtype="float13")


def test_load_bfloat16_is_close(qwen: Any) -> None:
    """Activations of 8 bits of mantissa: a few percent at most after two layers."""
    weights = {name: weight.bfloat16() for name, weight in canonical(qwen).items()}
    model = load(StateDict(qwen.config.to_dict(), weights), device="cpu", dtype="bfloat16")
    ids = list(range(30))
    error = worst_error(model(torch.tensor([ids]))[0], reference_logits(qwen, ids))
    assert 0 < error < 0.05


PEAK = """
import re, sys
from pathlib import Path
from fastgpt.models import load
def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
load(sys.argv[2], device="cpu", dtype="float32")  # code, threads and caches are there from now on
before = peak_kib()
model = load(sys.argv[1], device="cpu", dtype="float32")
print(peak_kib() - before)
"""


def test_load_peak_memory_is_model_and_one_shard(tmp_path: Path) -> None:
    """Peak resident growth of a fresh process, against the bytes of the files."""
    hidden, width, vocab, layers, shards = 512, 2560, 8192, 6, 6
    sizes = {"hidden_size": hidden, "intermediate_size": width, "vocab_size": vocab}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": layers}
    config = case("Llama", **sizes, **heads).hf_config.to_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    from fastgpt.models import family

    kind = family(config)
    specs = kind.roles(kind.parse_config(config))
    weights = {spec.name: torch.full(spec.shape, 0.01) for spec in specs}
    total = sum(weight.nbytes for weight in weights.values())
    path = write_directory(tmp_path, config, weights, num_shards=shards)
    shard = max(file.stat().st_size for file in path.glob("*.safetensors"))
    del weights
    small = {**config, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
    small["num_hidden_layers"] = 1
    small_weights = {
        spec.name: torch.full(spec.shape, 0.01) for spec in kind.roles(kind.parse_config(small))
    }
    (tmp_path / "small").mkdir()
    first = write_directory(tmp_path / "small", small, small_weights)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), str(first)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = int(done.stdout) * 1024
    assert peak >= total  # the model itself is in memory, so the measure works
    slack = 24 << 20  # allocator, thread stacks, lazily loaded code
    assert peak <= total + shard + slack, f"peak {peak >> 20} of {total >> 20} + {shard >> 20} MiB"


def test_open_does_not_touch_weights(tmp_path: Path) -> None:
    path = write_directory(tmp_path, {"model_type": "llama"}, {"w": torch.ones(4)})
    checkpoint = open_checkpoint(path)
    assert not any(f.mapping.is_mapped for f in checkpoint._files.values())  # type: ignore[attr-defined]
