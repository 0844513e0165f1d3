"""How fast does one request decode and prefill, and what share of the memory limit is that?

    python benchmarks/decode.py --shape r1-qwen-1.5b --policy four-tier --device cpu
    python benchmarks/decode.py --model fastgpt/assets/tiny-r1 --device cuda

    python benchmarks/decode.py --shape r1-qwen-1.5b --device cuda --compare-pdl
    python benchmarks/decode.py --shape r1-qwen-1.5b --device cuda --prompt 16384 --batch 8 \
        --kv-cache-dtype fp8

Time per token is the difference of two generation lengths, so that prefill cancels. Prefill is the
time to the first token of a prompt, less one decode step. --compare-pdl measures twice on one GPU
engine, first with kernels that start one after the other, then with overlapping launches, and
demands the same tokens of both.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from random_model import POLICIES, SHAPES, RandomCheckpoint
from report import median, print_machine, streaming_read_gb_s

from fastgpt import Engine, SamplingParams
from fastgpt.checkpoint import open_checkpoint
from fastgpt.config import KV_CACHE_DTYPES
from fastgpt.models import registry


def generate_s(
    engine: Engine, num_prompt: int, num_tokens: int, batch: int, seed: int
) -> tuple[float, list[list[int]]]:
    """Return the seconds to generate num_tokens for each of `batch` random prompts, and them."""
    generator = torch.Generator().manual_seed(seed)
    vocab = engine.limits.vocab_size
    prompts = [
        torch.randint(0, vocab, (num_prompt,), generator=generator).tolist() for _ in range(batch)
    ]
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    outputs = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    assert all(len(output.token_ids) == num_tokens for output in outputs)
    return seconds, [output.token_ids for output in outputs]


def measure_steps(
    engine: Engine, args: argparse.Namespace
) -> tuple[list[float], list[list[list[int]]]]:
    """Return the seconds a decode step takes, once a repeat, and what each repeat generated."""
    short, long = args.tokens
    generate_s(engine, args.prompt, short, args.batch, seed=0)
    steps, tokens = [], []
    for repeat in range(args.repeats):
        slow, ids = generate_s(engine, args.prompt, long, args.batch, repeat)
        fast, _ = generate_s(engine, args.prompt, short, args.batch, repeat)
        steps.append((slow - fast) / (long - short))
        tokens.append(ids)
    return steps, tokens


def measure_overlap(
    engine: Engine, args: argparse.Namespace
) -> tuple[list[float], list[list[list[int]]]]:
    """Measure again with kernels that overlap, on graphs captured anew."""
    engine.runner.overlap_launches = True
    engine.runner.capture_graphs(args.batch)
    return measure_steps(engine, args)


def stored_bytes(path: Path) -> int:
    """Return the bytes that decoding one token reads from a checkpoint on disk, embedding apart."""
    checkpoint = open_checkpoint(path)
    assert checkpoint.config is not None
    family = registry.family(checkpoint.config)
    config = family.parse_config(checkpoint.config)
    return sum(
        checkpoint.read(spec.name).nbytes
        for spec in family.roles(config)
        if spec.name in checkpoint and ("embed" not in spec.name or config.tie_word_embeddings)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--model", type=Path, help="a checkpoint instead of a random shape")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="four-tier")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens of the decode runs")
    parser.add_argument("--prefill", type=int, default=256, help="prompt tokens of the prefill run")
    parser.add_argument("--tokens", type=int, nargs=2, default=(8, 40), metavar=("SHORT", "LONG"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compare-pdl", action="store_true", help="also without overlap (GPU)")
    args = parser.parse_args()
    if (args.shape is None) == (args.model is None):
        parser.error("give one of --shape and --model")
    if args.compare_pdl:
        if not args.device.startswith("cuda"):
            parser.error(f"--compare-pdl needs --device cuda, not {args.device}")
        os.environ["FASTGPT_DISABLE_PDL"] = "1"  # the engine below starts without overlap

    facts = print_machine(args.device)
    limit_gb_s = streaming_read_gb_s(args.device)
    if args.shape:
        source: Any = RandomCheckpoint(SHAPES[args.shape], POLICIES[args.policy])
        name, num_bytes = f"{args.shape} {args.policy}", source.decode_bytes
    else:
        source, name, num_bytes = args.model, args.model.stem, stored_bytes(args.model)
    length = max(args.prefill, args.prompt) + max(args.tokens) + 1
    start = time.perf_counter()
    engine = Engine(
        source,
        device=args.device,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        max_batch=args.batch,
        max_length=length,
    )
    load_s = time.perf_counter() - start

    steps, tokens = measure_steps(engine, args)
    prefills = [generate_s(engine, args.prefill, 1, 1, repeat)[0] for repeat in range(args.repeats)]
    ordered: dict[str, Any] = {}
    if args.compare_pdl:
        ordered = {"ms_per_step_without_pdl": min(steps) * 1e3}
        print(json.dumps({"model": name, **ordered}), flush=True)  # kept if what follows fails
        steps, overlapped_tokens = measure_overlap(engine, args)
        if overlapped_tokens != tokens:
            raise SystemExit("decode: overlapping launches changed the tokens; a kernel races")
    step_s = min(steps)
    prefill_s = min(prefills)
    result = {
        **facts,
        "model": name,
        "dtype": str(engine.loaded.model.dtype).removeprefix("torch."),
        "batch": args.batch,
        "prompt_tokens": args.prompt,
        "kv_cache_dtype": args.kv_cache_dtype,
        "kv_bytes_per_token": engine.runner.kv_cache.nbytes // engine.limits.num_cache_tokens,
        "ms_per_step": step_s * 1e3,
        "ms_per_step_median": median(steps) * 1e3,
        **ordered,
        "tok_per_s": args.batch / step_s,
        "gb_per_step": num_bytes / 1e9,
        "gb_per_s": num_bytes / step_s / 1e9,
        "streaming_read_gb_per_s": limit_gb_s,
        "fraction_of_limit": num_bytes / step_s / 1e9 / limit_gb_s,
        "prefill_tokens": args.prefill,
        "prefill_tok_per_s": args.prefill / prefill_s,
        "load_s": load_s,
    }
    print(
        f"{name}, batch {args.batch}: {step_s * 1e3:.2f} ms a step, "
        f"{args.batch / step_s:.1f} tok/s, "
        f"{num_bytes / 1e9:.2f} GB a step at {result['gb_per_s']:.1f} GB/s = "
        f"{result['fraction_of_limit']:.2f} of a streaming read ({limit_gb_s:.1f} GB/s); "
        f"prefill {args.prefill}: {result['prefill_tok_per_s']:.0f} tok/s; load {load_s:.1f} s"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
