#!/usr/bin/env python3
"""Train the bundled checkpoints tiny-r1 and tiny-qwen on one GPU, both at once, in minutes.

    python benchmarks/train_tiny.py --out build/tiny --minutes 5.5

Writes, under --out, each model as a Hugging Face directory with a training_report.json, and each
minute a shard of the running weights, from which `--init-from SHARD --minutes 0` exports a model.
The last line is a JSON report: exact match of greedy bf16 decoding over held-out problems per task.

The learning rate follows the clock, so the number of steps depends on the machine; everything drawn
at random follows --seed. `--steps` ends the schedule after a fixed number of steps instead.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_networks import (
    CONFIGS,
    VOCAB_SIZE,
    TinyCausalLM,
    cast_parameters,
    export_state,
    greedy_decode,
    import_state,
)
from tiny_tasks import (
    HELD_OUT_MODULUS,
    MAX_STEPS,
    MIN_STEPS,
    TASKS,
    check_answer,
    count_problems,
    draw_problems,
)
from tiny_tokenizer import (
    BOS,
    BOS_ID,
    CHAT_TEMPLATE,
    EOS,
    EOS_ID,
    PAD,
    PAD_ID,
    build_tokenizer,
    encode_problems,
    prompt_text,
)
from tokenizers import Tokenizer

MAX_NEW_TOKENS = 320


def _encode_share(job: tuple[str, str, int, int]) -> tuple[list[np.ndarray], list[int]]:
    task, tokenizer_json, count, seed = job
    tokenizer = Tokenizer.from_str(tokenizer_json)
    pairs = encode_problems(tokenizer, draw_problems(task, count, seed=seed, held_out=False))
    return [np.array(p + r, dtype=np.uint16) for p, r in pairs], [len(p) for p, _ in pairs]


def make_dataset(path: Path, tokenizer: Tokenizer, per_task: int, seed: int, workers: int) -> None:
    """Write per_task problems of every task to an .npz, in two buckets of padded rows.

    Bucket b holds tokens_b uint16 [rows, longest], prompt_lens_b and lens_b int64 [rows].
    """
    share = min(per_task, 20_000)
    jobs = [
        (task, tokenizer.to_str(), share, seed * 1000 + i)
        for task in TASKS
        for i in range(per_task // share)
    ]
    rows: list[np.ndarray] = []
    prompt_lens: list[int] = []
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for part, lens in pool.imap(_encode_share, jobs):
            rows += part
            prompt_lens += lens
    lens = np.array([len(r) for r in rows])
    # The boundary that leaves the fewest padded positions.
    top = int(lens.max())
    ends = range(16, top, 16)
    cost = [np.sum(lens <= e) * e + np.sum(lens > e) * top for e in ends]
    boundary = ends[int(np.argmin(cost))]
    arrays = {}
    for b, keep in enumerate((lens <= boundary, lens > boundary)):
        index = np.flatnonzero(keep)
        width = -(-int(lens[index].max()) // 16) * 16
        tokens = np.full((len(index), width), PAD_ID, dtype=np.uint16)
        for row, i in zip(tokens, index, strict=True):
            row[: lens[i]] = rows[i]
        arrays |= {f"tokens_{b}": tokens, f"lens_{b}": lens[index]}
        arrays[f"prompt_lens_{b}"] = np.array(prompt_lens)[index]
        print(
            f"bucket {b}: {len(tokens)} problems of {width} tokens, mean {lens[index].mean():.0f}"
        )
    np.savez(path, **arrays)


def batch_loss(
    model: TinyCausalLM, ids: torch.Tensor, prompt_lens: torch.Tensor, lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of the response tokens and the tokens sent to each expert.

    Load is [num_moe_layers, num_experts] fp32, padding not counted; empty without experts.
    """
    hidden = model(ids[:, :-1])
    logits = model.lm_head(hidden).float().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(
        ids.shape[0], -1
    )
    at = torch.arange(ids.shape[1] - 1, device=ids.device)
    is_target = (at >= prompt_lens[:, None] - 1) & (at < lens[:, None] - 1)
    is_token = (at < lens[:, None])[..., None]
    load = [(m.load & is_token).sum((0, 1)).float() for m in model.moe_layers()]
    return (losses * is_target).sum(), torch.stack(load) if load else losses.new_zeros(0)


class Buckets:
    """Endless shuffled batches of both buckets, held on the device."""

    def __init__(self, path: Path, batch: int, device: torch.device, seed: int) -> None:
        data = np.load(path)
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.parts = []
        total = sum(len(data[f"lens_{b}"]) for b in (0, 1))
        for b in (0, 1):
            tokens = torch.from_numpy(data[f"tokens_{b}"].astype(np.int16)).to(device)
            lens = [torch.from_numpy(data[f"{k}_{b}"]).to(device) for k in ("prompt_lens", "lens")]
            rows = max(1, round(batch * len(tokens) / total))
            self.parts.append((tokens, lens[0], lens[1], rows))
        self.order = [torch.empty(0, dtype=torch.long, device=device)] * 2

    def next(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return ids [rows, width] int64, prompt lengths and lengths for each bucket."""
        batches = []
        for b, (tokens, prompt_lens, lens, rows) in enumerate(self.parts):
            if len(self.order[b]) < rows:
                self.order[b] = torch.randperm(
                    len(tokens), generator=self.generator, device=tokens.device
                )
            at, self.order[b] = self.order[b][:rows], self.order[b][rows:]
            batches.append((tokens[at].long(), prompt_lens[at], lens[at]))
        return batches


def evaluate(
    state: dict[str, torch.Tensor],
    name: str,
    tokenizer: Tokenizer,
    device: torch.device,
    n: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Decode n held-out problems of each task greedily in bf16; count exact answers and chains."""
    model = TinyCausalLM(CONFIGS[name]).to(device)
    import_state(model, state)
    cast_parameters(model, torch.bfloat16).eval()
    results = {}
    for task in TASKS:
        problems = draw_problems(task, n, seed=seed, held_out=True)
        pairs = encode_problems(tokenizer, problems)
        outputs = greedy_decode(
            model, [p for p, _ in pairs], max_new_tokens=MAX_NEW_TOKENS, eos_id=EOS_ID
        )
        texts = tokenizer.decode_batch(outputs, skip_special_tokens=False)
        right = [check_answer(p, t) for p, t in zip(problems, texts, strict=True)]
        results[task] = {
            "n": n,
            "exact_match": sum(right) / n,
            "whole_chain": sum(p.response == t for p, t in zip(problems, texts, strict=True)) / n,
            "mean_response_tokens": round(sum(map(len, outputs)) / n, 1),
        }
        wrong = [(p.question, t) for p, t, ok in zip(problems, texts, right, strict=True) if not ok]
        for question, text in wrong[:2]:
            print(f"wrong: {question!r} -> {text!r}")
    return results


def learning_rate(progress: float, peak: float) -> float:
    """Return warm-up to `peak` over 2 %, a plateau until 40 %, then a straight line to zero."""
    return peak * min(progress / 0.02 + 0.01, 1.0, max(0.0, (1.0 - progress) / 0.6))


def train(
    args: argparse.Namespace, name: str, tokenizer: Tokenizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train one model until its time or step limit; return its exported weights and the figures."""
    start = time.monotonic()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    model = TinyCausalLM(CONFIGS[name]).to(device)
    if args.init_from:
        import_state(model, load_file(args.init_from))
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    limit_s = args.minutes * 60
    if limit_s <= 0:
        return export_state(model), figures
    buckets = Buckets(args.data, args.batch, device, args.seed)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    if args.compile:  # layer by layer: equal layers share one graph, so compiling takes seconds
        torch._dynamo.config.suppress_errors = True  # a layer that fails to compile runs eagerly
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    moe_layers = model.moe_layers()
    step, num_tokens, next_shard, loss_sum = 0, 0, 60.0, torch.zeros((), device=device)
    while True:
        elapsed = time.monotonic() - start
        progress = step / args.steps if args.steps else elapsed / limit_s
        if progress >= 1.0 or elapsed >= limit_s:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        batches = buckets.next()
        num_targets = sum((lens - prompt_lens).sum() for _, prompt_lens, lens in batches)
        loads = []
        for ids, prompt_lens, lens in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, load = batch_loss(model, ids, prompt_lens, lens)
            (loss / num_targets).backward()
            loss_sum += loss.detach() / num_targets
            loads.append(load)
            num_tokens += ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Balance without an auxiliary loss (arXiv:2408.15664): overloaded experts lose bias.
        for layer, load in zip(moe_layers, sum(loads) if moe_layers else (), strict=True):
            bias = layer.gate.e_score_correction_bias
            bias -= 1e-3 * min(1.0, 2 * (1.0 - progress)) * torch.sign(load - load.mean())
        step += 1
        if step % args.log_every == 0:
            mean = loss_sum.item() / args.log_every  # waits for the device: the clock stays honest
            loss_sum.zero_()
            print(
                f"{name} step {step} {time.monotonic() - start:.0f} s loss {mean:.5f} "
                f"lr {optimizer.param_groups[0]['lr']:.2e} "
                f"{num_tokens / max(elapsed, 1e-3) / 1e6:.2f} M tok/s",
                flush=True,
            )
        if elapsed >= next_shard:
            next_shard += 60.0
            state = export_state(model)
            scratch = args.shards / f"{name}.shard.tmp"
            save_file(state, scratch)
            scratch.replace(args.shards / f"{name}.shard.safetensors")
            quick = evaluate(state, name, tokenizer, device, args.quick, args.seed + 1)
            print(
                f"{name} {elapsed:.0f} s",
                {t: r["exact_match"] for t, r in quick.items()},
                flush=True,
            )
    figures |= {
        "steps": step,
        "padded_tokens": num_tokens,
        "problems_seen": step * sum(part[3] for part in buckets.parts),
        "train_s": round(time.monotonic() - start, 1),
    }
    if moe_layers:
        share = sum(loads)
        share = share / share.sum(1, keepdim=True)
        figures["expert_load_last_step"] = [[round(x, 3) for x in row] for row in share.tolist()]
    return export_state(model), figures


def save_directory(
    directory: Path, name: str, state: dict[str, torch.Tensor], tokenizer: Tokenizer
) -> None:
    """Write a Hugging Face model directory."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"))
    config = CONFIGS[name]
    files = {
        "config.json": config,
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": BOS_ID,
            "do_sample": True,
            "eos_token_id": EOS_ID,
            "temperature": 0.6,
            "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": config["max_position_embeddings"],
            "pad_token": PAD,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for file, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=file == "config.json")
        (directory / file).write_text(text + "\n", encoding="utf-8")


def compare_with_transformers(directory: Path, name: str) -> float:
    """Return max |logit difference| / max |logit| of our module and transformers', in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = TinyCausalLM(CONFIGS[name]).eval()
    import_state(ours, load_file(directory / "model.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    problem = draw_problems("sorting", 1, seed=0, held_out=True)[0]
    messages = [{"role": "user", "content": problem.question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if text != prompt_text(problem.question):
        raise RuntimeError(
            f"the chat template renders {text!r}, not {prompt_text(problem.question)!r}"
        )
    ids = tokenizer(
        text + problem.response, add_special_tokens=False, return_tensors="pt"
    ).input_ids
    noise = torch.randint(0, VOCAB_SIZE, (2, 300), generator=torch.Generator().manual_seed(0))
    worst = 0.0
    with torch.inference_mode():
        for batch in (ids, noise):
            expected, got = theirs(batch).logits, ours.lm_head(ours(batch))
            worst = max(worst, float((expected - got).abs().max() / expected.abs().max()))
    return worst


def run_model(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train, export, evaluate and check one model; write its directory and return its report."""
    import tokenizers
    import transformers

    tokenizer = build_tokenizer(args.seed)
    state, figures = train(args, name, tokenizer)
    directory = args.out / name
    save_directory(directory, name, state, tokenizer)
    device = torch.device(args.device)
    start = time.monotonic()
    tasks = evaluate(state, name, tokenizer, device, args.problems, args.seed + 2)
    for task, result in tasks.items():
        result["possible_problems_at_least"] = count_problems(task)
    print(json.dumps(tasks), flush=True)
    eval_s = round(time.monotonic() - start, 1)
    difference = compare_with_transformers(directory, name)
    report = {
        "model": name,
        "seed": args.seed,
        **figures,
        "weights_bytes": (directory / "model.safetensors").stat().st_size,
        "held_out": f"crc32(question) % {HELD_OUT_MODULUS} == 0",
        "chain_steps": [MIN_STEPS, MAX_STEPS],
        "decoding": "greedy, bf16",
        "tasks": tasks,
        "eval_s": eval_s,
        "max_relative_logit_difference_from_transformers": difference,
        "machine": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "cpus": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (directory / "training_report.json").write_text(json.dumps(report, indent=2) + "\n")
    if difference > 1e-4:
        raise RuntimeError(f"logits differ from transformers' by {difference:.1e} of the largest")
    (args.shards / f"{name}.shard.safetensors").unlink(missing_ok=True)
    return report


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for models, shards and logs"
    )
    parser.add_argument("--shards", type=Path, help="directory for shards, --out if not given")
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--minutes", type=float, default=6.0, help="training time of each model")
    parser.add_argument("--steps", type=int, default=0, help="end after this many steps")
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--per-task", type=int, default=500_000, help="training problems per task")
    parser.add_argument("--problems", type=int, default=5000, help="held-out problems per task")
    parser.add_argument("--quick", type=int, default=128, help="held-out problems at each minute")
    parser.add_argument("--batch", type=int, default=256, help="problems in a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--data", type=Path, help="dataset that an earlier run wrote")
    parser.add_argument("--init-from", type=Path, help="shard to start from")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    args.shards = args.shards or args.out
    for directory in (args.out, args.shards):
        directory.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    random.seed(args.seed)
    if args.data is None and args.minutes > 0:
        start = time.monotonic()
        args.data = args.out / "problems.npz"
        make_dataset(args.data, build_tokenizer(args.seed), args.per_task, args.seed, args.workers)
        print(f"data {time.monotonic() - start:.1f} s", flush=True)
    if len(args.models) == 1:
        print(json.dumps(run_model(args, args.models[0])))
        return 0
    # One process a model: both share the GPU, and neither waits for the other's compilation.
    flags = sys.argv[1:]
    at = flags.index("--models") if "--models" in flags else len(flags)
    end = at + 1
    while end < len(flags) and not flags[end].startswith("--"):
        end += 1
    flags = flags[:at] + flags[end:]
    if args.data is not None:
        flags += ["--data", str(args.data)]
    children = {}
    for name in args.models:
        log = (args.out / f"{name}.log").open("w")
        command = [sys.executable, "-u", __file__, *flags, "--models", name]
        children[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    codes = {name: child.wait() for name, child in children.items()}
    reports = {}
    for name, code in codes.items():
        if code:
            log_end = (args.out / f"{name}.log").read_text().splitlines()[-30:]
            print(f"{name} failed with {code}:\n" + "\n".join(log_end))
        else:
            reports[name] = json.loads((args.out / name / "training_report.json").read_text())
    print(json.dumps(reports))
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
