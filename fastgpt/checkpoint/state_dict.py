"""A checkpoint that lies in memory: the state of a module, under canonical names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.experts import ExpertSlice, split_names
from fastgpt.errors import CheckpointError
from fastgpt.scheme import QuantizedTensor

__all__ = ["StateDict"]


class StateDict(Checkpoint):
    """Named tensors of a module; fused experts of transformers 5 appear as one weight per expert.

    Args:
        config: fields of the model's config.json, or None.
        tensors: Hugging Face name -> tensor; kept by reference, never written.
    """

    def __init__(
        self, config: dict[str, Any] | None, tensors: Mapping[str, Tensor | QuantizedTensor]
    ) -> None:
        self.path = Path()
        self.config = config
        self.tokenizer_config = {}
        self.generation_config = {}
        self._tensors: dict[str, Tensor | QuantizedTensor] = {}
        self._slices: dict[str, tuple[Tensor, ExpertSlice]] = {}
        for name, tensor in tensors.items():
            parts = (
                {n: (tensor, place) for n, place in split_names(name, tuple(tensor.shape))}
                if isinstance(tensor, Tensor)
                else {}
            )
            self._slices.update(parts)
            if not parts:
                self._tensors[name] = tensor

    def names(self) -> list[str]:
        """Return the canonical weight names, sorted."""
        return sorted((*self._tensors, *self._slices))

    def __contains__(self, name: object) -> bool:
        """Tell whether a weight of that canonical name is present."""
        return name in self._tensors or name in self._slices

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Return one weight; it shares memory with the module's."""
        if name in self._slices:
            tensor, place = self._slices[name]
            return place.of(tensor)
        if name not in self._tensors:
            raise CheckpointError(f"the module has no weight {name!r}")
        return self._tensors[name]
