"""Is every CPU op at least as fast as eager torch? Times both at the shapes of r1-qwen-1.5b.

Prints one line an op: microseconds of ours, of torch on as many threads, and the ratio; the last
line is JSON. Best of several runs.

    python benchmarks/cpu_ops.py
"""

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastgpt import _C, ops

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1536, 8960, 12, 2, 128, 151_936
EPS = 1e-6


def best_us(function: Callable[[], object], runs: int = 9) -> float:
    """Return the shortest time of one call, in microseconds."""
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def row_cases(rows: int, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable]]:
    x, residual = torch.randn(rows, HIDDEN).to(dtype), torch.randn(rows, HIDDEN).to(dtype)
    weight, wide = torch.randn(HIDDEN).to(dtype), torch.randn(rows, 2 * FFN).to(dtype)
    q, k = torch.randn(rows, HEADS, HEAD_DIM).to(dtype), torch.randn(rows, KV_HEADS, HEAD_DIM)
    k = k.to(dtype)
    positions, table = torch.arange(rows), torch.rand(rows, HEAD_DIM)
    vocabulary, ids = torch.randn(32_000, HIDDEN).to(dtype), torch.randint(32_000, (rows,))
    y, weights = torch.randn(rows, 6, HIDDEN).to(dtype), torch.rand(rows, 6)

    def rotate() -> None:
        cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
        for heads in (q, k):
            a, b = heads.float().chunk(2, dim=-1)
            heads.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))

    def silu_mul() -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def combine() -> Tensor:
        return (y.float() * weights.unsqueeze(-1)).sum(1).to(dtype)

    def add_norm() -> Tensor:
        residual.add_(x)
        return functional.rms_norm(residual, (HIDDEN,), weight, EPS)

    return {
        "rms_norm": (
            lambda: ops.rms_norm(x, weight, EPS),
            lambda: functional.rms_norm(x, (HIDDEN,), weight, EPS),
        ),
        "add_rms_norm": (lambda: ops.add_rms_norm(x, residual, weight, EPS), add_norm),
        "rotary": (lambda: ops.rotary(positions, table, q, k), rotate),
        "silu_mul": (lambda: ops.silu_mul(wide), silu_mul),
        "embedding": (
            lambda: ops.embedding(ids, vocabulary),
            lambda: functional.embedding(ids, vocabulary),
        ),
        "moe_combine": (lambda: ops.moe_combine(y, weights), combine),
    }


def attention_case(q_len: int, seq_len: int, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Ours reads a paged cache, torch a contiguous one."""
    num_blocks = -(-seq_len // 32)
    cache = torch.randn(num_blocks, 2, 32, KV_HEADS, HEAD_DIM).to(dtype)
    q = torch.randn(q_len, HEADS, HEAD_DIM).to(dtype)
    tables = torch.arange(num_blocks, dtype=torch.int32)[None]
    starts, lengths = torch.tensor([0, q_len]).int(), torch.tensor([seq_len]).int()
    k, v = cache.transpose(0, 1).flatten(1, 2)[:, :seq_len].transpose(1, 2).unsqueeze(1).unbind(0)
    heads = q.transpose(0, 1)[None]
    scale = HEAD_DIM**-0.5
    return (
        lambda: ops.attention(q, cache, tables, starts, lengths, scale, q_len, seq_len),
        lambda: functional.scaled_dot_product_attention(
            heads, k, v, is_causal=q_len > 1, enable_gqa=True
        ),
    )


def sample_case(temperature: float, top_k: int, top_p: float) -> tuple[Callable, Callable]:
    logits = torch.randn(1, VOCAB) * 3
    one = torch.ones(1)
    args = (
        one * temperature, torch.tensor([top_k]).int(), one * top_p, one * 0,
        torch.tensor([7]), torch.tensor([3]),
    )  # fmt: skip

    def eager() -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        scaled = logits / temperature
        if top_k:
            edge = scaled.topk(top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < edge, float("-inf"))
        if top_p < 1:
            values, order = scaled.sort(descending=True)
            p = values.softmax(-1)
            values = values.masked_fill(p.cumsum(-1) - p >= top_p, float("-inf"))
            scaled = torch.full_like(scaled, float("-inf")).scatter(1, order, values)
        return torch.multinomial(scaled.softmax(-1), 1)

    return (lambda: ops.sample(logits, *args), eager)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(_C.num_threads())
    print(f"{_C.num_threads()} threads, {_C.cpu_isa()}, torch {torch.__version__}")
    cases: dict[str, tuple[Callable, Callable]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for rows in (1, 256):
            for op, case in row_cases(rows, dtype).items():
                cases[f"{op} {rows} {name}"] = case
        for q_len, seq_len in ((1, 1024), (1, 8192), (256, 256)):
            cases[f"attention {q_len}x{seq_len} {name}"] = attention_case(q_len, seq_len, dtype)
    for settings in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.6, 0, 0.95), (0.7, 50, 0.9)):
        cases[f"sample {settings}"] = sample_case(*settings)
    results = {}
    for name, (ours, eager) in cases.items():
        mine, theirs = best_us(ours), best_us(eager)
        results[name] = {"us": round(mine, 1), "torch_us": round(theirs, 1)}
        print(f"{name:34} {mine:9.1f} us   torch {theirs:9.1f} us   {theirs / mine:6.2f}x")
    slower = [name for name, r in results.items() if r["us"] > r["torch_us"]]
    print(json.dumps({"results": results, "slower_than_torch": slower}))


if __name__ == "__main__":
    main()
