#!/usr/bin/env python3
"""What searching codes and formats wins, on four small models and their twins with outliers.

    python benchmarks/quant_quality.py [--models tiny-qwen ...] [--tokens 200000] [--device cuda]
                                       [--processes 8] [--calibration own|texts]

Every row is measured by the certificate's own code: KL of next-token distributions from the
source's over all positions of held-out texts, prompts included. A twin computes the same function
with powers of two moved between norm gains or gates and the columns that read them, which gives it
the outlier channels of large models. Calibration: the model's own answers to 64 prompts (own), or
64 texts of the kind that is measured, of the training split (texts).

Rotated rows fold a rotation of the residual stream into the weights first, where the head is not
the embedding. A budget has the bytes of the uniform row above it; "layers only" leaves embedding
and head as they are, as uniform rows do. A ratio says nothing where the KL is under three noise
floors (bf16 activations). micro-text and micro-chain are trained first if --micro lacks them, which
takes minutes on two cores (train_micro.py); what they are measured on is held out, whatever machine
made them. Rows appear as they are done, with --processes those of several models mixed. The last
line is the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
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
from fastgpt.quant.evaluate import Evaluation, SourceAnswers
from fastgpt.quant.family import quantize_family
from fastgpt.quant.plan import plan_family
from fastgpt.quant.report import Report
from fastgpt.quant.rotation import RotatedCheckpoint

ROOT = Path(__file__).resolve().parents[1]
MICRO = ROOT / "build/micro"
MODELS = ("tiny-qwen", "tiny-r1", *MICRO_CONFIGS)
KINDS = ("original", "twin")
PARTS = ("uniform", "rotated", "budget", "layers")
Texts = list[list[int]]
HEADING = (
    f"{'model':17} {'weights':22} {'MB':>6} {'KL mean':>9} {'p99':>9} {'top-1':>8} {'ratio':>7}"
)


def directory(model: str, micro: Path) -> Path:
    return micro / model if model in MICRO_CONFIGS else ROOT / "fastgpt/assets" / model


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


def texts_of(
    model: str, path: Path, num_tokens: int, num_trained: int
) -> tuple[Texts, Texts, Texts]:
    """Return prompts and whole texts of the training split, and num_tokens held-out ones."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    if model == "micro-text":
        trained, held_out = split_documents()
        step = len(trained) // num_trained
        taught = text_sequences(tokenizer, trained[::step])[:num_trained]
        prompts = [ids[:12] for ids in taught]
        measured = text_sequences(tokenizer, held_out)
    else:
        each = -(-num_trained // len(TASKS))
        drawn = [draw_problems(t, each, seed=5, held_out=False) for t in TASKS]
        questions = [problem for group in zip(*drawn, strict=True) for problem in group]
        pairs = encode_problems(tokenizer, questions)  # tasks in turn
        prompts = [prompt for prompt, _ in pairs]
        taught = [prompt + response for prompt, response in pairs]
        each = num_tokens // (100 * len(TASKS)) + 1  # a problem takes more than a hundred tokens
        measured = chain_sequences(tokenizer, each, seed=9, held_out=True)
    texts, total = [], 0
    step = max(1, int(sum(map(len, measured)) / (1.1 * num_tokens)))
    for ids in measured[::step]:
        texts.append(ids)
        total += len(ids)
    if total < num_tokens:
        raise SystemExit(f"{model}: {total} held-out tokens, {num_tokens} are wanted")
    return prompts[:num_trained], taught[:num_trained], texts


class Bench:
    """One model or its twin, what it is calibrated with and what it is measured on."""

    def __init__(self, model: str, kind: str, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.path = directory(model, args.micro)
        self.name = model if kind == "original" else f"{model} twin"
        plain = HuggingFaceCheckpoint(self.path)
        prompts, taught, self.texts = texts_of(model, self.path, args.tokens, args.sequences)
        own = Calibration(
            "self" if args.calibration == "own" else taught,
            prompts=prompts,
            num_sequences=args.sequences,
            num_evaluation=0,
            length=384,
        )
        self.tokens, _ = token_sequences(own, plain, self.device)
        self.source = plain if kind == "original" else twin_of(plain)
        assert self.source.config is not None
        self.is_tied = bool(self.source.config.get("tie_word_embeddings"))
        self.answers = SourceAnswers.of(self.source, self.texts, self.device)
        self.start = time.monotonic()
        self.rows: list[dict[str, Any]] = []

    def uniform(
        self,
        label: str,
        policy: Any,
        base: dict[str, Any] | None = None,
        *,
        rotate: bool = False,
    ) -> dict[str, Any]:
        """Measure one format for all matrices, beside the row `base`."""
        report = Report()
        planned, _ = plan_family(self.source, Policy.parse(policy))
        source = RotatedCheckpoint(self.source, planned, self.device) if rotate else self.source
        tensors = quantize_family(source, planned, report, self.device, self.tokens)
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
        allocation = quantizer.report.allocation
        predicted = allocation["predicted_kl"]
        entry |= {
            "max_bytes": limit,
            "predicted_kl": predicted,
            "allocation": allocation,
        }
        used = entry["bytes"] / limit - 1
        error = predicted / entry["kl_mean"] - 1
        formats = {
            unit["names"][0].removeprefix("model.layers.").removesuffix(".weight"): str(fmt)
            for unit in allocation["units"]
            for item in quantizer.plan()
            if item.name == unit["names"][0] and (fmt := item.format or "kept")
        }
        print(
            f"{self.name:17} predicted {predicted:.3g} ({100 * error:+.0f} %), by sums "
            f"{allocation['additive_kl']:.3g}, first plan {allocation['first_plan_kl']:.3g}, "
            f"bytes {100 * used:+.3f} %"
        )
        print(f"{self.name:17} " + ", ".join(f"{k} {v}" for k, v in formats.items()), flush=True)

    def _row(
        self, label: str, stored: Any, report: Report, base: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        evaluation = Evaluation(self.source, self.texts, self.device, answers=self.answers)
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
            f"{entry['kl_p99']:9.2e} {100 * entry['same_top1']:7.3f}% {ratio}{noise} "
            f"[{time.monotonic() - self.start:.0f} s]",
            flush=True,
        )
        self.rows.append(entry)
        return entry


def run(model: str, kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return the rows of one model or its twin."""
    start = time.monotonic()
    bench = Bench(model, kind, args)
    num_tokens = sum(map(len, bench.tokens))
    print(
        f"{bench.name:17} calibrated on {len(bench.tokens)} sequences, {num_tokens} tokens "
        f"({args.calibration}), made in {time.monotonic() - start:.0f} s",
        flush=True,
    )

    def compare(name: str) -> None:
        nearest = bench.uniform(f"{name} nearest", uniform(name, "rtn"))
        bench.uniform(f"{name} searched", uniform(name, "auto"), nearest)
        if "rotated" in args.parts and not bench.is_tied:
            for label, algorithm in (("nearest", "rtn"), ("searched", "auto")):
                policy = uniform(name, algorithm)
                bench.uniform(f"{name} {label}, rotated", policy, nearest, rotate=True)

    if {"uniform", "rotated"} & set(args.parts):
        compare("int4")
        compare("int3")
    if {"budget", "layers"} & set(args.parts) and kind == "original":
        g32 = {"format": "int4", "group_size": 32}
        policy = {"attention_weights": g32, "residual_connections": g32, "io_layers": "bf16"}
        base = bench.uniform("int4 g32 (4.5 bits)", policy)
        if "budget" in args.parts:
            bench.budget("budget of 4.5 bits", policy, base["bytes"], base)
        if "layers" in args.parts:
            kept = {**policy, "overrides": {"embed_tokens|lm_head": "bf16"}}
            del kept["io_layers"]
            bench.budget("budget, layers only", kept, base["bytes"], base)
    if bench.rows:
        last = bench.rows[-1]
        print(
            f"{bench.name:17} noise floor {last['noise_floor_kl']:.2g}, {last['positions']} "
            f"positions, {time.monotonic() - start:.0f} s",
            flush=True,
        )
    return bench.rows


def run_apart(args: argparse.Namespace, model: str, kind: str) -> list[dict[str, Any]]:
    """Do the same in a process of its own, whose lines appear as they come."""
    command = [sys.executable, "-u", __file__, "--models", model, "--kinds", kind]
    command += ["--tokens", str(args.tokens), "--device", args.device, "--parts", *args.parts]
    command += ["--sequences", str(args.sequences), "--calibration", args.calibration]
    command += ["--micro", str(args.micro)]
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                rows = json.loads(line)["rows"]
            elif line.rstrip() != HEADING:
                print(line, end="", flush=True)
    if process.returncode:
        raise SystemExit(f"{model} {kind} ended with status {process.returncode}")
    return list(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--calibration", choices=("own", "texts"), default="own")
    parser.add_argument("--sequences", type=int, default=64, help="to calibrate with, at most")
    parser.add_argument("--micro", type=Path, default=MICRO, help="where the micro models are")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    for model in args.models:
        if model in MICRO_CONFIGS and not (args.micro / model / "training_report.json").exists():
            make_model(model, args.micro / model)
    cases = [(model, kind) for model in args.models for kind in args.kinds]
    print(HEADING, flush=True)
    if len(cases) == 1 or args.processes == 1:
        parts = [run(*case, args) for case in cases]
    else:
        with ThreadPoolExecutor(args.processes) as pool:
            parts = list(pool.map(lambda case: run_apart(args, *case), cases))
    rows = [row for part in parts for row in part]
    print(json.dumps({"benchmark": "quant_quality", "device": args.device, "rows": rows}))


if __name__ == "__main__":
    main()
