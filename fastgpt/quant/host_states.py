"""Activations that wait in host memory and pass through the device one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastgpt.quant.host import part_on_host

__all__ = ["HostStates"]

_MAX_LEAVING = 2  # on their way to the host; more would only hold memory


class HostStates:
    """A list of tensors in host memory; belongs to one thread.

    On a CUDA device the copies have a stream of their own: the next tensor arrives, and the last
    one leaves, while one is computed with.

    Args:
        parts: the tensors, on any device.
        device: where they are computed with.
    """

    def __init__(self, parts: Iterable[Tensor], device: torch.device) -> None:
        self._device = device
        self._parts = [part_on_host(part) for part in parts]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fork(self) -> HostStates:
        """Return the same tensors as an object of their own: they are replaced, never written."""
        other = HostStates([], self._device)
        other._parts = list(self._parts)
        return other

    def visit(self) -> Iterator[tuple[int, Tensor]]:
        """Yield position and a copy on the device of every tensor."""
        if self._copies is None:
            for at, part in enumerate(self._parts):
                yield at, part.clone()
            return
        current = torch.cuda.current_stream(self._device)
        coming = self._fetch(0) if self._parts else None
        for at in range(len(self._parts)):
            assert coming is not None
            part, arrived = coming
            # Before the work on this one is queued: the copy then waits for none of it.
            coming = self._fetch(at + 1) if at + 1 < len(self._parts) else None
            current.wait_event(arrived)
            yield at, part

    def update(self) -> Iterator[tuple[int, Tensor]]:
        """Yield as `visit` does; what was written to each tensor by the next step is kept."""
        leaving: deque[torch.cuda.Event] = deque()
        for at, part in self.visit():
            yield at, part
            if self._copies is None:
                self._parts[at] = part
                continue
            leaving.append(self._send(at, part))
            if len(leaving) > _MAX_LEAVING:
                leaving.popleft().synchronize()
        for event in leaving:
            event.synchronize()

    def _fetch(self, at: int) -> tuple[Tensor, torch.cuda.Event]:
        assert self._copies is not None
        source = self._parts[at]
        # Allocated on the stream that computes, and so given back to it in order.
        part = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            part.copy_(source, non_blocking=True)
            part.record_stream(self._copies)  # it may be dropped unused
            arrived: torch.cuda.Event = self._copies.record_event()
            return part, arrived

    def _send(self, at: int, part: Tensor) -> torch.cuda.Event:
        assert self._copies is not None
        target = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            target.copy_(part, non_blocking=True)
            part.record_stream(self._copies)
            self._parts[at] = target
            left: torch.cuda.Event = self._copies.record_event()
            return left
