"""The quantizer: a model or a checkpoint in, a smaller model with its report out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.container import Metadata, write_container
from fastgpt.checkpoint.state_dict import StateDict
from fastgpt.errors import ConfigError
from fastgpt.models import load as load_model
from fastgpt.quant.calibration import Calibration, token_sequences, tokens_sha256
from fastgpt.quant.evaluate import Evaluation
from fastgpt.quant.family import PlannedTensor, Stored, plan_family, quantize_family
from fastgpt.quant.foreign import quantize_module
from fastgpt.quant.policy import Policy
from fastgpt.quant.report import Report
from fastgpt.quant.search import is_searched
from fastgpt.quant.sources import TextFiles, module_checkpoint, open_source, text_of_module
from fastgpt.quant.verify import checkpoint_sha256

__all__ = ["QuantizedModel", "Quantizer"]

_HEADER_BYTES_PER_TENSOR = 1000  # two parts with name, shape, offsets, sums; its choice


class Quantizer:
    """Quantizes one model as a policy says.

    Codes of integer formats with groups are searched: round-to-nearest, clipped scales and GPTQ,
    after exact scalings and rotations, whichever is best by the error of the weight's output on
    calibration tokens that were held out.

    Args:
        model_or_path: an nn.Module (one of FastGPT's, one of transformers', or any module with
            linear layers), a Hugging Face directory, a FastGPT file, or a pickled state dict.
        config: role -> format, with `overrides` and `sensitive`; the name of a preset; or None for
            "four-tier" (fp8 attention, int4 feed-forward, binary norms, fp16 embedding and head).
        tokenizer: a directory or tokenizer.json to put into the file; by default the one beside the
            checkpoint or at model.name_or_path. Without one the file serves token ids only.
        sensitive: names, or dotted parts of names, that stay fp16.
        device: where the arithmetic runs; by default where each weight is.
        model_config: fields of config.json, or its path, for a pickled state dict or for a module
            that does not carry them.
        in_place: change a foreign module itself instead of a copy.
        calibration: "self" (the model's own generations), a text file, texts, lists of token ids, a
            `Calibration`, or None: codes are then searched by the error of the weights alone, as
            they always are in a module of another library. Read only if codes are searched.
        budget: not available in this version; None.

    Raises:
        ConfigError: an unknown key, a malformed value.
        UnsupportedFormat: a format this version does not compute.
        CheckpointError: the checkpoint cannot be read.

    >>> Quantizer("DeepSeek-R1-Distill-Qwen-1.5B").convert().save("m.pt")  # doctest: +SKIP
    """

    def __init__(
        self,
        model_or_path: nn.Module | str | os.PathLike[str],
        config: Mapping[str, Any] | str | None = None,
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        budget: None = None,
        calibration: Any = "self",
        sensitive: Sequence[str] | str = (),
        device: str | torch.device | None = None,
        model_config: Mapping[str, Any] | str | None = None,
        in_place: bool = False,
    ) -> None:
        if budget is not None:
            raise ConfigError(f"budget={budget!r} is not available in this version; leave it out")
        self.calibration = Calibration.parse(calibration)
        self.policy = Policy.parse(config, sensitive)
        self.report = Report()
        self._device = None if device is None else torch.device(device)
        self._in_place = in_place
        self.certificate: dict[str, Any] = {}
        self._tokens: tuple[list[list[int]], list[list[int]]] | None = None
        self._module: nn.Module | None = None
        self._checkpoint: Checkpoint | None
        if isinstance(model_or_path, nn.Module):
            self._module = model_or_path
            self._checkpoint = module_checkpoint(model_or_path, model_config)
            text = text_of_module(model_or_path)
            if isinstance(self._checkpoint, Checkpoint) and self._checkpoint.tokenizer_json:
                text = TextFiles.of(self._checkpoint)
        elif isinstance(model_or_path, (str, os.PathLike)):
            self._checkpoint = open_source(model_or_path, model_config)
            text = TextFiles.of(self._checkpoint)
            if self._checkpoint.config is None:
                raise ConfigError(
                    f"{model_or_path} holds a module that is not one of FastGPT's families; load "
                    "it into its class and pass the module"
                )
        else:
            kind = type(model_or_path).__name__
            raise ConfigError(f"model_or_path is a {kind}; expected an nn.Module or a path")
        self._text = text if tokenizer is None else TextFiles.read(tokenizer)
        if tokenizer is not None and not self._text.generation_config:
            self._text = TextFiles(
                self._text.tokenizer_json,
                self._text.tokenizer_config,
                self._text.chat_template,
                text.generation_config,
            )

    def plan(self) -> list[PlannedTensor]:
        """Return what would be stored and how, without reading weights.

        Raises:
            CheckpointError: a weight is missing or has no role.
            ConfigError: a rule that matches nothing or cannot be applied, or a foreign module.
        """
        if self._checkpoint is None:
            raise ConfigError("a foreign module has no plan; convert() it")
        return plan_family(self._checkpoint, self.policy)[0]

    def dry_run(self) -> Report:
        """Return a report of the sizes the file would have, without reading weights; no errors."""
        if self._checkpoint is None:
            raise ConfigError("a foreign module has no plan; convert() it")
        report = Report()
        planned, report.notes = plan_family(self._checkpoint, self.policy)
        for item in planned:
            stored = self._checkpoint.read(item.name)  # mapped, not touched
            report.add(
                item.name,
                role=item.role,
                fmt=str(item.format) if item.format else "kept",
                num_values=torch.Size(item.shape).numel(),
                before_bytes=stored.nbytes,
                after_bytes=item.format.nbytes(item.shape) if item.format else stored.nbytes,
            )
        return report

    def convert(self, progress: bool = True) -> Any:
        """Return the quantized model: an nn.Module with `save(path)`; print its bytes by format.

        A model of a known family becomes a `QuantizedModel`. Any other module keeps its class and
        gains `save`; its linear layers are replaced, in a copy unless `in_place` was given.

        Args:
            progress: show a progress bar on a terminal and print the report.

        Raises:
            CheckpointError: a weight is missing, of a wrong shape, or holds NaN or infinity.
            ConfigError: a rule that matches nothing, or a value that does not fit its format.
        """
        self.report = Report()
        self.certificate = {}
        metadata = self._metadata()
        result: nn.Module
        if self._checkpoint is None:
            assert self._module is not None
            result = quantize_module(
                self._module,
                self.policy,
                metadata,
                self.report,
                device=self._device,
                in_place=self._in_place,
            )
        else:
            tensors = {name: _owned(stored) for name, stored in self._tensors(progress)}
            result = QuantizedModel(tensors, metadata, self.report)
        metadata.report = self.report.to_json()
        metadata.certificate = self._certificate()
        if progress:
            sys.stdout.write(f"{self.report}\n")
        return result

    def write(self, path: str | os.PathLike[str], progress: bool = True) -> Report:
        """Quantize straight into a file, one tensor in memory at a time; return the report.

        The file is the one `convert().save(path)` writes.
        """
        if self._checkpoint is None:
            self.convert(progress=progress).save(path)
            return self.report
        self.report = Report()
        self.certificate = {}
        metadata = self._metadata()

        def tensors() -> Iterator[tuple[str, Stored]]:
            yield from self._tensors(progress)
            metadata.report = self.report.to_json()
            metadata.certificate = self._certificate()

        _write(path, tensors(), metadata, num_tensors=len(self.plan()))
        if progress:
            sys.stdout.write(f"{self.report}\n")
        return self.report

    def _tensors(self, progress: bool) -> Iterator[tuple[str, Stored]]:
        assert self._checkpoint is not None
        planned, notes = plan_family(self._checkpoint, self.policy)
        self.report.notes += notes
        sequences: list[list[int]] = []
        evaluation: list[list[int]] = []
        if any(item.format is not None and not item.format.is_plain for item in planned):
            sequences, evaluation = self._calibration_tokens()
        if not any(is_searched(item.format) for item in planned):
            sequences = []
        tensors = quantize_family(self._checkpoint, planned, self.report, self._device, sequences)
        if evaluation:
            measured = Evaluation(self._checkpoint, evaluation, self._device)
            tensors = _then(measured.watch(tensors), lambda: self._certify(measured))
        return _with_bar(tensors, len(planned)) if progress else tensors

    def _certificate(self) -> dict[str, Any]:
        """Return what the file says of its origin and of the model's answers."""
        if self._checkpoint is None:
            return {}
        return {**self.certificate, "source_sha256": checkpoint_sha256(self._checkpoint)}

    def _certify(self, measured: Evaluation) -> None:
        self.certificate = measured.figures
        figures = {k: v for k, v in measured.figures.items() if k != "evaluation_tokens"}
        self.report.quality = figures

    def _calibration_tokens(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return the tokens to quantize and to measure with, the same in every run."""
        assert self._checkpoint is not None
        if self._tokens is None:
            self._tokens = token_sequences(self.calibration, self._checkpoint, self._device)
        sequences, _ = self._tokens
        self.report.calibration = {
            "source": self.calibration.describe(),
            "num_sequences": len(sequences),
            "num_tokens": sum(map(len, sequences)),
            "sha256": tokens_sha256(sequences),
        }
        return self._tokens

    def _metadata(self) -> Metadata:
        config = None
        if self._checkpoint is not None and self._checkpoint.config is not None:
            # The source's own quantization, if any, is undone: the file's records say what is what.
            config = {
                k: v for k, v in self._checkpoint.config.items() if k != "quantization_config"
            }
        return Metadata(
            model_config=config,
            policy=self.policy.to_json(),
            tokenizer_json=self._text.tokenizer_json,
            tokenizer_config=self._text.tokenizer_config,
            chat_template=self._text.chat_template,
            generation_config=self._text.generation_config,
        )


class QuantizedModel(nn.Module):
    """A quantized model of a known family, in memory.

    forward: input_ids [batch, tokens] int64 -> logits [batch, tokens, vocab] float32. The first
    call arranges the weights for the kernels of its device; `save` needs none of that.

    Attributes:
        checkpoint: the stored tensors by name, with configuration and tokenizer.
        metadata: what the file will say.
        report: bytes by role and format, and errors.
    """

    def __init__(self, tensors: dict[str, Stored], metadata: Metadata, report: Report) -> None:
        super().__init__()
        self.metadata = metadata
        self.report = report
        self.checkpoint = StateDict(metadata.model_config, tensors)
        self.checkpoint.tokenizer_json = metadata.tokenizer_json
        self.checkpoint.tokenizer_config = metadata.tokenizer_config
        self.checkpoint.chat_template = metadata.chat_template
        self.checkpoint.generation_config = metadata.generation_config
        self._tensors = tensors
        self._model: nn.Module | None = None
        self._device: torch.device | None = None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of every position."""
        if self._model is None or self._device != input_ids.device:
            self._device = input_ids.device
            self._model = load_model(self.checkpoint, device=input_ids.device)
        logits: torch.Tensor = self._model(input_ids)
        return logits

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a file that `fastgpt.load` and `fastgpt-server` open."""
        _write(path, self._tensors.items(), self.metadata, num_tensors=len(self._tensors))


def _write(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, Stored]],
    metadata: Metadata,
    *,
    num_tensors: int,
) -> None:
    # Room for the header saves writing a large file twice; a small one is copied and stays tight.
    text_bytes = len((metadata.tokenizer_json or "").encode()) * 2
    reserve = text_bytes + num_tensors * _HEADER_BYTES_PER_TENSOR + 65536
    write_container(path, tensors, metadata, header_bytes=reserve if num_tensors > 512 else 0)


def _then(
    tensors: Iterator[tuple[str, Stored]], action: Callable[[], None]
) -> Iterator[tuple[str, Stored]]:
    """Yield the same, then act."""
    yield from tensors
    action()


def _owned(stored: Stored) -> Stored:
    """Return `stored` in memory of its own where it is a view of a source that may change."""
    return stored.clone() if isinstance(stored, torch.Tensor) else stored


def _with_bar(tensors: Iterator[tuple[str, Stored]], total: int) -> Iterator[tuple[str, Stored]]:
    """Yield the same, with a progress bar on standard error while it is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("quantizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        for name, stored in tensors:
            bar.update(task, advance=1, description=name)
            yield name, stored
