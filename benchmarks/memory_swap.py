"""How fast do weights leave and return, and how fast does a model decode that does not fit?

    python benchmarks/memory_swap.py                    (one GPU; about a minute)
    python benchmarks/memory_swap.py --shape tiny       (CPU: what it does, not how fast)

Three questions, each against what one pinned copy of 1 GiB reaches on the same machine:
evict and restore of every matrix of the shape in bf16; the second eviction, which
copies nothing; and decode of the model in a pool of 2/3 of its weights, whose limit is the time of
copying what does not stay. Tokens are compared with those of the model in a pool that holds it all.
"""

import argparse
import json
import time
from typing import Any

import torch
from random_model import POLICIES, SHAPES, RandomCheckpoint
from report import median, print_machine

from fastgpt import Engine, GPTMemoryPool, SamplingParams
from fastgpt.models import registry

TINY = {**SHAPES["r1-qwen-1.5b"], "hidden_size": 256, "intermediate_size": 1024,
        "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 1000}  # fmt: skip


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def link_gb_s(device: str) -> tuple[float, float]:
    """Return the rates of one pinned copy to the device and back, GB/s."""
    num_bytes = (1 << 30) if device == "cuda" else (64 << 20)
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    rates = []
    for target, source in ((there, host), (host, there)):
        times = []
        for _ in range(6):
            synchronize(device)
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            synchronize(device)
            times.append(time.perf_counter() - start)
        rates.append(num_bytes / min(times) / 1e9)
    return rates[0], rates[1]


def matrix_sizes(config: dict[str, Any]) -> list[int]:
    """Return the bytes of every matrix of a model in bf16."""
    family = registry.family(config)
    specs = family.roles(family.parse_config(config))
    return [2 * spec.shape[0] * spec.shape[1] for spec in specs if len(spec.shape) == 2]


def swap_rates(sizes: list[int], device: str, to_gb_s: float, from_gb_s: float) -> dict[str, Any]:
    """Evict and restore entries of these sizes."""
    total = sum(sizes)
    pool = GPTMemoryPool(device, budget=total + (512 << 20), host_budget=2 * total + (512 << 20))
    names = [f"entry.{i}" for i in range(len(sizes))]
    checks = []
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        tensor = pool.allocate((size,), name, torch.uint8)
        tensor.fill_(i % 251)
        checks.append(i % 251)
        del tensor
    rows: dict[str, Any] = {"swap_gb": total / 1e9, "swap_entries": len(sizes)}

    def timed(label: str, act: Any) -> float:
        synchronize(device)
        start = time.perf_counter()
        act()
        synchronize(device)
        seconds = time.perf_counter() - start
        rows[label] = seconds * 1e3
        return seconds

    timed("evict_first_ms", lambda: pool.evict(*names))  # page-locks the host memory
    timed("restore_first_ms", lambda: pool.restore(*names))
    out_s = [timed("evict_ms", lambda: pool.evict(*names))]
    in_s = [timed("restore_ms", lambda: pool.restore(*names))]
    for name in names:
        pool.freeze(name)
    out_s.append(timed("evict_ms", lambda: pool.evict(*names)))
    in_s.append(timed("restore_ms", lambda: pool.restore(*names)))
    clean_s = []
    for _ in range(2):
        clean_s.append(timed("evict_clean_ms", lambda: pool.evict(*names)))
        in_s.append(timed("restore_ms", lambda: pool.restore(*names)))
    rows["evict_ms"], rows["restore_ms"] = median(out_s) * 1e3, median(in_s) * 1e3
    rows["evict_clean_ms"] = median(clean_s) * 1e3
    rows["evict_of_link"] = total / median(out_s) / 1e9 / from_gb_s
    rows["restore_of_link"] = total / median(in_s) / 1e9 / to_gb_s
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        if not bool((pool.allocate((size,), name, torch.uint8) == checks[i]).all()):
            raise SystemExit(f"memory_swap: {name} came back changed")
    pool.check_integrity()
    print(
        f"swap of {total / 1e9:.2f} GB in {len(sizes)} entries: out {rows['evict_ms']:.0f} ms "
        f"({rows['evict_of_link']:.2f} of the link), back {rows['restore_ms']:.0f} ms "
        f"({rows['restore_of_link']:.2f}), clean eviction {rows['evict_clean_ms']:.1f} ms, first "
        f"eviction {rows['evict_first_ms']:.0f} ms",
        flush=True,
    )
    return rows


def decode(engine: Engine, num_tokens: int, batch: int) -> tuple[float, list[list[int]]]:
    """Return seconds a decode step and the tokens."""
    generator = torch.Generator().manual_seed(3)
    vocab = engine.limits.vocab_size
    prompts = [torch.randint(0, vocab, (16,), generator=generator).tolist() for _ in range(batch)]
    seconds = []
    for length in (2, num_tokens, 2, num_tokens):
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        outputs = engine.generate(prompts, params)
        seconds.append(time.perf_counter() - start)
    step_s = (min(seconds[1::2]) - min(seconds[::2])) / (num_tokens - 2)
    return step_s, [output.token_ids for output in outputs]


def decode_rates(
    checkpoint: RandomCheckpoint, device: str, to_gb_s: float, tokens: int
) -> dict[str, Any]:
    """Decode with and without swap and compare tokens."""
    settings = {"device": device, "max_batch": 1, "max_length": 256, "max_batch_tokens": 256}
    plain = Engine(checkpoint, **settings)
    plain_s, expected = decode(plain, tokens, 1)
    pool = plain.loaded.memory.pool
    weights = sum(e.num_bytes for e in pool.entries() if not e.name.startswith("engine."))
    beside = pool.stats().allocated_bytes - weights
    del plain, pool
    if device == "cuda":
        beside += 300 << 20  # graphs and activations, which the engine leaves room for
    budget = weights * 2 // 3 + beside
    engine = Engine(checkpoint, memory_pool_size=budget, swap_to_cpu=True, **settings)
    swap = engine.loaded.memory.swap
    step_s, tokens_swapping = decode(engine, tokens, 1)
    if tokens_swapping != expected:
        raise SystemExit("memory_swap: swapping changed the tokens")
    resident = weights - swap.bytes_per_pass
    copied = swap.bytes_per_pass
    room = resident + swap.window_bytes  # what the pool holds for weights
    rows = {
        "weights_gb": weights / 1e9,
        "budget_gb": budget / 1e9,
        "room_for_weights_gb": room / 1e9,
        "copied_gb_per_step": copied / 1e9,
        "resident_gb": resident / 1e9,
        "step_ms": step_s * 1e3,
        "step_ms_all_resident": plain_s * 1e3,
        "link_bound_ms": copied / to_gb_s / 1e6,
        "of_link_bound": copied / to_gb_s / 1e9 / step_s,
        "of_link_bound_window_resident": (weights - room) / to_gb_s / 1e9 / step_s,
    }
    print(
        f"decode of {weights / 1e9:.2f} GB of weights in {room / 1e9:.2f} GB: {step_s * 1e3:.2f} "
        f"ms a step ({plain_s * 1e3:.2f} when all fits), {copied / 1e9:.2f} GB copied in each = "
        f"{rows['of_link_bound']:.3f} of the link; were the window's {swap.window_bytes / 1e9:.2f} "
        f"GB weights that stay {rows['of_link_bound_window_resident']:.3f}; the same tokens",
        flush=True,
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*sorted(SHAPES), "tiny"], default="r1-qwen-7b")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="four-tier")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab", type=int, default=16384, help="of the model that decodes")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--skip", default="", help="swap, decode")
    args = parser.parse_args()
    facts = print_machine(args.device)
    to_gb_s, from_gb_s = link_gb_s(args.device)
    print(f"one pinned copy: {to_gb_s:.1f} GB/s to the device, {from_gb_s:.1f} back", flush=True)
    result: dict[str, Any] = {**facts, "to_gb_s": to_gb_s, "from_gb_s": from_gb_s}
    config = TINY if args.shape == "tiny" else SHAPES[args.shape]
    if "swap" not in args.skip:
        result |= swap_rates(matrix_sizes(config), args.device, to_gb_s, from_gb_s)
    if "decode" not in args.skip:
        # A small vocabulary: embedding and head always stay, and take long to make at random.
        config = {**config, "vocab_size": min(args.vocab, config["vocab_size"])}
        checkpoint = RandomCheckpoint(config, POLICIES[args.policy])
        result |= decode_rates(checkpoint, args.device, to_gb_s, args.tokens)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
