"""GPTQ: codes of one column after another, each column making up for the errors before it.

Groups are static: the grid is fixed before the first column is rounded, so columns may go in any
order and the stored weight needs no permutation.
Source: GPTQ, arXiv:2210.17323; the blocked form is its section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.quant.grid import Grid

__all__ = ["gptq_codes"]

_BLOCK = 128  # columns whose errors are spread to the rest of the row by one product


def gptq_codes(
    weight: Tensor, grid: Grid, gram: Tensor, *, by_use: bool = True, damping: float = 0.01
) -> Tensor:
    """Return codes, uint8 [rows, cols], that keep weight @ x near for inputs x of that Gram matrix.

    Args:
        weight: [rows, cols] float32.
        grid: where the codes lie.
        gram: mean of x xᵀ over the inputs, [cols, cols] float32.
        by_use: take the most used columns first; else in their own order, which is better where
            neighbouring columns are the correlated ones.
        damping: share of the mean diagonal that is added to it.
    """
    cols = weight.shape[1]
    order = torch.arange(cols, device=weight.device)
    if by_use:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    spread = _upper_factor(gram[order][:, order], damping)
    scale, zero = (part[:, order] for part in grid.columns(cols))
    left = weight[:, order].float().clone()
    codes = torch.empty_like(left, dtype=torch.uint8)
    top = float(2**grid.bits - 1)
    for first in range(0, cols, _BLOCK):
        last = min(first + _BLOCK, cols)
        block, errors = left[:, first:last], torch.empty_like(left[:, first:last])
        local = spread[first:last, first:last]
        for i in range(last - first):
            j = first + i
            column = block[:, i]
            code = (torch.round(column / scale[:, j]) + zero[:, j]).clamp_(0, top)
            codes[:, j] = code.to(torch.uint8)
            error = (column - (code - zero[:, j]) * scale[:, j]) / local[i, i]
            block[:, i + 1 :].addr_(error, local[i, i + 1 :], alpha=-1)
            errors[:, i] = error
        left[:, last:].addmm_(errors, spread[first:last, last:], alpha=-1)
    out = torch.empty_like(codes)
    out[:, order] = codes
    return out


def _upper_factor(gram: Tensor, damping: float) -> Tensor:
    """Return upper U with inverse(gram + damping) = Uᵀ U; damps more until it exists."""
    gram = gram.double()
    mean = gram.diagonal().mean().clamp(min=1e-30)
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    while True:
        lower, info = torch.linalg.cholesky_ex(gram + damping * mean * eye)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0:
                factor: Tensor = upper.float()
                return factor
        damping = max(10 * damping, 1e-6)
