#!/usr/bin/env python3
"""What searching codes wins over round-to-nearest, on the trained tiny models and their twins.

    python benchmarks/quant_quality.py [--model tiny-qwen tiny-r1] [--tokens 200000]

Every row is measured by the certificate's own code: KL of next-token distributions from the
source's over all positions of held-out problems, prompts included. A twin computes the same
function with powers of two moved between norm gains or gates and the columns that read them, which
gives it the outlier channels of large models. Calibration: the model's own answers to 64 problems.
A ratio says nothing where the KL is under three noise floors (bf16 activations).
The last line is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_tasks import TASKS, draw_problems
from tokenizers import Tokenizer
from train_tiny import encode_problems

from fastgpt.checkpoint import HuggingFaceCheckpoint, StateDict
from fastgpt.checkpoint.base import Checkpoint
from fastgpt.quant import Budget, Calibration, Policy
from fastgpt.quant.allocate import is_free, measure_units, solve
from fastgpt.quant.calibration import token_sequences
from fastgpt.quant.evaluate import Evaluation
from fastgpt.quant.family import quantize_family
from fastgpt.quant.plan import plan_family
from fastgpt.quant.report import Report
from fastgpt.scheme import Format

ROOT = Path(__file__).resolve().parents[1]


def uniform(name: str, algorithm: str) -> dict[str, Any]:
    """Return a policy of one format for all matrices of the layers."""
    fmt = {"format": name, "algorithm": algorithm}
    return {"attention_weights": fmt, "residual_connections": fmt, "io_layers": "bf16"}


def twin_of(source: Checkpoint) -> StateDict:
    """Return the same function with outlier channels: one in sixteen, 32 times as large."""
    state = {name: source.read(name).float() for name in source.names()}
    generator = torch.Generator().manual_seed(1)

    def factors(count: int) -> torch.Tensor:
        return torch.where(torch.rand(count, generator=generator) < 1 / 16, 32.0, 1.0)

    for name in source.names():
        prefix, _, last = name.rpartition("layernorm.weight")
        if last == "" and prefix.endswith(("input_", "post_attention_")):
            layer = prefix.removesuffix("input_").removesuffix("post_attention_")
            readers = ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa")
            is_input = prefix.endswith("input_")
            f = factors(state[name].numel())
            state[name] *= f
            for reader in state:
                module = reader.removesuffix(".weight").rpartition(".")[2]
                inside = reader.startswith(layer) and reader.endswith(".weight")
                if inside and is_input and module in readers:
                    state[reader] /= f
                if inside and not is_input and module in ("gate_proj", "up_proj", "gate"):
                    state[reader] /= f
        if name.endswith(".up_proj.weight"):
            f = factors(state[name].shape[0])
            state[name] *= f.unsqueeze(1)
            state[name.replace(".up_proj.", ".down_proj.")] /= f
    return StateDict(source.config, state)


def quantized(
    source: Checkpoint, policy: Any, tokens: list[list[int]], formats: dict[str, Any] | None = None
) -> tuple[list[tuple[str, Any]], Report]:
    """Return the stored tensors in file order and the report."""
    planned, _ = plan_family(source, Policy.parse(policy))
    if formats is not None:
        planned = [replace(i, format=formats[i.name]) if i.name in formats else i for i in planned]
    report = Report()
    return list(quantize_family(source, planned, report, None, tokens)), report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="*", default=["tiny-qwen", "tiny-r1"])
    parser.add_argument("--tokens", type=int, default=200_000)
    args = parser.parse_args()
    rows = []
    print(
        f"{'model':16} {'weights':22} {'MB':>6} {'KL mean':>9} {'p99':>9} {'top-1':>8} {'ratio':>7}"
    )
    for model in args.model:
        path = ROOT / "fastgpt/assets" / model
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        plain = HuggingFaceCheckpoint(path)
        questions = [p for t in TASKS for p in draw_problems(t, 22, seed=5, held_out=False)]
        prompts = [prompt for prompt, _ in encode_problems(tokenizer, questions)]
        own = Calibration(prompts=prompts, num_sequences=64, num_evaluation=0)
        tokens, _ = token_sequences(own, plain, None)
        each = args.tokens // (100 * len(TASKS)) + 1
        held_out = [p for t in TASKS for p in draw_problems(t, each, seed=9, held_out=True)]
        texts = [prompt + response for prompt, response in encode_problems(tokenizer, held_out)]
        for kind, source in (("", plain), (" twin", twin_of(plain))):
            base: dict[str, float] = {}
            for label, fmt, policy in (
                ("int4 nearest", "int4", uniform("int4", "rtn")),
                ("int4 searched", "int4", uniform("int4", "auto")),
                ("int3 nearest", "int3", uniform("int3", "rtn")),
                ("int3 searched", "int3", uniform("int3", "auto")),
            ):
                stored, report = quantized(source, policy, tokens)
                figures = measure(source, texts, stored)
                rows.append(row(model + kind, label, report.after_bytes, figures, base, fmt))
            if kind:
                continue
            # 4.5 bits per weight of the layers' matrices: uniform groups of 32 against a budget.
            g32 = {"format": "int4", "group_size": 32}
            policy = {"attention_weights": g32, "residual_connections": g32, "io_layers": "bf16"}
            stored, report = quantized(source, policy, tokens)
            figures = measure(source, texts, stored)
            rows.append(row(model, "int4 g32 uniform", report.after_bytes, figures, base, "4.5"))
            planned, _ = plan_family(source, Policy.parse(policy))
            free = [i.name for i in planned if is_free(i) and i.name != "lm_head.weight"]
            units = measure_units(source, free, tokens, None)
            fixed = report.after_bytes - sum(
                Format.parse(g32).nbytes(i.shape) for i in planned if i.name in free
            )
            limit = Budget(bytes=report.after_bytes).bytes
            solution = solve(units, fixed, max_bytes=limit, max_loss=None)
            formats = {
                name: option.format
                for unit, option in zip(units, solution.options, strict=True)
                for name in unit.names
            }
            stored, report = quantized(source, policy, tokens, formats)
            figures = measure(source, texts, stored)
            entry = row(model, "budget, same bytes", report.after_bytes, figures, base, "4.5")
            rows.append({**entry, "predicted_kl": solution.loss, "max_bytes": limit})
            print(f"{'':16} predicted KL {solution.loss:.3g}, budget {limit / 1e6:.3f} MB")
    print(json.dumps({"benchmark": "quant_quality", "rows": rows}))


def measure(source: Checkpoint, texts: list[list[int]], stored: Any) -> dict[str, Any]:
    """Return the certificate's figures of the stored tensors."""
    evaluation = Evaluation(source, texts, None)
    for _ in evaluation.watch(stored):
        pass
    return evaluation.figures


def row(
    model: str, label: str, size: int, figures: dict[str, Any], base: dict[str, float], key: str
) -> dict[str, Any]:
    """Print and return one line; the first of a key is what the others are compared with."""
    kl = figures["kl_mean"]
    first = base.setdefault(key, kl)
    noise = " (near noise)" if figures["near_noise"] else ""
    print(
        f"{model:16} {label:22} {size / 1e6:6.3f} {kl:9.2e} {figures['kl_p99']:9.2e} "
        f"{100 * figures['same_top1']:7.3f}% {kl / first:7.3f}{noise}",
        flush=True,
    )
    keys = ("kl_mean", "kl_p99", "same_top1", "noise_floor_kl", "near_noise", "positions")
    return {"model": model, "weights": label, "bytes": size, **{k: figures[k] for k in keys}}


if __name__ == "__main__":
    main()
