"""Products with weights in plain torch."""

import torch
from torch import Tensor


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, compute: torch.dtype = torch.float64
) -> Tensor:
    """weight: the dequantized weight [n, k]; the result stays in `compute`."""
    y = x.to(compute) @ weight.to(compute).T
    return y if bias is None else y + bias.to(compute)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    sorted_rows: Tensor,
    offsets: Tensor,
    rows_per_token: int,
    *,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    y = torch.zeros(len(sorted_rows), weight.shape[1], dtype=compute, device=x.device)
    for e in range(len(weight)):
        rows = sorted_rows[offsets[e] : offsets[e + 1]].long()
        y[rows] = linear(x[rows // rows_per_token], weight[e], compute=compute)
    return y


def batched_linear(x: Tensor, weight: Tensor, *, compute: torch.dtype = torch.float64) -> Tensor:
    return torch.einsum("nhk,hmk->nhm", x.to(compute), weight.to(compute))
