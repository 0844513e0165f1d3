"""Write a quantized model as compressed-tensors does, for transformers and vLLM.

What a file of ours holds becomes, code by code: int4, int3, int2 "pack-quantized" with groups, int8
per channel; fp8 "naive-quantized" per channel or block, weights alone; a binary norm, whose loss is
folded into its readers, a plain vector of its two values; anything plain stays as it is. Scales are
written in the model's type where it holds all of them exactly, as llm-compressor does; else ours.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint.codes import pack_stream
from fastgpt.checkpoint.container import Metadata
from fastgpt.checkpoint.safetensors import DTYPES
from fastgpt.errors import CheckpointError, ConfigError, UnsupportedFormat
from fastgpt.scheme import BLOCK, Format, QuantizedTensor, suggest

__all__ = ["OUTPUT_FORMATS", "check_expressible", "check_output", "write_compressed_tensors"]

OUTPUT_FORMATS = ("fastgpt", "compressed-tensors")

LAYOUT_VERSION = "0.20.0"  # of the compressed-tensors package whose layout this is
SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MODEL_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def check_output(path: str | os.PathLike[str], format: str) -> None:
    """Check that a model can be saved at a path in a format, before the work is done.

    Raises:
        ConfigError: an unknown format.
        CheckpointError: a directory that holds something else.
    """
    if format == "compressed-tensors":
        _check_target(Path(path))
    if format not in OUTPUT_FORMATS:
        hint = suggest(format, OUTPUT_FORMATS)
        raise ConfigError(
            f"format is {format!r}{hint}; files are written as {' or '.join(OUTPUT_FORMATS)}"
        )


def check_expressible(name: str, fmt: Format | None, shape: tuple[int, ...]) -> None:
    """Raise UnsupportedFormat if compressed-tensors cannot express a weight of this format."""
    if fmt is None or fmt.is_plain or fmt.name == "binary":
        return
    if not _is_linear(name) or len(shape) != 2:
        raise UnsupportedFormat(
            f"{name} is {fmt} of shape {list(shape)}; compressed-tensors stores quantized weights "
            "of linear layers only: keep it in fp16"
        )
    if fmt.group_size and shape[1] % fmt.group_size:
        raise UnsupportedFormat(
            f"{name} is {fmt} with {shape[1]} columns, whose last group is short; "
            f"compressed-tensors has whole groups only: choose a group_size that divides "
            f"{shape[1]}, or fp8"
        )


def write_compressed_tensors(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, Tensor | QuantizedTensor]],
    metadata: Metadata,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model directory; it appears complete or not at all.

    Args:
        path: a new directory, an empty one, or one that this function wrote before.
        tensors: names and stored weights, written as they come.
        metadata: its configuration, tokenizer and text settings are written; the certificate and
            the report have no place in this layout.
        shard_bytes: size from which on a new file is begun.

    Raises:
        UnsupportedFormat: a weight that this layout cannot express, by name.
        CheckpointError: the directory holds something else.
    """
    target = Path(path)
    _check_target(target)
    if metadata.model_config is None:
        raise UnsupportedFormat(
            "compressed-tensors describes a model of transformers; this is a module of another "
            "library, save it to a FastGPT file"
        )
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        layout = _Layout(metadata.model_config)
        shards = _Shards(work, shard_bytes)
        for name, stored in tensors:
            for part_name, part in layout.parts(name, stored):
                shards.put(part_name, part)
        shards.finish()
        config = {**metadata.model_config, "quantization_config": layout.config()}
        _write_json(work / "config.json", config)
        _write_text(work, metadata)
        if target.exists():
            shutil.rmtree(target)
        work.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Layout:
    """Turns weights into compressed-tensors' parts and remembers what the configuration must say.

    Attributes:
        dtype: of the model, in which scales are written where it holds them.
    """

    def __init__(self, model_config: dict[str, Any]) -> None:
        named = model_config.get("dtype") or model_config.get("torch_dtype")
        self.dtype = _MODEL_DTYPES.get(str(named), torch.bfloat16)
        self._modules: dict[str, Format] = {}
        self._ignored: list[str] = []
        if model_config.get("tie_word_embeddings"):
            self._ignored.append("lm_head")  # a module without a weight of its own

    def parts(self, name: str, stored: Tensor | QuantizedTensor) -> list[tuple[str, Tensor]]:
        """Return the stored tensors of one weight.

        Raises:
            UnsupportedFormat: if the layout cannot express it.
        """
        module = name.removesuffix(".weight")
        if isinstance(stored, Tensor):
            if stored.dim() == 2 and _is_linear(name):
                self._ignored.append(module)
            return [(name, stored)]
        if stored.format.name == "binary":
            return [(name, self._narrow(stored.dequantize()))]
        check_expressible(name, stored.format, stored.shape)
        self._modules[module] = stored.format
        if stored.format.name == "fp8":
            return self._fp8(module, stored)
        if stored.format.name == "int8":
            return self._int8(module, stored)
        return self._integers(module, stored)

    def _fp8(self, module: str, stored: QuantizedTensor) -> list[tuple[str, Tensor]]:
        scale = stored.parts["scale"]
        if stored.format.scale == "channel":
            scale = scale.unsqueeze(-1)
        codes = stored.parts["packed"].view(torch.float8_e4m3fn)
        return [(f"{module}.weight", codes), (f"{module}.weight_scale", self._narrow(scale))]

    def _int8(self, module: str, stored: QuantizedTensor) -> list[tuple[str, Tensor]]:
        rows, cols = stored.shape
        codes = stored.parts["packed"].view(torch.uint8) ^ 128  # code + 128, a byte each
        words = pack_stream(codes, 8, -(-cols // 4) * 4)
        return [
            (f"{module}.weight_packed", words.contiguous().view(torch.int32)),
            (f"{module}.weight_scale", self._narrow(stored.parts["scale"].unsqueeze(-1))),
            (f"{module}.weight_shape", torch.tensor([rows, cols])),
        ]

    def _integers(self, module: str, stored: QuantizedTensor) -> list[tuple[str, Tensor]]:
        fmt, (rows, cols) = stored.format, stored.shape
        words = pack_stream(stored.codes(), fmt.bits, -(-cols * fmt.bits // 32) * 4)
        parts = [
            (f"{module}.weight_packed", words.contiguous().view(torch.int32)),
            (f"{module}.weight_scale", self._narrow(stored.parts["scale"])),
            (f"{module}.weight_shape", torch.tensor([rows, cols])),
        ]
        zero = stored.parts.get("zero_point")
        if zero is not None:  # packed along the rows
            down = pack_stream(zero.T, fmt.bits, -(-rows * fmt.bits // 32) * 4)
            zeros = down.contiguous().view(torch.int32).T.contiguous()
            parts.append((f"{module}.weight_zero_point", zeros))
        return parts

    def _narrow(self, values: Tensor) -> Tensor:
        """Return values in the model's type if it holds them exactly, else as they are."""
        narrow = values.to(self.dtype)
        return narrow if torch.equal(narrow.to(values.dtype), values) else values

    def config(self) -> dict[str, Any]:
        """Return `quantization_config`.

        Raises:
            UnsupportedFormat: if no weight is quantized.
        """
        formats = list(dict.fromkeys(self._modules.values()))
        if not formats:
            raise UnsupportedFormat(
                "no weight is quantized; compressed-tensors describes quantized weights, use the "
                "plain model directory"
            )
        groups = {
            f"group_{i}": {
                "targets": self._targets(fmt) if len(formats) > 1 else ["Linear"],
                "weights": _arguments(fmt),
                "input_activations": None,
                "output_activations": None,
                "format": _layout_name(fmt),
            }
            for i, fmt in enumerate(formats)
        }
        names = {_layout_name(fmt) for fmt in formats}
        return {
            "version": LAYOUT_VERSION,
            "quant_method": "compressed-tensors",
            "config_groups": groups,
            "format": names.pop() if len(names) == 1 else "mixed-precision",
            "ignore": self._ignored,
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "moe_sparsity_config": None,
            "sparsity_config": {},
            "transform_config": {},
        }

    def _targets(self, fmt: Format) -> list[str]:
        """Return patterns over layers and experts where they mean this format alone, else names."""
        by_pattern: dict[str, set[Format | None]] = {}
        everything = {**dict.fromkeys(self._ignored), **self._modules}
        for module, other in everything.items():
            by_pattern.setdefault(_pattern(module), set()).add(other)
        targets = []
        for module, own in self._modules.items():
            if own == fmt:
                pattern = _pattern(module)
                targets.append(pattern if by_pattern[pattern] == {fmt} else module)
        return list(dict.fromkeys(targets))


def _is_linear(name: str) -> bool:
    """Tell whether a weight is a linear layer's: what `Linear` means as a target."""
    return name.endswith(".weight") and not name.endswith("embed_tokens.weight")


def _pattern(module: str) -> str:
    """Return the pattern of a module's name in any layer.

    >>> _pattern("model.layers.3.mlp.up_proj")
    're:model[.]layers[.][0-9]+[.]mlp[.]up_proj$'
    """
    return "re:" + re.sub(r"(?<=[.])[0-9]+(?=[.])", "[0-9]+", module).replace(".", "[.]") + "$"


def _layout_name(fmt: Format) -> str:
    return "naive-quantized" if fmt.name == "fp8" else "pack-quantized"


def _arguments(fmt: Format) -> dict[str, Any]:
    """Return a scheme's `weights`."""
    common = {"dynamic": False, "group_size": None, "symmetric": fmt.symmetric}
    if fmt.name == "int8":
        return {**common, "num_bits": 8, "type": "int", "strategy": "channel"}
    if fmt.has_groups:
        size = fmt.group_size
        return {**common, "num_bits": fmt.bits, "type": "int", "strategy": "group",
                "group_size": size}  # fmt: skip
    if fmt.scale == "channel":
        return {**common, "num_bits": 8, "type": "float", "strategy": "channel"}
    return {**common, "num_bits": 8, "type": "float", "strategy": "block",
            "block_structure": [BLOCK, BLOCK]}  # fmt: skip


class _Shards:
    """Writes tensors into safetensors files of a directory, a new one when the last is full."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self.directory = directory
        self.shard_bytes = shard_bytes
        self._finished: list[Path] = []
        self._shard_of: dict[str, int] = {}
        self._total = 0
        self._begin()

    def _begin(self) -> None:
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._at = 0
        self._body = (self.directory / "body").open("w+b")

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            CheckpointError: if the name is taken.
        """
        if name in self._shard_of:
            raise CheckpointError(f"cannot write two tensors named {name!r}")
        tensor = tensor.detach().cpu().contiguous()
        if self._at and self._at + tensor.nbytes > self.shard_bytes:
            self._end()
            self._begin()
        self._body.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._at, self._at + tensor.nbytes],
        }
        self._at += tensor.nbytes
        self._total += tensor.nbytes
        self._shard_of[name] = len(self._finished)

    def _end(self) -> None:
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        file = self.directory / f"shard-{len(self._finished)}"
        self._body.seek(0)
        with file.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(self._body, out, 16 * 1024 * 1024)
            out.flush()
            os.fsync(out.fileno())
        self._body.close()
        (self.directory / "body").unlink()
        self._finished.append(file)

    def finish(self) -> None:
        """Give the files their names, and write the index where there are several."""
        self._end()
        count = len(self._finished)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        else:
            weight_map = {name: names[shard] for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            _write_json(self.directory / "model.safetensors.index.json", index)
        for file, name in zip(self._finished, names, strict=True):
            file.rename(self.directory / name)


def _check_target(target: Path) -> None:
    """Raise unless the directory is new, empty, or of this layout."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        config = json.loads((target / "config.json").read_text("utf-8"))
        if config["quantization_config"]["quant_method"] == "compressed-tensors":
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(
        f"{target} exists and is not a compressed-tensors directory; give the name of a new one"
    )


def _write_text(directory: Path, metadata: Metadata) -> None:
    if metadata.tokenizer_json is not None:
        (directory / "tokenizer.json").write_text(metadata.tokenizer_json, "utf-8")
    for name in ("tokenizer_config", "generation_config"):
        fields = getattr(metadata, name)
        if fields:
            _write_json(directory / f"{name}.json", fields)
    if metadata.chat_template is not None:
        (directory / "chat_template.jinja").write_text(metadata.chat_template, "utf-8")


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True), "utf-8")
