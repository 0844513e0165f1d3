"""Write tiny Hugging Face model directories."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.checkpoint import StateDict
from fastgpt.scheme import BLOCK

__all__ = ["canonical", "fp8_block", "write_directory"]


def canonical(reference: Any) -> dict[str, Tensor]:
    """Return a transformers model's weights under canonical names, one per expert."""
    checkpoint = StateDict(None, reference.state_dict())
    return {name: checkpoint.read(name).detach().clone() for name in checkpoint.names()}


def fp8_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 codes and the factor per 128 x 128 block that multiplies to dequantize."""
    rows, cols = weight.shape
    scale = torch.empty(-(-rows // BLOCK), -(-cols // BLOCK))
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            block = slice(r * BLOCK, (r + 1) * BLOCK), slice(c * BLOCK, (c + 1) * BLOCK)
            scale[r, c] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scale[r, c]).to(torch.float8_e4m3fn)
    return codes, scale


def write_directory(
    path: Path, config: dict[str, Any], weights: dict[str, Tensor], num_shards: int = 1
) -> Path:
    """Write config.json and the weights, in order, spread over the shards."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(weights, path / "model.safetensors")
        return path
    names = list(weights)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]
        save_file({name: weights[name] for name in mine}, path / file)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
