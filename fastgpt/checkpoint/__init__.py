"""Reading and writing models on disk."""

import os
from pathlib import Path

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.container import Container, Metadata
from fastgpt.checkpoint.export import write_compressed_tensors
from fastgpt.checkpoint.gguf import GgufCheckpoint
from fastgpt.checkpoint.gguf_file import MAGIC
from fastgpt.checkpoint.huggingface import HuggingFaceCheckpoint
from fastgpt.checkpoint.state_dict import StateDict
from fastgpt.checkpoint.writer import write_container
from fastgpt.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "Container",
    "GgufCheckpoint",
    "HuggingFaceCheckpoint",
    "Metadata",
    "StateDict",
    "open_checkpoint",
    "write_compressed_tensors",
    "write_container",
]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face model directory, a FastGPT container or a GGUF file, whatever its suffix.

    Headers are checked now, weights are mapped when they are read. Nothing is ever unpickled.

    Raises:
        CheckpointError: if the path is missing, damaged or none of them.
        UnsupportedFormat: if its weights are stored in a way that is not read.
    """
    path = Path(path)
    if path.is_dir():
        return HuggingFaceCheckpoint(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a model directory or a FastGPT file")
    is_gguf = path.suffix == ".gguf" or _starts_with(path, MAGIC)
    return GgufCheckpoint(path) if is_gguf else Container(path)


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False  # opening it as a container says why
