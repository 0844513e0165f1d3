"""Weights of a mapped source brought into pinned memory before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from fastgpt.layers.weights import Source
from fastgpt.quant.host import PINNED_BYTES
from fastgpt.scheme import QuantizedTensor

__all__ = ["ReadAhead"]

Stored = torch.Tensor | QuantizedTensor

_AHEAD_BYTES = 512 << 20  # page-locking runs at 2.8 GB/s, once
_NUM_THREADS = 4  # one takes the page faults of a mapped file at 1.5 to 3 GB/s


class ReadAhead:
    """Reads weights, those of `names` ahead of need; belongs to one thread, and ends with a `with`.

    A copy from pinned memory runs at the rate of the link; from a mapped file it would wait for
    every page. Names may be left out, but not asked for in another order.

    Args:
        source: name -> weight in mapped memory.
        names: in the order in which they will be asked for.
    """

    def __init__(self, source: Source, names: Iterable[str]) -> None:
        self._source = source
        self._names = deque(names)
        self._wanted = set(self._names)
        self._coming: deque[tuple[str, int, Future[Stored]]] = deque()
        self._threads = ThreadPoolExecutor(_NUM_THREADS)

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def read(self, name: str) -> Stored:
        """Return a weight, in pinned memory if it was read ahead."""
        if name not in self._wanted:
            return self._source(name)
        self._fill()
        while True:
            coming, _, copy = self._coming.popleft()
            self._wanted.discard(coming)
            self._fill()
            if coming == name:
                return copy.result()

    def _fill(self) -> None:
        """Start copies until enough bytes are on their way, at least one."""
        ahead = sum(num_bytes for _, num_bytes, _ in self._coming)
        while self._names and (ahead < _AHEAD_BYTES or not self._coming):
            name = self._names.popleft()
            stored = self._source(name)  # a view: its pages are touched by the thread
            self._coming.append((name, stored.nbytes, self._threads.submit(_pinned, stored)))
            ahead += stored.nbytes


def _pinned(stored: Stored) -> Stored:
    if isinstance(stored, QuantizedTensor):
        parts = {suffix: _part_pinned(part) for suffix, part in stored.parts.items()}
        return QuantizedTensor(stored.format, stored.shape, parts)
    return _part_pinned(stored)


def _part_pinned(part: torch.Tensor) -> torch.Tensor:
    if part.nbytes > PINNED_BYTES:
        return part
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part)
