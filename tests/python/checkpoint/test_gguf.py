"""GGUF files: every block bit for bit, whole models against transformers, and what can be wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf_files as files
import ml_dtypes
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastgpt
from fastgpt.checkpoint import gguf_blocks, open_checkpoint
from fastgpt.checkpoint.experts import split_names
from fastgpt.cli.main import app
from fastgpt.errors import CheckpointError, UnsupportedFormat
from fastgpt.layers.rotary import RopeConfig, frequencies
from fastgpt.quant import Quantizer
from fastgpt.scheme import QuantizedTensor

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import CASES, case, prompts_for, reference_logits, reference_model, worst_error


@pytest.mark.parametrize("kind", files.SIZES)
def test_blocks_decode_as_ggml_defines_them(tmp_path: Path, kind: str) -> None:
    path, raw = files.one(tmp_path, kind)
    expected = files.decode(kind, raw, 3, 512)
    checkpoint = open_checkpoint(path)
    stored = checkpoint.read("model.layers.0.mlp.up_proj.weight")
    (said,) = checkpoint.imported
    assert (said.kind, said.num_bytes) == (f"GGUF {kind}", len(raw))
    if kind == "Q4_0":  # held code by code, negative scales as well
        assert isinstance(stored, QuantizedTensor)
        assert str(stored.format) == said.becomes == "int4 g32 asymmetric"
        assert bool((stored.parts["scale"] >= 0).all())
        np.testing.assert_array_equal(stored.dequantize().numpy(), expected)
    else:
        assert isinstance(stored, torch.Tensor)
        assert said.becomes == "float16"
        np.testing.assert_array_equal(stored.numpy(), expected.astype(np.float16))


@pytest.mark.parametrize("kind", files.SIZES)
def test_blocks_decode_as_the_gguf_package_does(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    rows, cols = 2, 768
    raw = files.random_blocks(kind, rows, cols, seed=1)
    shaped = np.frombuffer(raw, np.uint8).reshape(rows, -1)
    expected = gguf.quants.dequantize(shaped, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(files.decode(kind, raw, rows, cols), expected)
    block = gguf_blocks.BLOCK_TYPES[kind]
    if block.decode is not None:
        blocks = torch.from_numpy(shaped.copy()).reshape(-1, block.num_bytes)
        np.testing.assert_array_equal(block.decode(blocks).view(rows, cols).numpy(), expected)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_every_16_bit_number_is_read_as_it_is(tmp_path: Path, kind: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    path, _ = files.one(tmp_path, kind, 256, 256, raw=every.tobytes())
    stored = open_checkpoint(path).read("model.layers.0.mlp.up_proj.weight")
    assert isinstance(stored, torch.Tensor)
    want = every.view(np.float16 if kind == "F16" else ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(stored.float().numpy(), want)


def test_values_beyond_float16_become_bfloat16(tmp_path: Path) -> None:
    block = np.float16(1000.0).tobytes() + np.full(32, 100, np.int8).tobytes()
    path, _ = files.one(tmp_path, "Q8_0", 1, 32, raw=block)
    stored = open_checkpoint(path).read("model.layers.0.mlp.up_proj.weight")
    assert isinstance(stored, torch.Tensor)
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, torch.full((1, 32), 100_000.0).bfloat16())


# ---- whole models ----

DENSE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm", "self_attn.kv_b_proj": "attn_kv_b",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}  # fmt: skip


def metadata_of(config: Any, arch: str) -> dict[str, Any]:
    """Return what llama.cpp's converter writes for a transformers configuration."""
    theta = config.rope_parameters["rope_theta"]
    out: dict[str, Any] = {
        "general.architecture": arch,
        "general.name": "tiny",
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": float(theta),
        f"{arch}.vocab_size": config.vocab_size,
    }
    if arch in ("llama", "qwen3"):
        head_dim = config.head_dim
        out |= {f"{arch}.attention.key_length": head_dim, f"{arch}.rope.dimension_count": head_dim}
        out[f"{arch}.attention.value_length"] = head_dim
    if arch == "deepseek2":
        is_v3 = config.model_type == "deepseek_v3"
        keys = config.qk_nope_head_dim + config.qk_rope_head_dim
        out |= {
            "deepseek2.attention.kv_lora_rank": config.kv_lora_rank,
            "deepseek2.attention.key_length": keys,
            "deepseek2.attention.value_length": config.v_head_dim,
            "deepseek2.rope.dimension_count": config.qk_rope_head_dim,
            "deepseek2.expert_count": config.n_routed_experts,
            "deepseek2.expert_used_count": config.num_experts_per_tok,
            "deepseek2.expert_shared_count": config.n_shared_experts,
            "deepseek2.expert_feed_forward_length": config.moe_intermediate_size,
            "deepseek2.leading_dense_block_count": config.first_k_dense_replace,
            "deepseek2.expert_weights_scale": float(config.routed_scaling_factor),
            "deepseek2.expert_weights_norm": is_v3,
            "deepseek2.expert_gating_func": 2 if is_v3 else 1,
            "deepseek2.expert_group_count": config.n_group,
            "deepseek2.expert_group_used_count": config.topk_group,
            "deepseek2.rope.scaling.type": "yarn",
            "deepseek2.rope.scaling.factor": 8.0,
            "deepseek2.rope.scaling.original_context_length": 32,
            "deepseek2.rope.scaling.yarn_log_multiplier": 0.1 * 0.7,
        }
        if config.q_lora_rank:
            out["deepseek2.attention.q_lora_rank"] = config.q_lora_rank
    return out


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return rows as llama.cpp's converter orders them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors_of(reference: Any, arch: str, *, split_kv_b: bool = False) -> dict[str, Any]:
    """Return the tensors llama.cpp's converter writes, in F32."""
    config, out = reference.config, {}

    def put(name: str, array: np.ndarray) -> None:
        out[name] = ("F32", array.shape, files.encode(array, "F32"))

    for name, value in reference.state_dict().items():
        array = value.float().numpy()
        stem, _, suffix = name.rpartition(".")
        if stem in DENSE:
            put(f"{DENSE[stem]}.{suffix}", array)
            continue
        _, _, layer, rest = name.split(".", 3)
        block, module = f"blk.{layer}", rest.rpartition(".")[0]
        fused = list(split_names(name, array.shape))
        if fused:  # transformers stacks gate and up
            if name.endswith("down_proj"):
                put(f"{block}.ffn_down_exps.weight", array)
            else:
                half = array.shape[1] // 2
                put(f"{block}.ffn_gate_exps.weight", array[:, :half])
                put(f"{block}.ffn_up_exps.weight", array[:, half:])
            continue
        if rest == "mlp.gate.e_score_correction_bias":
            put(f"{block}.exp_probs_b.bias", array)
            continue
        if arch == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads
            heads = heads if module.endswith("q_proj") else config.num_key_value_heads
            array = permuted(array, heads)
        if split_kv_b and module.endswith("kv_b_proj"):
            by_head = array.reshape(config.num_attention_heads, -1, array.shape[1])
            nope = config.qk_nope_head_dim
            put(f"{block}.attn_k_b.weight", by_head[:, :nope].swapaxes(1, 2))
            put(f"{block}.attn_v_b.weight", by_head[:, nope:])
            continue
        put(f"{block}.{LAYER[module]}.{suffix}", array)
    return out


YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.7, "mscale_all_dim": 0.7, "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "llama": ("llama", case("Llama", head_dim=20)),
    "llama tied bias": ("llama", case("Llama", tie_word_embeddings=True, attention_bias=True)),
    "qwen2": ("qwen2", CASES["qwen2"]),
    "qwen3": ("qwen3", CASES["qwen3"]),
    "v2": (
        "deepseek2",
        case("DeepseekV2", topk_method="group_limited_greedy", rope_parameters=YARN),
    ),
    "v3": ("deepseek2", case("DeepseekV3", rope_parameters=YARN)),
    "v3 split kv_b": ("deepseek2", case("DeepseekV3", rope_parameters=YARN)),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_answers_as_transformers(tmp_path: Path, name: str) -> None:
    arch, this = MODELS[name]
    reference = reference_model(this.hf_config)
    split = "split" in name
    path = files.write(
        tmp_path / "m.gguf",
        metadata_of(reference.config, arch),
        tensors_of(reference, arch, split_kv_b=split),
    )
    (prompt,) = prompts_for(reference.config.vocab_size, [48])
    got = fastgpt.load(path, device="cpu", dtype="float32")(torch.tensor([prompt]))[0]
    error = worst_error(got, reference_logits(reference, prompt))
    # Float32 sums in another order; kv_b in two parts is rounded to float16.
    assert error < (5e-3 if split else 2e-5)


def test_rows_of_q_left_in_llama_order_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgpt.checkpoint.gguf import GgufCheckpoint

    monkeypatch.setattr(GgufCheckpoint, "_reordered", lambda self, raw, shape, place: raw)
    with pytest.raises(AssertionError):
        test_model_answers_as_transformers(tmp_path, "llama")


def test_llama3_rope_factors_are_recognized(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    plain = RopeConfig(32, 500000.0)
    scaled = RopeConfig.parse({"rope_theta": 500000.0, "rope_scaling": scaling}, 32)
    factors = (frequencies(plain) / frequencies(scaled)).numpy()
    assert factors.max() == pytest.approx(8)
    metadata = {**files.LLAMA, "llama.rope.freq_base": 500000.0}
    tensors = {
        "token_embd.weight": ("F32", (4, 64), files.encode(np.ones((4, 64)), "F32")),
        "rope_freqs.weight": ("F32", (16,), files.encode(factors, "F32")),
    }
    checkpoint = open_checkpoint(files.write(tmp_path / "m.gguf", metadata, tensors))
    assert checkpoint.config is not None
    assert checkpoint.config["rope_scaling"] == scaling
    assert checkpoint.names() == ["model.embed_tokens.weight"]
    tensors["rope_freqs.weight"] = ("F32", (16,), files.encode(factors * 1.1, "F32"))
    with pytest.raises(UnsupportedFormat, match=r"rope_freqs\.weight"):
        open_checkpoint(files.write(tmp_path / "n.gguf", metadata, tensors))


def test_quantizer_and_inspect_take_a_file(tmp_path: Path) -> None:
    reference = reference_model(MODELS["llama"][1].hf_config)
    tensors = tensors_of(reference, "llama")
    rows, cols = 130, 96
    raw = files.random_blocks("Q8_0", rows, cols)
    tensors["blk.0.ffn_up.weight"] = ("Q8_0", (rows, cols), raw)
    path = files.write(tmp_path / "m.gguf", metadata_of(reference.config, "llama"), tensors)
    Quantizer(path, {"residual_connections": "fp8"}, calibration=None).write(
        tmp_path / "m.pt", progress=False
    )
    stored = open_checkpoint(tmp_path / "m.pt").read("model.layers.0.mlp.up_proj.weight")
    assert isinstance(stored, QuantizedTensor)
    values = files.decode("Q8_0", raw, rows, cols)
    assert np.abs(stored.dequantize().numpy() - values).max() <= np.abs(values).max() / 16
    result = CliRunner().invoke(app, ["inspect", str(path), "--tensors"])
    assert result.exit_code == 0, result.output
    assert "1 weights of GGUF Q8_0" in result.output
    assert "dequantized to float16" in result.output


def test_files_of_the_gguf_package_are_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in files.LLAMA.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
    weight = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
    embedding = np.ones((4, 64), np.float16)
    for kind in ("Q4_0", "Q8_0"):
        blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
        name = {"Q4_0": "ffn_up", "Q8_0": "ffn_gate"}[kind]
        writer.add_tensor(f"blk.0.{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("token_embd.weight", embedding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for name, tolerance in (("up_proj", 1 / 7), ("gate_proj", 1 / 120)):
        stored = checkpoint.read(f"model.layers.0.mlp.{name}.weight")
        dense = stored if isinstance(stored, torch.Tensor) else stored.dequantize()
        assert np.abs(dense.float().numpy() - weight).max() <= np.abs(weight).max() * tolerance


def test_model_that_lacks_a_tensor_names_it(tmp_path: Path) -> None:
    reference = reference_model(MODELS["llama"][1].hf_config)
    tensors = tensors_of(reference, "llama")
    del tensors["blk.1.ffn_down.weight"]
    path = files.write(tmp_path / "m.gguf", metadata_of(reference.config, "llama"), tensors)
    with pytest.raises(CheckpointError, match=r"m\.gguf .*'model\.layers\.1\.mlp\.down_proj"):
        fastgpt.load(path, device="cpu")
