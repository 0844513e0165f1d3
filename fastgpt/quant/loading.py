"""Opening a quantized model again."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from fastgpt.checkpoint import open_checkpoint
from fastgpt.checkpoint.container import Container
from fastgpt.errors import ConfigError
from fastgpt.models import load as load_model
from fastgpt.quant.foreign import load_into

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    into: nn.Module | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> Any:
    """Return the model in a FastGPT file, a Hugging Face directory or a GGUF file, ready to call.

    A model of a known family is an nn.Module of FastGPT's: forward(input_ids [batch, tokens]) ->
    logits [batch, tokens, vocab], float32. Any other module is loaded into an instance of its own
    class, which the file does not name: `load(path, into=module)` fills it and returns it.

    Args:
        path: a container, a model directory or a GGUF file.
        into: an instance of the class that was quantized, for a file without a model configuration.
        device: "auto" is the GPU where there is one; ignored with `into`, which stays where it is.
        dtype: type of the activations; "auto" is the checkpoint's where the device computes in it.

    Raises:
        CheckpointError: the file is damaged or does not fit `into`.
        ConfigError: `into` is missing where it is needed, or given where it is not.
    """
    checkpoint = open_checkpoint(path)
    if isinstance(checkpoint, Container) and checkpoint.config is None:
        if into is None:
            raise ConfigError(
                f"{path} holds a module of a class FastGPT does not know; pass an instance of it: "
                "load(path, into=module)"
            )
        return load_into(checkpoint, into)
    if into is not None:
        raise ConfigError(f"{path} holds a model FastGPT builds itself; leave `into` out")
    return load_model(checkpoint, device=device, dtype=dtype)
