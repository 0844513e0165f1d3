"""Mixture of experts in plain torch."""

import torch
from torch import Tensor


def moe_route(
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    *,
    num_groups: int = 1,
    topk_groups: int = 1,
    scoring: str = "softmax",
    renormalize: bool = False,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias
    if topk_groups < num_groups:
        groups = choice.unflatten(1, (num_groups, logits.shape[1] // num_groups))
        width = groups.shape[-1]
        best = groups.topk(min(2, width) if correction_bias is not None else 1, dim=-1)
        kept = _best(best.values.sum(-1), topk_groups)
        mask = torch.ones(groups.shape[:2], dtype=torch.bool, device=logits.device)
        mask.scatter_(1, kept, False)
        choice = groups.masked_fill(mask.unsqueeze(-1), float("-inf")).flatten(1)
    expert_ids = _best(choice, top_k)
    weights = scores.gather(1, expert_ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return expert_ids.int(), weights * scaling


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values in descending order, the lower index among equals."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def moe_sort(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = expert_ids.flatten()
    sorted_rows = flat.argsort(stable=True).int()
    counts = torch.bincount(flat.long(), minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return sorted_rows, offsets


def moe_combine(
    y: Tensor,
    weights: Tensor,
    shared: Tensor | None = None,
    *,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    result = (y.to(compute) * weights.to(compute).unsqueeze(-1)).sum(1)
    if shared is not None:
        result = result + shared.to(compute)
    return result.to(y.dtype)
