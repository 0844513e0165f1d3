"""Mixture of experts: routing, sorting rows by expert, and summing the experts' results."""

import torch
from torch import Tensor

from fastgpt.ops._library import call
from fastgpt.ops.scratch import empty

__all__ = ["moe_combine", "moe_route", "moe_sort"]

_ops = torch.ops.fastgpt


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
    expert_ids: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the experts that serve each token and their weights, best expert first.

    Experts form num_groups equal groups; only the best topk_groups groups may serve a token. A
    group's score is its best expert, or with a correction bias the sum of its best two. The bias
    steers the choice and never enters the weights. Ties go to the lower id.

    Args:
        logits: [num_tokens, num_experts], float32.
        correction_bias: [num_experts], float32; None = none.
        top_k: experts per token.
        num_groups: divides num_experts; 1 = no group limit.
        topk_groups: groups kept, at most num_groups.
        scoring: "softmax" over all experts, or "sigmoid" of each.
        renormalize: divide the weights by their sum (plus 1e-20).
        scaling: multiplies the weights.
        expert_ids: where to write, [num_tokens, top_k], int32; allocated if None.
        weights: where to write, [num_tokens, top_k], float32; allocated if None.

    Raises:
        InvalidArgument: if shapes, dtypes or counts do not fit.

    Source: DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437.
    """
    if expert_ids is None:
        expert_ids = empty((logits.shape[0], top_k), torch.int32, logits.device)
    if weights is None:
        weights = empty((logits.shape[0], top_k), torch.float32, logits.device)
    call(
        _ops.moe_route.default,
        logits, correction_bias, top_k, num_groups, topk_groups, scoring, renormalize, scaling,
        expert_ids, weights,
    )  # fmt: skip
    return expert_ids, weights


def moe_sort(
    expert_ids: Tensor,
    num_experts: int,
    *,
    sorted_rows: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the flat rows token * top_k + j ordered by expert, and where each expert starts.

    Args:
        expert_ids: [num_tokens, top_k], int32, contiguous, each in 0 .. num_experts - 1. On CUDA
            rows with another id are left out.
        num_experts: experts of the layer.
        sorted_rows: where to write, [num_tokens * top_k], int32; allocated if None. Rows of one
            expert stay in ascending order.
        offsets: where to write, [num_experts + 1], int32; allocated if None. Expert e owns
            positions offsets[e] .. offsets[e + 1] - 1 of sorted_rows.

    Raises:
        InvalidArgument: if shapes or dtypes do not fit; on the CPU for a bad id.
    """
    if sorted_rows is None:
        sorted_rows = empty((expert_ids.numel(),), torch.int32, expert_ids.device)
    if offsets is None:
        offsets = empty((num_experts + 1,), torch.int32, expert_ids.device)
    call(_ops.moe_sort.default, expert_ids, num_experts, sorted_rows, offsets)
    return sorted_rows, offsets


def moe_combine(
    y: Tensor, weights: Tensor, shared: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Return the weighted sum of each token's experts, plus the shared expert's result.

    Args:
        y: [num_tokens, top_k, hidden]; float32, float16 or bfloat16, last dimension contiguous.
        weights: [num_tokens, top_k], float32.
        shared: [num_tokens, hidden], dtype of y; None = none.
        out: where to write, [num_tokens, hidden], any float dtype; allocated in y's if None. The
            sum runs in float32 over the experts in order, the shared result last.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit.
    """
    if out is None:
        out = empty((y.shape[0], y.shape[2]), y.dtype, y.device)
    call(_ops.moe_combine.default, y, weights, shared, out)
    return out


@torch.library.register_fake("fastgpt::moe_route")
def _(
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    scoring: str,
    renormalize: bool,
    scaling: float,
    expert_ids: Tensor,
    weights: Tensor,
) -> None:
    return None


@torch.library.register_fake("fastgpt::moe_sort")
def _(expert_ids: Tensor, num_experts: int, sorted_rows: Tensor, offsets: Tensor) -> None:
    return None


@torch.library.register_fake("fastgpt::moe_combine")
def _(y: Tensor, weights: Tensor, shared: Tensor | None, out: Tensor) -> None:
    return None
