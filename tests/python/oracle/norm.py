"""Row-wise operations in plain torch."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, compute: torch.dtype = torch.float64
) -> Tensor:
    wide = x.to(compute)
    result = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        result = result * weight.to(compute)
    return result.to(x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    residual.copy_((residual.float() + x.float()).to(residual.dtype))
    return rms_norm(residual.to(compute), weight, eps, compute=compute).to(x.dtype)


def rotary(
    positions: Tensor,
    cos_sin: Tensor,
    q: Tensor,
    k: Tensor | None = None,
    *,
    interleaved: bool = False,
    compute: torch.dtype = torch.float64,
) -> None:
    half = cos_sin.shape[1] // 2
    angles = cos_sin.to(compute)[positions].unsqueeze(1)
    cos, sin = angles[..., :half], angles[..., half:]
    for x in (q, k):
        if x is None:
            continue
        if interleaved:
            first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        else:
            first, second = x[..., :half], x[..., half : 2 * half]
        a, b = first.to(compute), second.to(compute)
        first.copy_((a * cos - b * sin).to(x.dtype))
        second.copy_((b * cos + a * sin).to(x.dtype))


def silu_mul(x: Tensor, *, compute: torch.dtype = torch.float64) -> Tensor:
    gate, up = x.to(compute).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def embedding(ids: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return torch.nn.functional.embedding(ids, weight).to(dtype or weight.dtype)
