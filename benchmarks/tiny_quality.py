#!/usr/bin/env python3
"""What each quantization tier costs on tiny-r1: exact match on held-out problems, and KL.

    python benchmarks/tiny_quality.py [--problems 5000] [--device cpu|cuda] [--model DIR]

The weights are quantized by the product and read back as the numbers its file stands for; the
network itself is the plain-torch one of tiny_networks.py, in float32, so that only weights differ
from the reference (the checkpoint's own bf16 weights in the same arithmetic).

exact match: greedy decoding, the answer after </think> equal to the problem's, same problems for
    every row. lost / won count problems that only the reference / only the row solves; the change
    in points has the 95 % interval of paired problems.
KL: sum p log(p / q) over the vocabulary, mean and 99th percentile over the response positions of
    the taught solutions of up to 500 problems a task; same top-1: positions where both prefer the
    same token.

The article's column repeats its "precision loss"; it states no metric, so the two do not compare.
The last line is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from tiny_networks import TinyCausalLM, greedy_decode, import_state
from tiny_tasks import TASKS, Problem, check_answer, draw_problems
from tokenizers import Tokenizer
from train_tiny import EOS_ID, MAX_NEW_TOKENS, encode_problems

from fastgpt.checkpoint import HuggingFaceCheckpoint
from fastgpt.quant import Calibration, Quantizer
from fastgpt.quant.calibration import token_sequences
from fastgpt.scheme import QuantizedTensor

ROOT = Path(__file__).resolve().parents[1]
KEPT = {"io_layers": "bf16"}
NAIVE = {"format": "binary", "algorithm": "naive"}
ASYMMETRIC = {"format": "int4", "symmetric": False, "group_size": 64}

# Row -> (policy, the article's precision loss in percent).
ROWS: dict[str, tuple[Any, str]] = {
    "fp8": ("fp8", ""),
    "fp8 attention": ({**KEPT, "attention_weights": "fp8"}, "0.3"),
    "int8 matrices": (
        {**KEPT, "attention_weights": "int8", "residual_connections": "int8"},
        "",
    ),
    "int4 residual branch": ({**KEPT, "residual_connections": "int4"}, "1.1"),
    "binary norms": ({**KEPT, "norm_params": "binary"}, "2.7"),
    "binary norms, naive": ({**KEPT, "norm_params": NAIVE}, ""),
    "fp16 input and output": ({"io_layers": "fp16"}, "0"),
    "four-tier": ("four-tier", ""),
    "int4 g64 asymmetric": ({**KEPT, "residual_connections": ASYMMETRIC}, ""),
}

KL_PROBLEMS = 500  # of each task whose taught solutions give the KL
DECODED = 2500  # problems decoded together: their keys and values take 14 GB

HEADING = (
    f"{'':22}  {'MB':>6}  {'exact':>7}  {'lost':>4}  {'won':>4}  {'change in points':>22}  "
    f"{'KL mean':>8}  {'KL p99':>8}  {'same top-1':>10}  {'article':>8}"
)

Pair = tuple[list[int], list[int]]


def stored_values(
    model: Path, policy: Any, tokens: list[list[int]], device: str
) -> tuple[dict[str, torch.Tensor], int]:
    """Return the float32 value of every weight as the policy stores it, and the bytes of all."""
    quantizer = Quantizer(model, policy, calibration=tokens, device=device)
    tensors = quantizer.convert(progress=False).checkpoint
    state = {}
    for name in tensors.names():
        stored = tensors.read(name)
        is_quantized = isinstance(stored, QuantizedTensor)
        state[name] = stored.dequantize() if is_quantized else stored.to(torch.float32)
    return state, quantizer.report.after_bytes


@torch.inference_mode()
def response_log_probs(model: TinyCausalLM, pairs: list[Pair], device: str) -> torch.Tensor:
    """Return log p of the next token at every response position, [positions, vocab], float64."""
    out = []
    for start in range(0, len(pairs), 32):
        chunk = pairs[start : start + 32]
        rows = [prompt + response for prompt, response in chunk]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row)] = torch.tensor(row)
        hidden = model(ids.to(device))
        for line, (prompt, response) in zip(hidden, chunk, strict=True):
            at = line[len(prompt) - 1 : len(prompt) + len(response) - 1]
            out.append(model.lm_head(at).double().log_softmax(-1))
    return torch.cat(out)


def solve(model: TinyCausalLM, problems: list[Problem], tokenizer: Tokenizer) -> torch.Tensor:
    """Return whether each problem's answer is exact, [num_problems] bool."""
    prompts = [prompt for prompt, _ in encode_problems(tokenizer, problems)]
    outputs = []
    for start in range(0, len(prompts), DECODED):
        part = prompts[start : start + DECODED]
        outputs += greedy_decode(model, part, max_new_tokens=MAX_NEW_TOKENS, eos_id=EOS_ID)
    texts = tokenizer.decode_batch(outputs, skip_special_tokens=False)
    return torch.tensor([check_answer(p, t) for p, t in zip(problems, texts, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "fastgpt/assets/tiny-r1")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems per task")
    parser.add_argument("--seed", type=int, default=7, help="of the problems")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    args = parser.parse_args()

    config = json.loads((args.model / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    problems = [
        problem
        for task in TASKS
        for problem in draw_problems(task, args.problems, seed=args.seed, held_out=True)
    ]
    each = args.problems
    pairs = encode_problems(
        tokenizer,
        [p for i in range(len(TASKS)) for p in problems[i * each :][: min(each, KL_PROBLEMS)]],
    )
    model = TinyCausalLM(config).to(args.device).eval()

    def measure(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        import_state(model, state)
        return solve(model, problems, tokenizer), response_log_probs(model, pairs, args.device)

    device = torch.device(args.device)
    tokens, _ = token_sequences(
        Calibration(num_evaluation=0), HuggingFaceCheckpoint(args.model), device
    )
    plain, before_bytes = stored_values(args.model, KEPT, tokens, args.device)
    right, log_p = measure(plain)
    p = log_p.exp()
    print(f"{len(problems)} held-out problems, {len(p)} response positions")
    print(HEADING)
    reference = {"row": "bf16 (reference)", "bytes": before_bytes, "exact_match": mean(right)}
    print(line_of(reference), flush=True)
    rows = [reference]
    for name in args.rows:
        policy, article = ROWS[name]
        state, num_bytes = stored_values(args.model, policy, tokens, args.device)
        exact, log_q = measure(state)
        kl = (p * (log_p - log_q)).sum(-1).clamp(min=0)
        row = {
            "row": name,
            "bytes": num_bytes,
            "exact_match": mean(exact),
            "lost": int((right & ~exact).sum()),
            "won": int((exact & ~right).sum()),
            "change": change(right, exact),
            "change_by_task": {
                task: change(
                    *(x[i * args.problems : (i + 1) * args.problems] for x in (right, exact))
                )
                for i, task in enumerate(TASKS)
            },
            "kl_mean": float(kl.mean()),
            "kl_p99": float(kl.kthvalue(max(1, round(0.99 * len(kl)))).values),
            "same_top1": mean(log_p.argmax(-1) == log_q.argmax(-1)),
            "article_percent": article,
        }
        print(line_of(row), flush=True)  # a row takes a minute on two cores
        rows.append(row)
    print(
        json.dumps(
            {
                "benchmark": "tiny_quality",
                "model": args.model.name,
                "problems": len(problems),
                "positions": len(p),
                "seed": args.seed,
                "machine": machine(args.device),
                "rows": rows,
            }
        )
    )


def mean(flags: torch.Tensor) -> float:
    return float(flags.double().mean())


def change(before: torch.Tensor, after: torch.Tensor) -> list[float]:
    """Return the change of exact match in points and the ends of its 95 % interval, paired."""
    points = 100 * (after.double() - before.double())
    half = 1.96 * float(points.std()) / len(points) ** 0.5
    middle = float(points.mean())
    return [middle, middle - half, middle + half]


def line_of(row: dict[str, Any]) -> str:
    """Return one line of the table under HEADING."""
    line = f"{row['row']:22}  {row['bytes'] / 1e6:6.2f}  {100 * row['exact_match']:6.2f}%"
    if "kl_mean" in row:
        article = f"{row['article_percent']} %" if row["article_percent"] else ""
        interval = "{:+.2f} ({:+.2f} to {:+.2f})".format(*row["change"])
        line += (
            f"  {row['lost']:4}  {row['won']:4}  {interval:>22}"
            f"  {row['kl_mean']:8.1e}  {row['kl_p99']:8.1e}"
            f"  {100 * row['same_top1']:9.3f}%  {article:>8}"
        )
    return line


def machine(device: str) -> dict[str, Any]:
    """Return what a reader needs to repeat the figures."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": done.stdout.strip(),
    }


if __name__ == "__main__":
    main()
