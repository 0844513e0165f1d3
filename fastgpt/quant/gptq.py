"""GPTQ: codes of one column after another, each column making up for the errors before it.

Groups are static: the grid is fixed before the first column is rounded, so columns may go in any
order and the stored weight needs no permutation.
Source: GPTQ, arXiv:2210.17323; the blocked form is its section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import ops
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
    # Columns are stored as rows, [cols, rows]: every step touches whole ones.
    left = weight.T[order].float()
    scale, zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()
    group = order // grid.group_size
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for first in range(0, cols, _BLOCK):
        last = min(first + _BLOCK, cols)
        block = slice(first, last)
        _, errors = ops.gptq_round(
            left[block],
            scale[group[block]],
            zero[group[block]],
            spread[block, block],
            2**grid.bits - 1,
            codes=codes[block],
        )
        left[last:].addmm_(spread[block, last:].T, errors, alpha=-1)
    out = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    out[:, order] = codes.T
    return out


def _upper_factor(gram: Tensor, damping: float) -> Tensor:
    """Return upper U with inverse(gram + damping) = Uᵀ U; damps more until it exists.

    With the columns in reverse order, gram = L Lᵀ; in their own order L is an upper R with gram =
    R Rᵀ, and U is its inverse. So the inverse of gram, and its own factor, are never computed.
    """
    reverse = gram.flip(0, 1).to(torch.float64)
    diagonal = reverse.diagonal()
    mean = diagonal.mean().clamp(min=1e-30)
    added = 0.0
    while True:
        diagonal += (damping - added) * mean
        added = damping
        lower, info = torch.linalg.cholesky_ex(reverse)
        if int(info) == 0:
            break
        del lower  # the largest things in memory; two of them at a time
        damping = max(10 * damping, 1e-6)
    del reverse, diagonal
    inverse = torch.eye(len(lower), dtype=torch.float64, device=gram.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    return inverse.float().flip(0, 1)
