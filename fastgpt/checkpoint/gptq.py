"""Read weights as GPTQ tools store them: transposed, packed along the input.

`qweight` int32 [cols * bits / 32, rows] holds the codes of an output row as one stream of bits down
a column; `scales` [groups, rows]; `qzeros` int32 [groups, rows * bits / 32] the zero points as a
stream along the rows; `g_idx` [cols] the group of every input column. Format "gptq" (v1) stores
zero points minus 1, "gptq_v2" stores them as they are.

Columns out of order (`desc_act` without static groups) have no form here, as no kernel gathers its
input: such weights are dequantized. In order, as static groups leave them, codes are kept.

Sources: GPTQ, arXiv:2210.17323; the files of AutoGPTQ and GPTQModel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint.codes import Stored, from_codes, held_as, read_stream
from fastgpt.checkpoint.foreign import (
    FLOATS,
    ForeignWeight,
    Settings,
    StoredTensors,
    by_module,
    compile_pattern,
)
from fastgpt.scheme import Format

__all__ = ["find_weights"]

# Of `dynamic`: whether the modules it names are quantized, their pattern, what differs for them.
Override = tuple[bool, re.Pattern[str], Settings]

# How the codes were searched, and how other engines run them; none changes what is stored.
NEUTRAL = (
    "quant_method", "model_name_or_path", "model_file_base_name", "damp_percent",
    "damp_auto_increment", "static_groups", "true_sequential", "dataset", "batch_size",
    "pad_token_id", "tokenizer", "exllama_config", "use_exllama", "disable_exllama",
    "use_cuda_fp16", "max_input_length", "model_seqlen", "module_name_preceding_first_block",
    "block_name_to_quantize", "cache_block_outputs", "modules_in_block_to_quantize", "meta",
    "lm_head", "backend", "act_group_aware", "is_marlin_format", "awq_gemm_checkpoint", "mse",
    "parallel_packing", "offload_to_disk", "offload_to_disk_path", "adapter", "fail_safe",
    "failsafe", "hyb_act", "gptaq", "gptaq_alpha", "compute_device_filter", "mock_quantization",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How one module is stored; group_size None: one group a row."""

    bits: int
    group_size: int | None
    symmetric: bool
    desc_act: bool
    is_v1: bool

    @property
    def kind(self) -> str:
        """Name for people."""
        scope = f"g{self.group_size}" if self.group_size else "channel"
        order = " desc_act" if self.desc_act else ""
        sign = "" if self.symmetric else " asymmetric"
        return f"GPTQ{'' if self.is_v1 else ' v2'} int{self.bits} {scope}{sign}{order}"


def find_weights(
    quantization: dict[str, Any], tensors: StoredTensors, dtype: torch.dtype
) -> tuple[dict[str, ForeignWeight], set[str]]:
    """Return the quantized weights by name, and stored tensors that no weight needs (none).

    Args:
        quantization: `quantization_config` of config.json, or quantize_config.json.
        tensors: what the directory holds.
        dtype: of weights that must be dequantized.

    Raises:
        UnsupportedFormat: a layout, or an unknown key, that is not read here.
        CheckpointError: a tensor is missing or does not fit the configuration.
    """
    layout, overrides = _parse(quantization, tensors.path)
    weights = {}
    for module, present in by_module(
        tensors.entries, ("qweight", "scales", "qzeros", "g_idx")
    ).items():
        mine = _of_module(layout, overrides, module)
        parts = {suffix: f"{module}.{suffix}" for suffix in sorted(present)}
        if mine is None:
            tensors.fail(
                min(parts.values()), "is quantized, but a '-:' pattern of `dynamic` excludes it"
            )
        becomes = _check(mine, module, present, tensors) or dtype
        decode = partial(_decode, mine, dtype, tensors, module)
        weights[f"{module}.weight"] = ForeignWeight(mine.kind, parts, decode, becomes)
    return weights, set()


def _parse(
    quantization: dict[str, Any], path: Path
) -> tuple[Layout, list[tuple[bool, re.Pattern[str], Any]]]:
    """Return the layout of all modules, and what `dynamic` changes for some."""
    settings = Settings(quantization, f"{path / 'config.json'}: quantization_config")
    settings.ignore(*NEUTRAL)
    settings.refuse("rotation")
    settings.one_of("pack_dtype", ("int32",), "int32")
    stated = settings.one_of("format", ("gptq", "gptq_v2"), "gptq")
    stated = settings.one_of("checkpoint_format", ("gptq", "gptq_v2"), stated)
    base = Layout(4, 128, symmetric=True, desc_act=False, is_v1=stated == "gptq")
    layout = _options(settings, base)
    overrides: list[Override] = []
    for key, value in settings.get("dynamic", dict, {}).items():
        where = f"{settings.where}: dynamic"
        is_quantized = not key.startswith("-:")
        pattern = compile_pattern(re.sub(r"^[+-]:", "", key), where)
        changes = Settings(value or {}, f"{where}: {key}")
        changes.ignore(*NEUTRAL)
        overrides.append((is_quantized, pattern, changes))
        _options(changes, layout)
        changes.done()
    settings.done()
    return layout, overrides


def _options(settings: Settings, base: Layout) -> Layout:
    bits = settings.one_of("bits", (2, 3, 4, 8), base.bits)
    return replace(
        base,
        bits=bits,
        group_size=settings.group_size("group_size", base.group_size),
        symmetric=settings.get("sym", bool, base.symmetric),
        desc_act=settings.get("desc_act", bool, base.desc_act),
    )


def _of_module(layout: Layout, overrides: list[Override], module: str) -> Layout | None:
    """Return a module's layout, that of the first pattern which matches; None where excluded."""
    for is_quantized, pattern, changes in overrides:
        if pattern.match(module):
            return _options(changes, layout) if is_quantized else None
    return layout


def _check(layout: Layout, module: str, present: set[str], tensors: StoredTensors) -> Format | None:
    """Check types and shapes; return the format that keeps the codes, if one does."""
    name = f"{module}.qweight"
    words, rows = tensors.require(name, f"{module}.{min(present)}", (torch.int32,)).shape
    if words * 32 % layout.bits:
        tensors.fail(name, f"has {words} words a column, not whole codes of {layout.bits} bits")
    cols = words * 32 // layout.bits
    groups = -(-cols // layout.group_size) if layout.group_size else 1
    why = f"{name} of shape {(words, rows)} with {layout.bits} bits in {layout.kind}"
    tensors.require(f"{module}.scales", name, FLOATS)
    tensors.check_shape(f"{module}.scales", (groups, rows), why)
    tensors.require(f"{module}.qzeros", name, (torch.int32,))
    tensors.check_shape(f"{module}.qzeros", (groups, -(-rows * layout.bits // 32)), why)
    if "g_idx" in present:
        tensors.require(f"{module}.g_idx", name, (torch.int32, torch.int64), 1)
        tensors.check_shape(f"{module}.g_idx", (cols,), why)
    elif layout.desc_act and groups > 1:
        tensors.require(f"{module}.g_idx", name, (torch.int32,), 1)
    if layout.desc_act and groups > 1:
        return None
    return held_as(layout.bits, layout.group_size, symmetric=layout.symmetric)


def _decode(
    layout: Layout,
    dtype: torch.dtype,
    tensors: StoredTensors,
    module: str,
    parts: Mapping[str, Tensor],
) -> Stored:
    """Return one weight [rows, cols] from its stored parts."""
    words, rows = parts["qweight"].shape
    bits = layout.bits
    cols = words * 32 // bits
    codes = read_stream(parts["qweight"].T, bits, cols)
    zero = read_stream(parts["qzeros"], bits, rows).T.contiguous()
    if layout.is_v1:
        zero = zero + 1 & 2**bits - 1  # the zero point 0 wraps around
    middle = 2 ** (bits - 1)
    if layout.symmetric and not bool((zero == middle).all()):
        wrong = int(zero[zero != middle][0])
        tensors.fail(
            f"{module}.qzeros",
            f"holds the zero point {wrong} in a symmetric file, whose only one is {middle}; its "
            f"checkpoint_format is probably not {'gptq' if layout.is_v1 else 'gptq_v2'!r}, or "
            "`sym` should be false",
        )
    scale = parts["scales"].T
    zero_or_none = None if layout.symmetric else zero
    group_of = parts.get("g_idx")
    if group_of is not None:
        group_of = group_of.to(torch.int64)
        if cols and not 0 <= int(group_of.min()) <= int(group_of.max()) < scale.shape[1]:
            tensors.fail(
                f"{module}.g_idx",
                f"names groups {int(group_of.min())} to {int(group_of.max())} of {scale.shape[1]}",
            )
    return from_codes(
        codes,
        scale,
        zero_or_none,
        bits=bits,
        group_size=layout.group_size,
        dtype=dtype,
        group_of=group_of,
    )
