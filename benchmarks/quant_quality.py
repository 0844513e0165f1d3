#!/usr/bin/env python3
"""What searching codes and formats wins, on four small models and their twins with outliers.

    python benchmarks/quant_quality.py [--models tiny-qwen ...] [--tokens 200000] [--device cuda]
                                       [--processes 4]

Every row is measured by the certificate's own code: KL of next-token distributions from the
source's over all positions of held-out texts, prompts included. A twin computes the same function
with powers of two moved between norm gains or gates and the columns that read them, which gives it
the outlier channels of large models. Calibration: the model's own answers to 64 prompts.

A budget has the bytes of the uniform row above it; "layers only" leaves embedding and head as they
are, as uniform rows do. A ratio says nothing where the KL is under three noise floors (bf16
activations). micro-text and micro-chain are trained first if build/micro lacks them, which takes
minutes on two cores (train_micro.py). The last line is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tiny_tasks import TASKS, draw_problems
from tiny_tokenizer import encode_problems
from tokenizers import Tokenizer
from train_micro import (
    MICRO_CONFIGS,
    chain_sequences,
    make_model,
    split_documents,
    text_sequences,
)

from fastgpt.checkpoint import HuggingFaceCheckpoint, StateDict
from fastgpt.checkpoint.base import Checkpoint
from fastgpt.quant import Budget, Calibration, Policy, Quantizer
from fastgpt.quant.calibration import token_sequences
from fastgpt.quant.evaluate import Evaluation
from fastgpt.quant.family import quantize_family
from fastgpt.quant.plan import plan_family
from fastgpt.quant.report import Report

ROOT = Path(__file__).resolve().parents[1]
MICRO = ROOT / "build/micro"
MODELS = ("tiny-qwen", "tiny-r1", *MICRO_CONFIGS)
KINDS = ("original", "twin")
HEADING = (
    f"{'model':17} {'weights':22} {'MB':>6} {'KL mean':>9} {'p99':>9} {'top-1':>8} {'ratio':>7}"
)


def directory(model: str) -> Path:
    return MICRO / model if model in MICRO_CONFIGS else ROOT / "fastgpt/assets" / model


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


def texts_of(model: str, num_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return 66 prompts from the training texts, and held-out texts of num_tokens or more."""
    tokenizer = Tokenizer.from_file(str(directory(model) / "tokenizer.json"))
    if model == "micro-text":
        trained, held_out = split_documents()
        prompts = [ids[:12] for ids in text_sequences(tokenizer, trained[:: len(trained) // 66])]
        texts, total = [], 0
        for ids in text_sequences(tokenizer, held_out):
            if total < num_tokens:
                texts.append(ids)
                total += len(ids)
        return prompts[:66], texts
    drawn = [draw_problems(t, 22, seed=5, held_out=False) for t in TASKS]
    questions = [problem for each in zip(*drawn, strict=True) for problem in each]  # tasks in turn
    prompts = [prompt for prompt, _ in encode_problems(tokenizer, questions)]
    each = num_tokens // (100 * len(TASKS)) + 1  # a problem takes more than a hundred tokens
    return prompts, chain_sequences(tokenizer, each, seed=9, held_out=True)


class Bench:
    """One model or its twin, what it is calibrated with and what it is measured on."""

    def __init__(self, model: str, kind: str, num_tokens: int, device: str) -> None:
        self.device = torch.device(device)
        self.path = directory(model)
        self.name = model if kind == "original" else f"{model} twin"
        plain = HuggingFaceCheckpoint(self.path)
        prompts, self.texts = texts_of(model, num_tokens)
        own = Calibration(prompts=prompts, num_sequences=64, num_evaluation=0, length=384)
        self.tokens, _ = token_sequences(own, plain, self.device)
        self.source = plain if kind == "original" else twin_of(plain)
        self.rows: list[dict[str, Any]] = []

    def uniform(
        self, label: str, policy: Any, base: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Measure one format for all matrices, beside the row `base`."""
        report = Report()
        planned, _ = plan_family(self.source, Policy.parse(policy))
        tensors = quantize_family(self.source, planned, report, self.device, self.tokens)
        return self._row(label, list(tensors), report, base)

    def budget(self, label: str, policy: Any, limit: int, base: dict[str, Any]) -> None:
        """Measure formats chosen within `limit` bytes beside the uniform row `base`."""
        quantizer = Quantizer(
            self.path,
            policy,
            budget=Budget(bytes=limit),
            calibration=self.tokens,
            device=self.device,
        )
        result = quantizer.convert(progress=False)
        stored = [(item.name, result.checkpoint.read(item.name)) for item in quantizer.plan()]
        entry = self._row(label, stored, quantizer.report, base)
        predicted = quantizer.report.allocation["predicted_kl"]
        entry |= {
            "max_bytes": limit,
            "predicted_kl": predicted,
            "allocation": quantizer.report.allocation,
        }
        used = entry["bytes"] / limit - 1
        error = predicted / entry["kl_mean"] - 1
        formats = {
            unit["names"][0].removeprefix("model.layers.").removesuffix(".weight"): str(fmt)
            for unit in quantizer.report.allocation["units"]
            for item in quantizer.plan()
            if item.name == unit["names"][0] and (fmt := item.format or "kept")
        }
        print(
            f"{'':17} predicted {predicted:.3g} ({100 * error:+.0f} %), bytes {100 * used:+.3f} %"
        )
        print(f"{'':17} " + ", ".join(f"{k} {v}" for k, v in formats.items()), flush=True)

    def _row(
        self, label: str, stored: Any, report: Report, base: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        evaluation = Evaluation(self.source, self.texts, self.device)
        for _ in evaluation.watch(stored):
            pass
        figures = evaluation.figures
        keys = ("kl_mean", "kl_p99", "same_top1", "noise_floor_kl", "near_noise", "positions")
        entry = {"model": self.name, "weights": label, "bytes": report.after_bytes}
        entry |= {key: figures[key] for key in keys}
        if base is not None:
            entry["ratio"] = entry["kl_mean"] / base["kl_mean"]
        ratio = f"{entry['ratio']:7.3f}" if base is not None else " " * 7
        noise = " (near noise)" if figures["near_noise"] else ""
        print(
            f"{self.name:17} {label:22} {entry['bytes'] / 1e6:6.3f} {entry['kl_mean']:9.2e} "
            f"{entry['kl_p99']:9.2e} {100 * entry['same_top1']:7.3f}% {ratio}{noise}",
            flush=True,
        )
        self.rows.append(entry)
        return entry


def run(model: str, kind: str, num_tokens: int, device: str) -> list[dict[str, Any]]:
    """Print and return the rows of one model or its twin."""
    bench = Bench(model, kind, num_tokens, device)

    def compare(name: str) -> None:
        nearest = bench.uniform(f"{name} nearest", uniform(name, "rtn"))
        bench.uniform(f"{name} searched", uniform(name, "auto"), nearest)

    compare("int4")
    if kind == "original":
        g32 = {"format": "int4", "group_size": 32}
        policy = {"attention_weights": g32, "residual_connections": g32, "io_layers": "bf16"}
        base = bench.uniform("int4 g32 (4.5 bits)", policy)
        bench.budget("budget of 4.5 bits", policy, base["bytes"], base)
        kept = {**policy, "overrides": {"embed_tokens|lm_head": "bf16"}}
        del kept["io_layers"]
        bench.budget("budget, layers only", kept, base["bytes"], base)
    compare("int3")
    last = bench.rows[-1]
    print(f"{'':17} noise floor {last['noise_floor_kl']:.2g}, {last['positions']} positions")
    return bench.rows


def run_apart(args: argparse.Namespace, model: str, kind: str) -> list[dict[str, Any]]:
    """Do the same in a process of its own."""
    command = [sys.executable, __file__, "--models", model, "--kinds", kind]
    command += ["--tokens", str(args.tokens), "--device", args.device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *lines, last = done.stdout.strip().splitlines()
    print("\n".join(lines[1:]), flush=True)
    return list(json.loads(last)["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    for model in args.models:
        if model in MICRO_CONFIGS:
            make_model(model, directory(model))
    cases = [(model, kind) for model in args.models for kind in args.kinds]
    print(HEADING, flush=True)
    if len(cases) == 1 or args.processes == 1:
        parts = [run(*case, args.tokens, args.device) for case in cases]
    else:
        with ThreadPoolExecutor(args.processes) as pool:
            parts = list(pool.map(lambda case: run_apart(args, *case), cases))
    rows = [row for part in parts for row in part]
    print(json.dumps({"benchmark": "quant_quality", "device": args.device, "rows": rows}))


if __name__ == "__main__":
    main()
