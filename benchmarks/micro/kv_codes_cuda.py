"""How much faster is attention over a cache of fp8 or int8 codes than over bfloat16?

    python benchmarks/micro/kv_codes_cuda.py [--section decode prefill mla write]

Each shape is checked against float64 over the numbers that the cache stands for, then timed as a
graph replay on buffers rotated past the L2 cache: microseconds (median), the bytes of the cache per
second, and the time relative to bfloat16. A streaming read is measured in the same run.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ops_cuda import DEVICE, paged_case, reference, relative_error, rotated, time_us, workspace_for
from report import streaming_read_gb_s

from fastgpt import ops

Heads = tuple[int, int, int, int]
Lengths = list[tuple[int, int]]
CACHES = {"bf16": torch.bfloat16, "fp8": torch.uint8, "int8": torch.int8}
BLOCK_SIZE = 32

DECODES: list[tuple[Heads, Lengths]] = [
    ((28, 4, 128, 128), [(1, 4096)]),
    ((28, 4, 128, 128), [(1, 32768)]),
    ((28, 4, 128, 128), [(1, 131072)]),
    ((28, 4, 128, 128), [(1, 4096)] * 32),
    ((28, 4, 128, 128), [(1, 2048)] * 128),
    ((32, 8, 128, 128), [(1, 4096)] * 32),
    ((12, 2, 128, 128), [(1, 32768)]),
    ((32, 8, 64, 64), [(1, 4096)] * 32),
    ((8, 2, 256, 256), [(1, 4096)] * 32),
]
PREFILLS: list[tuple[Heads, Lengths]] = [
    ((28, 4, 128, 128), [(4096, 4096)]),
    ((28, 4, 128, 128), [(512, 8192)]),
    ((32, 8, 64, 64), [(4096, 4096)]),
    ((8, 2, 256, 256), [(4096, 4096)]),
]
LATENT: list[tuple[Heads, Lengths]] = [
    ((16, 1, 576, 512), [(1, 4096)] * 32),
    ((16, 1, 576, 512), [(1, 32768)]),
    ((128, 1, 576, 512), [(1, 4096)] * 32),
    ((16, 1, 576, 512), [(1024, 1024)]),
]


def stored(cache: Tensor, dtype: torch.dtype, *, mla: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """A bfloat16 cache written as `dtype` by the product's own ops, and the arguments beside it."""
    if not dtype.is_floating_point:
        slots = torch.arange(cache.shape[0] * BLOCK_SIZE, device=DEVICE)
        if mla:
            rows = cache.flatten(0, 1)
            codes = torch.empty(*cache.shape[:2], 512, dtype=dtype, device=DEVICE)
            scale = torch.empty(*cache.shape[:2], 4, device=DEVICE)
            pe = torch.empty(*cache.shape[:2], 64, dtype=cache.dtype, device=DEVICE)
            ops.write_mla(rows[:, :512], rows[:, 512:], slots, codes, kv_scale=scale, pe_cache=pe)
            return codes, {"kv_scale": scale, "pe_cache": pe}
        codes = torch.empty_like(cache, dtype=dtype)
        scale = torch.empty(*cache.shape[:2], cache.shape[3], BLOCK_SIZE, device=DEVICE)
        k, v = cache[:, 0].flatten(0, 1), cache[:, 1].flatten(0, 1)
        ops.write_kv(k, v, slots, codes, kv_scale=scale)
        return codes, {"kv_scale": scale}
    return cache, {}


def dequantized(rows: Tensor, extra: dict[str, Tensor]) -> Tensor:
    """What the cache stands for, float32."""
    if not extra:
        return rows.float()
    values = (rows.view(torch.float8_e4m3fn) if rows.dtype == torch.uint8 else rows).float()
    if "pe_cache" in extra:
        latent = values * extra["kv_scale"].repeat_interleave(128, -1)
        return torch.cat([latent, extra["pe_cache"].float()], -1)
    return values * extra["kv_scale"].transpose(2, 3)[..., None]


def make_call(
    heads: Heads, lengths: Lengths, dtype: torch.dtype, *, mla: bool, check: bool = False
) -> Callable[[], object]:
    args = list(paged_case(lengths, heads, torch.bfloat16, BLOCK_SIZE, mla=mla))
    args[1], extra = stored(args[1], dtype, mla=mla)
    out = torch.full((*args[0].shape[:2], heads[3]), float("nan"), device=DEVICE).bfloat16()
    workspace = workspace_for(tuple(args), heads)
    function = ops.mla_attention if mla else ops.attention

    def call() -> object:
        return function(*args, out=out, workspace=workspace, **extra)

    if check:
        call()
        expected = reference((args[0], dequantized(args[1], extra), *args[2:]), heads[3], mla=mla)
        error = relative_error(out, expected)
        assert error < 5e-3, f"{heads} {lengths[:2]} {dtype}: relative error {error:.2e}"
    return call


def measure(section: str, cases: list[tuple[Heads, Lengths]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    mla = section == "mla"
    for heads, lengths in cases:
        num_keys = sum(seq_len for _, seq_len in lengths)
        plain_us = 0.0
        for name, dtype in CACHES.items():
            if mla:
                token_bytes = 1152 if name == "bf16" else 656
            else:
                size = heads[1] * (heads[2] + heads[3])
                token_bytes = 2 * size if name == "bf16" else size + 8 * heads[1]
            num_bytes = num_keys * token_bytes
            make_call(heads, lengths[:2], dtype, mla=mla, check=True)

            def make(h: Heads = heads, n: Lengths = lengths, d: torch.dtype = dtype) -> Any:
                return make_call(h, n, d, mla=mla)

            us = time_us(rotated(make, num_bytes))
            plain_us = plain_us or us
            count, (new, keys) = len(lengths), lengths[0]
            print(
                f"{section:8} {heads!s:20} {count:4} x {new}/{keys:<7} {name:5} {us:9.1f} us "
                f"{num_bytes / us / 1e3:7.0f} GB/s  {us / plain_us:5.2f} of bf16",
                flush=True,
            )
            rows.append({"section": section, "heads": heads, "count": count, "new": new,
                         "keys": keys, "cache": name, "us": round(us, 2)})  # fmt: skip
    return rows


def measure_writes() -> list[dict[str, object]]:
    """rotary_write_kv of decode and prefill steps."""
    rows: list[dict[str, object]] = []
    heads, kv_heads, dim = 28, 4, 128
    for tokens in (1, 32, 4096):
        for name, dtype in CACHES.items():

            def make(n: int = tokens, d: torch.dtype = dtype) -> Callable[[], object]:
                packed = torch.randn(n, heads + 2 * kv_heads, dim, device=DEVICE).bfloat16()
                q, k, v = packed.split_with_sizes((heads, kv_heads, kv_heads), 1)
                blocks = -(-n // BLOCK_SIZE)
                cache = torch.zeros(blocks, 2, BLOCK_SIZE, kv_heads, dim, dtype=d, device=DEVICE)
                scale = torch.zeros(blocks, 2, kv_heads, BLOCK_SIZE, device=DEVICE)
                extra = {} if d.is_floating_point else {"kv_scale": scale}
                table = torch.randn(n, dim, device=DEVICE)
                slots = torch.arange(n, device=DEVICE)
                return lambda: ops.rotary_write_kv(slots, table, q, k, v, slots, cache, **extra)

            us = time_us(rotated(make, 2.0 * tokens * (heads + 2 * kv_heads) * dim))
            print(f"write    {tokens:5} tokens {name:5} {us:9.1f} us", flush=True)
            rows.append({"section": "write", "count": tokens, "cache": name, "us": round(us, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sections = {"decode": DECODES, "prefill": PREFILLS, "mla": LATENT}
    names = [*sections, "write"]
    parser.add_argument("--section", nargs="*", choices=names, default=names)
    args = parser.parse_args()
    torch.manual_seed(0)
    limit = streaming_read_gb_s("cuda")
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, streaming read {limit:.0f} GB/s", flush=True)
    rows: list[dict[str, object]] = []
    for name in args.section:
        rows += measure_writes() if name == "write" else measure(name, sections[name])
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    print(json.dumps({"benchmark": "kv_codes_cuda", "gpu": gpu, "commit": commit.stdout.strip(),
                      "streaming_read_gb_per_s": limit, "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
