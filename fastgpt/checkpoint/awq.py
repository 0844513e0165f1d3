"""Read weights as AutoAWQ stores them: 4-bit codes with a zero point per group.

GEMM: `qweight` int32 [cols, rows / 8] and `qzeros` int32 [groups, rows / 8] hold eight output rows
a word, nibble i the row 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]; `scales` [groups, rows].
GEMV: `qweight` int32 [rows, cols / 8], `qzeros` int32 [rows, words], `scales` [rows, 8 * words] in
order, the groups padded to whole words and more.

Sources: AWQ, arXiv:2306.00978; the files of AutoAWQ, https://github.com/casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint.codes import Stored, from_codes, held_as, read_stream
from fastgpt.checkpoint.foreign import FLOATS, ForeignWeight, Settings, StoredTensors, by_module

__all__ = ["find_weights"]

BITS = 4
ROW_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
NEUTRAL = (
    "quant_method", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config",
    "modules_to_not_convert",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How all quantized modules are stored; group_size None: one group a row."""

    group_size: int | None
    is_gemv: bool
    has_zero_point: bool

    @property
    def kind(self) -> str:
        """Name for people."""
        scope = f"g{self.group_size}" if self.group_size else "channel"
        sign = " asymmetric" if self.has_zero_point else ""
        return f"AWQ{' GEMV' if self.is_gemv else ''} int4 {scope}{sign}"


def find_weights(
    quantization: dict[str, Any], tensors: StoredTensors, dtype: torch.dtype
) -> tuple[dict[str, ForeignWeight], set[str]]:
    """Return the quantized weights by name, and stored tensors that no weight needs (none).

    Args:
        quantization: `quantization_config` of config.json, or quant_config.json.
        tensors: what the directory holds.
        dtype: of weights that must be dequantized.

    Raises:
        UnsupportedFormat: a layout, or an unknown key, that is not read here.
        CheckpointError: a tensor is missing or does not fit the configuration.
    """
    layout = _parse(quantization, tensors.path)
    becomes = held_as(BITS, layout.group_size, symmetric=not layout.has_zero_point) or dtype
    weights = {}
    for module, present in by_module(tensors.entries, ("qweight", "scales", "qzeros")).items():
        _check(layout, module, present, tensors)
        parts = {suffix: f"{module}.{suffix}" for suffix in sorted(present)}
        decode = partial(_decode, layout, dtype, tensors, module)
        weights[f"{module}.weight"] = ForeignWeight(layout.kind, parts, decode, becomes)
    return weights, set()


def _parse(quantization: dict[str, Any], path: Path) -> Layout:
    settings = Settings(quantization, f"{path / 'config.json'}: quantization_config")
    settings.ignore(*NEUTRAL)
    settings.one_of("bits", (BITS,), settings.one_of("w_bit", (BITS,), BITS))
    group_size = settings.group_size("group_size", settings.group_size("q_group_size", 128))
    # GEMV_FAST and llm-awq interleave rows as their kernels want them; Marlin files likewise.
    version = settings.get("version", str, settings.get("format", str, "gemm")).lower()
    if version not in ("gemm", "gemv"):
        settings.unsupported("version", version, ("gemm", "gemv"))
    has_zero_point = settings.get("zero_point", bool, True)
    settings.refuse("desc_act")
    settings.ignore("sym")
    settings.done()
    return Layout(group_size, version == "gemv", has_zero_point)


def _check(layout: Layout, module: str, present: set[str], tensors: StoredTensors) -> None:
    name = f"{module}.qweight"
    first, second = tensors.require(name, f"{module}.{min(present)}", (torch.int32,)).shape
    rows, cols = (first, second * 8) if layout.is_gemv else (second * 8, first)
    groups = -(-cols // layout.group_size) if layout.group_size else 1
    why = f"{name} of shape {(first, second)} in {layout.kind}"
    scales = tensors.require(f"{module}.scales", name, FLOATS).shape
    if layout.has_zero_point or "qzeros" in present:
        tensors.require(f"{module}.qzeros", name, (torch.int32,))
    if not layout.is_gemv:
        tensors.check_shape(f"{module}.scales", (groups, rows), why)
        if "qzeros" in present:
            tensors.check_shape(f"{module}.qzeros", (groups, second), why)
        return
    if scales[0] != rows or scales[1] < groups:
        tensors.check_shape(f"{module}.scales", (rows, groups), why)
    if "qzeros" in present:
        words = tensors.entries[f"{module}.qzeros"].shape
        if words[0] != rows or words[1] * 8 < groups:
            tensors.check_shape(f"{module}.qzeros", (rows, -(-groups // 8)), why)


def _decode(
    layout: Layout,
    dtype: torch.dtype,
    tensors: StoredTensors,
    module: str,
    parts: Mapping[str, Tensor],
) -> Stored:
    """Return one weight [rows, cols] from its stored parts."""
    zero = parts.get("qzeros")
    if layout.is_gemv:
        cols = parts["qweight"].shape[1] * 8
        groups = -(-cols // layout.group_size) if layout.group_size else 1
        codes = read_stream(parts["qweight"], BITS, cols)
        scale = parts["scales"][:, :groups]
        if zero is not None:
            zero = read_stream(zero, BITS, groups).contiguous()
    else:
        codes = _rows_of_words(parts["qweight"]).T.contiguous()
        scale = parts["scales"].T
        if zero is not None:
            zero = _rows_of_words(zero).T.contiguous()
    if not layout.has_zero_point and zero is not None:
        if not bool((zero == 2 ** (BITS - 1)).all()):
            tensors.fail(
                f"{module}.qzeros", "holds zero points, but the configuration says zero_point false"
            )
        zero = None
    return from_codes(codes, scale, zero, bits=BITS, group_size=layout.group_size, dtype=dtype)


def _rows_of_words(words: Tensor) -> Tensor:
    """Return the codes of [n, rows / 8] words in the order of the rows, uint8 [n, rows]."""
    nibbles = read_stream(words, BITS, words.shape[1] * 8).unflatten(1, (words.shape[1], 8))
    ordered = torch.empty_like(nibbles)
    ordered[..., list(ROW_OF_NIBBLE)] = nibbles
    return ordered.flatten(1)
