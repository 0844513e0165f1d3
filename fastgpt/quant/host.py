"""Moving results from a device to the host."""

from __future__ import annotations

import torch

from fastgpt.scheme import QuantizedTensor

__all__ = ["PINNED_BYTES", "on_host", "part_on_host"]

PINNED_BYTES = 256 << 20  # torch rounds up to powers of two; larger parts would waste half


def on_host(stored: torch.Tensor | QuantizedTensor) -> torch.Tensor | QuantizedTensor:
    """Return a stored tensor on the CPU."""
    if isinstance(stored, QuantizedTensor):
        parts = {suffix: part_on_host(part) for suffix, part in stored.parts.items()}
        return QuantizedTensor(stored.format, stored.shape, parts)
    return part_on_host(stored)


def part_on_host(part: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU, from a device in pinned memory unless it is large.

    torch keeps pinned memory and hands it out again: no page of it is touched for the first time,
    which takes longer than the copy.
    """
    if part.device.type == "cpu" or part.nbytes > PINNED_BYTES:
        return part.cpu()
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part)
