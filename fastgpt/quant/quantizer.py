"""The quantizer: a model or a checkpoint in, a smaller model with its report out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.container import Metadata, write_container
from fastgpt.checkpoint.export import check_output, write_compressed_tensors
from fastgpt.checkpoint.state_dict import StateDict
from fastgpt.errors import ConfigError
from fastgpt.models import load as load_model
from fastgpt.quant.allocate import Budget, Unit, is_free, keep_sensitive, measure_units, solve
from fastgpt.quant.calibration import Calibration, token_sequences, tokens_sha256
from fastgpt.quant.evaluate import Evaluation
from fastgpt.quant.family import PlannedTensor, Stored, plan_family, quantize_family
from fastgpt.quant.foreign import quantize_module
from fastgpt.quant.policy import Policy
from fastgpt.quant.report import Report
from fastgpt.quant.search import is_searched
from fastgpt.quant.sources import TextFiles, module_checkpoint, open_source, text_of_module
from fastgpt.quant.verify import checkpoint_sha256
from fastgpt.scheme import Format

__all__ = ["QuantizedModel", "Quantizer"]

_HEADER_BYTES_PER_TENSOR = 1000  # two parts with name, shape, offsets, sums; its choice


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Run torch's kernels on one thread: the search is many small ones, and threads of torch's that
    spin between them take the cores from one another and from the core's own pool.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Quantizer:
    """Quantizes one model as a policy says.

    Codes of integer formats with groups are searched: round-to-nearest, clipped scales and GPTQ,
    after exact scalings and rotations, whichever is best by the error of the weight's output on
    calibration tokens that were held out.

    Args:
        model_or_path: an nn.Module (one of FastGPT's, one of transformers', or any module with
            linear layers), a Hugging Face directory, a FastGPT or GGUF file, or a pickled state
            dict.
        config: role -> format, with `overrides` and `sensitive`; the name of a preset; or None for
            "four-tier" (fp8 attention, int4 feed-forward, binary norms, fp16 embedding and head).
        tokenizer: a directory or tokenizer.json to put into the file; by default the one beside the
            checkpoint or at model.name_or_path. Without one the file serves token ids only.
        sensitive: names, or dotted parts of names, that stay fp16; or "auto": the weights whose
            rounding changes the model's answers most for their bytes, up to 5 % more bytes.
        device: where the arithmetic runs; by default where each weight is.
        model_config: fields of config.json, or its path, for a pickled state dict or for a module
            that does not carry them.
        in_place: change a foreign module itself instead of a copy.
        calibration: "self" (the model's own generations), a text file, texts, lists of token ids, a
            `Calibration`, or None: codes are then searched by the error of the weights alone, as
            they always are in a module of another library. Read only if codes are searched.
        budget: "4.7GB", "4.5bpw", or a `Budget`: the formats of all matrices that no override or
            sensitive name decides are then chosen by what they cost the model's answers.

    Raises:
        ConfigError: an unknown key, a malformed value.
        CheckpointError: the checkpoint cannot be read.

    >>> Quantizer("DeepSeek-R1-Distill-Qwen-1.5B").convert().save("m.pt")  # doctest: +SKIP
    """

    def __init__(
        self,
        model_or_path: nn.Module | str | os.PathLike[str],
        config: Mapping[str, Any] | str | None = None,
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        budget: Budget | str | int | None = None,
        calibration: Any = "self",
        sensitive: Sequence[str] | str = (),
        device: str | torch.device | None = None,
        model_config: Mapping[str, Any] | str | None = None,
        in_place: bool = False,
    ) -> None:
        self.budget = None if budget is None else Budget.parse(budget)
        self.calibration = Calibration.parse(calibration)
        self._keeps_sensitive = sensitive == "auto"
        self.policy = Policy.parse(config, () if self._keeps_sensitive else sensitive)
        self.report = Report()
        self._device = None if device is None else torch.device(device)
        self._in_place = in_place
        self.certificate: dict[str, Any] = {}
        self._plan: tuple[list[PlannedTensor], list[str]] | None = None
        self._allocation: dict[str, Any] = {}
        self._units: list[Unit] = []
        self._max_loss: float | None = None
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
        """Return what would be stored and how; reads weights only to keep a budget.

        Raises:
            CheckpointError: a weight is missing or has no role.
            ConfigError: a rule that matches nothing or cannot be applied, or a foreign module.
        """
        if self._checkpoint is None:
            raise ConfigError("a foreign module has no plan; convert() it")
        return self._planned()[0]

    def dry_run(self) -> Report:
        """Return a report of the sizes the file would have, without errors.

        Weights are read only where a budget or sensitive="auto" must be solved first.
        """
        if self._checkpoint is None:
            raise ConfigError("a foreign module has no plan; convert() it")
        report = Report()
        planned, report.notes = self._planned()
        report.allocation = self._allocation
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

    @_one_torch_thread()
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
            while not self._is_good_enough():
                self._restart()
                tensors = {name: _owned(stored) for name, stored in self._tensors(progress)}
            result = QuantizedModel(tensors, metadata, self.report)
        metadata.report = self.report.to_json()
        metadata.certificate = self._certificate()
        if progress:
            sys.stdout.write(f"{self.report}\n")
        return result

    @_one_torch_thread()
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
        while not self._is_good_enough():
            self._restart()
            _write(path, tensors(), metadata, num_tensors=len(self.plan()))
        if progress:
            sys.stdout.write(f"{self.report}\n")
        return self.report

    def _tensors(self, progress: bool) -> Iterator[tuple[str, Stored]]:
        assert self._checkpoint is not None
        planned, notes = self._planned()
        self.report.notes += notes
        self.report.allocation = self._allocation
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

    def _planned(self) -> tuple[list[PlannedTensor], list[str]]:
        """Return the plan with its notes, once solved the same in every run."""
        assert self._checkpoint is not None
        if self._plan is None:
            planned, notes = plan_family(self._checkpoint, self.policy)
            self._allocation = {}
            if self.budget is not None or self._keeps_sensitive:
                sequences, _ = self._calibration_tokens()
                if not sequences:
                    raise ConfigError(
                        'a budget and sensitive="auto" need calibration data; leave calibration '
                        "at 'self' or give some"
                    )
                free = [i.name for i in planned if is_free(i) and not self.policy.pins(i.name)]
                units = measure_units(self._checkpoint, free, sequences, self._device)
                if self._keeps_sensitive:
                    planned, kept = keep_sensitive(planned, units)
                    notes.append(f"sensitive, kept in fp16: {', '.join(kept) or 'none'}")
                    units = [u for u in units if not set(u.names) & set(kept)]
                if self.budget is not None:
                    self._units, self._max_loss = units, self.budget.max_kl
                    planned = self._allocate(planned, notes)
            self._plan = planned, notes
        return self._plan[0], list(self._plan[1])

    def _allocate(self, planned: list[PlannedTensor], notes: list[str]) -> list[PlannedTensor]:
        """Return the plan with the formats that fit the budget best."""
        assert self._checkpoint is not None
        assert self.budget is not None
        chosen = {name for unit in self._units for name in unit.names}
        read = self._checkpoint.read
        fixed = 0
        for item in planned:
            if item.name in chosen:
                continue
            size = item.format.nbytes(item.shape) if item.format else read(item.name).nbytes
            # A bias or router that absorbs a scale is stored in float32.
            grows = item.format is None and item.role == "kept"
            fixed += max(size, Format("fp32").nbytes(item.shape)) if grows else size
        max_bytes = self.budget.bytes
        if self.budget.bits_per_weight is not None:
            count = sum(torch.Size(item.shape).numel() for item in planned)
            max_bytes = int(self.budget.bits_per_weight * count / 8)
        solution = solve(self._units, fixed, max_bytes=max_bytes, max_loss=self._max_loss)
        formats = {
            name: option.format
            for unit, option in zip(self._units, solution.options, strict=True)
            for name in unit.names
        }
        self._allocation = {
            "bytes": solution.num_bytes,
            "max_bytes": max_bytes,
            "predicted_kl": solution.loss,
            "frontier": [[size, loss] for size, loss in solution.frontier],
            "units": [
                {
                    "names": list(unit.names),
                    "options": [
                        [str(o.format) if o.format else "kept", o.num_bytes, o.loss]
                        for o in unit.options
                    ],
                }
                for unit in self._units
            ],
        }
        return [
            replace(item, format=formats[item.name]) if item.name in formats else item
            for item in planned
        ]

    def _is_good_enough(self) -> bool:
        """Tell whether the measured figures meet the budget's limits, if it has any."""
        limits = self.budget
        if limits is None or (limits.max_kl is None and limits.min_top1 is None):
            return True
        if not self.certificate:
            raise ConfigError(
                "max_kl and min_top1 are checked by measuring, which needs calibration data kept "
                "apart for it: give 10 sequences or more, or leave calibration at 'self'"
            )
        kl, top1 = self.certificate["kl_mean"], self.certificate["same_top1"]
        return (limits.max_kl is None or kl <= limits.max_kl) and (
            limits.min_top1 is None or top1 >= limits.min_top1
        )

    def _restart(self) -> None:
        """Promote the weights that cost most, so that the next run loses less.

        Raises:
            ConfigError: a size limit forbids it, or everything is promoted already.
        """
        assert self.budget is not None
        assert self._plan is not None
        kl, top1 = self.certificate["kl_mean"], self.certificate["same_top1"]
        found = f"KL mean {kl:.4g}, same top token {100 * top1:.2f} %"
        if self.budget.max_kl is None:
            raise ConfigError(f"min_top1 cannot be met within the size budget: {found}")
        before, notes = self._plan
        loss = self._allocation["predicted_kl"]
        if not loss > 0:
            raise ConfigError(f"the limits cannot be met even with the weights kept: {found}")
        self._max_loss = 0.7 * loss * min(1.0, self.budget.max_kl / max(kl, 1e-30))
        after = self._allocate(before, notes)
        if after == before:  # the next smaller choice, whatever it gains
            self._max_loss = 0.0
            after = self._allocate(before, notes)
        names = [a.name for a, b in zip(after, before, strict=True) if a.format != b.format]
        notes.append(f"promoted to meet the limits ({found}): {', '.join(names)}")
        self._plan = after, notes
        self.report = Report()

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
                k: v
                for k, v in self._checkpoint.config.items()
                if k not in ("quantization_config", "compression_config")
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
