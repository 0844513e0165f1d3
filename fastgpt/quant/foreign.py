"""Quantizing any PyTorch module: its linear layers are replaced, the rest of it stays.

Replaced layers keep their place, so the module's own forward runs unchanged. Fused expert weights
(3-D parameters of a module called `experts`) become read-only attributes that dequantize.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import torch
from torch import nn

from fastgpt import ops
from fastgpt.checkpoint.container import Container, Metadata
from fastgpt.checkpoint.writer import write_container
from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.layers.linear import check_activations, multiply
from fastgpt.quant.policy import Parameter, Policy
from fastgpt.quant.report import Report
from fastgpt.quant.rounding import round_tensor
from fastgpt.quant.search import choose, is_searched
from fastgpt.scheme import PLAIN_DTYPES, Format, QuantizedTensor

__all__ = ["QuantizedLinear", "QuantizedModule", "load_into", "quantize_module"]

_FORMAT_OF = {dtype: name for name, dtype in PLAIN_DTYPES.items()}


class QuantizedModule(Protocol):
    """What `quantize_module` returns: the caller's module with `save` added."""

    def save(self, path: str) -> None:
        """Write the module's tensors to a container."""


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored in a quantized or 16-bit format.

    forward: x [..., in_features] in fp32, bf16 or fp16 -> [..., out_features] of the same type.
    The stored parts are buffers, so state_dict, `to(device)` and deepcopy work; a change of dtype
    applies to the bias alone.
    """

    bias: torch.Tensor | None

    def __init__(
        self, stored: torch.Tensor | QuantizedTensor, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = stored.shape
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        if isinstance(stored, QuantizedTensor):
            self.format = stored.format
            parts = stored.parts
        else:
            self.format = Format(_FORMAT_OF[stored.dtype])
            parts = {"weight": stored}
        self._suffixes = tuple(parts)
        for suffix, part in parts.items():
            self.register_buffer(suffix, part)
        self._arranged: torch.Tensor | ops.ArrangedWeight | None = None

    def stored(self) -> torch.Tensor | QuantizedTensor:
        """Return the weight in its stored form."""
        parts = {suffix: cast(torch.Tensor, self._buffers[suffix]) for suffix in self._suffixes}
        if self.format.is_plain:
            return parts["weight"]
        return QuantizedTensor(self.format, (self.out_features, self.in_features), parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight.T + bias; the first call arranges the weight for the kernels."""
        if self._arranged is None:
            self._arranged = _arrange(self.stored())
            check_activations(self.format.activations, x.device)
        rows = x.reshape(-1, self.in_features)
        y = multiply(rows, self._arranged, self.bias, self.format.activations)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer in the module's printed form."""
        return f"{self.in_features}, {self.out_features}, format={self.format}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        before = {suffix: self._buffers[suffix] for suffix in self._suffixes}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for suffix, old in before.items():  # moves apply to codes and scales, casts do not
            new = self._buffers[suffix]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[suffix] = old.to(new.device)
        self._arranged = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._arranged = None

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLinear:
        stored = copy.deepcopy(self.stored(), memo)
        return QuantizedLinear(stored, copy.deepcopy(self.bias, memo))


def _arrange(stored: torch.Tensor | QuantizedTensor) -> torch.Tensor | ops.ArrangedWeight:
    """Return a weight as `ops.linear` takes it."""
    if isinstance(stored, torch.Tensor):
        return stored
    return ops.arrange(
        stored.parts["packed"],
        stored.parts["scale"],
        stored.parts.get("zero_point"),
        format=stored.format.name,
        in_features=stored.shape[-1],
        group_size=stored.format.group_size or 0,
    )


class _QuantizedParameter(nn.Module):
    """The stored parts of a weight that its owner reads as an attribute."""

    def __init__(self, stored: torch.Tensor | QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.format = stored.format if isinstance(stored, QuantizedTensor) else None
        self.shape = tuple(stored.shape)
        self.dtype = dtype
        parts = stored.parts if isinstance(stored, QuantizedTensor) else {"weight": stored}
        self._suffixes = tuple(parts)
        for suffix, part in parts.items():
            self.register_buffer(suffix, part)

    def stored(self) -> torch.Tensor | QuantizedTensor:
        parts = {suffix: cast(torch.Tensor, self._buffers[suffix]) for suffix in self._suffixes}
        if self.format is None:
            return parts["weight"]
        return QuantizedTensor(self.format, self.shape, parts)

    def value(self) -> torch.Tensor:
        stored = self.stored()
        if isinstance(stored, QuantizedTensor):
            return stored.dequantize(self.dtype)
        return stored.to(self.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> _QuantizedParameter:
        before = {suffix: self._buffers[suffix] for suffix in self._suffixes}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for suffix, old in before.items():
            new = self._buffers[suffix]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[suffix] = old.to(new.device)
        return self


def quantize_module(
    module: nn.Module,
    policy: Policy,
    metadata: Metadata,
    report: Report,
    *,
    device: torch.device | None,
    in_place: bool,
) -> nn.Module:
    """Return the module, or a deep copy, with its linear weights stored as the policy says.

    Every nn.Linear takes the role `default`; so do 3-D parameters of modules named `experts`.
    Linears whose weight is shared with another module are kept, as is everything else.

    Raises:
        ConfigError: there is nothing to quantize, or a rule that matches nothing.
        CheckpointError: a weight holds NaN or infinite values.
    """
    if not in_place:
        module = copy.deepcopy(module)
    targets = _targets(module)
    parameters = [
        Parameter(name, tuple(p.shape), "default" if name in targets else "kept")
        for name, p in module.named_parameters(remove_duplicate=False)
    ]
    if not targets:
        raise ConfigError(
            f"{type(module).__name__} has no linear layer to quantize, and is no model FastGPT "
            "knows; a known one is recognized by its `config`"
        )
    formats = policy.assign(parameters)
    for parameter in parameters:
        weight = module.get_parameter(parameter.name)
        fmt = formats[parameter.name]
        stored: torch.Tensor | QuantizedTensor = weight.detach()
        if fmt is not None:
            moved = weight.detach() if device is None else weight.detach().to(device)
            if is_searched(fmt):
                choice = choose(moved, fmt, None, parameter.name)
                stored = choice.stored.to(weight.device)
            else:
                stored = round_tensor(moved, fmt, parameter.name).to(weight.device)
            _replace(module, parameter.name, stored, weight.dtype)
        _count(report, parameter, weight.detach(), stored)
    return _with_save(module, metadata)


def load_into(container: Container, module: nn.Module) -> nn.Module:
    """Fill `module`, of the class that was quantized, from a container; returns it, changed.

    Raises:
        CheckpointError: the module's names or shapes are not those of the file.
    """
    state = dict(module.named_parameters(remove_duplicate=False))
    targets = _targets(module)
    plain: dict[str, torch.Tensor] = {}
    for name in container.names():
        stored = container.read(name)
        if isinstance(stored, QuantizedTensor) or (name in targets and container.format(name)):
            if name not in targets:
                raise CheckpointError(
                    f"{container.path} quantized {name!r}, which {type(module).__name__} does not "
                    "have as a linear weight; load into the class that was quantized"
                )
            if tuple(stored.shape) != tuple(state[name].shape):
                raise CheckpointError(
                    f"{container.path} has {name!r} of shape {tuple(stored.shape)}; the module's "
                    f"is {tuple(state[name].shape)}"
                )
            owned = stored.clone() if isinstance(stored, torch.Tensor) else _clone(stored)
            _replace(module, name, owned.to(state[name].device), state[name].dtype)
        else:
            plain[name] = stored
    try:
        result = module.load_state_dict(plain, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{container.path} does not fit the module: {error}") from None
    replaced = {n for n in container.names() if n not in plain}
    missing = [n for n in result.missing_keys if not _is_part_of(n, replaced)]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{container.path} does not fit {type(module).__name__}: it lacks {missing[:3]} and "
            f"has {result.unexpected_keys[:3]} too many"
        )
    return _with_save(module, container.metadata)


def _targets(module: nn.Module) -> set[str]:
    """Return the names of the weights that can be replaced."""
    owners: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    targets = set()
    for path, child in module.named_modules():
        # Subclasses of nn.Linear may use their weight otherwise, so only the class itself.
        if type(child) is nn.Linear and owners[id(child.weight)] == 1:
            targets.add(f"{path}.weight".lstrip("."))
        elif path.rpartition(".")[2] == "experts":
            for name, parameter in child.named_parameters(recurse=False):
                if parameter.ndim == 3 and parameter.is_floating_point():
                    targets.add(f"{path}.{name}")
    return targets


def _replace(
    module: nn.Module, name: str, stored: torch.Tensor | QuantizedTensor, dtype: torch.dtype
) -> None:
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    if type(owner) is nn.Linear:
        parent_path, _, child_name = path.rpartition(".")
        if not path:
            raise ConfigError(
                "the module is itself one nn.Linear, which cannot be replaced in place; wrap it in "
                "nn.Sequential"
            )
        parent = module.get_submodule(parent_path)
        setattr(parent, child_name, QuantizedLinear(stored, owner.bias))
        return
    del owner._parameters[attribute]
    _make_readable(owner, attribute)
    # The holder has the weight's own name, so its buffers are named as in the container.
    owner._modules[attribute] = _QuantizedParameter(stored, dtype)


def _make_readable(owner: nn.Module, attribute: str) -> None:
    """Give this one module a property that dequantizes: its class gets a subclass of its own."""

    def read(self: nn.Module) -> torch.Tensor:
        return cast(_QuantizedParameter, self._modules[attribute]).value()

    cls = type(owner)
    owner.__class__ = type(cls.__name__, (cls,), {attribute: property(read)})


def _with_save(module: nn.Module, metadata: Metadata) -> nn.Module:
    """Add `save` to the module by a subclass of its class, so that it stays what it was."""
    cls = type(module)
    if not issubclass(cls, _Saves):
        module.__class__ = type(cls.__name__, (_Saves, cls), {})
    object.__setattr__(module, "_fastgpt_metadata", metadata)
    return module


class _Saves:
    """Adds `save` to a quantized module."""

    _fastgpt_metadata: Metadata

    def save(self, path: str) -> None:
        """Write all parameters and persistent buffers; `fastgpt.load(path, into=module)` reads."""
        assert isinstance(self, nn.Module)
        write_container(path, _stored_tensors(self), self._fastgpt_metadata)


def _stored_tensors(
    module: nn.Module,
) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor]]:
    replaced: dict[str, str] = {}  # prefix of the parts' names -> name of the weight
    for path, child in module.named_modules():
        if isinstance(child, QuantizedLinear):
            name = f"{path}.weight"
            replaced.update({f"{path}.{suffix}": name for suffix in child._suffixes})
            yield name, child.stored()
        elif isinstance(child, _QuantizedParameter):
            replaced.update({f"{path}.{suffix}": path for suffix in child._suffixes})
            yield path, child.stored()
    for name, tensor in module.state_dict().items():
        if name not in replaced:
            yield name, tensor


def _is_part_of(key: str, replaced: set[str]) -> bool:
    prefix = key.rpartition(".")[0]
    return f"{prefix}.weight" in replaced or prefix in replaced


def _count(
    report: Report,
    parameter: Parameter,
    weight: torch.Tensor,
    stored: torch.Tensor | QuantizedTensor,
) -> None:
    exact = weight.to(torch.float32)
    if isinstance(stored, QuantizedTensor):
        got, changed, name = stored.dequantize(), True, str(stored.format)
    else:
        got, changed = stored.to(torch.float32), stored.dtype != weight.dtype
        name = _FORMAT_OF.get(stored.dtype, str(stored.dtype))
    report.add(
        parameter.name,
        role=parameter.role,
        fmt=name,
        num_values=weight.numel(),
        before_bytes=weight.nbytes,
        after_bytes=stored.nbytes,
        squared_error=float((got - exact).double().square().sum()) if changed else 0.0,
        squared_norm=float(exact.double().square().sum()),
    )


def _clone(stored: QuantizedTensor) -> QuantizedTensor:
    parts = {suffix: part.clone() for suffix, part in stored.parts.items()}
    return QuantizedTensor(stored.format, stored.shape, parts)


def _frozen(bias: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(bias.detach(), requires_grad=False)
