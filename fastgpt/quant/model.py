"""A quantized model of a known family, as `Quantizer.convert` returns it."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import nn

from fastgpt.checkpoint.container import Container, Metadata
from fastgpt.checkpoint.export import check_output, write_compressed_tensors
from fastgpt.checkpoint.state_dict import StateDict
from fastgpt.checkpoint.writer import write_container
from fastgpt.models import load as load_model
from fastgpt.quant.report import Report
from fastgpt.scheme import QuantizedTensor

__all__ = ["QuantizedModel"]


class QuantizedModel(nn.Module):
    """A quantized model of a known family, in memory.

    forward: input_ids [batch, tokens] int64 -> logits [batch, tokens, vocab] float32. The first
    call arranges the weights for the kernels of its device; `save` needs none of that.

    Attributes:
        checkpoint: the stored tensors by name, with configuration and tokenizer.
        metadata: what the file will say.
        report: bytes by role and format, and errors.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor | QuantizedTensor],
        metadata: Metadata,
        report: Report,
        header_bytes: int = 0,
    ) -> None:
        super().__init__()
        self.metadata = metadata
        self.report = report
        self.checkpoint = StateDict(metadata.model_config, tensors)
        self.checkpoint.tokenizer_json = metadata.tokenizer_json
        self.checkpoint.tokenizer_config = metadata.tokenizer_config
        self.checkpoint.chat_template = metadata.chat_template
        self.checkpoint.generation_config = metadata.generation_config
        self.checkpoint.fp16_overflows = metadata.fp16_overflows
        self._tensors = tensors
        self._header_bytes = header_bytes
        self._model: nn.Module | None = None
        self._device: torch.device | None = None

    @staticmethod
    def of(container: Container, report: Report, header_bytes: int) -> QuantizedModel:
        """Return the model in a file; its tensors are views of the file."""
        tensors = {name: container.read(name) for name in container.metadata.tensors}
        return QuantizedModel(tensors, container.metadata, report, header_bytes)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of every position."""
        if self._model is None or self._device != input_ids.device:
            self._device = input_ids.device
            self._model = load_model(self.checkpoint, device=input_ids.device)
        logits: torch.Tensor = self._model(input_ids)
        return logits

    def save(self, path: str | os.PathLike[str], *, format: str = "fastgpt") -> None:
        """Write the model to a file that `fastgpt.load` and `fastgpt-server` open.

        Args:
            path: the file, or with "compressed-tensors" a new directory.
            format: "fastgpt", or "compressed-tensors" for transformers and vLLM, without
                certificate and report.

        Raises:
            UnsupportedFormat: a weight that compressed-tensors cannot express, by name.
        """
        check_output(path, format)
        if format == "compressed-tensors":
            write_compressed_tensors(path, self._tensors.items(), self.metadata)
            return
        write_container(path, self._tensors.items(), self.metadata, header_bytes=self._header_bytes)
