"""Every tensor of the output of a known family: its role, its format, and what absorbs its loss."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.models.registry import family
from fastgpt.quant.layerwise import layer_index
from fastgpt.quant.policy import Parameter, Policy
from fastgpt.scheme import Format

__all__ = ["MTP_ROLE", "PlannedTensor", "blocks_of", "keep_wide_rows", "plan_family"]

MTP_ROLE = "mtp"
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")  # computed from the configuration, not a weight
_SIXTEEN_BIT_ROWS = re.compile(r"\.experts\.\d+\.|\.kv_b_proj\.|embed_tokens\.")


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
    planned = keep_wide_rows(planned)
    _check_experts_share_a_format(planned)
    _check_roles_took_bytes(planned, policy)
    for name in mtp:
        shape = tuple(checkpoint.read(name).shape)
        planned.append(PlannedTensor(name, shape, MTP_ROLE, Format("bf16")))
    if mtp:
        notes.append(f"{len(mtp)} multi-token prediction weights are kept in bf16 and not loaded")
    return planned, notes


def keep_wide_rows(planned: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """Return the plan without eight-bit activations where products have none.

    Rows of experts are gathered, MLA's kv_b_proj is split by heads, an embedding is looked up.
    """
    return [
        replace(item, format=replace(item.format, activations="16bit"))
        if item.format is not None and _SIXTEEN_BIT_ROWS.search(item.name)
        else item
        for item in planned
    ]


def blocks_of(planned: Iterable[PlannedTensor]) -> list[list[PlannedTensor]]:
    """Return runs of tensors that are quantized together: a decoder layer, or what lies between."""
    runs = itertools.groupby(planned, lambda item: layer_index(item.name))
    return [list(run) for _, run in runs]


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
        wanted = replace(policy.roles[role], activations="16bit")
        formats = [i.format and replace(i.format, activations="16bit") for i in planned
                   if i.role == role]  # fmt: skip
        if wanted not in formats:
            raise ConfigError(
                f"{role}: {policy.roles[role]} took no bytes: no parameter of that role can be "
                f"stored so in this model; remove the key {role!r}"
            )
