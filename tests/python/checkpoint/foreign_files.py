"""Writers of other toolkits' files, and what the files mean: NumPy alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

MODULE = "model.layers.0.mlp.up_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words_of(codes: np.ndarray, bits: int, *, padded: bool = False) -> np.ndarray:
    """Return int32 words with code j of a row at its bit j * bits, across the borders of words.

    padded: each word holds 32 // bits whole codes instead, as older files have it.
    """
    rows, cols = codes.shape
    per_word = 32 // bits
    count = -(-cols // per_word) if padded else -(-cols * bits // 32)
    out = np.zeros((rows, count + 1), np.uint64)
    for j in range(cols):
        word, shift = divmod(j, per_word) if padded else divmod(j * bits, 32)
        moved = codes[:, j].astype(np.uint64) << np.uint64(shift * bits if padded else shift)
        out[:, word] |= moved & np.uint64(0xFFFFFFFF)
        out[:, word + 1] |= moved >> np.uint64(32)
    return out[:, :count].astype(np.uint32).view(np.int32)


@dataclass(frozen=True)
class Weight:
    """A weight (code - zero) * scale as every toolkit means it.

    codes [rows, cols], scale float32 and zero [rows, groups]; group_size None: one group a row.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int
    group_size: int | None
    symmetric: bool
    group_of: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """The weight, element by element, float32."""
        rows, cols = self.codes.shape
        out = np.empty((rows, cols), np.float32)
        for r in range(rows):
            for c in range(cols):
                g = c // self.group_size if self.group_size else 0
                if self.group_of is not None:
                    g = int(self.group_of[c])
                steps = int(self.codes[r, c]) - int(self.zero[r, g])
                out[r, c] = np.float32(steps) * np.float32(self.scale[r, g])
        return out


def make(
    bits: int = 4,
    group_size: int | None = 32,
    *,
    rows: int = 24,
    cols: int = 96,
    symmetric: bool = False,
    seed: int = 0,
    scale_dtype: Any = np.float16,
) -> Weight:
    """Return a random weight: all codes occur, no two groups share a scale."""
    rng = np.random.default_rng([seed, bits, rows, cols])
    groups = -(-cols // group_size) if group_size else 1
    codes = rng.integers(0, 2**bits, (rows, cols), dtype=np.int64)
    scale = rng.uniform(0.002, 0.05, (rows, groups)).astype(scale_dtype).astype(np.float32)
    zero = rng.integers(1, 2**bits, (rows, groups), dtype=np.int64)
    if symmetric:
        zero[:] = 2 ** (bits - 1)
    return Weight(codes, scale, zero, bits, group_size, symmetric)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def scales(array: np.ndarray, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return tensor(array.astype(np.float32)).to(dtype)


def gptq(weight: Weight, module: str = MODULE, *, v2: bool = False) -> dict[str, torch.Tensor]:
    """Return what AutoGPTQ (v1) or GPTQModel (v2) stores."""
    cols = weight.codes.shape[1]
    stored_zero = weight.zero if v2 else (weight.zero - 1) % 2**weight.bits
    order = weight.group_of
    if order is None:
        order = np.arange(cols) // (weight.group_size or cols)
    return {
        f"{module}.qweight": tensor(words_of(weight.codes, weight.bits).T),
        f"{module}.qzeros": tensor(words_of(stored_zero.T, weight.bits)),
        f"{module}.scales": scales(weight.scale.T),
        f"{module}.g_idx": tensor(order.astype(np.int32)),
    }


def gptq_config(weight: Weight, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": weight.bits,
        "group_size": weight.group_size or -1,
        "sym": weight.symmetric,
        "desc_act": weight.group_of is not None,
        "checkpoint_format": "gptq",
        **more,
    }


def awq(weight: Weight, module: str = MODULE, *, gemv: bool = False) -> dict[str, torch.Tensor]:
    """Return what AutoAWQ stores in its GEMM or GEMV version."""
    if gemv:
        rows, groups = weight.zero.shape
        width = -(-groups // 8) * 2  # whole words, and more of them than needed
        zero = np.zeros((rows, width * 8), np.int64)
        zero[:, :groups] = weight.zero
        scale = np.zeros((rows, width * 8), np.float32)
        scale[:, :groups] = weight.scale
        return {
            f"{module}.qweight": tensor(words_of(weight.codes, 4)),
            f"{module}.qzeros": tensor(words_of(zero, 4)),
            f"{module}.scales": scales(scale),
        }

    def interleaved(by_output: np.ndarray) -> np.ndarray:
        n, rows = by_output.shape
        out = np.zeros((n, rows // 8), np.uint32)
        for word in range(rows // 8):
            for nibble, place in enumerate(AWQ_ORDER):
                out[:, word] |= by_output[:, 8 * word + place].astype(np.uint32) << 4 * nibble
        return out.view(np.int32)

    return {
        f"{module}.qweight": tensor(interleaved(weight.codes.T)),
        f"{module}.qzeros": tensor(interleaved(weight.zero.T)),
        f"{module}.scales": scales(weight.scale.T),
    }


def awq_config(weight: Weight, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": weight.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        **more,
    }


def packed(
    weight: Weight,
    module: str = MODULE,
    *,
    padded: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> dict[str, torch.Tensor]:
    """Return what compressed-tensors stores as pack-quantized."""
    out = {
        f"{module}.weight_packed": tensor(words_of(weight.codes, weight.bits, padded=padded)),
        f"{module}.weight_scale": scales(weight.scale, scale_dtype),
        f"{module}.weight_shape": torch.tensor(weight.codes.shape),
    }
    if not weight.symmetric:
        zero = words_of(weight.zero.T, weight.bits, padded=padded).T
        out[f"{module}.weight_zero_point"] = tensor(zero)
    if weight.group_of is not None:
        out[f"{module}.weight_g_idx"] = tensor(weight.group_of.astype(np.int32))
    return out


def int8s(weight: Weight, module: str = MODULE) -> dict[str, torch.Tensor]:
    """Return what compressed-tensors stores as int-quantized: a signed byte a value."""
    middle = 2 ** (weight.bits - 1)
    out = {
        f"{module}.weight": tensor((weight.codes - middle).astype(np.int8)),
        f"{module}.weight_scale": scales(weight.scale, torch.bfloat16),
    }
    if not weight.symmetric:
        out[f"{module}.weight_zero_point"] = tensor((weight.zero - middle).astype(np.int8))
    return out


def ct_args(weight: Weight) -> dict[str, Any]:
    return {
        "num_bits": weight.bits,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": "group" if weight.group_size else "channel",
        "group_size": weight.group_size,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "actorder": None,
        "block_structure": None,
    }


def ct_config(
    args: dict[str, Any], layout: str = "pack-quantized", targets: Any = ("Linear",), **more: Any
) -> dict[str, Any]:
    group = {
        "targets": list(targets),
        "weights": args,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
        **more,
    }


@dataclass(frozen=True)
class Fp8:
    """An e4m3 weight with scales per row, block, or for all of it."""

    codes: np.ndarray  # uint8 [rows, cols]
    scale: np.ndarray  # float32
    block: tuple[int, int] | None = None

    @property
    def values(self) -> np.ndarray:
        """The weight, element by element, float32."""
        rows, cols = self.codes.shape
        numbers = self.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        out = np.empty((rows, cols), np.float32)
        for r in range(rows):
            for c in range(cols):
                place = (r // self.block[0], c // self.block[1]) if self.block else (r, 0)
                scale = (
                    self.scale if self.scale.size > 1 else np.broadcast_to(self.scale, (rows, 1))
                )
                out[r, c] = numbers[r, c] * scale[place]
        return out

    def tensors(self, module: str = MODULE) -> dict[str, torch.Tensor]:
        return {
            f"{module}.weight": tensor(self.codes).view(torch.float8_e4m3fn),
            f"{module}.weight_scale": tensor(self.scale),
        }


def make_fp8(
    scope: str = "channel", *, rows: int = 40, cols: int = 96, block: tuple[int, int] = (128, 128)
) -> Fp8:
    """Return a random fp8 weight; scope is tensor, channel or block. NaN codes do not occur."""
    rng = np.random.default_rng([7, rows, cols])
    codes = rng.integers(0, 256, (rows, cols)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x3B
    shape: tuple[int, ...] = {"tensor": (1,), "channel": (rows, 1)}.get(
        scope, (-(-rows // block[0]), -(-cols // block[1]))
    )
    scale = rng.uniform(1e-4, 1e-2, shape).astype(np.float32)
    return Fp8(codes, scale, block if scope == "block" else None)


def fp8_args(scope: str, block: list[int] | None = None) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": scope,
        "group_size": None,
        "block_structure": block,
        "dynamic": False,
    }


def write(path: Path, tensors: dict[str, torch.Tensor], quantization: Any, **config: Any) -> Path:
    """Write a model directory that holds these tensors and says so."""
    path.mkdir(parents=True, exist_ok=True)
    fields = {"model_type": "llama", "torch_dtype": "float32", **config}
    if quantization is not None:
        fields["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(fields))
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    return path


__all__ = [
    "AWQ_ORDER",
    "MODULE",
    "Fp8",
    "Weight",
    "awq",
    "awq_config",
    "ct_args",
    "ct_config",
    "fp8_args",
    "gptq",
    "gptq_config",
    "int8s",
    "make",
    "make_fp8",
    "packed",
    "replace",
    "words_of",
    "write",
]  # fmt: skip
