"""What quantizing changed in a model's answers, measured while its layers are produced.

The source and the quantized model read the same tokens, layer by layer beside each other, so no
more than one layer of each is in memory. Their next-token distributions p (source, float32) and q
(stored weights, the arithmetic that is served) give, over all positions:

    KL              sum p log(p / q), mean, median and 99th percentile, nats
    same top token  share of positions where both prefer the same token
    perplexity      exp of the mean negative log-likelihood of the next token; its ratio with a 95 %
                    interval from the spread between sequences
    noise floor     mean KL between the source in float32 and in bfloat16: below it, what is
                    measured cannot be told from rounding of activations

Positions of one sequence depend on each other, so the 95 % intervals of KL and of the top token
come from drawing whole sequences again and again (bootstrap, Efron 1979).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.checkpoint.base import Checkpoint
from fastgpt.layers.weights import Source
from fastgpt.memory import GPTMemoryPool
from fastgpt.models.placement import resolve_dtype
from fastgpt.models.registry import family
from fastgpt.quant.calibration import tokens_sha256
from fastgpt.quant.layerwise import layer_index
from fastgpt.quant.observe import HiddenStates
from fastgpt.quant.ranges import ActivationRanges
from fastgpt.scheme import QuantizedTensor

__all__ = ["Evaluation", "SourceAnswers", "stored_nll"]

Stored = Tensor | QuantizedTensor

_NEAR_FLOOR = 3.0  # a KL under this many floors says little
_NUM_DRAWS = 2000  # of the bootstrap
_AT_ONCE = 1 << 25  # logits compared together; float64 takes eight times the bytes, a few times


@dataclass(frozen=True)
class SourceAnswers:
    """What the source answers on some tokens, to compare several models with.

    Attributes:
        logits: one [tokens, vocab] per group of sequences (see `HiddenStates.groups`), float32.
        rounded: the same of the source in bfloat16.
    """

    logits: list[Tensor]
    rounded: list[Tensor]

    @staticmethod
    def of(
        checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], device: torch.device | None
    ) -> SourceAnswers:
        """Return the answers of a checkpoint; they lie on the device."""
        assert checkpoint.config is not None
        kind = family(checkpoint.config)
        config = kind.parse_config(checkpoint.config)
        on, read = device or torch.device("cpu"), checkpoint.read
        answers = []
        for dtype in (torch.float32, torch.bfloat16):
            states = HiddenStates(kind, config, read, sequences, on, dtype)
            for index in range(config.num_layers):
                states.advance(index, read)
            answers.append(list(states.logits(read)))
        return SourceAnswers(*answers)


class Evaluation:
    """Compares a model with its source on tokens that chose nothing.

    Args:
        checkpoint: the source.
        sequences: token ids, two sequences or more.
        device: where to run; None is the CPU.
        ranges: records the activations of the quantized model.
        pool: of the device, for the weights of the layer that runs; its own without one.
        answers: of the source on these sequences; without them it runs beside the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: Sequence[Sequence[int]],
        device: torch.device | None,
        ranges: ActivationRanges | None = None,
        pool: GPTMemoryPool | None = None,
        answers: SourceAnswers | None = None,
    ) -> None:
        assert checkpoint.config is not None
        self._answers = answers
        self.figures: dict[str, Any] = {}
        self._checkpoint = checkpoint
        self._kind = family(checkpoint.config)
        self._config = self._kind.parse_config(checkpoint.config)
        self._sequences = [list(ids) for ids in sequences]
        self._device = device or torch.device("cpu")
        self.ranges = ranges or ActivationRanges()
        self._pool = pool or GPTMemoryPool(self._device)
        self._served = resolve_dtype("auto", self._device, checkpoint.config)
        # Where the file is served in float16, it is only known at the end whether that holds its
        # activations; what takes float16's place then runs beside it.
        self._dtypes = [self._served]
        if self._served == torch.float16:
            self._dtypes.append(_without_fp16(self._device))

    def watch(
        self, tensors: Iterable[tuple[str, Stored]], read_back: Source | None = None
    ) -> Iterator[tuple[str, Stored]]:
        """Yield the same tensors, which come in file order; after the last, `figures` is set.

        read_back: name -> a tensor that was yielded, so that embedding and head need not be held.
        """
        read = self._checkpoint.read
        rest: dict[str, Stored] = {}
        read_rest = read_back or rest.__getitem__
        beside: list[HiddenStates] = []
        if self._answers is None:
            beside = [self._states(read, dtype) for dtype in (torch.float32, torch.bfloat16)]
        stored: list[HiddenStates] = []
        activations: set[str] = set()
        for index, run in itertools.groupby(tensors, lambda item: layer_index(item[0])):
            if index is None or index >= self._config.num_layers:
                for name, tensor in run:
                    if index is None and read_back is None:
                        rest[name] = tensor
                    yield name, tensor
                continue
            layer: dict[str, Stored] = {}
            for name, tensor in run:
                layer[name] = tensor
                if isinstance(tensor, QuantizedTensor) and tensor.format.activations != "16bit":
                    activations.add(tensor.format.activations)
                yield name, tensor
            stored = stored or [self._states(read_rest, dtype) for dtype in self._dtypes]
            for states in beside:
                states.advance(index, read)
            for states in stored[:-1]:
                states.advance(index, layer.__getitem__)
            stored[-1].advance(index, layer.__getitem__, ranges=self.ranges)
        if self.ranges.fp16_overflows():
            stored = stored[-1:]
        known = self._answers
        self.figures = self._compare(
            stored[0].groups,
            beside[0].logits(read) if known is None else known.logits,
            beside[1].logits(read) if known is None else known.rounded,
            stored[0].logits(read_rest),
        )
        self.figures["arithmetic"] = f"{_name(stored[0].dtype)} on {self._device.type}"
        if activations:
            fewest = ops.fewest_eight_bit_rows(self._device)
            self.figures["arithmetic"] += (
                f", {' and '.join(sorted(activations))} activations from {fewest} rows on"
            )

    def _states(self, read: Source, dtype: torch.dtype) -> HiddenStates:
        return HiddenStates(
            self._kind, self._config, read, self._sequences, self._device, dtype, self._pool
        )

    def _compare(
        self,
        sequence_groups: list[list[int]],
        source: Iterable[Tensor],
        rounded: Iterable[Tensor],
        stored: Iterable[Tensor],
    ) -> dict[str, Any]:
        """Return the figures of three runs of logits, one [tokens, vocab] per group."""
        divergences: list[Tensor] = []
        floors: list[Tensor] = []
        same: list[Tensor] = []
        before: list[Tensor] = []
        after: list[Tensor] = []
        for group, a, b, c in zip(sequence_groups, source, rounded, stored, strict=True):
            lengths = [len(self._sequences[at]) for at in group]
            # Nothing follows the last token of a sequence: its 0 is dropped below.
            following = [token for at in group for token in (*self._sequences[at][1:], 0)]
            next_ids = torch.tensor(following, device=a.device)
            step = max(1, _AT_ONCE // a.shape[1])
            pieces = [
                _compare_rows(*rows)
                for rows in zip(*(x.split(step) for x in (a, b, c, next_ids)), strict=True)
            ]
            columns = [torch.cat(column).split(lengths) for column in zip(*pieces, strict=True)]
            for figures, column in zip((divergences, floors, same), columns, strict=False):
                figures += column
            before += [column[:-1] for column in columns[3]]
            after += [column[:-1] for column in columns[4]]
        kl, floor = torch.cat(divergences), float(torch.cat(floors).mean())
        ratio, low, high = _ratio(before, after)
        mean = float(kl.mean())
        return {
            "positions": kl.numel(),
            "num_sequences": len(self._sequences),
            "kl_mean": mean,
            "kl_mean_95": bootstrap_interval(divergences),
            "kl_median": _quantile(kl, 0.5),
            "kl_p99": _quantile(kl, 0.99),
            "same_top1": float(torch.cat(same).mean()),
            "same_top1_95": bootstrap_interval(same),
            "nll_source": float(torch.cat(before).mean()),
            "nll": float(torch.cat(after).mean()),
            "perplexity_ratio": ratio,
            "perplexity_ratio_95": [low, high],
            "noise_floor_kl": floor,
            "near_noise": mean < _NEAR_FLOOR * floor,
            "evaluation_tokens": self._sequences,
            "evaluation_sha256": tokens_sha256(self._sequences),
        }


def bootstrap_interval(groups: Sequence[Tensor], num_draws: int = _NUM_DRAWS) -> list[float]:
    """Return the 95 % interval of the mean over all values when whole groups are drawn anew."""
    totals = torch.stack([group.sum() for group in groups])
    sizes = torch.tensor([float(group.numel()) for group in groups], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)  # the same figures from the same model
    drawn = torch.randint(len(groups), (num_draws, len(groups)), generator=generator)
    means = totals[drawn].sum(1) / sizes[drawn].sum(1)
    return [_quantile(means, 0.025), _quantile(means, 0.975)]


def _compare_rows(p: Tensor, r: Tensor, q: Tensor, next_ids: Tensor) -> tuple[Tensor, ...]:
    """Return KL, noise floor, same top token, and both likelihoods of each row, float64."""
    log_p, log_r, log_q = (x.double().log_softmax(-1) for x in (p, r, q))
    weight = log_p.exp()
    rows = (
        (weight * (log_p - log_q)).sum(-1).clamp(min=0),
        (weight * (log_p - log_r)).sum(-1).clamp(min=0),
        (log_p.argmax(-1) == log_q.argmax(-1)).double(),
        -log_p.gather(1, next_ids.unsqueeze(1)).squeeze(1),
        -log_q.gather(1, next_ids.unsqueeze(1)).squeeze(1),
    )
    return tuple(row.cpu() for row in rows)


def _quantile(values: Tensor, share: float) -> float:
    """Return the smallest value that `share` of the values do not exceed."""
    return float(values.kthvalue(max(1, math.ceil(share * values.numel()))).values)


def _without_fp16(device: torch.device) -> torch.dtype:
    """Return the type that a device computes in where float16 cannot hold the activations."""
    is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float32 if is_old else torch.bfloat16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    dtype = resolve_dtype("auto", on, checkpoint.config, checkpoint.fp16_overflows)
    states = HiddenStates(kind, config, checkpoint.read, sequences, on, dtype)
    for index in range(config.num_layers):
        states.advance(index, checkpoint.read)
    parts = []
    for group, logits in zip(states.groups, states.logits(checkpoint.read), strict=True):
        lengths = [len(sequences[at]) for at in group]
        for at, rows in zip(group, logits.double().log_softmax(-1).split(lengths), strict=True):
            parts.append(next_token_nll(rows, sequences[at]))
    return float(torch.cat(parts).mean())


def _ratio(before: list[Tensor], after: list[Tensor]) -> tuple[float, float, float]:
    """Return exp of the mean change of the log-likelihood, and its 95 % interval."""
    changes = [b - a for a, b in zip(before, after, strict=True)]
    mean = float(torch.cat(changes).mean())
    # Positions of one sequence depend on each other, so sequences are the samples.
    each = torch.stack([change.mean() for change in changes])
    error = 1.96 * float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.inf
    return math.exp(mean), math.exp(mean - error), math.exp(mean + error)
