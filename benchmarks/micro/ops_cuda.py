"""Check the small CUDA ops at serving shapes against float64, then time them as graph replays.

    python benchmarks/micro/ops_cuda.py [--checks-only]

Times are microseconds, medians over replays of a CUDA graph that runs the op on buffers rotated
past the L2 cache. `limit` is the time in which the bytes that must move would stream.
"""

import argparse
import json
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from fastgpt import ops

READ_BYTES_PER_US = 4.385e6  # streaming read of an H200
DEVICE = torch.device("cuda")


def paged_case(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int, int],
    dtype: torch.dtype,
    block_size: int,
    *,
    mla: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, int, int]:
    """Arguments of attention for (query rows, keys) of each request; unused slots are NaN."""
    num_heads, num_kv_heads, dim_qk, dim_v = heads
    counts = [-(-seq_len // block_size) for _, seq_len in lengths]
    ids = torch.randperm(sum(counts) + 3, device=DEVICE).int()
    width = (dim_qk,) if mla else (num_kv_heads, max(dim_qk, dim_v))
    kinds = () if mla else (2,)
    cache = torch.randn(len(ids), *kinds, block_size, *width, device=DEVICE).to(dtype)
    tables = torch.full((len(lengths), max(counts) + 1), 2**30, dtype=torch.int32, device=DEVICE)
    used = 0
    for r, (_, seq_len) in enumerate(lengths):
        tables[r, : counts[r]] = ids[used : used + counts[r]]
        used += counts[r]
        if seq_len % block_size:
            last = int(tables[r, counts[r] - 1])
            cache[last, ..., seq_len % block_size :, *(slice(None),) * len(width)] = float("nan")
    cache[ids[used:].long()] = float("nan")
    starts = torch.tensor([0, *(q_len for q_len, _ in lengths)]).cumsum(0).int()
    q = torch.randn(int(starts[-1]), num_heads, dim_qk, device=DEVICE).to(dtype)
    seq_lens = torch.tensor([seq_len for _, seq_len in lengths], dtype=torch.int32, device=DEVICE)
    return (
        q, cache, tables, starts.to(DEVICE), seq_lens, dim_qk**-0.5,
        max(q_len for q_len, _ in lengths), max(seq_len for _, seq_len in lengths),
    )  # fmt: skip


def reference(args: tuple, dim_v: int, *, mla: bool) -> Tensor:
    """Attention in float64, request by request."""
    q, cache, tables, starts, seq_lens, scale, _, _ = args
    out = torch.zeros(q.shape[0], q.shape[1], dim_v, dtype=torch.float64, device=DEVICE)
    block_size = cache.shape[1 if mla else 2]
    for r, seq_len in enumerate(seq_lens.tolist()):
        first, last = int(starts[r]), int(starts[r + 1])
        if seq_len == 0 or first == last:
            continue
        blocks = cache[tables[r, : -(-seq_len // block_size)].long()].double()
        if mla:
            k = blocks.flatten(0, 1)[:seq_len].unsqueeze(1)
            v = k[..., :dim_v]
        else:
            k, v = blocks[:, 0].flatten(0, 1)[:seq_len], blocks[:, 1].flatten(0, 1)[:seq_len]
            k, v = k[..., : q.shape[2]], v[..., :dim_v]
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q[first:last].double(), k) * scale
        rows = torch.arange(seq_len - (last - first), seq_len, device=DEVICE)
        hidden = torch.arange(seq_len, device=DEVICE)[None] > rows[:, None]
        scores.masked_fill_(hidden, float("-inf"))
        out[first:last] = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
    return out


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 5e-6}


def check_attention(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int, int],
    dtype: torch.dtype,
    block_size: int,
    *,
    mla: bool = False,
) -> None:
    args = paged_case(lengths, heads, dtype, block_size, mla=mla)
    function = ops.mla_attention if mla else ops.attention
    expected = reference(args, heads[3], mla=mla)
    for split in (True, False):
        out = torch.full((*args[0].shape[:2], heads[3]), float("nan"), dtype=dtype, device=DEVICE)
        workspace = workspace_for(args, heads) if split else None
        function(*args, out=out, workspace=workspace)
        error = relative_error(out, expected)
        worst = (out.double() - expected).abs().amax((1, 2))
        assert error < TOLERANCE[dtype], f"split {split}: {error:.2e}, worst row {worst.argmax()}"


def workspace_for(args: tuple, heads: tuple[int, int, int, int]) -> Tensor:
    num_bytes = ops.attention_workspace_bytes(
        args[0].shape[0], heads[0], heads[3], args[7], args[0].device
    )
    return torch.full((num_bytes,), 255, dtype=torch.uint8, device=DEVICE)


def check_graph() -> None:
    """A captured decode serves shorter batches: lengths are read on the device."""
    heads = (28, 4, 128, 128)
    args = list(paged_case([(1, 3000), (1, 700), (1, 64)], heads, torch.bfloat16, 32))
    args[7] = 8192
    out = torch.empty(3, 28, 128, dtype=torch.bfloat16, device=DEVICE)
    workspace = workspace_for(tuple(args), heads)
    ops.attention(*args, out=out, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.attention(*args, out=out, workspace=workspace)
    for lengths in ([3000, 700, 64], [1, 130, 33], [2999, 0, 63]):
        args[4].copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        error = relative_error(out, reference(tuple(args), 128, mla=False))
        assert error < TOLERANCE[torch.bfloat16], f"{lengths}: {error:.2e}"


def sample_args(rows: int, device: torch.device, *setting: float) -> tuple[Tensor, ...]:
    temperature, top_k, top_p, min_p = setting
    return (
        torch.full((rows,), float(temperature), device=device),
        torch.full((rows,), int(top_k), dtype=torch.int32, device=device),
        torch.full((rows,), float(top_p), device=device),
        torch.full((rows,), float(min_p), device=device),
        torch.arange(rows, device=device) + 11,
        torch.arange(rows, device=device) * 3,
    )


def check_sample() -> None:
    logits = torch.randn(6, 151936) * 3
    logits[1, 5:900] = logits[1].max()  # ties at the top
    logits[2, ::3] = float("-inf")
    logits[3, ::7] = float("nan")
    logits[4] = 1.5
    for setting in [(0, 0, 1, 0), (0.6, 0, 0.95, 0), (1, 50, 1, 0), (0.8, 5000, 0.9, 0.001),
                    (1.3, 0, 1, 0.05), (3.0, 0, 0.999, 0)]:  # fmt: skip
        expected = ops.sample(logits, *sample_args(6, torch.device("cpu"), *setting))
        ids = torch.full((6,), -7, device=DEVICE)
        ops.sample(logits.to(DEVICE), *sample_args(6, DEVICE, *setting), ids=ids)
        assert torch.equal(ids.cpu(), expected), f"{setting}: {ids.tolist()}, {expected.tolist()}"


def check_sort() -> None:
    for tokens, experts in ((8191, 256), (1, 256), (37, 64), (5, 3)):
        ids = torch.randint(0, experts, (tokens, 8), dtype=torch.int32, device=DEVICE)
        rows, offsets = ops.moe_sort(ids, experts)
        assert torch.equal(rows.long(), ids.flatten().long().argsort(stable=True))
        counts = torch.bincount(ids.flatten().long(), minlength=experts)
        assert torch.equal(offsets[1:].long(), counts.cumsum(0))


MIXED = [(1, 4096), (300, 1000), (1, 77), (8, 513), (9, 600), (1, 0), (0, 5), (64, 64), (2, 1999)]
CHECKS: dict[str, Callable[[], None]] = {
    "graph": check_graph,
    "sample": check_sample,
    "moe_sort": check_sort,
}
for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _i, _heads in enumerate(
        [(28, 4, 128, 128), (12, 2, 128, 128), (8, 8, 64, 64), (16, 16, 192, 128), (6, 1, 256, 256),
         (32, 2, 96, 96), (40, 8, 80, 80), (48, 1, 128, 128)]
    ):  # fmt: skip
        CHECKS[f"attention {_heads} {_dtype}"] = (
            lambda h=_heads, d=_dtype, b=(16, 32, 64, 128)[_i % 4]: check_attention(MIXED, h, d, b)
        )
    for _i, _num in enumerate((4, 16, 20, 128)):
        CHECKS[f"mla {_num} {_dtype}"] = lambda n=_num, d=_dtype, b=(32, 64, 16, 128)[_i]: (
            check_attention(MIXED, (n, 1, 576, 512), d, b, mla=True)
        )


def time_us(calls: list[Callable[[], object]], replays: int = 20) -> float:
    """Median time of one call; the calls use different buffers and run in one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def rotated(
    make: Callable[[], Callable[[], object]], num_bytes: float
) -> list[Callable[..., object]]:
    """Enough copies of a call to pass 150 MB, at least 4 and at most 32."""
    return [make() for _ in range(int(min(32, max(4, 150e6 // max(num_bytes, 1) + 1))))]


def sdpa_calls(tokens: int, heads: tuple[int, int, int, int]) -> list[Callable[[], object]]:
    """Causal attention of one prompt by eager torch over contiguous keys and values."""
    num_heads, num_kv_heads, dim_qk, dim_v = heads

    def make() -> Callable[[], object]:
        shapes = ((num_heads, dim_qk), (num_kv_heads, dim_qk), (num_kv_heads, dim_v))
        q, k, v = (
            torch.randn(1, count, tokens, dim, device=DEVICE).bfloat16() for count, dim in shapes
        )
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=num_heads != num_kv_heads
        )

    return rotated(make, 2.0 * tokens * num_kv_heads * (dim_qk + dim_v))


def attention_rows() -> list[tuple[str, float, float, str]]:
    rows = []
    bf16 = torch.bfloat16

    def measure(name: str, lengths: list[tuple[int, int]], heads: tuple[int, int, int, int],
                peer: str, mla: bool = False) -> None:  # fmt: skip
        row = heads[2] if mla else heads[1] * (heads[2] + heads[3])
        num_bytes = 2.0 * sum(seq_len for _, seq_len in lengths) * row

        def make() -> Callable[[], object]:
            args = paged_case(lengths, heads, bf16, 32, mla=mla)
            out = torch.empty(*args[0].shape[:2], heads[3], dtype=bf16, device=DEVICE)
            workspace = workspace_for(args, heads)
            function = ops.mla_attention if mla else ops.attention
            return lambda: function(*args, out=out, workspace=workspace)

        flops = sum(
            2 * q * heads[0] * (heads[2] + heads[3]) * (s - (q - 1) / 2) for q, s in lengths
        )
        us = time_us(rotated(make, num_bytes))
        limit = max(num_bytes / READ_BYTES_PER_US, flops / 790e6)
        rows.append((name, us, limit, peer))

    heads = (28, 4, 128, 128)
    decodes = [(1, 4096, "16.1"), (1, 32768, "30.6"), (8, 4096, "30.0"), (32, 4096, "75.1"),
               (128, 2048, "147"), (256, 1024, "160")]  # fmt: skip
    for count, keys, peer in decodes:
        measure(f"decode {count}x{keys}", [(1, keys)] * count, heads, f"FA3 {peer}")
    measure("decode 1x256 (1.5b)", [(1, 256)], (12, 2, 128, 128), "")
    for tokens, peer in ((256, ""), (1024, "30.6"), (4096, "202"), (16384, "2972")):
        torch_us = time_us(sdpa_calls(tokens, heads))
        measure(f"prefill {tokens}", [(tokens, tokens)], heads,
                f"SDPA {torch_us:.1f}" + (f", FA3 {peer}" if peer else ""))  # fmt: skip
    for other in ((12, 2, 128, 128), (32, 8, 64, 64), (16, 16, 192, 128), (8, 2, 256, 256)):
        measure(f"prefill 4096 {other}", [(4096, 4096)], other,
                f"SDPA {time_us(sdpa_calls(4096, other)):.1f}")  # fmt: skip
    for count, num, peer in ((1, 128, "25.7"), (32, 128, "84.3"), (128, 128, "267"),
                             (32, 16, "57.1"), (128, 16, "162")):  # fmt: skip
        measure(f"mla {num} heads {count}x4096", [(1, 4096)] * count, (num, 1, 576, 512),
                f"FlashMLA {peer}", mla=True)  # fmt: skip
    measure("mla 4 heads 1x256 (tiny-r1)", [(1, 256)], (4, 1, 576, 512), "", mla=True)
    measure("mla prefill 1024, 16 heads", [(1024, 1024)], (16, 1, 576, 512), "", mla=True)
    return rows


def small_rows() -> list[tuple[str, float, float, str]]:
    rows = []
    bf16 = torch.bfloat16

    def measure(name: str, make: Callable[[], Callable[[], object]], num_bytes: float) -> None:
        rows.append((name, time_us(rotated(make, num_bytes)), num_bytes / READ_BYTES_PER_US, ""))

    def randn(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    for n in (1, 2048):
        for hidden in (1536, 3584):

            def norm(n: int = n, hidden: int = hidden) -> Callable[[], object]:
                x, r, w, o = randn(n, hidden), randn(n, hidden), randn(hidden), randn(n, hidden)
                return lambda: ops.add_rms_norm(x, r, w, 1e-6, out=o)

            measure(f"add_rms_norm {n}x{hidden}", norm, 8.0 * n * hidden)

        def silu(n: int = n) -> Callable[[], object]:
            x, o = randn(n, 2 * 18944), randn(n, 18944)
            return lambda: ops.silu_mul(x, out=o)

        measure(f"silu_mul {n}x18944", silu, 6.0 * n * 18944)

        def rope(n: int = n) -> Callable[[], object]:
            q, k, table = randn(n, 28, 128), randn(n, 4, 128), randn(4096, 128, dtype=torch.float32)
            positions = torch.arange(n, device=DEVICE)
            return lambda: ops.rotary(positions, table, q, k)

        measure(f"rotary {n}x(28+4)x128", rope, 4.0 * n * 32 * 128)

        def write(n: int = n) -> Callable[[], object]:
            k, v, cache = randn(n, 4, 128), randn(n, 4, 128), randn(n // 32 + 1, 2, 32, 4, 128)
            slots = torch.arange(n, device=DEVICE)
            return lambda: ops.write_kv(k, v, slots, cache)

        measure(f"write_kv {n}x4x128", write, 8.0 * n * 4 * 128)

        def route(n: int = n) -> Callable[[], object]:
            logits, bias = randn(n, 256, dtype=torch.float32), randn(256, dtype=torch.float32)
            return lambda: ops.moe_route(
                logits, bias, 8, num_groups=8, topk_groups=4, scoring="sigmoid"
            )  # fmt: skip

        measure(f"moe_route {n}x256", route, 4.0 * n * 256)

        def sort(n: int = n) -> Callable[[], object]:
            ids = torch.randint(0, 256, (n, 8), dtype=torch.int32, device=DEVICE)
            return lambda: ops.moe_sort(ids, 256)

        measure(f"moe_sort {n}x8", sort, 8.0 * n * 8)

        def combine(n: int = n) -> Callable[[], object]:
            y, w, s, o = (
                randn(n, 8, 2048),
                randn(n, 8, dtype=torch.float32),
                randn(n, 2048),
                randn(n, 2048),
            )
            return lambda: ops.moe_combine(y, w, s, out=o)

        measure(f"moe_combine {n}x8x2048", combine, 2.0 * n * 2048 * 10)
    for n in (1, 32):
        for label, setting in {"greedy": (0, 0, 1, 0), "t 0.6 p 0.95": (0.6, 0, 0.95, 0),
                               "k 50 p 0.9": (0.7, 50, 0.9, 0)}.items():  # fmt: skip

            def draw(n: int = n, setting: tuple = setting) -> Callable[[], object]:
                logits, ids = (
                    randn(n, 151936, dtype=torch.float32) * 3,
                    torch.zeros(n, dtype=torch.int64, device=DEVICE),
                )
                args = sample_args(n, DEVICE, *setting)
                return lambda: ops.sample(logits, *args, ids=ids)

            measure(f"sample {n}x151936 {label}", draw, 4.0 * n * 151936)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checks-only", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    failures = []
    for name, check in CHECKS.items():
        try:
            check()
            torch.cuda.synchronize()
        except Exception as error:
            failures.append(name)
            print(f"FAILED {name}: {error}")
            if not isinstance(error, AssertionError):
                traceback.print_exc()
    print(f"{len(CHECKS) - len(failures)} of {len(CHECKS)} checks passed; failed: {failures}")
    if options.checks_only:
        sys.exit(bool(failures))
    rows = []
    for section in (attention_rows, small_rows):
        try:
            rows += section()
        except Exception:
            failures.append(section.__name__)
            traceback.print_exc()
    print(f"\n{'op':36} {'us':>8} {'limit':>8}  peer (H200)")
    for name, us, limit, peer in rows:
        print(f"{name:36} {us:8.1f} {limit:8.1f}  {peer}")
    gpu = torch.cuda.get_device_name()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    print(json.dumps({"gpu": gpu, "commit": commit.stdout.strip(), "failures": failures,
                      "us": {name: round(us, 2) for name, us, _, _ in rows}}))  # fmt: skip
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
