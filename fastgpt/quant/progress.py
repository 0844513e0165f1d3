"""How far a run is: a bar on a terminal, a line of log per block elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from fastgpt.logging import get_logger
from fastgpt.memory import device_memory
from fastgpt.quant.layerwise import layer_index
from fastgpt.quant.plan import PlannedTensor, blocks_of
from fastgpt.quant.report import TensorEntry
from fastgpt.units import format_bytes

__all__ = ["Progress"]

_log = get_logger(__name__)
_PAGE_BYTES = 4096  # of /proc/self/statm


class Progress:
    """Shows blocks as they are finished: layer, time left, error and memory.

    A context manager; on standard error while that is a terminal, else through the package's
    logger, which is silent unless a program sets it up.

    Args:
        planned: everything that will be made.
        device: whose memory is shown; None is the CPU.
        is_shown: False shows nothing.
    """

    def __init__(
        self, planned: Sequence[PlannedTensor], device: torch.device | None, is_shown: bool
    ) -> None:
        blocks = blocks_of(planned)
        self._num_layers = sum(layer_index(items[0].name) is not None for items in blocks)
        self._num_values = sum(_num_values(items) for items in blocks)
        self._done_values = self._new_values = 0
        self._device = device or torch.device("cpu")
        self._is_shown = is_shown
        self._start_s = time.monotonic()
        console = Console(stderr=True)
        is_bar = is_shown and console.is_terminal
        columns = (TextColumn("quantizing"), BarColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=console, transient=True) if is_bar else None
        if self._bar is not None:
            self._task = self._bar.add_task("", total=self._num_values)

    def __enter__(self) -> Progress:
        """Start the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def advance(
        self,
        items: Sequence[PlannedTensor],
        entries: Mapping[str, TensorEntry],
        *,
        is_resumed: bool = False,
    ) -> None:
        """Count a block; what a run before this one did takes no time and tells nothing of it."""
        if not self._is_shown:
            return
        count = _num_values(items)
        self._done_values += count
        self._new_values += 0 if is_resumed else count
        if is_resumed:
            self._start_s = time.monotonic()
        words = [
            self._place(items[0].name),
            *self._left(),
            *_error([entries[i.name] for i in items]),
        ]
        words.append(self._memory())
        if is_resumed:
            words.append("was done before")
        if self._bar is not None:
            self._bar.update(self._task, advance=count, description=", ".join(words))
        else:
            _log.info("%s", ", ".join(words))

    def _place(self, name: str) -> str:
        index = layer_index(name)
        return name if index is None else f"layer {index + 1}/{self._num_layers}"

    def _left(self) -> list[str]:
        if not self._new_values:
            return []
        seconds = time.monotonic() - self._start_s
        left = seconds * (self._num_values - self._done_values) / self._new_values
        minutes, seconds = divmod(round(left), 60)
        return [f"{minutes}:{seconds:02d} left"]

    def _memory(self) -> str:
        if self._device.type == "cpu":
            num_pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
            return f"{format_bytes(num_pages * _PAGE_BYTES)} resident"
        free, total = device_memory(self._device)
        return f"{format_bytes(total - free)} of {format_bytes(total)} on {self._device}"


def _num_values(items: Sequence[PlannedTensor]) -> int:
    return sum(torch.Size(item.shape).numel() for item in items)


def _error(entries: Sequence[TensorEntry]) -> list[str]:
    """Return the block's mean error, of outputs where it is known."""
    for kind, errors in (
        ("output", [e.error for e in entries if e.of == "outputs"]),
        ("weight", [e.nmse for e in entries if e.nmse > 0]),
    ):
        if errors:
            return [f"{kind} error {100 * sum(errors) / len(errors):.2g} %"]
    return []
