"""Random tiny models of every family, as transformers builds them, and running ours beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

from fastgpt.batch import Batch
from fastgpt.checkpoint import StateDict
from fastgpt.models.model import Model
from fastgpt.models.registry import family

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "original_max_position_embeddings": 32,
}

DENSE: dict[str, Any] = {
    "vocab_size": 157,
    "hidden_size": 96,
    "intermediate_size": 130,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
LATENT: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 80,
    "intermediate_size": 122,
    "moe_intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "n_shared_experts": 1,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 48,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}


@dataclass(frozen=True)
class Case:
    """One tiny configuration: the transformers config class and what differs from the base."""

    kind: str
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def hf_config(self) -> transformers.PretrainedConfig:
        base = LATENT if self.kind.startswith("Deepseek") else DENSE
        return getattr(transformers, f"{self.kind}Config")(**{**base, **dict(self.changes)})


def case(kind: str, **changes: Any) -> Case:
    return Case(kind, tuple(changes.items()))


# One of each family, with every feature that a mutant of test_mutants.py breaks.
CASES: dict[str, Case] = {
    "llama": case("Llama", rope_parameters=LLAMA3_ROPE, head_dim=20),
    "qwen2": case("Qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": case("Qwen3", head_dim=64, num_key_value_heads=3),
    "v2": case(
        "DeepseekV2", topk_method="group_limited_greedy", rope_parameters=YARN, n_shared_experts=2
    ),
    "v2_lite": case("DeepseekV2", q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1),
    "v3": case("DeepseekV3", rope_parameters=YARN),
}
# More shapes, for the slow sweep.
SWEEP: dict[str, Case] = {
    "llama_tied_bias": case(
        "Llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True, hidden_size=48
    ),
    "llama_linear": case(
        "Llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
    ),
    "llama_mha": case("Llama", num_key_value_heads=6, vocab_size=3, hidden_size=108),
    "llama_mqa": case("Llama", num_key_value_heads=1, head_dim=128, intermediate_size=1),
    "qwen2_tied": case("Qwen2", tie_word_embeddings=True, num_hidden_layers=1),
    "qwen2_yarn": case(
        "Qwen2",
        rope_parameters={k: v for k, v in YARN.items() if not k.startswith("mscale")},
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
    "qwen2_wide": case("Qwen2", hidden_size=258, num_attention_heads=3, num_key_value_heads=3),
    "qwen3_tied": case("Qwen3", tie_word_embeddings=True, head_dim=80, hidden_size=37),
    "qwen3_bias": case("Qwen3", attention_bias=True, head_dim=96),
    "v2_all_moe": case(
        "DeepseekV2", first_k_dense_replace=0, topk_method="greedy", num_experts_per_tok=12
    ),
    "v2_dense": case("DeepseekV2", first_k_dense_replace=3, topk_method="greedy"),
    "v2_product": case(
        "DeepseekV2", kv_lora_rank=512, qk_rope_head_dim=64, q_lora_rank=None, topk_method="greedy"
    ),
    "v3_plain_rope": case("DeepseekV3", rope_interleave=False, norm_topk_prob=False),
    "v3_lite": case("DeepseekV3", q_lora_rank=None, n_group=1, topk_group=1, attention_bias=True),
    "v3_product": case("DeepseekV3", kv_lora_rank=512, qk_rope_head_dim=64, rope_parameters=YARN),
    "v3_all_groups": case("DeepseekV3", n_group=3, topk_group=3, num_experts_per_tok=11),
}


def reference_model(hf_config: transformers.PretrainedConfig, seed: int = 0) -> Any:
    """Return a float32 transformers model with random weights, matrices five times the default.

    Biases, gains and the correction bias are random too: at their initial 0 and 1 a model that
    ignores them would pass.
    """
    torch.manual_seed(seed)
    model_class = getattr(transformers, type(hf_config).__name__.replace("Config", "ForCausalLM"))
    model = model_class(hf_config).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() >= 2:
                tensor.normal_(0.0, 5 * 0.02, generator=generator)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith((".bias", "correction_bias")):
                tensor.normal_(0.0, 0.2, generator=generator)
    return model


def our_model(
    reference: Any,
    *,
    edit_config: Callable[[dict[str, Any]], None] | None = None,
    edit_weights: Callable[[dict[str, Tensor]], None] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Model:
    """Return our model with the reference's weights; the edits plant mutants."""
    config = reference.config.to_dict()
    weights = {name: tensor.detach() for name, tensor in reference.state_dict().items()}
    if edit_config:
        edit_config(config)
    if edit_weights:
        edit_weights(weights)
    checkpoint = StateDict(config, weights)
    kind = family(config)
    where = torch.device(device)
    return kind.build(
        kind.parse_config(config),
        checkpoint.read,
        where,
        dtype,
        lambda shape, dt, name: torch.empty(shape, dtype=dt, device=where),
    )


@dataclass
class Step:
    """New tokens of one request in one batch."""

    request: int
    tokens: Sequence[int]


class Runner:
    """Feeds requests to one of our models through a paged cache, block by block."""

    def __init__(self, model: Model, num_reqs: int, max_len: int, block_size: int = 16) -> None:
        self.model = model
        self.block_size = block_size
        self.per_req = -(-max_len // block_size)
        total = num_reqs * self.per_req
        # blocks of a request are neither contiguous nor ordered
        order = torch.randperm(total, generator=torch.Generator().manual_seed(3))
        self.tables = order.view(num_reqs, self.per_req).to(torch.int32)
        self.cache = model.new_kv_cache(total, block_size, model.dtype)
        self.lengths = [0] * num_reqs

    def batch(self, steps: Sequence[Step]) -> Batch:
        """Return the flat batch of these steps and count their tokens as cached."""
        ids, positions, slots, cu, lens = [], [], [], [0], []
        for step in steps:
            start = self.lengths[step.request]
            for position, token in enumerate(step.tokens, start):
                block = int(self.tables[step.request, position // self.block_size])
                ids.append(token)
                positions.append(position)
                slots.append(block * self.block_size + position % self.block_size)
            self.lengths[step.request] += len(step.tokens)
            cu.append(len(ids))
            lens.append(self.lengths[step.request])
        device = self.model.device
        return Batch(
            token_ids=torch.tensor(ids, dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            block_tables=self.tables[[step.request for step in steps]].to(device),
            cu_seqlens_q=torch.tensor(cu, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
            max_seqlen_q=max(len(step.tokens) for step in steps),
            max_seq_len=max(lens),
            logits_indices=torch.arange(len(ids), device=device),
        )

    def run(self, steps: Sequence[Step]) -> list[Tensor]:
        """Return the logits of every new token, one tensor [num_tokens, vocab] per step."""
        batch = self.batch(steps)
        hidden = self.model.forward(batch, self.cache)
        logits = self.model.logits(hidden[batch.logits_indices])
        return list(logits.split([len(step.tokens) for step in steps]))


def prompts_for(vocab_size: int, lengths: Sequence[int], seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def reference_logits(reference: Any, prompt: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return reference(torch.tensor([list(prompt)])).logits[0]


def worst_error(actual: Tensor, expected: Tensor) -> float:
    """Return max |actual - expected| / max |expected|; infinite where NaN differs."""
    if not torch.isfinite(actual).all():
        return float("inf")
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())


__all__ = [
    "CASES",
    "SWEEP",
    "Case",
    "Runner",
    "Step",
    "case",
    "our_model",
    "prompts_for",
    "reference_logits",
    "reference_model",
    "replace",
    "worst_error",
]
