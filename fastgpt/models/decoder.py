"""Llama, Qwen2 and Qwen3: dense decoders with grouped-query attention, told apart by a few fields.

Sources: Llama 3, arXiv:2407.21783; Qwen2, arXiv:2407.10671; Qwen3, arXiv:2505.09388.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastgpt.errors import CheckpointError
from fastgpt.layers.attention import GqaAttention, Workspace
from fastgpt.layers.linear import Projection
from fastgpt.layers.moe import GatedFeedForward
from fastgpt.layers.rotary import RopeConfig, cos_sin_table
from fastgpt.layers.weights import Allocate, Source, WeightLoader
from fastgpt.models.model import Block, KVLayout, Layer, Model
from fastgpt.models.spec import Family, LoadLayer, ParamSpec, ValueHeads, field, size

__all__ = [
    "LLAMA",
    "QWEN2",
    "QWEN3",
    "DecoderConfig",
    "build",
    "build_stack",
    "head_roles",
    "load_feed_forward",
    "load_head",
    "roles",
]


@dataclass(frozen=True)
class DecoderConfig:
    """Configuration of a dense decoder; the last five fields are what the families differ in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool


def _parse(config: dict[str, Any], name: str) -> DecoderConfig:
    """Read config.json of one of the three families.

    Raises:
        CheckpointError: for a field that is missing, of a wrong type, or not supported.
    """
    hidden = size(config, "hidden_size")
    heads = size(config, "num_attention_heads")
    kv_heads = field(config, "num_key_value_heads", int, heads)
    if kv_heads < 1 or heads % kv_heads:
        raise CheckpointError(
            f"config.json: {heads} attention heads do not share {kv_heads} key-value heads evenly"
        )
    head_dim = field(config, "head_dim", int, 128 if name == "qwen3" else hidden // heads)
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(f"config.json: head_dim is {head_dim}, expected an even number")
    activation = field(config, "hidden_act", str, "silu")
    if activation != "silu":
        raise CheckpointError(f"config.json: hidden_act is {activation!r}; only silu is supported")
    num_layers = size(config, "num_hidden_layers")
    _refuse_sliding_window(config, num_layers)
    bias = field(config, "attention_bias", bool, False)
    return DecoderConfig(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=field(config, "rms_norm_eps", float, 1e-6),
        max_position=size(config, "max_position_embeddings"),
        rope=RopeConfig.parse(config, head_dim),
        tie_word_embeddings=field(config, "tie_word_embeddings", bool, False),
        qkv_bias=name == "qwen2" or bias,
        output_bias=name != "qwen2" and bias,
        mlp_bias=name == "llama" and field(config, "mlp_bias", bool, False),
        qk_norm=name == "qwen3",
    )


def _refuse_sliding_window(config: dict[str, Any], num_layers: int) -> None:
    """Raise if some layer attends to a window only: the answers would be silently different."""
    in_use = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    first = field(config, "max_window_layers", int, 28) if in_use else num_layers
    types = config.get("layer_types") or []
    if (in_use and first < num_layers) or "sliding_attention" in types:
        raise CheckpointError("config.json: sliding-window attention is not supported")


def roles(config: DecoderConfig) -> list[ParamSpec]:
    """Return every parameter, layer by layer."""
    hidden, width = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    specs = [ParamSpec("model.embed_tokens.weight", (config.vocab_size, hidden), "io_layers")]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        qkv = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        specs.append(
            ParamSpec(
                f"{layer}.input_layernorm.weight",
                (hidden,),
                "norm_params",
                tuple(f"{attention}.{name}.weight" for name in qkv),
            )
        )
        for name, rows in qkv.items():
            specs.append(
                ParamSpec(f"{attention}.{name}.weight", (rows, hidden), "attention_weights")
            )
            if config.qkv_bias:
                specs.append(ParamSpec(f"{attention}.{name}.bias", (rows,), "kept"))
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                specs.append(ParamSpec(f"{attention}.{name}.weight", (config.head_dim,), "kept"))
        specs.append(ParamSpec(f"{attention}.o_proj.weight", (hidden, q_rows), "attention_weights"))
        if config.output_bias:
            specs.append(ParamSpec(f"{attention}.o_proj.bias", (hidden,), "kept"))
        specs.append(
            ParamSpec(
                f"{layer}.post_attention_layernorm.weight",
                (hidden,),
                "norm_params",
                (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
            )
        )
        for name, rows, cols in (
            ("gate_proj", width, hidden),
            ("up_proj", width, hidden),
            ("down_proj", hidden, width),
        ):
            specs.append(ParamSpec(f"{mlp}.{name}.weight", (rows, cols), "residual_connections"))
            if config.mlp_bias:
                specs.append(ParamSpec(f"{mlp}.{name}.bias", (rows,), "kept"))
    return specs + head_roles(config.vocab_size, hidden, config.tie_word_embeddings)


def head_roles(vocab_size: int, hidden: int, tied: bool) -> list[ParamSpec]:
    """Return the final norm and the output matrix.

    A tied output matrix is the embedding, which cannot absorb what the norm's gain loses.
    """
    if tied:
        return [ParamSpec("model.norm.weight", (hidden,), "norm_params")]
    return [
        ParamSpec("model.norm.weight", (hidden,), "norm_params", ("lm_head.weight",)),
        ParamSpec("lm_head.weight", (vocab_size, hidden), "io_layers"),
    ]


def load_head(
    loader: WeightLoader, embedding: torch.Tensor, vocab_size: int, hidden: int, tied: bool
) -> Projection:
    """Return the output projection; a tied one is made from the embedding."""
    if tied:
        return loader.tied_head(embedding)
    return loader.linear("lm_head", [("lm_head", vocab_size)], hidden)


def load_layer(
    config: DecoderConfig, i: int, loader: WeightLoader, cos_sin: torch.Tensor, workspace: Workspace
) -> Layer:
    """Return decoder layer i; see `fastgpt.models.spec.LoadLayer`."""
    layer = f"model.layers.{i}"
    hidden = config.hidden_size
    attention = _attention(loader, config, f"{layer}.self_attn", cos_sin, workspace)
    post_norm = loader.norm(f"{layer}.post_attention_layernorm.weight", hidden, config.norm_eps)
    feed_forward = load_feed_forward(
        loader, f"{layer}.mlp", hidden, config.intermediate_size, bias=config.mlp_bias
    )
    return Layer(attention, post_norm, feed_forward)


def kv_layout(config: DecoderConfig) -> KVLayout:
    """Return the shape of the cache."""
    return KVLayout("gqa", config.num_layers, config.num_kv_heads, config.head_dim)


def value_heads(config: DecoderConfig) -> ValueHeads:
    """Return how values reach the output projection."""
    return ValueHeads("v_proj", config.num_heads, config.num_kv_heads, config.head_dim, 0)


class StackConfig(Protocol):
    """What `build_stack` asks of a family's configuration."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def max_position(self) -> int: ...
    @property
    def rope(self) -> RopeConfig: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


def build_stack(
    config: StackConfig,
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    allocate: Allocate,
    max_position: int | None,
    *,
    load_layer: LoadLayer,
    kv_layout: KVLayout,
    head_dim_v: int,
) -> Model:
    """Return a model of pre-normalized layers between an embedding and a head; see `spec.Build`.

    Args:
        load_layer: the family's.
        kv_layout: shape of the cache.
        head_dim_v: columns of a head's output in the attention kernel.
    """
    loader = WeightLoader(source, device, dtype, allocate)
    hidden, eps = config.hidden_size, config.norm_eps
    limit = min(max_position or config.max_position, config.max_position)
    cos_sin = loader.place_table("rotary.cos_sin", cos_sin_table(config.rope, limit))
    embedding = loader.dense("model.embed_tokens.weight", (config.vocab_size, hidden))
    workspace = Workspace()
    first_norm = loader.norm("model.layers.0.input_layernorm.weight", hidden, eps)
    blocks = []
    for i in range(config.num_layers):
        layer = load_layer(config, i, loader, cos_sin, workspace)
        following = f"model.layers.{i + 1}.input_layernorm"
        if i + 1 == config.num_layers:
            following = "model.norm"
        next_norm = loader.norm(f"{following}.weight", hidden, eps)
        blocks.append(Block(layer.attention, layer.post_norm, layer.feed_forward, next_norm))
    head = load_head(loader, embedding, config.vocab_size, hidden, config.tie_word_embeddings)
    return Model(
        config=config,
        kv_layout=kv_layout,
        embedding=embedding,
        first_norm=first_norm,
        blocks=blocks,
        head=head,
        num_heads=config.num_heads,
        head_dim_v=head_dim_v,
        workspace=workspace,
        device=device,
        dtype=dtype,
        max_position=limit,
        allocate=allocate,
    )


def build(
    config: DecoderConfig,
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    allocate: Allocate,
    max_position: int | None = None,
) -> Model:
    """Return the model; see `fastgpt.models.spec.Build`."""
    return build_stack(
        config, source, device, dtype, allocate, max_position,
        load_layer=load_layer, kv_layout=kv_layout(config), head_dim_v=config.head_dim,
    )  # fmt: skip


def _attention(
    loader: WeightLoader,
    config: DecoderConfig,
    name: str,
    cos_sin: torch.Tensor,
    workspace: Workspace,
) -> GqaAttention:
    head_dim, eps = config.head_dim, config.norm_eps
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    parts = [(f"{name}.q_proj", q_rows), (f"{name}.k_proj", kv_rows), (f"{name}.v_proj", kv_rows)]
    qkv = loader.linear(
        f"{name}.qkv_proj",
        parts,
        config.hidden_size,
        biases=[module for module, _ in parts] if config.qkv_bias else (),
    )
    output = loader.linear(
        f"{name}.o_proj",
        [(f"{name}.o_proj", config.hidden_size)],
        q_rows,
        biases=[f"{name}.o_proj"] if config.output_bias else (),
    )
    q_norm = k_norm = None
    if config.qk_norm:
        q_norm = loader.norm(f"{name}.q_norm.weight", head_dim, eps)
        k_norm = loader.norm(f"{name}.k_norm.weight", head_dim, eps)
    return GqaAttention(
        qkv=qkv,
        output=output,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=head_dim,
        cos_sin=cos_sin,
        q_norm=q_norm,
        k_norm=k_norm,
        workspace=workspace,
    )


def load_feed_forward(
    loader: WeightLoader, name: str, hidden: int, width: int, *, bias: bool = False
) -> GatedFeedForward:
    """Return the gated feed-forward layer whose weights start with `name`."""
    parts = [(f"{name}.gate_proj", width), (f"{name}.up_proj", width)]
    last = [(f"{name}.down_proj", hidden)]
    biases = [module for module, _ in parts + last] if bias else ()
    gate_up = loader.linear(f"{name}.gate_up_proj", parts, hidden, biases=biases)
    down = loader.linear(f"{name}.down_proj", last, width, biases=biases)
    return GatedFeedForward(gate_up, down)


def _no_mtp(config: DecoderConfig, name: str) -> bool:
    """Dense decoders have no multi-token prediction weights."""
    return False


def _family(name: str, architecture: str) -> Family:
    return Family(
        name,
        (architecture,),
        lambda config: _parse(config, name),
        roles,
        build,
        _no_mtp,
        load_layer,
        kv_layout,
        value_heads,
    )


LLAMA = _family("llama", "LlamaForCausalLM")
QWEN2 = _family("qwen2", "Qwen2ForCausalLM")
QWEN3 = _family("qwen3", "Qwen3ForCausalLM")
