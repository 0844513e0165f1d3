"""What a family says about its parameters, and how it presents itself to the registry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fastgpt.errors import CheckpointError
from fastgpt.layers.attention import Workspace
from fastgpt.layers.rotary import RopeConfig
from fastgpt.layers.weights import Allocate, Source, WeightLoader

if TYPE_CHECKING:
    from fastgpt.models.model import KVLayout, Layer, Model

__all__ = ["ROLES", "Family", "ModelConfig", "ParamSpec", "ValueHeads", "field", "size"]

ROLES = ("attention_weights", "residual_connections", "norm_params", "io_layers", "kept")


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter of a model.

    Attributes:
        name: Hugging Face name.
        shape: of the unquantized tensor.
        role: one of ROLES; it decides the quantized format.
        consumers: for a norm gain, the weights whose input it multiplies: what quantization loses
            of the gain can be folded into their input columns. Empty where it cannot.
        optional: the checkpoint may lack it.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    consumers: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True, slots=True)
class ValueHeads:
    """How attention's values reach the output projection: linearly, head by head.

    Attributes:
        module: the projection of every layer's attention whose rows are values.
        num_heads: heads of the output projection's input, each head_dim columns wide.
        num_kv_heads: heads of `module`; num_heads // num_kv_heads output heads read each.
        head_dim: values of one head.
        first_row: rows of one head of `module` before its values.
    """

    module: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    first_row: int


class ModelConfig(Protocol):
    """The part of every family's configuration that the rest of the house reads."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def max_position(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def rope(self) -> RopeConfig: ...


class Build(Protocol):
    """Builds a model whose weights come from `source` and live in memory from `allocate`.

    max_position bounds the positions the model will see (the rotary table's length); by default
    the checkpoint's own limit.
    """

    def __call__(
        self,
        config: Any,
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
        allocate: Allocate,
        max_position: int | None = None,
    ) -> "Model": ...


class LoadLayer(Protocol):
    """Loads one decoder layer: its attention, the norm behind it, its feed-forward."""

    def __call__(
        self,
        config: Any,
        i: int,
        loader: WeightLoader,
        cos_sin: torch.Tensor,
        workspace: Workspace,
    ) -> "Layer": ...


@dataclass(frozen=True)
class Family:
    """One model family: functions over its configuration, no state.

    Attributes:
        name: as in `model_type` of config.json.
        architectures: class names in `architectures` of config.json.
        parse_config: fields of config.json -> the family's frozen configuration.
        roles: configuration -> every parameter the model reads, in loading order.
        build: see Build.
        is_mtp: (configuration, name) -> whether a weight belongs to multi-token prediction, which
            is recognized, kept in files, and not loaded.
        load_layer: see LoadLayer.
        kv_layout: configuration -> shape of the cache.
        value_heads: configuration -> how values reach the output projection.
    """

    name: str
    architectures: tuple[str, ...]
    parse_config: Callable[[dict[str, Any]], Any]
    roles: Callable[[Any], list[ParamSpec]]
    build: Build
    is_mtp: Callable[[Any, str], bool]
    load_layer: LoadLayer
    kv_layout: Callable[[Any], "KVLayout"]
    value_heads: Callable[[Any], ValueHeads]


class _Missing:
    pass


_MISSING = _Missing()


def size(config: dict[str, Any], name: str, default: Any = _MISSING) -> int:
    """Return a field of config.json that counts something there must be, an int of 1 or more."""
    value = field(config, name, int, default)
    if value < 1:
        raise CheckpointError(f"config.json: {name!r} is {value}, expected 1 or more")
    return int(value)


def field(config: dict[str, Any], name: str, kind: type, default: Any = _MISSING) -> Any:
    """Return a field of config.json after checking its type.

    null counts as absent where there is a default; an integer is accepted for a float.

    Raises:
        CheckpointError: if it is absent without a default, of another type, or a negative count.
    """
    value = config.get(name)
    if value is None:
        if default is _MISSING:
            raise CheckpointError(f"config.json has no {name!r}")
        return default
    accepted: type | tuple[type, ...] = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise CheckpointError(f"config.json: {name!r} is {value!r}, expected {kind.__name__}")
    if isinstance(value, int) and kind is int and value < 0:
        raise CheckpointError(f"config.json: {name!r} is {value}, expected 0 or more")
    return kind(value)
