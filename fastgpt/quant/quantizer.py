"""The quantizer: a model or a checkpoint in, a smaller model with its report out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from fastgpt import _C, ops
from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.container import FORMAT_VERSION, Container, Metadata
from fastgpt.checkpoint.writer import ContainerWriter
from fastgpt.errors import ConfigError
from fastgpt.layers.weights import Source
from fastgpt.memory import GPTMemoryPool
from fastgpt.quant.allocate import Budget
from fastgpt.quant.calibration import Calibration, token_sequences, tokens_sha256
from fastgpt.quant.digest import DigestingCheckpoint
from fastgpt.quant.evaluate import Evaluation
from fastgpt.quant.family import Stored, quantize_family
from fastgpt.quant.foreign import quantize_module
from fastgpt.quant.journal import Journal, source_names_sha256
from fastgpt.quant.model import QuantizedModel
from fastgpt.quant.plan import PlannedTensor
from fastgpt.quant.planner import Planner
from fastgpt.quant.policy import Policy
from fastgpt.quant.progress import Progress
from fastgpt.quant.ranges import ActivationRanges
from fastgpt.quant.report import Report
from fastgpt.quant.run import check_room, header_room, named_errors, run_blocks, write_blocks
from fastgpt.quant.search import is_searched
from fastgpt.quant.sources import TextFiles, module_checkpoint, open_source, text_of_module
from fastgpt.scheme import EIGHT_BIT

__all__ = ["QuantizedModel", "Quantizer"]


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
        rotate: rotate the residual stream, folded into the weights, before they are rounded:
            "never", "always", or "auto": where the quantized model's answers are the better for it
            on held-out calibration sequences, which quantizes it twice more. The model must have a
            head of its own.
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
        rotate: str = "never",
        device: str | torch.device | None = None,
        model_config: Mapping[str, Any] | str | None = None,
        in_place: bool = False,
    ) -> None:
        self.budget = None if budget is None else Budget.parse(budget)
        self.calibration = Calibration.parse(calibration)
        self._keeps_sensitive = sensitive == "auto"
        if rotate not in ("never", "always", "auto"):
            raise ConfigError(f"rotate is {rotate!r}; expected 'never', 'always' or 'auto'")
        self._rotate = rotate
        self._device = None if device is None else torch.device(device)
        self.policy = Policy.parse(config, () if self._keeps_sensitive else sensitive).on(
            _eight_bit_gains(self._device or torch.device("cpu"))
        )
        self.report = Report()
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
        if rotate != "never" and self._checkpoint is None:
            raise ConfigError(
                "a foreign module's residual stream is not known; leave rotate at 'never'"
            )
        self._planner = Planner(
            self._checkpoint,
            self.policy,
            self.budget,
            keeps_sensitive=self._keeps_sensitive,
            rotate=rotate,
            device=self._device,
            calibration=lambda: self._calibration_tokens()[0],
        )
        self._text = text if tokenizer is None else TextFiles.read(tokenizer)
        if tokenizer is not None and not self._text.generation_config:
            self._text = TextFiles(
                self._text.tokenizer_json,
                self._text.tokenizer_config,
                self._text.chat_template,
                text.generation_config,
            )

    @_one_torch_thread()
    def plan(self) -> list[PlannedTensor]:
        """Return what would be stored and how; reads weights only to keep a budget.

        Raises:
            CheckpointError: a weight is missing or has no role.
            ConfigError: a rule that matches nothing or cannot be applied, or a foreign module.
        """
        if self._checkpoint is None:
            raise ConfigError("a foreign module has no plan; convert() it")
        return self._planner.planned()

    @_one_torch_thread()
    def dry_run(self) -> Report:
        """Return a report of the sizes the file would have, without errors.

        Weights are read only where a budget or sensitive="auto" must be solved first.
        """
        if self._checkpoint is None:
            raise ConfigError("a foreign module has no plan; convert() it")
        report = Report()
        planned = self._planner.planned()
        report.notes = list(self._planner.notes)
        report.allocation = self._planner.allocation
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
    def convert(
        self, progress: bool = True, *, resume: str | os.PathLike[str] | None = None
    ) -> Any:
        """Return the quantized model: an nn.Module with `save(path)`; print its bytes by format.

        A model of a known family becomes a `QuantizedModel`. Any other module keeps its class and
        gains `save`; its linear layers are replaced, in a copy unless `in_place` was given.

        Args:
            progress: show progress and print the report.
            resume: a file: write it as `write(resume, resume=True)` does, and return the model in
                it, mapped rather than held in memory. For a known family only.

        Raises:
            CheckpointError: a weight is missing, of a wrong shape, or holds NaN or infinity.
            ConfigError: a rule that matches nothing, or a value that does not fit its format.
        """
        if resume is not None:
            if self._checkpoint is None:
                raise ConfigError("resume is for models of a known family; leave it out")
            self.write(resume, progress, resume=True)
            return QuantizedModel.of(Container(resume), self.report, self._header_bytes)
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
            metadata.report = self.report.to_json()
        else:
            while True:
                tensors = self._collect(progress)
                if self._planner.is_met_by(self.certificate):
                    break
                self._planner.promote(self.certificate)
            self._complete(metadata)
            result = QuantizedModel(tensors, metadata, self.report, self._header_bytes)
        if progress:
            sys.stdout.write(f"{self.report}\n")
        return result

    @_one_torch_thread()
    def write(
        self, path: str | os.PathLike[str], progress: bool = True, *, resume: bool = False
    ) -> Report:
        """Quantize straight into a file, one block in memory at a time; return the report.

        The file is the one `convert().save(path)` writes; it replaces what is there. While the run
        lasts, `.<name>.partial` and `.<name>.journal` stand beside it, and stay when it is killed.

        Args:
            path: the file.
            progress: show progress and print the report.
            resume: go on where a run into this file stopped, if one did. The result is the same,
                byte for byte.

        Raises:
            CheckpointError: as in `convert`; or the file system refuses the file.
            ConfigError: as in `convert`; or the run that stopped was another one.
        """
        output = Path(path)
        if self._checkpoint is None:
            with named_errors(output):
                self.convert(progress=progress).save(path)
            return self.report
        check_room(output, 0)
        with named_errors(output):
            journal = Journal(output, self._key(), resume=resume)
            keep = True
            try:
                self._tokens = journal.tokens or self._tokens
                if journal.plan is not None:
                    self._planner.restore(journal.plan)
                while not self._attempt(output, journal, progress):
                    self._planner.promote(self.certificate)
                    journal.set_plan(self._planner.to_json())
                keep = False
            finally:
                journal.close(keep=keep and bool(journal.blocks))
        if progress:
            sys.stdout.write(f"{self.report}\n")
        return self.report

    def _attempt(self, output: Path, journal: Journal, progress: bool) -> bool:
        """Write the file by the present plan; return whether it meets the limits."""
        assert self._checkpoint is not None
        self.report = Report()
        self.certificate = {}
        planned = self._planner.planned()
        self._data(planned)
        if journal.tokens is None and self._tokens is not None:
            journal.set_tokens(*self._tokens)
        if journal.plan is None:
            journal.set_plan(self._planner.to_json())
        expected: dict[str, str] = {}
        for block in journal.blocks:
            self.report.restore(block.report)
            expected.update(block.source)
        metadata = self._metadata()
        check_room(output, self._stored_bytes(planned) if not journal.blocks else 0)
        source = DigestingCheckpoint(self._checkpoint, expected)
        writer = ContainerWriter(
            output,
            header_bytes=self._header_bytes,
            body=journal.body,
            blocks=[block.written for block in journal.blocks],
        )
        finished = frozenset(n for block in journal.blocks for n in block.report)
        try:
            tensors = self._tensors(
                source, lambda n: writer.read(n) if n in finished else None, writer.read
            )
            with Progress(planned, self._device, progress) as shown:
                write_blocks(writer, journal, source, tensors, planned, self.report, shown)
            if not self._planner.is_met_by(self.certificate):
                return False
            self._complete(metadata, source)
            writer.finish(metadata)
            return True
        finally:
            writer.close(keep=bool(journal.blocks))

    def _collect(self, progress: bool) -> dict[str, Stored]:
        """Return all tensors by the present plan."""
        assert self._checkpoint is not None
        self.report = Report()
        self.certificate = {}
        planned = self._planner.planned()
        tensors: dict[str, Stored] = {}
        with Progress(planned, self._device, progress) as shown:
            run_blocks(
                self._tensors(self._checkpoint),
                planned,
                lambda name, stored: tensors.update({name: _owned(stored)}),
                lambda items: shown.advance(items, self.report.tensors),
            )
        return tensors

    def _tensors(
        self,
        source: Checkpoint,
        finished: Callable[[str], Stored | None] = lambda name: None,
        read_back: Source | None = None,
    ) -> Iterator[tuple[str, Stored]]:
        """Yield every tensor; behind the last, report and certificate are complete."""
        assert self._checkpoint is not None
        planned = self._planner.planned()
        self.report.notes = list(self._planner.notes)
        self.report.allocation = self._planner.allocation
        sequences, evaluation = self._data(planned)
        ranges = ActivationRanges()
        pool = GPTMemoryPool(self._device or "cpu")
        tensors = quantize_family(
            self._planner.quantized_source(source),
            planned,
            self.report,
            self._device,
            sequences,
            pool=pool,
            finished=finished,
            ranges=ranges,
        )
        if evaluation:
            measured = Evaluation(self._checkpoint, evaluation, self._device, ranges, pool)
            yield from measured.watch(tensors, read_back)
            self.certificate = measured.figures
            self.report.quality = {
                k: v for k, v in measured.figures.items() if k != "evaluation_tokens"
            }
        else:
            yield from tensors
        self.report.ranges = ranges.to_json()

    def _data(self, planned: list[PlannedTensor]) -> tuple[list[list[int]], list[list[int]]]:
        """Return the tokens to search codes with and to measure with; none where none are read."""
        is_plain = all(item.format is None or item.format.is_plain for item in planned)
        if is_plain and not self._planner.has_limits:
            return [], []
        sequences, evaluation = self._calibration_tokens()
        is_used = any(is_searched(item.format) for item in planned)
        return sequences if is_used else [], evaluation

    @property
    def _header_bytes(self) -> int:
        """Room for the header, the same in every run."""
        planned = self._planner.planned()
        num_tokens = sum(map(len, self._tokens[1])) if self._tokens else 0
        num_options = sum(len(u["options"]) for u in self._planner.allocation.get("units", []))
        return header_room(self._metadata(), planned, num_tokens, num_options)

    def _complete(self, metadata: Metadata, source: DigestingCheckpoint | None = None) -> None:
        """Put report and certificate into the metadata."""
        assert self._checkpoint is not None
        source = source or DigestingCheckpoint(self._checkpoint)
        metadata.report = self.report.to_json()
        metadata.certificate = {**self.certificate, "source_sha256": source.sha256()}
        metadata.fp16_overflows = self.report.ranges.get("fp16_overflows", {})

    def _key(self) -> dict[str, Any]:
        """Return what decides the bytes of the file."""
        assert self._checkpoint is not None
        on = self._device or torch.device("cpu")
        return {
            # Names alone: values are compared as they are read.
            "source": source_names_sha256(self._checkpoint),
            "policy": self.policy.to_json(),
            "sensitive": "auto" if self._keeps_sensitive else None,
            "rotate": self._rotate,
            "budget": None if self.budget is None else asdict(self.budget),
            "calibration": self.calibration.key(),
            "text": hashlib.sha256(msgspec.json.encode(asdict(self._text))).hexdigest(),
            "device": str(torch.cuda.get_device_name(on)) if on.type == "cuda" else _C.cpu_isa(),
            "version": [FORMAT_VERSION, _version(), torch.__version__],
        }

    def _stored_bytes(self, planned: list[PlannedTensor]) -> int:
        assert self._checkpoint is not None
        read = self._checkpoint.read
        return sum(i.format.nbytes(i.shape) if i.format else read(i.name).nbytes for i in planned)

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


def _eight_bit_gains(device: torch.device) -> list[str]:
    """Return the formats whose activations the device multiplies faster than 16-bit ones."""
    return [name for name in EIGHT_BIT if ops.has_eight_bit_product(name, device)]


def _version() -> str:
    try:
        return importlib.metadata.version("fastgpt-optimizer")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


def _owned(stored: Stored) -> Stored:
    """Return `stored` in pageable memory of its own: not in a source that may change."""
    if isinstance(stored, torch.Tensor):
        return torch.empty_like(stored, pin_memory=False).copy_(stored)
    parts = {k: part.clone() if part.is_pinned() else part for k, part in stored.parts.items()}
    return replace(stored, parts=parts)
