"""The draw as csrc/include/fastgpt/sampling.h defines it, in numpy and Python integers.

Written for clarity: one row at a time, every kept set by an explicit sort.
"""

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# exp2(f) on [-0.5, 0.5], Cephes exp2f, lowest power first.
_EXP2 = [
    1.0,
    6.931472028550421e-1,
    2.402264791363012e-1,
    5.550332471162809e-2,
    9.618437357674640e-3,
    1.339887440266574e-3,
    1.535336188319500e-4,
]


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Ten rounds of Philox4x32 (Salmon et al., SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & _MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & _MASK]
        k = [(k[0] + 0x9E3779B9) & _MASK, (k[1] + 0xBB67AE85) & _MASK]
    return c


def random_bits(seed: int, position: int) -> int:
    words = philox4x32(
        (position & _MASK, (position >> 32) & _MASK, 0, 0), (seed & _MASK, (seed >> 32) & _MASK)
    )
    return words[1] << 32 | words[0]


def _fma(a: np.ndarray, b: np.ndarray, c: float) -> np.ndarray:
    """fma of float32 values: the product is exact in float64, so only the sum rounds twice.

    Exact here but for the rare double rounding, which changes the last bit of a weight.
    """
    return (a.astype(np.float64) * b.astype(np.float64) + np.float64(np.float32(c))).astype(
        np.float32
    )


def exp2_of(y: np.ndarray) -> np.ndarray:
    valid = y >= -64
    safe = np.where(valid, y, np.float32(0))
    whole = np.rint(safe)
    f = (safe - whole).astype(np.float32)
    p = np.full_like(f, np.float32(_EXP2[6]))
    for coefficient in reversed(_EXP2[:6]):
        p = _fma(p, f, coefficient)
    return np.where(valid, np.ldexp(p, whole.astype(np.int32)), np.float32(0))


def kept_weights(
    row: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """Integer weight of each token after all cuts, for a row with a finite maximum."""
    row = np.where(np.isnan(row), np.float32(-np.inf), row)
    one = np.float32
    with np.errstate(over="ignore"):
        factor = min(one(1.44269504) / one(temperature), np.finfo(np.float32).max)
        y = ((row - row.max()) * factor).astype(np.float32)
    e = exp2_of(y)
    weights = np.rint(e * one(2**30)).astype(np.uint64)
    kept = row > -np.inf
    if 0 < top_k < row.size:
        kept &= row >= np.sort(row)[::-1][top_k - 1]
    if top_p < 1:
        p = int(np.rint(one(top_p) * one(2**24)))
        target = max(1, int(weights[kept].sum()) * p >> 24)
        order = np.argsort(-row, kind="stable")
        order = order[kept[order]]
        reached = np.cumsum(weights[order])
        kept &= row >= row[order[np.searchsorted(reached, np.uint64(target))]]
    if min_p > 0:
        kept &= e >= one(min_p)
    return np.where(kept, weights, np.uint64(0))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    ids = []
    for i, row in enumerate(logits.cpu().numpy()):
        clean = np.where(np.isnan(row), np.float32(-np.inf), row)
        if not float(temperature[i]) > 0 or np.isinf(clean.max()):
            ids.append(int(clean.argmax()))
            continue
        weights = kept_weights(
            row, float(temperature[i]), int(top_k[i]), float(top_p[i]), float(min_p[i])
        )
        reached = np.cumsum(weights)
        bits = random_bits(int(seeds[i]) % 2**64, int(positions[i]) % 2**64)
        target = bits * int(reached[-1]) >> 64
        ids.append(int(np.searchsorted(reached, np.uint64(target), side="right")))
    return torch.tensor(ids, dtype=torch.int64, device=logits.device)


def penalize(
    logits: Tensor,
    history: Tensor,
    slots: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    for i, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        line, row = history[slot], logits[i].double()
        count = (line & 0x7FFFFFFF).double()
        row = torch.where(
            line != 0, torch.where(row > 0, row / repetition[i], row * repetition[i]), row
        )
        row = row - frequency[i] * count - presence[i] * (count > 0)
        logits[i] = row.float()


def record_tokens(history: Tensor, slots: Tensor, ids: Tensor, *, is_prompt: bool) -> None:
    for slot, token in zip(slots.tolist(), ids.tolist(), strict=True):
        if slot < 0:
            continue
        if is_prompt:
            history[slot, token] |= -(2**31)
        else:
            history[slot, token] += 1
