"""Whether float16 holds a model's activations: the largest seen at every linear layer.

float16 ends at 65504. Qwen models are known to pass it in the input of a down_proj or in the
residual stream, and everything behind that is infinite or NaN. What calibration sees is a sample,
so half of the range is kept as a margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["FP16_LIMIT", "ActivationRanges"]

FP16_LIMIT = 3e4
_FLOAT32_MAX = 3.4028234663852886e38  # JSON knows no infinity
_NUM_NAMED = 10


class ActivationRanges:
    """The largest |x| of linear layers' inputs and outputs and of the residual stream, by name."""

    def __init__(self) -> None:
        self._amax: dict[str, Tensor] = {}

    def add(self, names: Sequence[str], *activations: Tensor) -> None:
        """Count activations at the weights `names`, which run as one; NaN counts as infinite."""
        for x in activations:
            if x.numel() == 0:
                continue
            low, high = torch.aminmax(x.detach())
            amax = torch.maximum(-low, high).float()
            before = self._amax.get(names[0])
            # Not read back here: a device would have to be waited for at every layer.
            amax = amax if before is None else torch.maximum(before, amax)
            self._amax.update(dict.fromkeys(names, amax))

    def values(self) -> dict[str, float]:
        """Return name -> largest |x|."""
        found = {name: float(amax) for name, amax in self._amax.items()}
        return {
            name: min(_FLOAT32_MAX, math.inf if math.isnan(amax) else amax)
            for name, amax in found.items()
        }

    def fp16_overflows(self) -> dict[str, float]:
        """Return what comes too near to float16's largest value, the largest first."""
        over = [(name, amax) for name, amax in self.values().items() if amax > FP16_LIMIT]
        return dict(sorted(over, key=lambda item: -item[1])[:_NUM_NAMED])

    def to_json(self) -> dict[str, Any]:
        """Return the report's entry: the largest value and where it is, and all of them."""
        values = self.values()
        if not values:
            return {}
        largest = max(values, key=lambda name: values[name])
        return {
            "amax": values[largest],
            "at": largest,
            "limit": FP16_LIMIT,
            "fp16_overflows": self.fp16_overflows(),
            "tensors": values,
        }
