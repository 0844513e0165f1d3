#!/usr/bin/env python3
"""The article's table of tiers, measured: what each loses and how much faster it decodes.

    python benchmarks/article_table.py [--device cuda] [--shapes r1-qwen-1.5b]
                                       [--tiers "binary norms" four-tier]
                                       [--problems 5000 | --quality OUTPUT_OF_TINY_QUALITY]

Per tier, beside the article's figures, which name neither metric nor machine:

    loss     on tiny-r1: change of exact match in points over held-out problems, paired, with its
             95 % interval, and the mean KL of the answers (tiny_quality.py)
    speed    decoding one sequence, tokens per second over bf16's on the same machine, of a random
             model of a published shape (decode.py); the other tiers stay bf16

Then the bytes of R1-Distill-Qwen-7B's shape by policy, from a dry run that reads no weights; what a
budget chooses there is a question of measured losses, so the last line shows only that it fits.
The last line is the table as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from decode import measure_steps
from random_model import POLICIES, SHAPES, RandomCheckpoint

from fastgpt import Engine
from fastgpt.models import registry
from fastgpt.quant.allocate import Option, Unit, solve
from fastgpt.quant.plan import plan_family
from fastgpt.quant.policy import Policy
from fastgpt.quant.sensitivity import OPTIONS, is_free, unit_of
from fastgpt.units import format_bytes

ROOT = Path(__file__).resolve().parents[1]
# Tier -> the article's precision loss and speed-up in percent.
TIERS: dict[str, tuple[float | None, float | None]] = {
    "fp8 attention": (0.3, 22),
    "int4 residual branch": (1.1, 45),
    "binary norms": (2.7, 63),
    "fp16 input and output": (0.0, 15),
    "four-tier": (None, None),
}
SIZED = "r1-qwen-7b"
BUDGET_BYTES = 4_700_000_000


def quality(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return tiny_quality.py's row of every tier, from its output at hand or from running it."""
    if args.quality is not None:
        output = args.quality.read_text()
    else:
        command = [sys.executable, str(ROOT / "benchmarks/tiny_quality.py")]
        command += [
            "--device",
            args.device,
            "--problems",
            str(args.problems),
            "--rows",
            *args.tiers,
        ]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = json.loads(output.strip().splitlines()[-1])["rows"]
    return {row["row"]: row for row in rows}


def tokens_per_s(shape: str, policy: str, args: argparse.Namespace) -> float:
    """Return the decoding speed of one sequence."""
    source: Any = RandomCheckpoint(SHAPES[shape], POLICIES[policy])
    length = args.prompt + max(args.tokens) + 1
    engine = Engine(source, device=args.device, max_batch=1, max_length=length)
    seconds, _ = measure_steps(engine, args)
    del engine
    gc.collect()
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()
    print(f"{shape} {policy}: {1.0 / min(seconds):.1f} tokens/s on {args.device}", flush=True)
    return 1.0 / min(seconds)


def budget_bytes(shape: str, limit: int) -> tuple[int, dict[str, int]]:
    """Return the bytes a budget takes of a shape, and how many matrices get each format.

    Losses stand in for measured ones: 4^-bits a value, the same for every matrix.
    """
    source = RandomCheckpoint(SHAPES[shape], {})
    planned, _ = plan_family(source, Policy.parse("four-tier"))
    free = {item.name: item for item in planned if is_free(item)}
    keys: dict[str, list[str]] = {}
    for name in free:
        keys.setdefault(unit_of(name), []).append(name)
    units = []
    for names in keys.values():
        shapes = [free[name].shape for name in names]
        values = sum(torch.Size(s).numel() for s in shapes)
        options = []
        for fmt in OPTIONS:
            size = sum(map(fmt.nbytes, shapes))
            options.append(Option(fmt, size, values * 4.0 ** (-8 * size / values)))
        units.append(Unit(tuple(names), (*options, Option(None, 2 * values, 0.0))))
    fixed = sum(
        item.format.nbytes(item.shape) if item.format else 4 * torch.Size(item.shape).numel()
        for item in planned
        if item.name not in free
    )
    solution = solve(units, fixed, max_bytes=limit, max_loss=None)
    counts: dict[str, int] = {}
    for unit, option in zip(units, solution.options, strict=True):
        name = str(option.format) if option.format else "bf16"
        counts[name] = counts.get(name, 0) + len(unit.names)
    return solution.num_bytes, counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=["r1-qwen-1.5b"])
    parser.add_argument("--tiers", nargs="*", choices=list(TIERS), default=list(TIERS))
    parser.add_argument("--problems", type=int, default=5000, help="of each of the three tasks")
    parser.add_argument("--quality", type=Path, help="file with the output of tiny_quality.py")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 72))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.batch = 1

    values = sum(
        torch.Size(spec.shape).numel()
        for family in [registry.family(SHAPES[SIZED])]
        for spec in family.roles(family.parse_config(SHAPES[SIZED]))
    )
    sizes = {"fp32": 4 * values}
    for policy in ("bf16", "four-tier"):
        sizes[policy] = RandomCheckpoint(SHAPES[SIZED], POLICIES[policy]).stored_bytes
    sizes["budget"], counts = budget_bytes(SIZED, BUDGET_BYTES)
    print(f"{SIZED}: " + ", ".join(f"{name} {format_bytes(n)}" for name, n in sizes.items()))
    print(f"budget of {format_bytes(BUDGET_BYTES)}: {counts}", flush=True)

    speeds: dict[str, dict[str, float]] = {}
    for shape in args.shapes:
        speeds[shape] = {name: tokens_per_s(shape, name, args) for name in ("bf16", *args.tiers)}
    found = quality(args) if args.problems or args.quality else {}

    heading = "".join(f"  {shape:>14}" for shape in args.shapes)
    print(
        f"{'':22}  {'exact match, points':>24}  {'KL mean':>8}  {'article':>7}{heading}  "
        f"{'article':>7}"
    )
    for name in args.tiers:
        loss, faster = TIERS[name]
        line = f"{name:22}"
        if name in found:
            interval = "{:+.2f} ({:+.2f} to {:+.2f})".format(*found[name]["change"])
            line += f"  {interval:>24}  {found[name]['kl_mean']:8.1e}"
        else:
            line += " " * 36
        line += f"  {'' if loss is None else f'{loss} %':>7}"
        for shape in args.shapes:
            gain = 100 * (speeds[shape][name] / speeds[shape]["bf16"] - 1)
            line += f"  {gain:+12.1f} %"
        print(line + f"  {'' if faster is None else f'{faster} %':>7}")
    print(
        json.dumps(
            {
                "benchmark": "article_table",
                "device": torch.cuda.get_device_name() if "cuda" in args.device else "cpu",
                "tokens_per_s": speeds,
                "sizes": {SIZED: sizes},
                "quality": found,
            }
        )
    )


if __name__ == "__main__":
    main()
