"""Choosing the next token on the device: the draw, the penalties and the history they read."""

import torch
from torch import Tensor

from fastgpt.ops._library import call
from fastgpt.ops.scratch import empty_like

__all__ = ["penalize", "record_tokens", "sample"]

_ops = torch.ops.fastgpt


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    ids: Tensor | None = None,
) -> Tensor:
    """Return one token id per row: the same on every backend, in any batch.

    Temperature comes first, then top-k, top-p and min-p on what remains, then one draw with the
    random bits of (seed, position). Ties at the edge of top-k and top-p all stay. A NaN logit
    counts as -inf; a row without a finite logit gives its largest, or id 0. The exact arithmetic
    stands in csrc/include/fastgpt/sampling.h.

    Args:
        logits: [num_rows, vocab_size], float32, last dimension contiguous.
        temperature: [num_rows], float32; 0 = greedy, the lowest id among equals.
        top_k: [num_rows], int32; 0 = off.
        top_p: [num_rows], float32, in (0, 1]; 1 = off.
        min_p: [num_rows], float32, in [0, 1]; 0 = off.
        seeds: [num_rows], int64.
        positions: [num_rows], int64, position of the token being drawn.
        ids: where to write, [num_rows], int64; allocated if None.

    Raises:
        InvalidArgument: if shapes or dtypes do not fit; on the CPU for a setting out of range.

    Source: Philox4x32-10, Salmon et al., SC 2011; top-p, arXiv:1904.09751; min-p, arXiv:2407.01082.
    """
    if ids is None:
        ids = empty_like(seeds)
    call(_ops.sample.default, logits, temperature, top_k, top_p, min_p, seeds, positions, ids)
    return ids


def penalize(
    logits: Tensor,
    history: Tensor,
    slots: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Lower in place the logits of tokens that a request has seen.

    The repetition penalty divides positive and multiplies negative logits of tokens in the prompt
    or generated; then frequency is subtracted once per occurrence and presence once, both for
    generated tokens only.

    Args:
        logits: [num_rows, vocab_size], float32; changed.
        history: [num_slots, vocab_size], int32, kept by record_tokens.
        slots: [num_rows], int64, the row's line of history; negative = leave the row as it is.
        repetition: [num_rows], float32, > 0; 1 = off.
        presence: [num_rows], float32; 0 = off.
        frequency: [num_rows], float32; 0 = off.

    Raises:
        InvalidArgument: if shapes or dtypes do not fit; on the CPU for a slot or repetition out of
            range.

    Source: repetition penalty, CTRL, arXiv:1909.05858.
    """
    call(_ops.penalize.default, logits, history, slots, repetition, presence, frequency)


def record_tokens(history: Tensor, slots: Tensor, ids: Tensor, *, is_prompt: bool) -> None:
    """Enter tokens into the history in place.

    Args:
        history: [num_slots, vocab_size], int32; changed. The low 31 bits count how often a token
            was generated, the top bit says that it stands in the prompt. Zero a line before use.
        slots: [num_ids], int64, line of each token; negative = skip.
        ids: [num_ids], int64.
        is_prompt: set the top bit instead of counting.

    Raises:
        InvalidArgument: if shapes or dtypes do not fit; on the CPU for a slot or id out of range.
    """
    call(_ops.record_tokens.default, history, slots, ids, is_prompt)


@torch.library.register_fake("fastgpt::sample")
def _(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    ids: Tensor,
) -> None:
    return None


@torch.library.register_fake("fastgpt::penalize")
def _(
    logits: Tensor,
    history: Tensor,
    slots: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    return None


@torch.library.register_fake("fastgpt::record_tokens")
def _(history: Tensor, slots: Tensor, ids: Tensor, is_prompt: bool) -> None:
    return None
