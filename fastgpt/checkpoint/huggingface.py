"""Read a Hugging Face model directory: safetensors shards, configuration, tokenizer, chat template.

FP8 checkpoints as DeepSeek-R1 ships store e4m3 codes and a float32 `weight_scale_inv` per 128 x 128
block, a factor that multiplies to dequantize; here it becomes `scale`, and is never called inverse
again. Weights that another toolkit quantized are found by its reader, see `FOREIGN`.
"""

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgpt.checkpoint import awq, compressed_tensors, gptq
from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.experts import ExpertSlice, split_names
from fastgpt.checkpoint.foreign import (
    ForeignWeight,
    Settings,
    StoredTensors,
    log_imports,
    summarize,
)
from fastgpt.checkpoint.safetensors import SafetensorsFile, TensorEntry
from fastgpt.errors import CheckpointError, UnsupportedFormat
from fastgpt.scheme import BLOCK, Format, QuantizedTensor

__all__ = ["HuggingFaceCheckpoint"]

SCALE_SUFFIX = "_scale_inv"
INDEX_NAME = "model.safetensors.index.json"
FP8_BLOCK = Format.parse({"format": "fp8", "scale": "block"})
# quant_method -> what finds its weights
FOREIGN = {
    "compressed-tensors": compressed_tensors.find_weights,
    "gptq": gptq.find_weights,
    "awq": awq.find_weights,
}
# Files of tools that do not write into config.json, and their method.
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class HuggingFaceCheckpoint(Checkpoint):
    """A model directory. All headers are checked when it is opened; weights are mapped when read.

    Raises:
        CheckpointError: if config.json, the index or a shard is missing or damaged.
        UnsupportedFormat: if the weights are quantized in a way that is not read here.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        config = self._json("config.json", required=True)
        self.config = config
        method, quantization = self._quantization(config)
        self.tokenizer_json = self._text("tokenizer.json")
        self.tokenizer_config = self._json("tokenizer_config.json")
        self.generation_config = self._json("generation_config.json")
        self.chat_template = self._chat_template()
        self._files: dict[str, SafetensorsFile] = {}
        self._stored = self._open_shards()
        self._foreign: dict[str, ForeignWeight] = {}
        self._joined: set[str] = set()  # stored names that are parts of a weight, or unused
        if method in FOREIGN:
            self._find_foreign(method, quantization)
        self._slices: dict[str, ExpertSlice] = {}
        self._names = self._canonical_names()
        self._current: SafetensorsFile | None = None

    def names(self) -> list[str]:
        """Return the canonical weight names, sorted."""
        return sorted(self._names)

    def __contains__(self, name: object) -> bool:
        """Tell whether a weight of that canonical name is present."""
        return name in self._names

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Return one weight; this object keeps at most one shard mapped."""
        if name not in self._names:
            self._fail(f"has no weight {name!r}; its files hold {len(self._names)} others")
        foreign = self._foreign.get(name)
        if foreign is not None:
            return foreign.decode({k: self._read_stored(v) for k, v in foreign.parts.items()})
        place = self._slices.get(name)
        if place is not None:
            return place.of(self._read_stored(place.fused_name))
        scale_name = name + SCALE_SUFFIX
        tensor = self._read_stored(name)
        if scale_name not in self._stored:
            if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                self._fail(f"has the fp8 weight {name!r} without its scale {scale_name!r}")
            return tensor
        scale = self._read_stored(scale_name).to(torch.float32)
        if tensor.dtype != torch.float8_e4m3fn or tensor.dim() != 2:
            self._fail(
                f"has a scale for {name!r}, which is {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; expected a float8_e4m3fn matrix"
            )
        expected = tuple(-(-size // BLOCK) for size in tensor.shape)
        if tuple(scale.shape) != expected:
            self._fail(
                f"has scale {scale_name!r} of shape {tuple(scale.shape)}; the weight's shape "
                f"{tuple(tensor.shape)} needs {expected}"
            )
        parts = {"packed": tensor.view(torch.uint8), "scale": scale}
        return QuantizedTensor(FP8_BLOCK, tuple(tensor.shape), parts)

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {what}") from None

    def _text(self, name: str) -> str | None:
        path = self.path / name
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def _json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        text = self._text(name)
        if text is None:
            if required:
                fix = "give a model directory or a FastGPT file"
                if any(self.path.glob("*.gguf")):
                    fix = "it holds GGUF files, give one of them"
                self._fail(f"has no {name}; {fix}")
            return {}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._fail(f"has a {name} that is not valid JSON ({error})")
        if not isinstance(value, dict):
            self._fail(f"has a {name} that is a JSON {type(value).__name__}, not an object")
        return value

    def _chat_template(self) -> str | None:
        """Return chat_template.jinja, else tokenizer_config's template (the default of several)."""
        text = self._text("chat_template.jinja")
        if text is not None:
            return text
        value = self.tokenizer_config.get("chat_template")
        if isinstance(value, list):
            named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
            value = named.get("default")
        if value is not None and not isinstance(value, str):
            self._fail("has a tokenizer_config.json whose chat_template is not text")
        return value

    def _quantization(self, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return quantization method and settings, ("", {}) for none.

        Raises:
            UnsupportedFormat: for a method that is not read.
        """
        quantization = config.get("quantization_config", config.get("compression_config"))
        if quantization is None:
            for file, default in SETTINGS_FILES.items():
                if settings := self._json(file):
                    quantization = {"quant_method": default, **settings}
        if quantization is None:
            return "", {}
        if not isinstance(quantization, dict):
            self._fail("has a quantization_config that is not an object")
        method = quantization.get("quant_method")
        block = quantization.get("weight_block_size")
        if method in FOREIGN:
            return str(method), quantization
        if method == "fp8" and block == [BLOCK, BLOCK]:
            fields = Settings(quantization, f"{self.path / 'config.json'}: quantization_config")
            fields.ignore("quant_method", "weight_block_size", "activation_scheme", "scale_fmt")
            fields.ignore("modules_to_not_convert", "dequantize")
            fields.one_of("fmt", ("e4m3",), "e4m3")
            fields.done()
            return "fp8", quantization
        stated = f" with weight_block_size {block}" if method == "fp8" else ""
        raise UnsupportedFormat(
            f"{self.path} is quantized by {method!r}{stated}; read are 'fp8' with "
            f"[{BLOCK}, {BLOCK}], {', '.join(map(repr, FOREIGN))}; use the unquantized model"
        )

    def _find_foreign(self, method: str, quantization: dict[str, Any]) -> None:
        """Fill in the weights that another toolkit quantized."""
        assert self.config is not None
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        dtype = DTYPES.get(str(named), torch.bfloat16)
        entries = {name: self._entry(name) for name in self._stored}
        tensors = StoredTensors(self.path, entries, self._stored)
        self._foreign, unused = FOREIGN[method](quantization, tensors, dtype)
        if not self._foreign:
            self._fail(
                f"says it is quantized by {method!r} but holds no such weights; if they are plain, "
                f"remove quantization_config from config.json, or {' or '.join(SETTINGS_FILES)}"
            )
        self._joined = unused.union(*(weight.parts.values() for weight in self._foreign.values()))
        for name in self._foreign.keys() & self._stored.keys():
            if name not in self._joined:
                tensors.fail(name, "is there twice, plain and quantized")
        self.imported = summarize(self._foreign, tensors)
        log_imports(self.path, self.imported)

    def _open_shards(self) -> dict[str, str]:
        """Open every shard; return stored tensor name -> shard file name."""
        index = self._json(INDEX_NAME)
        if not index:
            return self._open_single()
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            self._fail(f"has a {INDEX_NAME} without a weight_map")
        shards = set()
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                self._fail(f"has a {INDEX_NAME} that puts {name!r} in {shard!r}, not a file name")
            shards.add(shard)
        missing = sorted(shard for shard in shards if not (self.path / shard).is_file())
        if missing:
            self._fail(
                f"lacks {len(missing)} of {len(shards)} shards, first {missing[0]}; "
                "complete the download"
            )
        for shard in sorted(shards):
            self._files[shard] = SafetensorsFile(self.path / shard)
        for name, shard in weight_map.items():
            if name not in self._files[shard].entries:
                self._fail(f"has a {INDEX_NAME} that puts {name!r} in {shard}, which lacks it")
        return weight_map

    def _open_single(self) -> dict[str, str]:
        found = sorted(path.name for path in self.path.glob("*.safetensors"))
        if len(found) != 1:
            pickled = any(self.path.glob("*.bin")) or any(self.path.glob("*.pt"))
            hint = "; pickled weights are not read, convert them" if pickled and not found else ""
            self._fail(
                f"has {len(found)} .safetensors files and no {INDEX_NAME}; expected one file or "
                f"an index{hint}"
            )
        self._files[found[0]] = SafetensorsFile(self.path / found[0])
        return dict.fromkeys(self._files[found[0]].entries, found[0])

    def _entry(self, stored_name: str) -> TensorEntry:
        return self._files[self._stored[stored_name]].entries[stored_name]

    def _canonical_names(self) -> set[str]:
        """Return the names with fused experts split and scales joined to their weights."""
        names = set(self._foreign)
        for name in self._stored:
            if name in self._joined:
                continue
            split = dict(split_names(name, self._entry(name).shape))
            self._slices.update(split)
            is_scale = name.endswith(SCALE_SUFFIX) and name[: -len(SCALE_SUFFIX)] in self._stored
            if not split and not is_scale:
                names.add(name)
        return names | set(self._slices)

    def _read_stored(self, stored_name: str) -> Tensor:
        file = self._files[self._stored[stored_name]]
        if self._current is not file:
            if self._current is not None:
                self._current.unmap()
            self._current = file
        return file.read(stored_name)
