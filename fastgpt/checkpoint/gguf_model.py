"""What a GGUF file's metadata and tensor names mean: config.json's fields and canonical names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt.checkpoint.foreign import Settings
from fastgpt.checkpoint.gguf_file import GgufTensor

__all__ = ["Place", "places", "rope_factors_scaling", "to_config", "token_ids"]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "deepseek2": "",  # V2 or V3, told apart by the router
}
ROPE_FACTORS = "rope_freqs.weight"
_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
# Published rotary scalings of Llama 3, of which files store the result per pair only:
# factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight lies.

    Attributes:
        tensor: name in the file.
        expert: which of the stacked experts, None for all of the tensor.
        rotated_heads: heads whose rows the llama conversion reordered; 0: none.
        values: of a kv_b stored as keys (`tensor`, transposed) and values: the latter's tensor.
    """

    tensor: str
    expert: int | None = None
    rotated_heads: int = 0
    values: str | None = None


def places(
    architecture: str, config: Mapping[str, Any], tensors: Mapping[str, GgufTensor], path: Any
) -> dict[str, Place]:
    """Return canonical name -> place of every weight.

    Raises:
        CheckpointError: a tensor whose name has no meaning in this architecture.
    """
    found: dict[str, Place] = {}
    for name, tensor in tensors.items():
        if name == ROPE_FACTORS:
            continue
        stem, _, suffix = name.rpartition(".")
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if match is None:
            target = _TOP.get(stem) if suffix == "weight" else None
            if target is None:
                _unknown(name, architecture, path)
            found[f"{target}.{suffix}"] = Place(name)
            continue
        layer, kind = f"model.layers.{match[1]}", match[2]
        if kind in _EXPERTS and len(tensor.shape) == 3:
            for expert in range(tensor.shape[0]):
                target = f"{layer}.mlp.experts.{expert}.{_EXPERTS[kind]}.weight"
                found[target] = Place(name, expert=expert)
        elif kind == "exp_probs_b":
            found[f"{layer}.mlp.gate.e_score_correction_bias"] = Place(name)
        elif kind in ("attn_k_b", "attn_v_b") and f"blk.{match[1]}.attn_kv_b.weight" in tensors:
            continue  # some files hold kv_b both ways
        elif kind == "attn_k_b":
            values = f"blk.{match[1]}.attn_v_b.weight"
            if values not in tensors:
                _unknown(name, architecture, path, f"it lacks {values!r}")
            found[f"{layer}.self_attn.kv_b_proj.weight"] = Place(name, values=values)
        elif kind == "attn_v_b":
            continue
        elif kind in _IN_LAYER:
            heads = 0
            if architecture == "llama" and kind in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
            found[f"{layer}.{_IN_LAYER[kind]}.{suffix}"] = Place(name, rotated_heads=heads)
        else:
            _unknown(name, architecture, path)
    return found


def _unknown(name: str, architecture: str, path: Any, why: str = "") -> Any:
    settings = Settings({}, str(path))
    settings.fail(
        f"has tensor {name!r}, which means nothing in architecture {architecture!r}"
        + (f": {why}" if why else "; the file needs a newer FastGPT or is damaged")
    )


def to_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], path: Any
) -> dict[str, Any]:
    """Return the fields of config.json that the metadata stand for.

    Raises:
        UnsupportedFormat: an architecture, or a key of it, that is not read.
        CheckpointError: a key is missing or of a wrong type.
    """
    everything = Settings(dict(metadata), str(path))
    architecture = everything.one_of("general.architecture", tuple(ARCHITECTURES), "")
    prefix = f"{architecture}."
    own = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    fields = _Fields(own, f"{path}: {architecture}")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        everything.fail("lacks 'token_embd.weight'; it is no language model, or not complete")
    config: dict[str, Any] = {
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "vocab_size": embedding.shape[0],
        "hidden_size": fields.need("embedding_length", int),
        "intermediate_size": fields.need("feed_forward_length", int),
        "num_hidden_layers": fields.need("block_count", int),
        "num_attention_heads": fields.need("attention.head_count", int),
        "max_position_embeddings": fields.need("context_length", int),
        "rms_norm_eps": fields.need("attention.layer_norm_rms_epsilon", float),
        "rope_theta": fields.get("rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = fields.get("attention.head_count_kv", int, heads)
    fields.ignore("vocab_size")
    fields.one_of("attention.causal", (True,), True)
    fields.refuse("attention.sliding_window")
    if architecture == "deepseek2":
        config |= _deepseek(fields, tensors)
    else:
        config |= _dense(fields, architecture, config, tensors)
    config["rope_scaling"] = _rope_scaling(fields, config["max_position_embeddings"])
    config |= token_ids(metadata)
    fields.done()
    return config


def token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return bos_token_id and eos_token_id, the latter with every id that ends a turn."""
    found = {k: metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "eot", "eom")}
    ends = list(dict.fromkeys(found[k] for k in ("eos", "eot", "eom") if found[k] is not None))
    fields: dict[str, Any] = {} if found["bos"] is None else {"bos_token_id": found["bos"]}
    if ends:
        fields["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return fields


class _Fields(Settings):
    """Settings some of which must be there."""

    def need(self, key: str, kind: type[Any]) -> Any:
        """Return a value that must be there."""
        if self.values.get(key) is None:
            self.fail(f"lacks the metadata {key!r}; convert the model again")
        return self.get(key, kind, None)


def _dense(
    fields: _Fields, architecture: str, config: dict[str, Any], tensors: Mapping[str, GgufTensor]
) -> dict[str, Any]:
    rotated = fields.get("rope.dimension_count", int, 0)
    plain = config["hidden_size"] // max(config["num_attention_heads"], 1)
    head_dim = fields.get("attention.key_length", int, rotated or plain)
    if rotated not in (0, head_dim) or fields.get("attention.value_length", int, head_dim) != (
        head_dim
    ):
        fields.fail(f"has heads of {head_dim} keys with {rotated} rotated or other values")
    fields.refuse("expert_count")
    fields.refuse("expert_used_count")
    fields.one_of("tensor_data_layout", ("",), "")
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "head_dim": head_dim,
        "attention_bias": architecture != "qwen2" and "blk.0.attn_q.bias" in tensors,
    }


def _deepseek(fields: _Fields, tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """Return what DeepSeek-V2 and V3 add.

    Older files lack the expert groups, which then do not limit the choice of experts.
    """
    has_bias = any(name.endswith(".exp_probs_b.bias") for name in tensors)
    gating = fields.one_of(
        "expert_gating_func", (_SOFTMAX, _SIGMOID), _SIGMOID if has_bias else _SOFTMAX
    )
    is_v3 = gating == _SIGMOID
    rotated = fields.need("rope.dimension_count", int)
    # Files for attention over the latent give its widths as key and value lengths.
    keys = fields.get("attention.key_length_mla", int, fields.get("attention.key_length", int, 0))
    values = fields.get(
        "attention.value_length_mla", int, fields.get("attention.value_length", int, 0)
    )
    groups = fields.get("expert_group_count", int, 1)
    fields.refuse("nextn_predict_layers")
    method = "noaux_tc" if is_v3 else "group_limited_greedy" if groups > 1 else "greedy"
    return {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "num_key_value_heads": fields.need("attention.head_count", int),
        "q_lora_rank": fields.get("attention.q_lora_rank", int, 0) or None,
        "kv_lora_rank": fields.need("attention.kv_lora_rank", int),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": keys - rotated,
        "v_head_dim": values,
        "n_routed_experts": fields.get("expert_count", int, 0),
        "num_experts_per_tok": fields.get("expert_used_count", int, 0),
        "n_shared_experts": fields.get("expert_shared_count", int, 0),
        "moe_intermediate_size": fields.get("expert_feed_forward_length", int, 0),
        "first_k_dense_replace": fields.get("leading_dense_block_count", int, 0),
        "routed_scaling_factor": fields.get("expert_weights_scale", float, 1.0),
        "norm_topk_prob": fields.get("expert_weights_norm", bool, False),
        "n_group": groups,
        "topk_group": fields.get("expert_group_used_count", int, 1),
        "topk_method": method,
        "scoring_func": "sigmoid" if is_v3 else "softmax",
    }


def _rope_scaling(fields: _Fields, max_position: int) -> dict[str, Any] | None:
    kind = fields.one_of("rope.scaling.type", ("none", "linear", "yarn"), "none")
    factor = fields.get("rope.scaling.factor", float, fields.get("rope.scale_linear", float, 1.0))
    original = fields.get("rope.scaling.original_context_length", int, max_position)
    log_multiplier = fields.get("rope.scaling.yarn_log_multiplier", float, 0.0)
    beta_fast = fields.get("rope.scaling.yarn_beta_fast", float, 32.0)
    beta_slow = fields.get("rope.scaling.yarn_beta_slow", float, 1.0)
    fields.one_of("rope.scaling.attn_factor", (1.0,), 1.0)
    fields.ignore("rope.scaling.finetuned")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= {"original_max_position_embeddings": original}
        scaling |= {"beta_fast": beta_fast, "beta_slow": beta_slow}
        if log_multiplier:  # 0.1 times DeepSeek's mscale_all_dim, which equals its mscale
            mscale = round(10 * log_multiplier, 6)
            scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    return scaling


def rope_factors_scaling(
    factors: torch.Tensor, theta: float, head_dim: int, path: Any
) -> dict[str, Any]:
    """Return the Llama 3 rotary scaling that divides each pair's frequency by these factors.

    Args:
        factors: float32 [head_dim / 2], of `rope_freqs.weight`.
        theta, head_dim: of the model.
        path: of the file, for messages.

    Raises:
        UnsupportedFormat: no published scaling gives them.
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wavelength = 2 * torch.pi / frequency
    for factor, low, high, original in _LLAMA3:
        blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        wanted = 1 / ((1 - blend) / factor + blend)
        if torch.allclose(factors.to(torch.float64), wanted, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    settings = Settings({}, str(path))
    settings.unsupported(ROPE_FACTORS, factors.tolist(), [f"Llama 3's, {p}" for p in _LLAMA3])
