"""Read weights as compressed-tensors (llm-compressor, vLLM) stores them.

A config group says how the modules its targets match are stored: integers packed into int32 words
(`weight_packed`, `weight_scale`, `weight_shape`, `weight_zero_point`, `weight_g_idx`), or one int8
or e4m3 value each (`weight`, `weight_scale`, `weight_zero_point`). Integers are signed there; as
codes they start at 0, which adds 2^(bits - 1) to values and zero points alike and changes nothing.

Source: the compressed-tensors package, https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint.codes import Stored, from_codes, from_fp8, held_as, read_padded, read_stream
from fastgpt.checkpoint.foreign import (
    FLOATS,
    ForeignWeight,
    Settings,
    StoredTensors,
    by_module,
    compile_pattern,
)
from fastgpt.errors import UnsupportedFormat
from fastgpt.logging import get_logger
from fastgpt.scheme import BLOCK, Format

__all__ = ["find_weights"]

_logger = get_logger(__name__)

PACKED = "pack-quantized"
PLAIN = ("naive-quantized", "int-quantized", "float-quantized")
# Ranges of activations and of the cache: our activations stay 16-bit, so they are not needed.
ACTIVATION_PARTS = {
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
    "q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point",
}  # fmt: skip
WEIGHT_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point",
                "weight_g_idx")  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How the weights of one config group are stored.

    Attributes:
        layout: PACKED or one of PLAIN.
        bits: of an integer; 8 for floats.
        is_float: e4m3 instead of integers.
        symmetric: without zero points.
        group_size: columns of a group; None: one scale a row, or one for all.
        block: rows and columns of a block, None without.
        has_order: columns of a group are not neighbours; `weight_g_idx` names each one's group.
    """

    layout: str
    bits: int
    is_float: bool
    symmetric: bool
    group_size: int | None
    block: tuple[int, int] | None
    has_order: bool

    @property
    def kind(self) -> str:
        """Name for people."""
        if self.is_float:
            scope = f"{self.block[0]}x{self.block[1]}" if self.block else "channel"
            return f"compressed-tensors fp8 {scope}"
        scope = f"g{self.group_size}" if self.group_size else "channel"
        sign = "" if self.symmetric else " asymmetric"
        return f"compressed-tensors int{self.bits} {scope}{sign}"

    @property
    def format(self) -> Format | None:
        """The format that keeps the codes, None if none does."""
        if self.has_order:
            return None
        if not self.is_float:
            return held_as(self.bits, self.group_size, symmetric=self.symmetric)
        if self.block not in (None, (BLOCK, BLOCK)):
            return None
        return Format.parse({"format": "fp8", "scale": "block" if self.block else "channel"})


class Groups:
    """Which scheme a module has: names before patterns before classes, `ignore` first of all."""

    def __init__(self, schemes: Sequence[tuple[list[str], Scheme]], ignore: list[str], where: str):
        self.targets = [(target, scheme) for targets, scheme in schemes for target in targets]
        # compressed-tensors' order among several that match: exact, patterns, classes, by name
        self.targets.sort(key=lambda item: (_is_class(item[0]), "re:" in item[0], item[0]))
        self.ignore = ignore
        self._patterns = {
            text: compile_pattern(text.removeprefix("re:"), where)
            for text in (*ignore, *(target for target, _ in self.targets))
            if text.startswith("re:")
        }

    def matches(self, module: str, target: str) -> bool:
        """Tell whether a target means this module."""
        pattern = self._patterns.get(target)
        if pattern is not None:
            return pattern.match(module) is not None
        is_embedding = module.rpartition(".")[2] == "embed_tokens"
        return target in (module, "Embedding" if is_embedding else "Linear")

    def scheme(self, module: str) -> Scheme | None:
        """Return the module's scheme; None if it is ignored or no target matches."""
        if any(self.matches(module, item) for item in self.ignore):
            return None
        return next((s for target, s in self.targets if self.matches(module, target)), None)


def find_weights(
    quantization: dict[str, Any], tensors: StoredTensors, dtype: torch.dtype
) -> tuple[dict[str, ForeignWeight], set[str]]:
    """Return the quantized weights by name, and stored tensors that no weight needs.

    Args:
        quantization: `quantization_config` of config.json.
        tensors: what the directory holds.
        dtype: of weights that must be dequantized.

    Raises:
        UnsupportedFormat: a format, or an unknown key, that is not read here.
        CheckpointError: a tensor is missing or does not fit its scheme.
    """
    groups = _parse(quantization, tensors.path)
    weights: dict[str, ForeignWeight] = {}
    unused = {name for name in tensors.entries if name.rpartition(".")[2] in ACTIVATION_PARTS}
    for module, present in by_module(tensors.entries, WEIGHT_PARTS).items():
        if present == {"weight"}:
            continue
        scheme = groups.scheme(module)
        key = "weight_packed" if "weight_packed" in present else "weight"
        name = f"{module}.{key}"
        if scheme is None:
            tensors.fail(
                name if key in present else f"{module}.{min(present)}",
                "is quantized, but no target of a config group means its module, or `ignore` does",
            )
        if key != ("weight_packed" if scheme.layout == PACKED else "weight"):
            tensors.fail(name, f"does not fit its config group's format {scheme.layout!r}")
        parts = {suffix: f"{module}.{suffix}" for suffix in sorted(present)}
        check = _check_packed if scheme.layout == PACKED else _check_plain
        check(scheme, module, tensors)
        decode = partial(_decode, scheme, dtype, tensors, module)
        weights[f"{module}.weight"] = ForeignWeight(
            scheme.kind, parts, decode, scheme.format or dtype
        )
    return weights, unused


def _parse(quantization: dict[str, Any], path: Path) -> Groups:
    settings = Settings(quantization, f"{path / 'config.json'}: quantization_config")
    settings.ignore("quant_method", "version", "global_compression_ratio", "run_compressed")
    settings.refuse("transform_config")
    settings.refuse("moe_sparsity_config")
    sparsity = settings.get("sparsity_config", dict, {})
    if sparsity.get("format", "dense") != "dense":
        settings.unsupported("sparsity_config", sparsity["format"], ("dense",))
    settings.one_of("quantization_status", ("compressed",), "compressed")
    whole = settings.get("format", str, "mixed-precision")
    notes = []
    if settings.get("kv_cache_scheme", dict, {}):
        notes.append("the cache")
    schemes = []
    for name, value in settings.get("config_groups", dict, {}).items():
        group = Settings(value, f"{settings.where}: {name}")
        targets = group.get("targets", list, [])
        group.refuse("output_activations")
        if group.get("input_activations", dict, {}):
            notes.append("activations")
        layout = group.get("format", str, whole)
        if layout != PACKED and layout not in PLAIN:
            group.unsupported("format", layout, (PACKED, *PLAIN))
        group.ignore("weights")
        group.done()
        schemes.append((targets, _parse_scheme(group, layout)))
    ignore = settings.get("ignore", list, [])
    settings.done()
    for target in (*ignore, *(t for targets, _ in schemes for t in targets)):
        if not isinstance(target, str):
            settings.fail(f"has the target {target!r}, not a name or pattern")
    for targets, _ in schemes:
        for target in targets:
            if _is_class(target) and target not in ("Linear", "Embedding"):
                settings.unsupported("target", target, ("Linear", "Embedding", "names", "re:..."))
    if notes:
        _logger.info(
            "quantization of %s is not applied: they stay 16-bit",
            " and ".join(sorted(set(notes))),
        )
    return Groups(schemes, ignore, settings.where)


def _parse_scheme(group: Settings, layout: str) -> Scheme:
    weights = Settings(group.values.get("weights"), f"{group.where}: weights")
    is_float = weights.one_of("type", ("int", "float"), "int") == "float"
    bits = weights.one_of("num_bits", (8,) if is_float else (2, 3, 4, 5, 6, 7, 8), 8)
    symmetric = weights.get("symmetric", bool, True)
    group_size = weights.get("group_size", int, -1)
    guess = "group" if group_size > 0 else "channel"
    if weights.values.get("group_size") is None:
        guess = "tensor"
    strategies = ("tensor", "channel", "block") if is_float else ("tensor", "channel", "group")
    strategy = weights.one_of("strategy", strategies, guess)
    block = None
    if strategy == "block":
        size = weights.get("block_structure", list, [])
        if len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
            weights.fail(f"has block_structure {size!r}; expected [rows, cols]")
        block = (size[0], size[1])
    if strategy == "group" and group_size < 1:
        weights.fail(f"has strategy 'group' with group_size {group_size}")
    weights.refuse("dynamic")
    has_order = weights.values.get("actorder") in ("group", "dynamic", True)
    weights.ignore("block_structure", "actorder", "observer", "observer_kwargs", "scale_dtype",
                   "zp_dtype")  # fmt: skip
    weights.done()
    if is_float and (layout in (PACKED, "int-quantized") or not symmetric):
        raise UnsupportedFormat(
            f"{weights.where} describes {'symmetric' if symmetric else 'asymmetric'} floats in "
            f"{layout}, which is not read"
        )
    size_or_none = group_size if strategy == "group" else None
    return Scheme(layout, bits, is_float, symmetric, size_or_none, block, has_order)


def _is_class(target: str) -> bool:
    """Tell whether a target is a class name: module names of a model have dots, patterns `re:`."""
    return re.fullmatch(r"[A-Z]\w*", target) is not None


def _check_packed(scheme: Scheme, module: str, tensors: StoredTensors) -> None:
    name = f"{module}.weight_packed"
    rows, _ = tensors.require(name, name, (torch.int32,)).shape
    tensors.require(f"{module}.weight_shape", name, (torch.int64, torch.int32), 1)
    scale = tensors.require(f"{module}.weight_scale", name, FLOATS, None)
    if scale.shape not in ((1,), ()) and scale.shape[0] != rows:
        tensors.fail(f"{module}.weight_scale", f"has shape {scale.shape} for {rows} rows")
    if not scheme.symmetric:
        tensors.require(f"{module}.weight_zero_point", name, (torch.int32, torch.int8))
    if scheme.has_order:
        tensors.require(f"{module}.weight_g_idx", name, (torch.int32, torch.int64), 1)


def _check_plain(scheme: Scheme, module: str, tensors: StoredTensors) -> None:
    name = f"{module}.weight"
    wanted = torch.float8_e4m3fn if scheme.is_float else torch.int8
    rows, cols = tensors.require(name, f"{module}.weight_scale", (wanted,)).shape
    scale = tensors.require(f"{module}.weight_scale", name, FLOATS, None)
    if scheme.block:
        shape = (-(-rows // scheme.block[0]), -(-cols // scheme.block[1]))
        tensors.check_shape(f"{module}.weight_scale", shape, f"{name} of shape {(rows, cols)}")
    elif not scheme.group_size and scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        tensors.check_shape(f"{module}.weight_scale", (rows, 1), f"{name} of {rows} rows")
    if not scheme.symmetric:
        tensors.require(f"{module}.weight_zero_point", name, (torch.int8,))


def _decode(
    scheme: Scheme,
    dtype: torch.dtype,
    tensors: StoredTensors,
    module: str,
    parts: Mapping[str, Tensor],
) -> Stored:
    """Return one weight from its stored parts."""
    scale = parts["weight_scale"]
    if scheme.is_float:
        return from_fp8(parts["weight"], scale, scheme.block, dtype)
    middle = 2 ** (scheme.bits - 1)
    if "weight_packed" in parts:
        words = parts["weight_packed"]
        rows, cols = _shape(parts["weight_shape"], words, module, tensors)
        codes = _unpack(words, scheme.bits, cols, f"{module}.weight_packed", tensors)
    else:
        rows, cols = parts["weight"].shape
        codes = (parts["weight"].to(torch.int16) + middle).to(torch.uint8)
    group_size = scheme.group_size
    groups = -(-cols // group_size) if group_size else 1
    scale = scale.reshape(-1, 1).expand(rows, 1) if scale.numel() in (1, rows) else scale
    if tuple(scale.shape) != (rows, groups):
        tensors.fail(
            f"{module}.weight_scale",
            f"has shape {tuple(scale.shape)}; a weight of shape {(rows, cols)} in {scheme.kind} "
            f"needs {(rows, groups)}",
        )
    zero = parts.get("weight_zero_point")
    if zero is not None:
        zero = _zero_codes(zero, scheme, rows, groups, module, tensors)
        if scheme.symmetric:  # older files store what they do not need
            if not bool((zero == middle).all()):
                tensors.fail(
                    f"{module}.weight_zero_point",
                    "is not 0 everywhere in a config group that says it is symmetric",
                )
            zero = None
    group_of = parts.get("weight_g_idx")
    if group_of is not None:
        group_of = _group_of(group_of, cols, groups, module, tensors)
    return from_codes(
        codes, scale, zero, bits=scheme.bits, group_size=group_size, dtype=dtype, group_of=group_of
    )


def _shape(stated: Tensor, words: Tensor, module: str, tensors: StoredTensors) -> tuple[int, int]:
    values = [int(size) for size in stated]
    if len(values) != 2 or values[0] != words.shape[0] or values[1] < 0:
        tensors.fail(
            f"{module}.weight_shape", f"says {values} beside {words.shape[0]} rows of packed codes"
        )
    return values[0], values[1]


def _unpack(words: Tensor, bits: int, count: int, name: str, tensors: StoredTensors) -> Tensor:
    """Return the codes of words in either packing, told apart by the number of words.

    Newer files fill words densely; older ones put 32 // bits whole codes in each.
    """
    per_word = 32 // bits
    dense, padded = -(-count * bits // 32), -(-count // per_word)
    width = words.shape[1]
    if width not in (dense, padded):
        tensors.fail(
            name, f"has {width} words a row; {count} codes of {bits} bits need {dense} or {padded}"
        )
    if dense == padded and 32 % bits and count > per_word:
        tensors.fail(
            name,
            f"has {width} words a row, which both the dense and the older padded packing of "
            f"{count} codes of {bits} bits need, so its meaning is not certain; quantize it again",
        )
    return read_stream(words, bits, count) if width == dense else read_padded(words, bits, count)


def _zero_codes(
    zero: Tensor, scheme: Scheme, rows: int, groups: int, module: str, tensors: StoredTensors
) -> Tensor:
    """Return zero points as codes, uint8 [rows, groups]."""
    name = f"{module}.weight_zero_point"
    if zero.dtype == torch.int32:  # packed along the rows
        if zero.dim() != 2 or zero.shape[1] != groups:
            tensors.fail(name, f"has shape {tuple(zero.shape)}; expected {groups} columns")
        codes = _unpack(zero.T.contiguous(), scheme.bits, rows, name, tensors)
        return codes.T.contiguous()
    zero = zero.reshape(-1, 1).expand(rows, 1) if zero.numel() in (1, rows) else zero
    if tuple(zero.shape) != (rows, groups):
        tensors.fail(name, f"has shape {tuple(zero.shape)}; expected {(rows, groups)}")
    middle = 2 ** (scheme.bits - 1)
    return zero.to(torch.int16).add_(middle).to(torch.uint8)


def _group_of(
    index: Tensor, cols: int, groups: int, module: str, tensors: StoredTensors
) -> Tensor | None:
    """Return the group of every column; None for the filler -1, which means in order."""
    if bool((index == -1).all()):
        return None
    if index.numel() != cols or int(index.min()) < 0 or int(index.max()) >= groups:
        tensors.fail(
            f"{module}.weight_g_idx", f"does not name one of {groups} groups for {cols} columns"
        )
    return index.to(torch.int64)
