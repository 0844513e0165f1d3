"""Root-mean-square normalization, alone and joined with the residual addition before it."""

from torch import Tensor

from fastgpt import ops

__all__ = ["RmsNorm"]


class RmsNorm:
    """RMS normalization with its gain, [hidden], any float dtype, on the model's device."""

    __slots__ = ("eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalized rows of x, [..., hidden]."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x to `residual` in place and return the normalized sum, [num_tokens, hidden]."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
