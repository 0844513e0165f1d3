"""Feed-forward layers: gated (dense) and mixture of experts."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.layers.linear import Projection
from fastgpt.ops import ArrangedWeight, scratch

__all__ = ["ExpertProduct", "GatedFeedForward", "MixtureOfExperts"]

# (x, stacked weight, sorted_rows, offsets, rows_per_token) -> see ops.grouped_linear.
ExpertProduct = Callable[[Tensor, Tensor | ArrangedWeight, Tensor, Tensor, int], Tensor]


class GatedFeedForward:
    """down(silu(gate(x)) * up(x)); gate and up are one projection. Source: arXiv:2002.05202."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Projection, down: Projection) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: Tensor) -> Tensor:
        """Return [num_tokens, hidden] of x [num_tokens, hidden]."""
        return self.down(ops.silu_mul(self.gate_up(x)))


class MixtureOfExperts:
    """Routed experts, the best top_k for each token, plus an optional shared one.

    router: [hidden] -> num_experts; its logits are float32.
    correction_bias: [num_experts], float32; steers the choice, never the weights; or None.
    gate_up: experts' gate and up, stacked, [num_experts, 2 * width, hidden].
    down: [num_experts, hidden, width], stacked.
    Source: DeepSeek-V2, arXiv:2405.04434; DeepSeek-V3, arXiv:2412.19437.
    """

    def __init__(
        self,
        *,
        router: Projection,
        correction_bias: Tensor | None,
        gate_up: Tensor | ArrangedWeight,
        down: Tensor | ArrangedWeight,
        shared: GatedFeedForward | None,
        top_k: int,
        num_groups: int,
        topk_groups: int,
        scoring: str,
        renormalize: bool,
        scaling: float,
    ) -> None:
        self.router = router
        self.correction_bias = correction_bias
        self.gate_up = gate_up
        self.down = down
        self.shared = shared
        self.num_experts = router.out_features
        self.top_k = top_k
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.scoring = scoring
        self.renormalize = renormalize
        self.scaling = scaling
        self.product: ExpertProduct = ops.grouped_linear  # replaced by what watches the inputs

    def __call__(self, x: Tensor) -> Tensor:
        """Return [num_tokens, hidden] of x [num_tokens, hidden]."""
        num_tokens, hidden = x.shape
        logits = scratch.empty((num_tokens, self.num_experts), torch.float32, x.device)
        self.router(x, out=logits)
        expert_ids, weights = ops.moe_route(
            logits,
            self.correction_bias,
            self.top_k,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            scoring=self.scoring,
            renormalize=self.renormalize,
            scaling=self.scaling,
        )
        rows, offsets = ops.moe_sort(expert_ids, self.num_experts)
        gate_up = self.product(x, self.gate_up, rows, offsets, self.top_k)
        y = self.product(ops.silu_mul(gate_up), self.down, rows, offsets, 1)
        shared = None if self.shared is None else self.shared(x)
        return ops.moe_combine(y.view(num_tokens, self.top_k, hidden), weights, shared)
