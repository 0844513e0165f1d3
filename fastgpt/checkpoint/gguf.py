"""Read GGUF files as llama.cpp writes them: weights, configuration and tokenizer in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.codes import Stored, round_to
from fastgpt.checkpoint.foreign import Imported, log_imports
from fastgpt.checkpoint.gguf_blocks import BLOCK_TYPES, PLAIN, decode
from fastgpt.checkpoint.gguf_file import GgufParts
from fastgpt.checkpoint.gguf_model import (
    ROPE_FACTORS,
    Place,
    places,
    rope_factors_scaling,
    to_config,
    token_ids,
)
from fastgpt.checkpoint.gguf_tokenizer import tokenizer_config, tokenizer_json
from fastgpt.errors import CheckpointError
from fastgpt.logging import get_logger
from fastgpt.scheme import Format

__all__ = ["GgufCheckpoint"]

_logger = get_logger(__name__)

_SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k"}


class GgufCheckpoint(Checkpoint):
    """A model in a GGUF file, or in parts of one: give any of them.

    Headers are checked when it is opened; weights are mapped when read.

    Rows of q and k that the llama conversion reordered for another rotary layout are put back.

    Raises:
        CheckpointError: the file is damaged, or lacks what its architecture needs.
        UnsupportedFormat: an architecture, a tensor type, or a key that is not read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = GgufParts(path)
        metadata = self._file.metadata
        config = to_config(metadata, self._file.tensors, self.path)
        if ROPE_FACTORS in self._file.tensors:
            factors = self._file.raw(ROPE_FACTORS).contiguous().view(torch.float32).flatten()
            config["rope_scaling"] = rope_factors_scaling(
                factors, config["rope_theta"], config["head_dim"], self.path
            )
        self.config = config
        architecture = str(metadata["general.architecture"])
        self._places = places(architecture, config, self._file.tensors, self.path)
        self.tokenizer_json = tokenizer_json(metadata)
        self.tokenizer_config = tokenizer_config(metadata)
        self.chat_template = self.tokenizer_config.get("chat_template")
        self.generation_config = _generation_config(metadata)
        self.imported = self._imported()
        log_imports(self.path, self.imported)
        if self.tokenizer_json is None:
            _logger.warning(
                "%s has a tokenizer of kind %r, rule %r, which is not read; give one with "
                "--tokenizer DIR, or send token ids",
                self.path,
                metadata.get("tokenizer.ggml.model"),
                metadata.get("tokenizer.ggml.pre"),
            )

    def names(self) -> list[str]:
        """Return the canonical weight names, sorted."""
        return sorted(self._places)

    def __contains__(self, name: object) -> bool:
        """Tell whether a weight of that canonical name is present."""
        return name in self._places

    def read(self, name: str) -> Stored:
        """Return one weight, decoded from its blocks."""
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(
                f"{self.path} has no weight {name!r}; it holds {len(self._places)} others"
            )
        if place.values is not None:
            return self._joined_keys_and_values(place, place.values)
        tensor = self._file.tensors[place.tensor]
        raw, shape = self._file.raw(place.tensor), tensor.shape
        if place.expert is not None:
            rows = shape[1]
            raw, shape = raw[place.expert * rows : (place.expert + 1) * rows], shape[1:]
        if place.rotated_heads:
            raw = self._reordered(raw, shape, place)
        if len(shape) == 1 and place.rotated_heads:
            return decode(raw.reshape(1, -1), tensor.kind, shape[0])[0]  # type: ignore[index]
        stored = decode(raw, tensor.kind, shape[-1])
        return stored.view(shape) if isinstance(stored, Tensor) else stored

    def _reordered(self, raw: Tensor, shape: tuple[int, ...], place: Place) -> Tensor:
        """Undo the llama conversion: pairs (i, i + d / 2) of a head lie next to each other."""
        heads, rows = place.rotated_heads, shape[0]
        if heads < 1 or rows % (2 * heads):
            raise CheckpointError(
                f"{self.path}: {place.tensor!r} has {rows} rows, which {heads} heads do not share"
            )
        order = torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).flatten()
        return raw.view(rows, -1)[order]

    def _joined_keys_and_values(self, place: Place, values: str) -> Tensor:
        """Return kv_b [heads (keys + values), latent] of its two parts, keys transposed."""
        parts = []
        for name in (place.tensor, values):
            tensor = self._file.tensors[name]
            if len(tensor.shape) != 3:
                raise CheckpointError(
                    f"{self.path}: {name!r} has shape {tensor.shape}; expected [heads, .., ..]"
                )
            stored = decode(self._file.raw(name), tensor.kind, tensor.shape[-1])
            dense = stored if isinstance(stored, Tensor) else stored.dequantize()
            parts.append(dense.to(torch.float32).view(tensor.shape))
        keys, value = parts[0].transpose(1, 2), parts[1]
        if keys.shape[0] != value.shape[0] or keys.shape[2] != value.shape[2]:
            raise CheckpointError(
                f"{self.path}: {place.tensor!r} of shape {tuple(parts[0].shape)} and {values!r} "
                f"of shape {tuple(value.shape)} do not belong together"
            )
        return round_to(torch.cat((keys, value), 1).flatten(0, 1), torch.float16)

    def _imported(self) -> list[Imported]:
        groups: dict[str, list[str]] = {}
        for name, tensor in self._file.tensors.items():
            if tensor.kind not in PLAIN:
                groups.setdefault(tensor.kind, []).append(name)
        out = []
        for kind, names in sorted(groups.items()):
            becomes = BLOCK_TYPES[kind].becomes
            sizes = (self._file.tensors[n].end - self._file.tensors[n].start for n in names)
            out.append(
                Imported(
                    f"GGUF {kind}",
                    str(becomes).removeprefix("torch."),
                    isinstance(becomes, Format),
                    len(names),
                    sum(sizes),
                    min(names),
                )
            )
        return out


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    fields = token_ids(metadata)
    for key, name in _SAMPLING.items():
        if (value := metadata.get(f"general.sampling.{key}")) is not None:
            fields[name] = value
    return fields
