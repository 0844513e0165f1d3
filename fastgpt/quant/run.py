"""One run of the quantizer into a file: block by block, so that it can stop and go on.

A block, usually a decoder layer, is read from the mapped source, quantized, written, and let go;
the journal then says that it is there.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fastgpt.checkpoint.container import Metadata
from fastgpt.checkpoint.writer import Commit, ContainerWriter
from fastgpt.errors import CheckpointError
from fastgpt.quant.digest import DigestingCheckpoint
from fastgpt.quant.journal import Journal, JournalBlock
from fastgpt.quant.layerwise import layer_index
from fastgpt.quant.plan import PlannedTensor, blocks_of
from fastgpt.quant.progress import Progress
from fastgpt.quant.report import Report
from fastgpt.scheme import QuantizedTensor
from fastgpt.units import format_bytes

__all__ = ["check_room", "header_room", "named_errors", "run_blocks", "write_blocks"]

Stored = torch.Tensor | QuantizedTensor

_HEADER_BYTES_PER_TENSOR = 2000  # parts with names, shapes, offsets, sums; format; the report
_HEADER_BYTES_PER_TOKEN = 8  # of the evaluation
_HEADER_BYTES_PER_OPTION = 200  # of a budget's unit
_MAX_BEHIND = 3  # blocks that are made and not in the journal; a run that is killed loses them
_COPIED_BYTES = 64 << 20  # smaller files are copied behind their header and have no spare room


def header_room(
    metadata: Metadata, planned: Sequence[PlannedTensor], num_tokens: int, num_options: int
) -> int:
    """Return the bytes to reserve for a header, so that a large file is written once."""
    num_bytes = sum(i.format.nbytes(i.shape) for i in planned if i.format is not None)
    if num_bytes < _COPIED_BYTES:
        return 0
    return (
        65536
        + len((metadata.tokenizer_json or "").encode()) * 2
        + len(planned) * _HEADER_BYTES_PER_TENSOR
        + num_tokens * _HEADER_BYTES_PER_TOKEN
        + num_options * _HEADER_BYTES_PER_OPTION
    )


def check_room(output: Path, num_bytes: int) -> None:
    """Raise CheckpointError unless a file of that size can be written.

    Raises:
        CheckpointError: no such directory, or too little space.
    """
    if not output.parent.is_dir():
        raise CheckpointError(f"{output} cannot be written: {output.parent} is no directory")
    if output.is_dir():
        raise CheckpointError(f"{output} is a directory; name a file in it, such as m.pt")
    if not os.access(output.parent, os.W_OK):
        raise CheckpointError(f"{output} cannot be written: {output.parent} is read-only for you")
    free = shutil.disk_usage(output.parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{output} will take {format_bytes(num_bytes)}, but {output.parent} has "
            f"{format_bytes(free)} free; make room or choose another place"
        )


@contextmanager
def named_errors(output: Path) -> Iterator[None]:
    """Turn what the file system refuses into a CheckpointError that says what can be done."""
    try:
        yield
    except OSError as error:
        left = " What is done is kept: resume when there is room" if Journal.exists(output) else ""
        raise CheckpointError(
            f"{output} cannot be written: {error.strerror or error}.{left}"
        ) from error


def run_blocks(
    tensors: Iterator[tuple[str, Stored]],
    planned: Sequence[PlannedTensor],
    add: Callable[[str, Stored], None],
    commit: Callable[[list[PlannedTensor]], None],
    settle: Callable[[], None] = lambda: None,
) -> None:
    """Hand on every tensor, and tell when a block of them is complete, and when all are."""
    for items in blocks_of(planned):
        for item in items:
            name, stored = next(tensors)
            assert name == item.name
            add(name, stored)
            del stored  # the next weight is not to be made while this one is held
        commit(items)
    settle()
    for name, _ in tensors:  # lets the generator do what comes behind the last tensor
        raise AssertionError(f"{name} was not planned")


def write_blocks(
    writer: ContainerWriter,
    journal: Journal,
    source: DigestingCheckpoint,
    tensors: Iterator[tuple[str, Stored]],
    planned: Sequence[PlannedTensor],
    report: Report,
    progress: Progress,
) -> None:
    """Write what the journal lacks; it learns of a block when it is on the disk.

    That is looked for when the next ones are made, so hashing and writing take no time of their
    own, but for the last block and where a few are behind.
    """
    num_done = len(journal.blocks)
    # The head is large and comes last: hashing it then would be waited for.
    source.start(i.name for i in planned if layer_index(i.name) is None)
    blocks = iter(range(len(blocks_of(planned))))
    behind: deque[tuple[Commit, list[str]]] = deque()

    def add(name: str, stored: Stored) -> None:
        if name not in writer:
            writer.add(name, stored)

    def settle(at_most: int = 0) -> None:
        while len(behind) > at_most or (behind and behind[0][0].is_written()):
            commit, names = behind.popleft()
            _note(journal, commit, report, source, names)

    def commit(items: list[PlannedTensor]) -> None:
        names = [item.name for item in items]
        is_done = next(blocks) < num_done
        progress.advance(items, report.tensors, is_resumed=is_done)
        if is_done:
            source.digests(names)  # the source is what it was
            return
        behind.append((writer.commit(), names))
        settle(_MAX_BEHIND)

    run_blocks(tensors, planned, add, commit, settle)


def _note(
    journal: Journal,
    commit: Commit,
    report: Report,
    source: DigestingCheckpoint,
    names: list[str],
) -> None:
    """Put a block into the journal when it is on the disk."""
    block = JournalBlock(commit.wait(), report.entries(names), source.digests(names))
    journal.add_block(block)
