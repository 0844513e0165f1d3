"""Quantizing a model of a known family: every parameter has a role; norms fold into readers.

A binary norm stores two values per group of 128 gains. What that loses, gain / stored gain, is
multiplied in float32 into the input columns of the weights that read the norm's output, before they
are rounded: y = W (γ ⊙ x) = (W diag(γ / γ̂)) (γ̂ ⊙ x), so only the rounding of W changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.models.registry import family
from fastgpt.quant.policy import Parameter, Policy
from fastgpt.quant.report import Report
from fastgpt.quant.rounding import binary_residual, round_tensor
from fastgpt.scheme import Format, QuantizedTensor

__all__ = ["PlannedTensor", "plan_family", "quantize_family"]

Stored = torch.Tensor | QuantizedTensor

_MTP_ROLE = "mtp"
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")  # computed from the configuration, not a weight


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output file.

    Attributes:
        name: Hugging Face name.
        shape: of the unquantized tensor.
        role: its role, or "mtp".
        format: None keeps it as it is.
        consumers: weights that absorb what rounding this norm gain loses.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    format: Format | None
    consumers: tuple[str, ...] = ()


def plan_family(checkpoint: Checkpoint, policy: Policy) -> tuple[list[PlannedTensor], list[str]]:
    """Return every tensor of the output with its format, in file order, and notes for the report.

    Raises:
        CheckpointError: an unknown architecture; a weight that is missing or has no role.
        ConfigError: a rule that matches nothing or cannot be applied.
    """
    assert checkpoint.config is not None
    kind = family(checkpoint.config)
    config = kind.parse_config(checkpoint.config)
    specs = [s for s in kind.roles(config) if not s.optional or s.name in checkpoint]
    missing = [s.name for s in specs if s.name not in checkpoint]
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights are missing, the first is {missing[0]!r}; "
            "is a shard absent, or the configuration of another model?"
        )
    known = {s.name for s in specs}
    extra = [name for name in checkpoint.names() if name not in known]
    mtp = [name for name in extra if kind.is_mtp(config, name)]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unknown = [n for n in extra if n not in {*mtp, *tied} and not _DERIVED.search(n)]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} weights have no role in a {kind.name} model, the first is "
            f"{unknown[0]!r}; is the configuration that of another model?"
        )

    formats = policy.assign([Parameter(s.name, s.shape, s.role) for s in specs])
    notes = []
    planned = []
    for spec in specs:
        fmt = formats[spec.name]
        if fmt is not None and fmt.folds_residual and not spec.consumers:
            notes.append(f"{spec.name} is kept: no weight can absorb what a binary gain loses")
            fmt = None
        planned.append(PlannedTensor(spec.name, spec.shape, spec.role, fmt, spec.consumers))
    _check_experts_share_a_format(planned)
    _check_roles_took_bytes(planned, policy)
    for name in mtp:
        shape = tuple(checkpoint.read(name).shape)
        planned.append(PlannedTensor(name, shape, _MTP_ROLE, Format("bf16")))
    if mtp:
        notes.append(f"{len(mtp)} multi-token prediction weights are kept in bf16 and not loaded")
    return planned, notes


def quantize_family(
    checkpoint: Checkpoint,
    planned: list[PlannedTensor],
    report: Report,
    device: torch.device | None,
) -> Iterator[tuple[str, Stored]]:
    """Yield name and stored form of every planned tensor; fills `report` as it goes.

    One weight at a time is on `device` (None: where it is); results are on the CPU.

    Raises:
        CheckpointError: a weight has another shape than its role says, or NaN or infinite values.
        ConfigError: a value does not fit its format.
    """
    norms: dict[str, QuantizedTensor] = {}
    residuals: dict[str, torch.Tensor] = {}
    for item in planned:
        if item.format is None or not item.format.folds_residual:
            continue
        gain = _dense(checkpoint.read(item.name), item).to(torch.float32)
        stored = round_tensor(gain, item.format, item.name)
        assert isinstance(stored, QuantizedTensor)
        norms[item.name] = stored
        residual = binary_residual(gain, stored)
        residuals.update(dict.fromkeys(item.consumers, residual))

    for item in planned:
        source = checkpoint.read(item.name)
        if tuple(source.shape) != item.shape:
            raise CheckpointError(
                f"weight {item.name!r} has shape {tuple(source.shape)}; "
                f"the configuration asks for {item.shape}"
            )
        fold = residuals.get(item.name)
        if item.name in norms:
            result: Stored = norms[item.name]
            _count(report, item, source, result)  # the fold makes up for its error
        elif item.format is None and fold is None:
            if isinstance(source, torch.Tensor):
                _check_finite(source, item)
            result = source
            _count(report, item, source, result)
        else:
            wanted = _dense(source, item)
            if device is not None:
                wanted = wanted.to(device)
            if fold is not None:
                wanted = wanted.to(torch.float32) * fold.to(wanted.device)
            fmt = item.format or _kept_format(source, item)
            result = round_tensor(wanted, fmt, item.name)
            _count(report, item, source, result, wanted)
            result = result.to("cpu")
        yield item.name, result


def _kept_format(source: Stored, item: PlannedTensor) -> Format:
    """Return how a kept weight is stored after a fold: small protected ones lose nothing."""
    if item.role == "kept":
        return Format("fp32")
    plain = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if isinstance(source, QuantizedTensor):
        return source.format
    return Format(plain.get(source.dtype, "fp32"))


def _dense(source: Stored, item: PlannedTensor) -> torch.Tensor:
    if isinstance(source, QuantizedTensor):
        return source.dequantize(torch.float32)
    if not source.is_floating_point():
        raise CheckpointError(f"weight {item.name!r} is {source.dtype}, not floating point")
    return source


def _check_finite(source: torch.Tensor, item: PlannedTensor) -> None:
    if source.is_floating_point() and not bool(torch.isfinite(source).all()):
        raise CheckpointError(f"{item.name} holds NaN or infinite values")


def _count(
    report: Report,
    item: PlannedTensor,
    source: Stored,
    result: Stored,
    wanted: torch.Tensor | None = None,
) -> None:
    squared_error = squared_norm = 0.0
    if wanted is not None:
        exact = wanted.to(torch.float32)
        got = result.to(torch.float32) if isinstance(result, torch.Tensor) else result.dequantize()
        squared_norm = float(torch.linalg.vector_norm(exact, dtype=torch.float64)) ** 2
        squared_error = float(torch.linalg.vector_norm(got - exact, dtype=torch.float64)) ** 2
    report.add(
        item.name,
        role=item.role,
        fmt=_format_name(result),
        num_values=source.shape.numel() if isinstance(source, torch.Tensor) else _numel(source),
        before_bytes=source.nbytes,
        after_bytes=result.nbytes,
        squared_error=squared_error,
        squared_norm=squared_norm,
    )


def _numel(source: QuantizedTensor) -> int:
    return torch.Size(source.shape).numel()


def _format_name(result: Stored) -> str:
    if isinstance(result, QuantizedTensor):
        return str(result.format)
    plain: dict[Any, str] = {
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
    }
    return plain.get(result.dtype, str(result.dtype).removeprefix("torch."))


def _check_experts_share_a_format(planned: list[PlannedTensor]) -> None:
    """Kernels run all experts of a layer at once, gate and up together: they share one format."""
    seen: dict[tuple[str, bool], PlannedTensor] = {}
    for item in planned:
        match = re.search(r"^(.*\.experts)\.\d+\.(gate|up|down)_proj\.weight$", item.name)
        if match is None:
            continue
        first = seen.setdefault((match[1], match[2] == "down"), item)
        if first.format != item.format:
            raise ConfigError(
                f"{item.name} would be {item.format or 'kept'} but {first.name} "
                f"{first.format or 'kept'}; the experts of one layer share one format, so widen or "
                "narrow the rule"
            )


def _check_roles_took_bytes(planned: list[PlannedTensor], policy: Policy) -> None:
    for role in policy.required:
        if all(item.format != policy.roles[role] for item in planned if item.role == role):
            raise ConfigError(
                f"{role}: {policy.roles[role]} took no bytes: no parameter of that role can be "
                f"stored so in this model; remove the key {role!r}"
            )
