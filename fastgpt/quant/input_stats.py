"""Sums over the inputs of a weight: what the search for its codes needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["InputStats"]


@dataclass
class InputStats:
    """Inputs of one weight (or of several that read the same), [tokens, cols].

    Attributes:
        fit, held_out: sums of x xᵀ over the calibration tokens and over the held-out ones,
            [cols, cols] float32; or of x², [cols], where the matrix would not fit.
        num_fit, num_held_out: tokens in each.
    """

    fit: Tensor
    held_out: Tensor
    num_fit: int = 0
    num_held_out: int = 0

    @staticmethod
    def empty(cols: int, device: torch.device, *, full: bool) -> InputStats:
        """Return sums of nothing; `full` keeps whole matrices, else their diagonals."""
        shape = (cols, cols) if full else (cols,)
        return InputStats(torch.zeros(shape, device=device), torch.zeros(shape, device=device))

    @property
    def is_full(self) -> bool:
        """True where whole Gram matrices were kept."""
        return self.fit.ndim == 2

    def add(self, x: Tensor, *, held_out: bool) -> None:
        """Count the rows of x [tokens, cols]; nothing waits for the device."""
        if x.shape[0] == 0:
            return
        x = x.detach()
        total = self.held_out if held_out else self.fit
        if not self.is_full:
            total.add_(x.float().square().sum(0))
        elif x.device.type == "cuda" and x.dtype != torch.float32:
            # Tensor cores: products of 16-bit values are exact in float32, in which they add up.
            torch.addmm(total, x.T, x, out_dtype=torch.float32, out=total)
        else:
            total.addmm_(x.float().T, x.float())
        if held_out:
            self.num_held_out += x.shape[0]
        else:
            self.num_fit += x.shape[0]

    def gram(self) -> Tensor:
        """Return the mean of x xᵀ (or of x²) over the calibration tokens."""
        return self.fit / max(1, self.num_fit)

    def held_out_gram(self) -> Tensor:
        """Return the same over the held-out tokens."""
        return self.held_out / max(1, self.num_held_out)
