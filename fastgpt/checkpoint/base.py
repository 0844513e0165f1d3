"""What every kind of checkpoint offers the rest of the house."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from fastgpt.checkpoint.foreign import Imported
    from fastgpt.scheme import QuantizedTensor

__all__ = ["Checkpoint"]


class Checkpoint(ABC):
    """A model on disk: its weights by name, its configuration and its text settings.

    Names are canonical whatever the source: Hugging Face names, one weight per expert, a quantized
    weight listed once under its plain name. Reading is thread-safe and changes nothing.

    Attributes:
        path: directory or file it was opened from.
        config: fields of config.json; None for a model that is not in `fastgpt.models`.
        tokenizer_json: text of tokenizer.json, or None.
        tokenizer_config: fields of tokenizer_config.json, {} if there is none.
        chat_template: Jinja source, or None.
        generation_config: fields of generation_config.json, {} if there is none.
        imported: the weights another toolkit quantized, by kind; empty where there are none.
        fp16_overflows: module or weight name -> largest activation seen there, where it comes too
            near to float16's largest value; {} if there is none or nobody looked.
    """

    path: Path
    config: dict[str, Any] | None = None
    tokenizer_json: str | None = None
    tokenizer_config: dict[str, Any]
    chat_template: str | None = None
    generation_config: dict[str, Any]
    imported: Sequence[Imported] = ()
    fp16_overflows: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def names(self) -> list[str]:
        """Return the canonical weight names, sorted."""

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Tell whether a weight of that canonical name is present."""

    @abstractmethod
    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Return one weight as memory-mapped CPU tensors, paged in when touched.

        Raises:
            CheckpointError: if there is no such weight or its bytes are damaged.
        """

    def nbytes(self, name: str) -> int:
        """Return the bytes of one weight in the model that was opened."""
        return self.read(name).nbytes
