"""What can be quantized: a checkpoint on disk, a pickled state dict, or a module in memory."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoint import open_checkpoint
from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.state_dict import StateDict
from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.models.registry import FAMILIES

__all__ = ["TextFiles", "is_known", "module_checkpoint", "open_source", "text_of_module"]


@dataclass(frozen=True)
class TextFiles:
    """What a server needs besides weights; see `Checkpoint` for the fields."""

    tokenizer_json: str | None = None
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(checkpoint: Checkpoint) -> TextFiles:
        """Return the text settings a checkpoint carries."""
        return TextFiles(
            checkpoint.tokenizer_json,
            checkpoint.tokenizer_config,
            checkpoint.chat_template,
            checkpoint.generation_config,
        )

    @staticmethod
    def read(path: str | os.PathLike[str]) -> TextFiles:
        """Read them from a directory, or from a tokenizer.json and its neighbours.

        Raises:
            CheckpointError: no tokenizer.json there, or a file that cannot be parsed.
        """
        directory = Path(path)
        if directory.name == "tokenizer.json":
            directory = directory.parent
        tokenizer = directory / "tokenizer.json"
        if not tokenizer.is_file():
            raise CheckpointError(
                f"{path} has no tokenizer.json; give its directory, or convert the tokenizer with "
                "transformers' save_pretrained"
            )
        config = _read_json(directory / "tokenizer_config.json")
        template = directory / "chat_template.jinja"
        chat_template = template.read_text("utf-8") if template.is_file() else None
        if chat_template is None:
            chat_template = _default_template(config.get("chat_template"))
        _read_json(tokenizer)  # a damaged tokenizer is found now, not when the server starts
        return TextFiles(
            tokenizer.read_text("utf-8"),
            config,
            chat_template,
            _read_json(directory / "generation_config.json"),
        )


def open_source(
    path: str | os.PathLike[str], model_config: Mapping[str, Any] | str | None
) -> Checkpoint:
    """Open a Hugging Face directory, a container, a GGUF file or a pickled state dict.

    A pickled `.pt` or `.bin` is read through torch's weights-only unpickler, which runs no code;
    its configuration is `model_config` or the config.json beside it.

    Raises:
        CheckpointError: not a checkpoint, or a pickle that holds more than tensors.
    """
    file = Path(path)
    if not file.is_file() or not _is_pickle(file):
        if model_config is not None:
            raise ConfigError(
                "model_config is for a pickled state dict; this checkpoint has its own"
            )
        return open_checkpoint(path)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file} is a pickle that holds more than tensors, or is damaged "
            f"({str(error).splitlines()[0]}). If you trust it, load it yourself with "
            "torch.load(path, weights_only=False) and pass the module"
        ) from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not a map of tensors")
    checkpoint = StateDict(_config_of(model_config, file.parent), dict(state))
    checkpoint.path = file
    if (file.parent / "tokenizer.json").is_file():
        _set_text(checkpoint, TextFiles.read(file.parent))
    return checkpoint


def module_checkpoint(
    module: torch.nn.Module, model_config: Mapping[str, Any] | str | None = None
) -> Checkpoint | None:
    """Return the state of a module of a known family under canonical names; None for another.

    The family is recognized by `module.config` (an object with to_dict(), or a mapping).
    """
    own = getattr(module, "checkpoint", None)
    if isinstance(own, Checkpoint):  # a model that fastgpt.load returned
        return own
    config = _config_of(model_config, None) if model_config is not None else _module_config(module)
    if config is None or not is_known(config):
        return None
    state = {**dict(module.named_parameters(remove_duplicate=False)), **module.state_dict()}
    return StateDict(config, {name: tensor.detach() for name, tensor in state.items()})


def text_of_module(module: torch.nn.Module) -> TextFiles:
    """Return the text settings found at module.name_or_path, a directory; none without one.

    The module's own generation_config, where it has one, wins over the directory's.
    """
    text = TextFiles()
    for holder in (module, getattr(module, "config", None)):
        path = getattr(holder, "name_or_path", None)
        if isinstance(path, str) and path and (Path(path) / "tokenizer.json").is_file():
            text = TextFiles.read(path)
            break
    own: Any = getattr(module, "generation_config", None)
    if hasattr(own, "to_diff_dict"):
        text = replace(text, generation_config={**text.generation_config, **own.to_diff_dict()})
    return text


def is_known(config: Mapping[str, Any]) -> bool:
    """Tell whether a configuration names a family in `fastgpt.models`."""
    names = config.get("architectures") or []
    return any(
        config.get("model_type") == family.name or set(names) & set(family.architectures)
        for family in FAMILIES
    )


def _module_config(module: torch.nn.Module) -> dict[str, Any] | None:
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return None
    fields = dict(config)
    # A module made in memory may not name its class; ours are all causal language models.
    if not fields.get("architectures"):
        fields["architectures"] = [type(module).__name__]
    return json.loads(json.dumps(fields, default=str))  # type: ignore[no-any-return]


def _default_template(value: Any) -> str | None:
    """Return a tokenizer_config's template; of several named ones the default."""
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _config_of(
    model_config: Mapping[str, Any] | str | None, directory: Path | None
) -> dict[str, Any] | None:
    if isinstance(model_config, Mapping):
        return dict(model_config)
    if model_config is not None:
        file = Path(model_config)
        return _read_json(file / "config.json" if file.is_dir() else file, required=True)
    if directory is not None and (directory / "config.json").is_file():
        return _read_json(directory / "config.json")
    raise CheckpointError(
        "a pickled state dict does not say what model it is; put its config.json beside it or pass "
        "model_config="
    )


def _read_json(file: Path, *, required: bool = False) -> dict[str, Any]:
    if not file.is_file():
        if required:
            raise CheckpointError(f"{file} does not exist")
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def _set_text(checkpoint: Checkpoint, text: TextFiles) -> None:
    checkpoint.tokenizer_json = text.tokenizer_json
    checkpoint.tokenizer_config = text.tokenizer_config
    checkpoint.chat_template = text.chat_template
    checkpoint.generation_config = text.generation_config


def _is_zip(file: Path) -> bool:
    return zipfile.is_zipfile(file)


def _is_pickle(file: Path) -> bool:
    with file.open("rb") as opened:
        start = opened.read(4)
    return start == b"PK\x03\x04" or start[:1] == b"\x80"
