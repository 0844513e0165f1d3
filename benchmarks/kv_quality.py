#!/usr/bin/env python3
"""What does an fp8 or int8 KV cache cost on tiny-r1 and tiny-qwen?

    python benchmarks/kv_quality.py [--problems 100] [--device cpu|cuda] [--dtype bfloat16]

Everything is the product: the same weights and kernels, only the cache differs.

exact: greedy answers by the engine, equal to the held-out problem's; lost and won count problems
    that only the reference (a cache of the activations' dtype), or only the row, solves.
same tokens: responses that are equal to the reference's to the last token, and the share of tokens
    before the first difference.
KL: sum p log(p / q) over the vocabulary at the response positions of the taught solutions, a whole
    sequence in one pass, mean and 99th percentile; same top-1: positions where both prefer the same
    token.
bytes: of a cached token, all layers, scales included.

The last line is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from report import print_machine
from tiny_quality import mean
from tiny_tasks import TASKS, Problem, check_answer, draw_problems
from tiny_tokenizer import EOS_ID, encode_problems
from tokenizers import Tokenizer
from train_tiny import MAX_NEW_TOKENS

from fastgpt import Engine, SamplingParams, load
from fastgpt.config import KV_CACHE_DTYPES

ASSETS = Path(__file__).resolve().parents[1] / "fastgpt/assets"
MAX_LENGTH = 1024


def answer(
    model: Path, code: str, prompts: list[list[int]], args: argparse.Namespace
) -> tuple[list[list[int]], int]:
    """Return the engine's greedy responses, and the bytes of a cached token."""
    engine = Engine(
        model,
        device=args.device,
        dtype=args.dtype,
        kv_cache_dtype=code,
        max_batch=args.batch,
        max_length=MAX_LENGTH,
    )
    outputs = engine.generate(prompts, SamplingParams(max_tokens=MAX_NEW_TOKENS, temperature=0.0))
    responses = [[i for i in output.token_ids if i != EOS_ID] for output in outputs]
    num_bytes = engine.runner.kv_cache.nbytes // engine.limits.num_cache_tokens
    return responses, num_bytes


def response_log_probs(
    model: Path, code: str, pairs: list[tuple[list[int], list[int]]], args: argparse.Namespace
) -> torch.Tensor:
    """Return log p of the next token at every response position, [positions, vocab], float64."""
    network = load(model, device=args.device, dtype=args.dtype)
    network.model.use_kv_cache_dtype(code)
    out = []
    for prompt, response in pairs:
        logits = network(torch.tensor([prompt + response]))[0]
        at = logits[len(prompt) - 1 : len(prompt) + len(response) - 1]
        out.append(at.double().cpu().log_softmax(-1))
    return torch.cat(out)


def shared_prefix(a: list[int], b: list[int]) -> int:
    """Return the number of tokens before the first difference."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return same.index(False) if False in same else len(same)


def compare(model: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table of one model and return its rows."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    problems: list[Problem] = [
        problem
        for task in TASKS
        for problem in draw_problems(task, args.problems, seed=args.seed, held_out=True)
    ]
    pairs = encode_problems(tokenizer, problems)
    prompts = [list(prompt) for prompt, _ in pairs]
    kl_pairs = pairs[:: max(1, len(pairs) // args.kl_sequences)]
    rows: list[dict[str, Any]] = []
    print(f"{model.name}: {len(problems)} held-out problems, {len(kl_pairs)} sequences for the KL")
    for code in KV_CACHE_DTYPES:
        responses, num_bytes = answer(model, code, prompts, args)
        texts = tokenizer.decode_batch(responses, skip_special_tokens=False)
        exact = torch.tensor([check_answer(p, t) for p, t in zip(problems, texts, strict=True)])
        log_q = response_log_probs(model, code, kl_pairs, args)
        if code == "auto":
            plain, right, log_p = responses, exact, log_q
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
        prefixes = [shared_prefix(a, b) for a, b in zip(plain, responses, strict=True)]
        row = {
            "model": model.name,
            "kv_cache_dtype": code,
            "token_bytes": num_bytes,
            "exact_match": mean(exact),
            "lost": int((right & ~exact).sum()),
            "won": int((exact & ~right).sum()),
            "same_responses": mean(
                torch.tensor([a == b for a, b in zip(plain, responses, strict=True)])
            ),
            "same_prefix": sum(prefixes) / sum(map(len, plain)),
            "kl_mean": float(kl.mean()),
            "kl_p99": float(kl.kthvalue(max(1, round(0.99 * len(kl)))).values),
            "same_top1": mean(log_p.argmax(-1) == log_q.argmax(-1)),
        }
        print(
            f"  {code:5} {num_bytes:6} bytes  exact {100 * row['exact_match']:6.2f} %  "
            f"lost {row['lost']:3}  won {row['won']:3}  same responses "
            f"{100 * row['same_responses']:6.2f} %  tokens before a difference "
            f"{100 * row['same_prefix']:6.2f} %  KL {row['kl_mean']:.1e}  p99 {row['kl_p99']:.1e}  "
            f"same top-1 {100 * row['same_top1']:7.3f} %",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["tiny-r1", "tiny-qwen"])
    parser.add_argument("--problems", type=int, default=100, help="held-out problems per task")
    parser.add_argument("--kl-sequences", type=int, default=60)
    parser.add_argument("--seed", type=int, default=7, help="of the problems")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    facts = print_machine(args.device)
    rows = [row for name in args.models for row in compare(ASSETS / name, args)]
    print(json.dumps({"benchmark": "kv_quality", **facts, "dtype": args.dtype,
                      "problems": args.problems * len(TASKS), "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
