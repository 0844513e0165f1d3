"""DeepSeek-V2 (and Lite) and DeepSeek-V3 / R1: latent attention and a mixture of experts.

Sources: DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437; R1, arXiv:2501.12948.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.errors import CheckpointError
from fastgpt.layers.attention import Workspace
from fastgpt.layers.mla import MlaAttention
from fastgpt.layers.moe import GatedFeedForward, MixtureOfExperts
from fastgpt.layers.rotary import RopeConfig
from fastgpt.layers.weights import Allocate, Source, WeightLoader
from fastgpt.models.decoder import build_stack, head_roles, load_feed_forward
from fastgpt.models.model import KVLayout, Layer, Model
from fastgpt.models.spec import Family, ParamSpec, ValueHeads, field, size
from fastgpt.ops import ArrangedWeight

__all__ = ["DEEPSEEK_V2", "DEEPSEEK_V3", "DeepseekConfig", "build", "roles"]

LATENT_NORM_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says


@dataclass(frozen=True)
class DeepseekConfig:
    """Configuration of a DeepSeek model.

    `q_lora_rank` None: queries are not compressed (Lite). `num_experts` 0: every layer is dense.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    norm_eps: float
    max_position: int
    rope: RopeConfig
    rope_interleaved: bool
    tie_word_embeddings: bool
    attention_bias: bool
    num_experts: int
    num_shared_experts: int
    expert_size: int
    top_k: int
    first_dense_layers: int
    moe_layer_freq: int
    num_groups: int
    topk_groups: int
    scoring: str
    has_correction_bias: bool
    renormalize: bool
    routed_scaling: float

    def is_moe(self, layer: int) -> bool:
        """Tell whether a layer's feed-forward is a mixture of experts."""
        return (
            self.num_experts > 0
            and layer >= self.first_dense_layers
            and layer % self.moe_layer_freq == 0
        )

    @property
    def softmax_scale(self) -> float:
        """Factor of the attention scores, YaRN's mscale included."""
        return float((self.nope_dim + self.rope_dim) ** -0.5 * self.rope.softmax_mscale)


def _parse(config: dict[str, Any], name: str) -> DeepseekConfig:
    """Read config.json of DeepSeek-V2 or V3, as published or as transformers 5 writes it.

    Raises:
        CheckpointError: for a field that is missing, of a wrong type, or not supported.
    """
    activation = field(config, "hidden_act", str, "silu")
    if activation != "silu":
        raise CheckpointError(f"config.json: hidden_act is {activation!r}; only silu is supported")
    is_v3 = name == "deepseek_v3"
    rope_dim = field(config, "qk_rope_head_dim", int)
    if rope_dim < 2 or rope_dim % 2:
        raise CheckpointError(f"config.json: qk_rope_head_dim is {rope_dim}, expected even")
    q_lora_rank = field(config, "q_lora_rank", int, 0)
    return DeepseekConfig(
        vocab_size=size(config, "vocab_size"),
        hidden_size=size(config, "hidden_size"),
        intermediate_size=size(config, "intermediate_size"),
        num_layers=size(config, "num_hidden_layers"),
        num_heads=size(config, "num_attention_heads"),
        q_lora_rank=q_lora_rank or None,
        kv_lora_rank=size(config, "kv_lora_rank"),
        nope_dim=size(config, "qk_nope_head_dim"),
        rope_dim=rope_dim,
        v_dim=size(config, "v_head_dim"),
        norm_eps=field(config, "rms_norm_eps", float, 1e-6),
        max_position=size(config, "max_position_embeddings"),
        rope=RopeConfig.parse(config, rope_dim),
        rope_interleaved=field(config, "rope_interleave", bool, True),
        tie_word_embeddings=field(config, "tie_word_embeddings", bool, False),
        attention_bias=field(config, "attention_bias", bool, False),
        **_parse_experts(config, is_v3),
    )


def _parse_experts(config: dict[str, Any], is_v3: bool) -> dict[str, Any]:
    """Read the routing fields; V2's methods are greedy and group_limited_greedy, V3's noaux_tc."""
    num_experts = field(config, "n_routed_experts", int, 0)
    method = field(config, "topk_method", str, "noaux_tc" if is_v3 else "greedy")
    scoring = field(config, "scoring_func", str, "sigmoid" if is_v3 else "softmax")
    known = [("noaux_tc", "sigmoid")]
    if not is_v3:
        known = [("greedy", "softmax"), ("group_limited_greedy", "softmax")]
    if (method, scoring) not in known:
        raise CheckpointError(
            f"config.json: topk_method {method!r} with scoring_func {scoring!r} is not supported "
            f"here; known are {known}"
        )
    renormalize = field(config, "norm_topk_prob", bool, is_v3)
    if renormalize and not is_v3:
        raise CheckpointError(
            "config.json: norm_topk_prob is true; published implementations of DeepSeek-V2 "
            "disagree about it, so it is not supported"
        )
    grouped = method != "greedy"
    num_groups = field(config, "n_group", int, 1) if grouped else 1
    topk_groups = field(config, "topk_group", int, 1) if grouped else 1
    top_k = field(config, "num_experts_per_tok", int, 0)
    if num_experts and not (
        1 <= topk_groups <= num_groups
        and num_experts % num_groups == 0
        and 1 <= top_k <= num_experts // num_groups * topk_groups
    ):
        raise CheckpointError(
            f"config.json: {top_k} experts per token from {topk_groups} of {num_groups} groups "
            f"of {num_experts} experts is not possible"
        )
    return {
        "num_experts": num_experts,
        "num_shared_experts": field(config, "n_shared_experts", int, 0),
        "expert_size": field(config, "moe_intermediate_size", int, 0),
        "top_k": top_k,
        "first_dense_layers": field(config, "first_k_dense_replace", int, 0),
        "moe_layer_freq": max(1, field(config, "moe_layer_freq", int, 1)),
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "scoring": scoring,
        "has_correction_bias": is_v3,
        "renormalize": renormalize,
        "routed_scaling": field(config, "routed_scaling_factor", float, 1.0),
    }


def roles(config: DeepseekConfig) -> list[ParamSpec]:
    """Return every parameter, layer by layer."""
    hidden = config.hidden_size
    specs = [ParamSpec("model.embed_tokens.weight", (config.vocab_size, hidden), "io_layers")]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        attention = _attention_roles(config, f"{layer}.self_attn")
        feed_forward = _feed_forward_roles(config, i, f"{layer}.mlp")
        specs.append(
            ParamSpec(
                f"{layer}.input_layernorm.weight",
                (hidden,),
                "norm_params",
                _reading(attention, ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")),
            )
        )
        specs += attention
        specs.append(
            ParamSpec(
                f"{layer}.post_attention_layernorm.weight",
                (hidden,),
                "norm_params",
                _reading(feed_forward, ("gate", "gate_proj", "up_proj")),
            )
        )
        specs += feed_forward
    return specs + head_roles(config.vocab_size, hidden, config.tie_word_embeddings)


def _reading(specs: list[ParamSpec], modules: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the weights of those modules."""
    endings = tuple(f".{module}.weight" for module in modules)
    return tuple(spec.name for spec in specs if spec.name.endswith(endings))


def _attention_roles(config: DeepseekConfig, name: str) -> list[ParamSpec]:
    hidden, heads = config.hidden_size, config.num_heads
    q_rows = heads * (config.nope_dim + config.rope_dim)
    latent_rows = config.kv_lora_rank + config.rope_dim
    specs = []

    def weight(module: str, rows: int, cols: int, *, biased: bool = False) -> None:
        specs.append(ParamSpec(f"{name}.{module}.weight", (rows, cols), "attention_weights"))
        if biased:
            specs.append(ParamSpec(f"{name}.{module}.bias", (rows,), "kept"))

    if config.q_lora_rank is None:
        weight("q_proj", q_rows, hidden)
    else:
        weight("q_a_proj", config.q_lora_rank, hidden, biased=config.attention_bias)
        specs.append(ParamSpec(f"{name}.q_a_layernorm.weight", (config.q_lora_rank,), "kept"))
        weight("q_b_proj", q_rows, config.q_lora_rank)
    weight("kv_a_proj_with_mqa", latent_rows, hidden, biased=config.attention_bias)
    specs.append(ParamSpec(f"{name}.kv_a_layernorm.weight", (config.kv_lora_rank,), "kept"))
    weight("kv_b_proj", heads * (config.nope_dim + config.v_dim), config.kv_lora_rank)
    weight("o_proj", hidden, heads * config.v_dim, biased=config.attention_bias)
    return specs


def _feed_forward_roles(config: DeepseekConfig, layer: int, name: str) -> list[ParamSpec]:
    hidden = config.hidden_size
    specs = []

    def gated(module: str, width: int) -> None:
        shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden)}
        for part, shape in {**shapes, "down_proj": (hidden, width)}.items():
            specs.append(ParamSpec(f"{module}.{part}.weight", shape, "residual_connections"))

    if not config.is_moe(layer):
        gated(name, config.intermediate_size)
        return specs
    specs.append(ParamSpec(f"{name}.gate.weight", (config.num_experts, hidden), "kept"))
    if config.has_correction_bias:
        specs.append(
            ParamSpec(f"{name}.gate.e_score_correction_bias", (config.num_experts,), "kept")
        )
    for e in range(config.num_experts):
        gated(f"{name}.experts.{e}", config.expert_size)
    if config.num_shared_experts:
        gated(f"{name}.shared_experts", config.expert_size * config.num_shared_experts)
    return specs


def is_mtp(config: DeepseekConfig, name: str) -> bool:
    """Tell whether a weight is of a multi-token prediction layer: one past the last decoder layer.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.2.
    """
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= config.num_layers


def load_layer(
    config: DeepseekConfig, i: int, loader: WeightLoader, cos_sin: Tensor, workspace: Workspace
) -> Layer:
    """Return decoder layer i; see `fastgpt.models.spec.LoadLayer`."""
    layer = f"model.layers.{i}"
    hidden = config.hidden_size
    attention = _attention(loader, config, f"{layer}.self_attn", cos_sin, workspace)
    post_norm = loader.norm(f"{layer}.post_attention_layernorm.weight", hidden, config.norm_eps)
    feed_forward: GatedFeedForward | MixtureOfExperts
    if config.is_moe(i):
        feed_forward = _experts(loader, config, f"{layer}.mlp")
    else:
        feed_forward = load_feed_forward(loader, f"{layer}.mlp", hidden, config.intermediate_size)
    return Layer(attention, post_norm, feed_forward)


def kv_layout(config: DeepseekConfig) -> KVLayout:
    """Return the shape of the cache."""
    width = config.kv_lora_rank + config.rope_dim
    return KVLayout("mla", config.num_layers, 1, width, config.rope_dim)


def value_heads(config: DeepseekConfig) -> ValueHeads:
    """Return how values reach the output projection."""
    heads = config.num_heads
    return ValueHeads("kv_b_proj", heads, heads, config.v_dim, config.nope_dim)


def build(
    config: DeepseekConfig,
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    allocate: Allocate,
    max_position: int | None = None,
) -> Model:
    """Return the model; see `fastgpt.models.spec.Build`."""
    return build_stack(
        config, source, device, dtype, allocate, max_position,
        load_layer=load_layer, kv_layout=kv_layout(config), head_dim_v=config.kv_lora_rank,
    )  # fmt: skip


def _attention(
    loader: WeightLoader,
    config: DeepseekConfig,
    name: str,
    cos_sin: Tensor,
    workspace: Workspace,
) -> MlaAttention:
    hidden = config.hidden_size
    latent, heads = config.kv_lora_rank, config.num_heads
    q_rows = heads * (config.nope_dim + config.rope_dim)
    biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj") if config.attention_bias else ()
    biases = tuple(f"{name}.{module}" for module in biased)
    kv_a = (f"{name}.kv_a_proj_with_mqa", latent + config.rope_dim)
    q_norm = q_up = None
    if config.q_lora_rank is None:
        query = (f"{name}.q_proj", q_rows)
    else:
        query = (f"{name}.q_a_proj", config.q_lora_rank)
        q_norm = loader.norm(f"{name}.q_a_layernorm.weight", config.q_lora_rank, LATENT_NORM_EPS)
        q_up = loader.linear(f"{name}.q_b_proj", [(f"{name}.q_b_proj", q_rows)], config.q_lora_rank)
    key_up, value_up = _split_kv_b(loader, config, name)
    return MlaAttention(
        down=loader.linear(f"{name}.qkv_a_proj", [query, kv_a], hidden, biases=biases),
        q_norm=q_norm,
        q_up=q_up,
        kv_norm=loader.norm(f"{name}.kv_a_layernorm.weight", latent, LATENT_NORM_EPS),
        key_up=key_up,
        value_up=value_up,
        output=loader.linear(
            f"{name}.o_proj", [(f"{name}.o_proj", hidden)], heads * config.v_dim, biases=biases
        ),
        num_heads=heads,
        nope_dim=config.nope_dim,
        rope_dim=config.rope_dim,
        latent_dim=latent,
        v_dim=config.v_dim,
        scale=config.softmax_scale,
        cos_sin=cos_sin,
        interleaved=config.rope_interleaved,
        workspace=workspace,
    )


def _split_kv_b(
    loader: WeightLoader, config: DeepseekConfig, name: str
) -> tuple[Tensor | ArrangedWeight, Tensor | ArrangedWeight]:
    """Return kv_b_proj as the two absorbed matrices; see `MlaAttention`."""
    heads, latent = config.num_heads, config.kv_lora_rank
    rows = heads * (config.nope_dim + config.v_dim)
    stored = loader.read(f"{name}.kv_b_proj.weight", (rows, latent))
    dense = stored if isinstance(stored, Tensor) else stored.dequantize(torch.float32)
    per_head = dense.view(heads, config.nope_dim + config.v_dim, latent)
    per_head = per_head.to(loader.dense_dtype(stored))
    key_up = loader.stack(f"{name}.key_up", per_head[:, : config.nope_dim].transpose(1, 2))
    return key_up, loader.stack(f"{name}.value_up", per_head[:, config.nope_dim :])


def _experts(loader: WeightLoader, config: DeepseekConfig, name: str) -> MixtureOfExperts:
    hidden, width, count = config.hidden_size, config.expert_size, config.num_experts
    router = loader.router(f"{name}.gate", count, hidden)
    correction_bias = None
    if config.has_correction_bias:
        bias_name = f"{name}.gate.e_score_correction_bias"
        correction_bias = loader.dense(bias_name, (count,), torch.float32)
    experts = [f"{name}.experts.{e}" for e in range(count)]
    gate_up = loader.experts(
        f"{name}.experts.gate_up_proj",
        [(f"{e}.gate_proj", f"{e}.up_proj") for e in experts],
        width,
        hidden,
    )
    down = loader.experts(
        f"{name}.experts.down_proj", [(f"{e}.down_proj",) for e in experts], hidden, width
    )
    shared = None
    if config.num_shared_experts:
        shared = load_feed_forward(
            loader, f"{name}.shared_experts", hidden, width * config.num_shared_experts
        )
    return MixtureOfExperts(
        router=router,
        correction_bias=correction_bias,
        gate_up=gate_up,
        down=down,
        shared=shared,
        top_k=config.top_k,
        num_groups=config.num_groups,
        topk_groups=config.topk_groups,
        scoring=config.scoring,
        renormalize=config.renormalize,
        scaling=config.routed_scaling,
    )


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    ("DeepseekV2ForCausalLM",),
    lambda config: _parse(config, "deepseek_v2"),
    roles,
    build,
    is_mtp,
    load_layer,
    kv_layout,
    value_heads,
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    ("DeepseekV3ForCausalLM",),
    lambda config: _parse(config, "deepseek_v3"),
    roles,
    build,
    is_mtp,
    load_layer,
    kv_layout,
    value_heads,
)
