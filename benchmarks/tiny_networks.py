"""The two architectures that `train_tiny.py` trains, in plain torch, and their Hugging Face form.

`TinyCausalLM` reads a config.json mapping and covers DeepSeek-V3 (MLA, grouped sigmoid routing with
a correction bias, a shared expert) and Qwen2 (biased q, k, v, grouped queries, tied head).
Parameter names are the published ones, but the routed experts are stacked: so few and so small,
they run as one wide matrix product whose unchosen columns are multiplied by zero, which the GPU
does faster than it can gather tokens by expert. `export_state` splits them again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CONFIGS", "KVCache", "TinyCausalLM", "export_state", "greedy_decode", "import_state"]

VOCAB_SIZE = 384
_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
# The fields of the published config.json files, with the sizes of a toy.
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-r1": {
        **_COMMON,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "intermediate_size": 512,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 128,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 4,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 1024,
            "type": "yarn",
        },
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "v_head_dim": 64,
    },
    "tiny-qwen": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "intermediate_size": 768,
        "max_window_layers": 4,
        "num_key_value_heads": 2,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
}


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class KVCache:
    """Expanded keys and values of every layer for `batch` rows of at most `length` tokens."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, length: int) -> None:
        """Store k and v [batch, heads, tokens, d] at positions [batch, tokens] of one layer."""
        if len(self.layers) == layer:
            shape = (k.shape[0], k.shape[1], length)
            self.layers.append((k.new_zeros(*shape, k.shape[3]), v.new_zeros(*shape, v.shape[3])))
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        for cached, new in zip(self.layers[layer], (k, v), strict=True):
            cached[rows, :, positions] = new.transpose(1, 2)


def rope_frequencies(config: dict[str, Any], dim: int) -> Tensor:
    """Return each pair's rotation per position, [dim / 2] fp32; YaRN as in arXiv:2309.00071."""
    base, scaling = config["rope_theta"], config.get("rope_scaling")
    plain = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return plain
    context = scaling["original_max_position_embeddings"]

    def pair_of(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair_of(scaling["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / scaling["factor"] * ramp + plain * (1 - ramp)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate x [batch, heads, tokens, dim]; the result's halves are the pairs' two coordinates."""
    half, x32 = x.shape[-1] // 2, x.float()
    a, b = (x32[..., 0::2], x32[..., 1::2]) if interleaved else x32.split(half, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


_Cached = tuple[KVCache, Tensor, int, int]  # cache, positions, allocated length, extent in use


class Attention(nn.Module, ABC):
    """Causal attention; subclasses project to q, k, v of [batch, heads, tokens, d]."""

    scale: float
    o_proj: nn.Linear

    @abstractmethod
    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, rotated."""

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], layer: int, cached: _Cached | None
    ) -> Tensor:
        q, k, v = self.project(x, *rope)
        if cached is None:
            value_dim = v.shape[-1]  # the fused kernels want values as wide as keys
            v = functional.pad(v, (0, k.shape[-1] - value_dim))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            y = y[..., :value_dim]
        else:
            cache, positions, length, extent = cached
            cache.write(layer, k, v, positions, length)
            k, v = (t[:, :, :extent] for t in cache.layers[layer])
            scores = (q @ k.transpose(2, 3)).float() * self.scale
            visible = torch.arange(extent, device=x.device) <= positions[:, None, :, None]
            y = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype) @ v
        return self.o_proj(y.transpose(1, 2).flatten(2))


class QwenAttention(Attention):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.heads, self.kv_heads = (
            c["hidden_size"],
            c["num_attention_heads"],
            c["num_key_value_heads"],
        )
        self.dim = hidden // self.heads
        self.scale = self.dim**-0.5
        self.q_proj = nn.Linear(hidden, self.heads * self.dim)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.dim)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.dim)
        self.o_proj = nn.Linear(self.heads * self.dim, hidden, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            proj(x).unflatten(2, (-1, self.dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        repeats = self.heads // self.kv_heads
        k = rotate(k, cos, sin, False).repeat_interleave(repeats, 1)
        return rotate(q, cos, sin, False), k, v.repeat_interleave(repeats, 1)


class MLAttention(Attention):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.heads, eps = c["hidden_size"], c["num_attention_heads"], c["rms_norm_eps"]
        self.nope, self.pe, self.v = (
            c["qk_nope_head_dim"],
            c["qk_rope_head_dim"],
            c["v_head_dim"],
        )
        self.rank = c["kv_lora_rank"]
        self.q_a_proj = nn.Linear(hidden, c["q_lora_rank"], bias=False)
        self.q_a_layernorm = RMSNorm(c["q_lora_rank"], eps)
        self.q_b_proj = nn.Linear(c["q_lora_rank"], self.heads * (self.nope + self.pe), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.pe, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, eps)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.v), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v, hidden, bias=False)
        yarn = c["rope_scaling"]
        mscale = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1.0
        self.scale = (self.nope + self.pe) ** -0.5 * mscale * mscale

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_pe = (
            q.unflatten(2, (self.heads, -1)).transpose(1, 2).split((self.nope, self.pe), -1)
        )
        kv_latent, k_pe = self.kv_a_proj_with_mqa(x).split((self.rank, self.pe), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(kv_latent))
        k_nope, v = kv.unflatten(2, (self.heads, -1)).transpose(1, 2).split((self.nope, self.v), -1)
        k_pe = rotate(k_pe[:, None], cos, sin, True).expand(-1, self.heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_pe, cos, sin, True)), -1)
        return q, torch.cat((k_nope, k_pe), -1), v


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """DeepSeek-V3's grouped top-k: the correction bias chooses, the sigmoid scores weigh."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.empty(c["n_routed_experts"], c["hidden_size"]))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(c["n_routed_experts"]))

    def forward(self, x: Tensor) -> Tensor:
        """Return each token's weight of each expert, [..., num_experts] fp32, zero if unchosen."""
        groups, experts = self.c["n_group"], self.c["n_routed_experts"]
        with torch.autocast(x.device.type, enabled=False):
            scores = functional.linear(x.float(), self.weight.float()).sigmoid()
        choice = (scores.detach() + self.e_score_correction_bias).unflatten(-1, (groups, -1))
        best = choice.topk(2, -1)[0].sum(-1).topk(self.c["topk_group"], -1)[1]
        kept = torch.zeros_like(choice[..., 0]).scatter(-1, best, 1.0)
        choice = choice.masked_fill(kept[..., None] == 0, -torch.inf).flatten(-2)
        chosen = choice.topk(self.c["num_experts_per_tok"], -1)[1]
        weights = scores * torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        assert weights.shape[-1] == experts
        return weights * self.c["routed_scaling_factor"]


class MoE(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        experts, inner, hidden = (
            c["n_routed_experts"],
            c["moe_intermediate_size"],
            c["hidden_size"],
        )
        self.inner = inner
        self.gate = Router(c)
        # Row e * inner + i (column, for down) belongs to expert e.
        self.experts = MLP(hidden, experts * inner)
        self.shared_experts = MLP(hidden, inner * c["n_shared_experts"])
        self.load: Tensor | None = None  # chosen-expert mask of the last forward pass

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x)
        self.load = weights.detach() > 0
        e = self.experts
        y = functional.silu(e.gate_proj(x)) * e.up_proj(x)
        y = y * weights.to(y.dtype).repeat_interleave(self.inner, -1)
        return e.down_proj(y) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any], index: int) -> None:
        super().__init__()
        hidden, eps = c["hidden_size"], c["rms_norm_eps"]
        is_deepseek = c["model_type"] == "deepseek_v3"
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn: Attention = MLAttention(c) if is_deepseek else QwenAttention(c)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        is_moe = is_deepseek and index >= c["first_k_dense_replace"]
        self.mlp: nn.Module = MoE(c) if is_moe else MLP(hidden, c["intermediate_size"])

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], index: int, cached: _Cached | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, index, cached)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyCausalLM(nn.Module):
    """A causal language model of one of CONFIGS; parameters start in fp32."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab, hidden)
        self.model.layers = nn.ModuleList(
            Layer(config, i) for i in range(config["num_hidden_layers"])
        )
        self.model.norm = RMSNorm(hidden, config["rms_norm_eps"])
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        is_mla = config["model_type"] == "deepseek_v3"
        rope_dim = config["qk_rope_head_dim"] if is_mla else hidden // config["num_attention_heads"]
        angles = torch.outer(
            torch.arange(config["max_position_embeddings"]).float(),
            rope_frequencies(config, rope_dim),
        )
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        self._initialize()
        if config["tie_word_embeddings"]:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _initialize(self) -> None:
        """Normal weights of variance 1 / fan_in; residual outputs smaller by sqrt(2 layers)."""
        depth = math.sqrt(2 * self.config["num_hidden_layers"])
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                fan_in = parameter.shape[1]
                if "experts.down_proj" in name and "shared" not in name:
                    fan_in = self.config["moe_intermediate_size"]
                std = fan_in**-0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= depth
                elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                    std = 0.1 if "embed" in name else 0.02
                nn.init.normal_(parameter, std=std)

    def moe_layers(self) -> list[MoE]:
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MoE)]

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        length: int = 0,
        extent: int = 0,
    ) -> Tensor:
        """Return final hidden states [batch, tokens, hidden]; ids [batch, tokens].

        With a cache, row b's token t sits at positions[b, t], and attends to cache entries up to
        there; `length` entries are allocated and the first `extent` of them are read.
        """
        x = self.model.embed_tokens(ids)
        at = slice(0, ids.shape[1]) if positions is None else positions
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rope = (self.rope_cos[at], self.rope_sin[at])
        if positions is not None:
            rope = (rope[0][:, None], rope[1][:, None])
        cached = None if cache is None or positions is None else (cache, positions, length, extent)
        for index, layer in enumerate(self.model.layers):
            # A constant index without a cache: torch.compile then shares one graph among layers.
            x = layer(x, rope, index if cached else 0, cached)
        return self.model.norm(x)


def cast_parameters(model: TinyCausalLM, dtype: torch.dtype) -> TinyCausalLM:
    """Round the model's parameters in place; rotary tables and correction biases stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def export_state(model: TinyCausalLM, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return the weights under their published names, one tensor per expert, on the CPU.

    The correction bias stays fp32, as in DeepSeek's checkpoints; a tied head is left out.
    """
    state: dict[str, Tensor] = {}
    experts = model.config.get("n_routed_experts", 0)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config["tie_word_embeddings"]:
            continue
        keep = name.endswith("e_score_correction_bias")
        tensor = tensor.detach().to("cpu", torch.float32 if keep else dtype)
        if ".mlp.experts." in name:
            stem, last = name.split(".experts.")
            for e, part in enumerate(tensor.chunk(experts, 1 if "down_proj" in last else 0)):
                state[f"{stem}.experts.{e}.{last}"] = part.contiguous()
        else:
            state[name] = tensor.contiguous()
    return state


def import_state(model: TinyCausalLM, state: dict[str, Tensor]) -> None:
    """Load what `export_state` returned into the model, in the model's own dtype."""
    merged = {name: t for name, t in state.items() if ".mlp.experts." not in name}
    experts = range(model.config.get("n_routed_experts", 0))
    for name in model.state_dict():
        if ".mlp.experts." in name:
            stem, last = name.split(".experts.")
            parts = [state[f"{stem}.experts.{e}.{last}"] for e in experts]
            merged[name] = torch.cat(parts, 1 if "down_proj" in last else 0)
    if model.config["tie_word_embeddings"]:
        merged["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(merged)


@torch.inference_mode()
def greedy_decode(
    model: TinyCausalLM, prompts: list[list[int]], *, max_new_tokens: int, eos_id: int
) -> list[list[int]]:
    """Return each prompt's greedy continuation, all prompts decoded together with a KV cache.

    Rows are padded on the right; a row's next token overwrites the padding at its own position.
    Stops when every row has written the end token, which is not returned.
    """
    device = model.rope_cos.device
    lens = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(lens.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    ids = ids.to(device)
    cache, length = KVCache(), longest + max_new_tokens
    positions = torch.arange(longest, device=device).expand(len(prompts), -1)
    hidden = model(ids, positions, cache, length, longest)
    hidden = hidden[torch.arange(len(prompts), device=device), lens - 1]
    written, done = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token = model.lm_head(hidden).argmax(-1)
        token = torch.where(done, eos_id, token)
        written.append(token)
        done |= token == eos_id
        if step % 16 == 15 and bool(done.all()):
            break
        hidden = model(token[:, None], (lens + step)[:, None], cache, length, longest + step + 1)
        hidden = hidden[:, 0]
    rows = torch.stack(written, 1).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]
