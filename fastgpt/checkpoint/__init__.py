"""Reading and writing models on disk."""

import os
from pathlib import Path

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.container import Container, Metadata, write_container
from fastgpt.checkpoint.export import write_compressed_tensors
from fastgpt.checkpoint.huggingface import HuggingFaceCheckpoint
from fastgpt.checkpoint.state_dict import StateDict
from fastgpt.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "Container",
    "HuggingFaceCheckpoint",
    "Metadata",
    "StateDict",
    "open_checkpoint",
    "write_compressed_tensors",
    "write_container",
]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face model directory or a FastGPT container file, whatever its suffix.

    Headers are checked now, weights are mapped when they are read. Nothing is ever unpickled.

    Raises:
        CheckpointError: if the path is missing, damaged or neither of the two.
    """
    path = Path(path)
    if path.is_dir():
        return HuggingFaceCheckpoint(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a model directory or a FastGPT file")
    return Container(path)
