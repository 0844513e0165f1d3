"""Choosing the next token on the device, without waiting for it."""

import torch

from fastgpt import ops
from fastgpt.engine.batch import SamplingInputs
from fastgpt.engine.scheduler import ScheduledRequest

__all__ = ["Sampler"]


class Sampler:
    """Owns the token history that penalties read. Only the engine's thread calls it.

    A request's tokens depend on its own logits, seed and positions alone, never on its neighbours
    in the batch.

    Args:
        history: [max_batch, vocab_size], int32; low 31 bits: times generated, top bit: in the
            prompt.
    """

    def __init__(self, history: torch.Tensor) -> None:
        self.history = history

    def begin(self, scheduled: list[ScheduledRequest]) -> None:
        """Reset the history of requests with penalties whose computation starts in this step."""
        for item in scheduled:
            request = item.request
            if request.num_cached_tokens or not request.params.has_penalties:
                continue
            self.history[request.sampler_slot].zero_()
            self._record(request.sampler_slot, request.prompt_token_ids, is_prompt=True)
            if request.num_generated:  # preempted before: what it generated counts again
                self._record(request.sampler_slot, request.output_token_ids, is_prompt=False)

    def sample(
        self,
        logits: torch.Tensor,
        inputs: SamplingInputs,
        *,
        has_penalties: bool,
        out: torch.Tensor,
    ) -> None:
        """Write the chosen ids to out.

        Args:
            logits: [n, vocab_size], fp32; changed in place when has_penalties.
            inputs: n rows.
            has_penalties: whether to apply and record the penalties.
            out: [n], int64.
        """
        if has_penalties:
            ops.penalize(
                logits, self.history, inputs.slots,
                inputs.repetition, inputs.presence, inputs.frequency,
            )  # fmt: skip
        ops.sample(
            logits, inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p,
            inputs.seeds, inputs.positions,
            ids=out,
        )  # fmt: skip
        if has_penalties:
            ops.record_tokens(self.history, inputs.slots, out, is_prompt=False)

    def _record(self, slot: int, token_ids: list[int], *, is_prompt: bool) -> None:
        device = self.history.device
        ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
        slots = torch.full_like(ids, slot)
        ops.record_tokens(self.history, slots, ids, is_prompt=is_prompt)
