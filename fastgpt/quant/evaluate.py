"""What quantizing changed in a model's answers, measured while its layers are produced.

The source and the quantized model read the same tokens, layer by layer beside each other, so no
more than one layer of each is in memory. Their next-token distributions p (source, float32) and q
(stored weights, the arithmetic that is served) give, over all positions:

    KL              sum p log(p / q), mean and 99th percentile, nats
    same top token  share of positions where both prefer the same token
    perplexity      exp of the mean negative log-likelihood of the next token; its ratio with a 95 %
                    interval from the spread between sequences
    noise floor     mean KL between the source in float32 and in bfloat16: below it, what is
                    measured cannot be told from rounding of activations
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.layers.weights import Source
from fastgpt.models.placement import resolve_dtype
from fastgpt.models.registry import family
from fastgpt.quant.calibration import tokens_sha256
from fastgpt.quant.layerwise import layer_index
from fastgpt.quant.observe import HiddenStates
from fastgpt.scheme import QuantizedTensor

__all__ = ["Evaluation", "stored_nll"]

Stored = Tensor | QuantizedTensor

_NEAR_FLOOR = 3.0  # a KL under this many floors says little


class Evaluation:
    """Compares a model with its source on tokens that chose nothing.

    Args:
        checkpoint: the source.
        sequences: token ids, two sequences or more.
        device: where to run; None is the CPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: Sequence[Sequence[int]],
        device: torch.device | None,
    ) -> None:
        assert checkpoint.config is not None
        self.figures: dict[str, Any] = {}
        self._checkpoint = checkpoint
        self._kind = family(checkpoint.config)
        self._config = self._kind.parse_config(checkpoint.config)
        self._sequences = [list(ids) for ids in sequences]
        self._device = device or torch.device("cpu")
        self._served = resolve_dtype("auto", self._device, checkpoint.config)

    def watch(self, tensors: Iterable[tuple[str, Stored]]) -> Iterator[tuple[str, Stored]]:
        """Yield the same tensors, which come in file order; after the last, `figures` is set."""
        read = self._checkpoint.read
        rest: dict[str, Stored] = {}
        source = self._states(read, torch.float32)
        rounded = self._states(read, torch.bfloat16)
        stored: HiddenStates | None = None
        for index, run in itertools.groupby(tensors, lambda item: layer_index(item[0])):
            if index is None or index >= self._config.num_layers:
                for name, tensor in run:
                    if index is None:
                        rest[name] = tensor
                    yield name, tensor
                continue
            layer: dict[str, Stored] = {}
            for name, tensor in run:
                layer[name] = tensor
                yield name, tensor
            stored = stored or self._states(rest.__getitem__, self._served)
            source.advance(index, read)
            rounded.advance(index, read)
            stored.advance(index, layer.__getitem__)
        assert stored is not None
        self.figures = self._compare(
            source.logits(read), rounded.logits(read), stored.logits(rest.__getitem__)
        )

    def _states(self, read: Source, dtype: torch.dtype) -> HiddenStates:
        return HiddenStates(self._kind, self._config, read, self._sequences, self._device, dtype)

    def _compare(
        self, source: Iterator[Tensor], rounded: Iterator[Tensor], stored: Iterator[Tensor]
    ) -> dict[str, Any]:
        """Return the figures of three runs of logits, one [tokens, vocab] per sequence."""
        order = HiddenStates.order(self._sequences)
        divergences, floors, same, before, after = [], [], [], [], []
        for at, a, b, c in zip(order, source, rounded, stored, strict=True):
            log_p, log_r, log_q = (x.double().log_softmax(-1) for x in (a, b, c))
            p = log_p.exp()
            divergences.append((p * (log_p - log_q)).sum(-1).clamp(min=0))
            floors.append((p * (log_p - log_r)).sum(-1).clamp(min=0))
            same.append((log_p.argmax(-1) == log_q.argmax(-1)).double())
            after.append(next_token_nll(log_q, self._sequences[at]))
            before.append(next_token_nll(log_p, self._sequences[at]))
        kl, floor = torch.cat(divergences), float(torch.cat(floors).mean())
        ratio, low, high = _ratio(before, after)
        mean = float(kl.mean())
        return {
            "positions": kl.numel(),
            "kl_mean": mean,
            "kl_p99": float(kl.kthvalue(max(1, math.ceil(0.99 * kl.numel()))).values),
            "same_top1": float(torch.cat(same).mean()),
            "nll_source": float(torch.cat(before).mean()),
            "nll": float(torch.cat(after).mean()),
            "perplexity_ratio": ratio,
            "perplexity_ratio_95": [low, high],
            "noise_floor_kl": floor,
            "near_noise": mean < _NEAR_FLOOR * floor,
            "arithmetic": f"{str(self._served).removeprefix('torch.')} on {self._device.type}",
            "evaluation_tokens": self._sequences,
            "evaluation_sha256": tokens_sha256(self._sequences),
        }


def next_token_nll(log_probs: Tensor, ids: Sequence[int]) -> Tensor:
    """Return the negative log-likelihood of every token but the first, [tokens - 1]."""
    wanted = torch.tensor(ids[1:], device=log_probs.device)
    return -log_probs[:-1].gather(1, wanted.unsqueeze(1)).squeeze(1).cpu()


def stored_nll(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], device: torch.device | None
) -> float:
    """Return the mean negative log-likelihood of the next token under a stored model."""
    assert checkpoint.config is not None
    kind = family(checkpoint.config)
    config = kind.parse_config(checkpoint.config)
    on = device or torch.device("cpu")
    dtype = resolve_dtype("auto", on, checkpoint.config)
    states = HiddenStates(kind, config, checkpoint.read, sequences, on, dtype)
    for index in range(config.num_layers):
        states.advance(index, checkpoint.read)
    order = HiddenStates.order(sequences)
    parts = [
        next_token_nll(logits.double().log_softmax(-1), sequences[at])
        for at, logits in zip(order, states.logits(checkpoint.read), strict=True)
    ]
    return float(torch.cat(parts).mean())


def _ratio(before: list[Tensor], after: list[Tensor]) -> tuple[float, float, float]:
    """Return exp of the mean change of the log-likelihood, and its 95 % interval."""
    changes = [b - a for a, b in zip(before, after, strict=True)]
    mean = float(torch.cat(changes).mean())
    # Positions of one sequence depend on each other, so sequences are the samples.
    each = torch.stack([change.mean() for change in changes])
    error = 1.96 * float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.inf
    return math.exp(mean), math.exp(mean - error), math.exp(mean + error)
