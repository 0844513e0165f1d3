"""Products on one GPU: right against float64, then timed against the memory limit and torch.

Correct: every format, dtype and row count on odd shapes with fresh random weights; outputs are
poisoned slices. Timed: CUDA-graph replays over weights that together exceed L2, median of replays;
"limit" is the time a streaming read of the weight takes, measured in the same run, over that.
Talks to the op library alone, so it runs where the class module is not compiled.

    python benchmarks/micro/gemm_cuda.py [--library fastgpt/_ops.so] [--small] [--no-timing]
"""

import argparse
import ctypes
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
L2_BYTES = 60 << 20
DEV = "cuda"
OPS = torch.ops.fastgpt


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# Weights: random codes in canonical form, their float64 values, their arranged form ---------------


def dense(lead: tuple[int, ...], n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, tuple]:
    weight = torch.randn(*lead, n, k, device=DEV).to(dtype)
    return weight.double(), (weight,)


def fp8(lead: tuple[int, ...], n: int, k: int, per_block: bool) -> tuple[Tensor, tuple]:
    codes = torch.randint(0, 256, (*lead, n, k), device=DEV, dtype=torch.uint8)
    codes[(codes & 127) == 127] = 1  # NaN codes are refused when weights are written
    shape = (ceil_div(n, 128), ceil_div(k, 128)) if per_block else (n,)
    scale = torch.rand(*lead, *shape, device=DEV) * 0.01 + 1e-4
    spread = scale.unsqueeze(-1)
    if per_block:
        spread = scale.repeat_interleave(128, -1).repeat_interleave(128, -2)[..., :n, :k]
    values = codes.view(torch.float8_e4m3fn).double() * spread.double()
    packed = torch.full((*lead, ceil_div(n, 16), ceil_div(k, 128) * 2, 1024), 0xAA, device=DEV)
    packed = packed.to(torch.uint8)
    out_scale = torch.full_like(scale, float("nan"))
    OPS.arrange_weight(codes, scale, None, "fp8", k, 0, packed, out_scale, None)
    return values, (packed, out_scale)


def int8(lead: tuple[int, ...], n: int, k: int) -> tuple[Tensor, tuple]:
    codes = torch.randint(-128, 128, (*lead, n, k), device=DEV, dtype=torch.int8)
    scale = torch.rand(*lead, n, device=DEV) * 0.01 + 1e-4
    packed = torch.full((*lead, ceil_div(n, 16), ceil_div(k, 128) * 2, 1024), 0x55, device=DEV)
    packed = packed.to(torch.int8)
    out_scale = torch.full_like(scale, float("nan"))
    OPS.arrange_weight(codes, scale, None, "int8", k, 0, packed, out_scale, None)
    return codes.double() * scale.double().unsqueeze(-1), (packed, out_scale)


def int4(
    lead: tuple[int, ...], n: int, k: int, group_size: int, symmetric: bool
) -> tuple[Tensor, tuple]:
    row_bytes = ceil_div(ceil_div(k, 2), 16) * 16
    groups = ceil_div(k, group_size)
    codes = torch.randint(0, 256, (*lead, n, row_bytes), device=DEV, dtype=torch.uint8)
    scale = (torch.rand(*lead, n, groups, device=DEV) * 0.1 + 1e-3).half()
    zero = torch.randint(0, 16, (*lead, n, groups), device=DEV, dtype=torch.uint8)
    columns = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :k].double()
    offset = 8.0 if symmetric else zero.double().repeat_interleave(group_size, -1)[..., :k]
    values = (columns - offset) * scale.double().repeat_interleave(group_size, -1)[..., :k]
    blocks, tiles = ceil_div(k, 128), ceil_div(n, 16)
    packed = torch.full((*lead, tiles, blocks, 1024), 0xAA, device=DEV).to(torch.uint8)
    shape = (*lead, tiles, blocks * (128 // min(group_size, 128)), 16)
    out_scale = torch.full(shape, float("nan"), device=DEV).half()
    out_zero = None if symmetric else torch.full(shape, 0xAA, device=DEV).to(torch.uint8)
    OPS.arrange_weight(
        codes, scale, None if symmetric else zero, "int4", k, group_size, packed, out_scale,
        out_zero,
    )  # fmt: skip
    return values, (packed, out_scale, out_zero, group_size)


Maker = Callable[[tuple[int, ...], int, int], tuple[Tensor, tuple]]
MAKERS: dict[str, Maker] = {
    "fp32": lambda lead, n, k: dense(lead, n, k, torch.float32),
    "bf16": lambda lead, n, k: dense(lead, n, k, torch.bfloat16),
    "fp16": lambda lead, n, k: dense(lead, n, k, torch.float16),
    "fp8": lambda lead, n, k: fp8(lead, n, k, False),
    "fp8_block": lambda lead, n, k: fp8(lead, n, k, True),
    "int8": int8,
    "int4_g32": lambda lead, n, k: int4(lead, n, k, 32, True),
    "int4_g64_asym": lambda lead, n, k: int4(lead, n, k, 64, False),
    "int4_g128": lambda lead, n, k: int4(lead, n, k, 128, True),
    "int4_g128_asym": lambda lead, n, k: int4(lead, n, k, 128, False),
    "int4_g256": lambda lead, n, k: int4(lead, n, k, 256, True),
}


def op(kind: str, name: str) -> Callable[..., None]:
    family = name.split("_")[0]
    return getattr(OPS, f"{kind}_{family}" if family in ("fp8", "int8", "int4") else kind)


# Correctness --------------------------------------------------------------------------------------


class Checker:
    """Compares with float64 and remembers what failed."""

    def __init__(self) -> None:
        self.count = 0
        self.failures: list[str] = []
        self.worst = 0.0

    def __call__(self, label: str, out: Tensor, want: Tensor, size: Tensor) -> None:
        """size: sum of the magnitudes added up; rounding is at most tol * size and half an ulp."""
        self.count += 1
        half_ulp = {torch.float32: 6e-8, torch.float16: 4.9e-4, torch.bfloat16: 3.91e-3}[out.dtype]
        error = (out.double() - want).abs()
        bound = 2e-5 * size + half_ulp * want.abs() + 1e-30
        if out.dtype == torch.float16:
            bound = bound + 6e-8
        ratio = (error / bound).max().item() if error.numel() else 0.0
        bad = ~(error <= bound)  # NaN is bad
        self.worst = max(self.worst, ratio)
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            self.failures.append(
                f"{label}: {int(bad.sum())} of {bad.numel()} wrong, first {where}: "
                f"{out[where].item():.6g} for {want[where].item():.6g}"
            )


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """A slice of a NaN tensor, so that unwritten values and writes outside are seen."""
    return torch.full((*shape[:-1], shape[-1] + 5), float("nan"), device=DEV, dtype=dtype)[..., :-5]


def check_linear(check: Checker, small: bool) -> None:
    shapes = [(48, 64), (17, 40), (130, 136), (5, 1), (33, 257)]
    row_counts = [1, 3, 8, 9, 33, 70]
    if not small:
        shapes += [(1, 128), (272, 1024), (1543, 384), (96, 4232), (2304, 256), (17000, 392)]
        row_counts += [2, 16, 17, 64, 65, 127, 131, 257]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for n, k in shapes:
        for name, make in MAKERS.items():
            values, weight = make((), n, k)
            for i, rows in enumerate(row_counts):
                dtype = dtypes[i % 3] if small and name not in ("int4_g32", "fp8") else None
                for x_dtype in [dtype] if dtype else dtypes:
                    pad = 8 * (rows % 2) + (rows % 5 == 3)  # strided, at times unaligned
                    x = torch.randn(rows, k + pad, device=DEV).to(x_dtype)[:, :k]
                    bias = torch.randn(n, device=DEV, dtype=dtypes[rows % 3]) if rows % 4 else None
                    out = poisoned(rows, n, dtype=torch.float32 if rows % 2 else x_dtype)
                    op("linear", name)(x, *weight, bias, out)
                    want = x.double() @ values.T
                    size = x.double().abs() @ values.abs().T
                    if bias is not None:
                        want, size = want + bias.double(), size + bias.double().abs()
                    check(f"linear {name} {x_dtype} {rows}x{n}x{k}", out, want, size)
                    outside = out.as_strided((rows, 5), (n + 5, 1), n)
                    if not bool(outside.isnan().all()):
                        check.failures.append(f"linear {name} {rows}x{n}x{k}: wrote outside")


def check_grouped(check: Checker, small: bool) -> None:
    n, k = 72, 200
    for name, make in MAKERS.items():
        for experts, tokens, top_k in [(5, 1, 2), (40, 9, 3), (3, 0, 2)] + (
            [] if small else [(5, 200, 2), (33, 64, 6), (2, 150, 1), (3, 500, 2)]
        ):
            values, weight = make((experts,), n, k)
            ids = torch.randint(0, experts, (tokens * top_k,), device=DEV)
            ids[ids == experts // 2] = 0  # one expert without rows
            sorted_rows = torch.argsort(ids, stable=True).int()
            counts = torch.bincount(ids, minlength=experts)
            offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
            for rows_per_token in (top_k, 1):
                for x_dtype in (torch.bfloat16, torch.float16, torch.float32):
                    num_x = tokens * top_k // rows_per_token
                    x = torch.randn(num_x, k, device=DEV).to(x_dtype)
                    out = poisoned(tokens * top_k, n, dtype=x_dtype)
                    op("grouped_linear", name)(
                        x, *weight, sorted_rows, offsets, rows_per_token, out
                    )
                    rows = x.double().repeat_interleave(rows_per_token, 0)
                    want = torch.einsum("rk,rnk->rn", rows, values[ids])
                    size = torch.einsum("rk,rnk->rn", rows.abs(), values[ids].abs())
                    check(f"grouped {name} {x_dtype} {experts}x{tokens}x{top_k}", out, want, size)


def check_batched(check: Checker, small: bool) -> None:
    for rows in (1, 5, 40) if small else (1, 5, 16, 40, 100, 300):
        for heads, m, k in [(3, 40, 64), (16, 128, 512), (2, 512, 128), (2, 7, 13)]:
            for w_dtype in (torch.float32, torch.bfloat16, torch.float16):
                for x_dtype in (torch.float32, torch.bfloat16, torch.float16):
                    x = torch.randn(rows, heads, k + 64, device=DEV).to(x_dtype)[..., :k]
                    weight = torch.randn(heads, m, k, device=DEV).to(w_dtype)
                    out = poisoned(rows, heads, m, dtype=x_dtype)
                    OPS.batched_linear(x, weight, out)
                    want = torch.einsum("rhk,hmk->rhm", x.double(), weight.double())
                    size = torch.einsum("rhk,hmk->rhm", x.double().abs(), weight.double().abs())
                    label = f"batched {w_dtype} {x_dtype} {rows}x{heads}x{m}x{k}"
                    check(label, out, want, size)


def check_capture(check: Checker) -> None:
    """A captured product replays with the x of the moment."""
    for name, make in MAKERS.items():
        for rows in (1, 16, 80):
            values, weight = make((), 144, 384)
            x = torch.randn(rows, 384, device=DEV, dtype=torch.bfloat16)
            out = poisoned(rows, 144, dtype=torch.bfloat16)
            op("linear", name)(x, *weight, None, out)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                op("linear", name)(x, *weight, None, out)
            x.copy_(torch.randn_like(x))
            out.fill_(float("nan"))
            graph.replay()
            size = x.double().abs() @ values.abs().T
            check(f"capture {name} {rows}", out, x.double() @ values.T, size)


def check_quantizers(check: Checker) -> None:
    """The same codes and scales as the CPU's, and values that follow from them."""
    for rows, cols in [(1, 1), (3, 130), (129, 257), (64, 512)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(rows, cols).to(dtype)
            x[0] = 0
            forms: list[tuple[str, list, list]] = []
            for shape in ((rows,), (ceil_div(rows, 128), ceil_div(cols, 128))):
                forms.append(("fp8", [], [((rows, cols), torch.uint8), (shape, torch.float32)]))
            forms.append(("int8", [], [((rows, cols), torch.int8), ((rows,), torch.float32)]))
            for group in (32, 128):
                parts = [
                    ((rows, ceil_div(ceil_div(cols, 2), 16) * 16), torch.uint8),
                    ((rows, ceil_div(cols, group)), torch.float16),
                ]
                forms.append(("int4", [group], parts))
                forms.append(("int4", [group], [*parts, (parts[1][0], torch.uint8)]))
            for name, options, parts in forms:
                results = []
                for where in ("cpu", DEV):
                    outs = [torch.full(s, 85, dtype=t, device=where) for s, t in parts]
                    extra = [None] if name == "int4" and len(outs) == 2 else []
                    getattr(OPS, f"quantize_{name}")(x.to(where), *options, *outs, *extra)
                    back = torch.full_like(x, float("nan"), device=where)
                    getattr(OPS, f"dequantize_{name}")(*outs, *extra, *options, back)
                    results.append([*outs, back])
                same(check, f"quantize {name} {options} {rows}x{cols} {dtype}", *results)
    for numel in (1, 127, 128, 1537):
        x = torch.randn(numel) + 1
        results = []
        for where in ("cpu", DEV):
            outs = [
                torch.full((ceil_div(numel, 8),), 85, dtype=torch.uint8, device=where),
                *(torch.full((ceil_div(numel, 128),), 9.0, device=where) for _ in range(2)),
            ]
            OPS.quantize_binary(x.to(where), *outs)
            back = torch.full_like(x, float("nan"), device=where)
            OPS.dequantize_binary(*outs, back)
            results.append([*outs, back])
        same(check, f"quantize binary {numel}", *results)


def same(check: Checker, label: str, cpu: list[Tensor], cuda: list[Tensor]) -> None:
    check.count += 1
    for i, (a, b) in enumerate(zip(cpu, cuda, strict=True)):
        if not torch.equal(a, b.cpu()):
            wrong = int((a != b.cpu()).sum())
            check.failures.append(f"{label}: part {i} differs in {wrong} of {a.numel()}")


# Timing -------------------------------------------------------------------------------------------


Calls = list[Callable[[], object]]


def random_weight(name: str, n: int, k: int) -> tuple[tuple, int]:
    """Arranged random weight (codes need no meaning here) and its bytes."""
    if name in ("bf16", "fp16"):
        weight = torch.randn(n, k, device=DEV, dtype=torch.bfloat16 if name == "bf16" else None)
        weight = weight if name == "bf16" else weight.half()
        return (weight,), weight.nbytes
    packed = torch.randint(
        0, 126, (ceil_div(n, 16), ceil_div(k, 128) * (1 if name == "int4" else 2), 1024),
        device=DEV, dtype=torch.int8 if name == "int8" else torch.uint8,
    )  # fmt: skip
    if name != "int4":
        scale = torch.rand(n, device=DEV)
        return (packed, scale), packed.nbytes + scale.nbytes
    scale = torch.rand(ceil_div(n, 16), ceil_div(k, 128), 16, device=DEV).half()
    return (packed, scale, None, 128), packed.nbytes + scale.nbytes


def streaming_read() -> float:
    """TB/s of a sum of 4 GiB."""
    data = torch.ones(1 << 29, dtype=torch.int64, device=DEV)
    return data.nbytes / (median_us([partial(torch.sum, data)]) * 1e6)


def median_us(calls: list[Callable[[], object]]) -> float:
    """Time of one call inside a graph that makes them all, median of the replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[1:])


TIMED = [
    ("7b gate_up", 37888, 3584, ("int4", "bf16"), (1, 2, 4, 8, 16, 32, 64, 256, 2048)),
    ("7b down", 3584, 18944, ("int4", "bf16"), (1, 2, 8, 16, 64, 256)),
    ("7b qkv", 4608, 3584, ("int4", "fp8", "int8", "bf16"), (1, 16, 64, 256)),
    ("7b o", 3584, 3584, ("int4", "fp8", "int8", "bf16"), (1, 16, 64)),
    ("7b gate_up", 37888, 3584, ("fp8", "int8"), (1, 16, 64, 256)),
    ("7b down", 3584, 18944, ("fp8", "int8"), (1, 16)),
    ("1.5b gate_up", 17920, 1536, ("int4", "bf16"), (1, 16, 64)),
    ("1.5b down", 1536, 8960, ("int4", "bf16"), (1, 16, 64)),
    ("1.5b qkv", 2048, 1536, ("fp8", "bf16"), (1, 16)),
    ("1.5b o", 1536, 1536, ("fp8", "bf16"), (1, 16)),
    ("1.5b head", 151936, 1536, ("fp16", "bf16"), (1, 16, 64)),
]


def time_products(read_tbps: float) -> Iterator[dict]:
    for label, n, k, names, row_counts in TIMED:
        for name in names:
            size = random_weight(name, n, k)[1]
            copies = max(2, min(48, ceil_div(4 * L2_BYTES, size)))
            weights = [random_weight(name, n, k)[0] for _ in range(copies)]
            for rows in row_counts:
                x = torch.randn(rows, k, device=DEV, dtype=torch.bfloat16)
                out = torch.empty(rows, n, device=DEV, dtype=torch.bfloat16)
                function = op("linear", name)
                ours = median_us([partial(function, x, *w, None, out) for w in weights])
                row = {"shape": label, "n": n, "k": k, "format": name, "rows": rows}
                row |= {"us": round(ours, 2), "copies": copies}
                row["limit"] = round(size / (read_tbps * 1e6) / ours, 3)
                row["tflops"] = round(2e-6 * rows * n * k / ours, 1)
                if name == "bf16":
                    calls = [partial(torch.mm, x, w[0].T, out=out) for w in weights]
                    row["torch_us"] = round(median_us(calls), 2)
                yield row
            del weights
            torch.cuda.empty_cache()


MANY_ROWS = (48, 64, 128, 256, 512, 1024, 2048, 4096)
FORMATS = ("bf16", "fp8", "int8", "int4")
SHAPES = [
    ("7b gate_up", 37888, 3584), ("7b down", 3584, 18944), ("7b qkv", 4608, 3584),
    ("7b o", 3584, 3584), ("1.5b gate_up", 17920, 1536), ("1.5b down", 1536, 8960),
    ("1.5b qkv", 2048, 1536), ("1.5b o", 1536, 1536),
]  # fmt: skip


def canonical_weight(name: str, n: int, k: int) -> tuple:
    """What the dequantizer of a format takes: random codes and scales."""
    if name == "bf16":
        return ()
    if name == "fp8":
        codes = torch.randint(0, 126, (n, k), device=DEV, dtype=torch.uint8)
        return codes, torch.rand(n, device=DEV)
    if name == "int8":
        codes = torch.randint(-128, 128, (n, k), device=DEV, dtype=torch.int8)
        return codes, torch.rand(n, device=DEV)
    codes = torch.randint(0, 256, (n, k // 2), device=DEV, dtype=torch.uint8)
    return codes, torch.rand(n, k // 128, device=DEV).half(), None, 128


def multiply_torch(name: str, codes: tuple, dense: Tensor, x: Tensor, out: Tensor) -> None:
    if codes:
        getattr(OPS, f"dequantize_{name}")(*codes, dense)
    torch.mm(x, dense.T, out=out)


def time_many_rows() -> Iterator[dict]:
    """Products of many rows beside torch's: bf16, or dequantization to bf16 and then bf16."""
    for label, n, k in SHAPES:
        copies = max(2, min(8, ceil_div(4 * L2_BYTES, 2 * n * k)))
        dense = [torch.randn(n, k, device=DEV, dtype=torch.bfloat16) for _ in range(copies)]
        for name in FORMATS:
            weights = [random_weight(name, n, k)[0] for _ in range(copies)]
            pairs = [(canonical_weight(name, n, k), d) for d in dense]
            for rows in MANY_ROWS:
                x = torch.randn(rows, k, device=DEV, dtype=torch.bfloat16)
                out = torch.empty(rows, n, device=DEV, dtype=torch.bfloat16)

                times = times_beside_torch(
                    [partial(op("linear", name), x, *w, None, out) for w in weights],
                    [partial(torch.mm, x, d.T, out=out) for d in dense],
                    [partial(multiply_torch, name, c, d, x, out) for c, d in pairs],
                )
                row = {"shape": label, "n": n, "k": k, "format": name, "rows": rows}
                yield row | {"tflops": round(2e-6 * rows * n * k / times["us"], 1)} | times
            del weights, pairs
        del dense
        torch.cuda.empty_cache()


def time_experts() -> Iterator[dict]:
    """DeepSeek-V2-Lite's experts; torch multiplies expert by expert rows that lie together."""
    experts, top_k, n, k = 64, 6, 1408, 2048
    dense = torch.randn(experts, n, k, device=DEV, dtype=torch.bfloat16)
    for tokens in (512, 1024, 2048, 4096):
        ids = torch.rand(tokens, experts, device=DEV).topk(top_k).indices.flatten()
        order = torch.argsort(ids, stable=True)
        counts = torch.bincount(ids, minlength=experts)
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        bounds = offsets.tolist()
        x = torch.randn(tokens, k, device=DEV, dtype=torch.bfloat16)
        out = torch.empty(tokens * top_k, n, device=DEV, dtype=torch.bfloat16)
        spans = list(zip(bounds, bounds[1:], dense, strict=False))
        sorted_x, sorted_out = x[order // top_k], torch.empty_like(out)

        def multiply_experts(spans=spans, x=sorted_x, out=sorted_out) -> None:
            for begin, end, w in spans:
                torch.mm(x[begin:end], w.T, out=out[begin:end])

        for name in FORMATS:
            weight = stacked_weight(name, dense)
            args = (x, *weight, order.int(), offsets.int(), top_k, out)
            calls: Calls = [partial(op("grouped_linear", name), *args)]
            times = times_beside_torch(calls, [multiply_experts], [multiply_experts])
            yield {"op": "experts", "n": n, "k": k, "format": name, "rows": tokens} | times


def stacked_weight(name: str, dense: Tensor) -> tuple:
    experts, n, k = dense.shape
    if name == "bf16":
        return (dense,)
    packed, scale, *rest = random_weight(name, experts * n, k)[0]
    scale = scale.view(experts, n // 16, -1, 16) if name == "int4" else scale.view(experts, n)
    return (packed.view(experts, n // 16, -1, 1024), scale, *rest)


def time_heads() -> Iterator[dict]:
    """MLA's products with the two halves of kv_b, absorbed: one weight a head."""
    for n, k in ((512, 128), (128, 512)):
        for rows in (128, 512, 2048, 4096):
            x = torch.randn(rows, 16, k, device=DEV, dtype=torch.bfloat16)
            weight = torch.randn(16, n, k, device=DEV, dtype=torch.bfloat16)
            out = torch.empty(rows, 16, n, device=DEV, dtype=torch.bfloat16)
            theirs: Calls = [partial(torch.einsum, "rhk,hmk->rhm", x, weight)]
            calls: Calls = [partial(OPS.batched_linear, x, weight, out)]
            times = times_beside_torch(calls, theirs, theirs)
            yield {"op": "heads", "n": n, "k": k, "format": "bf16", "rows": rows} | times


def print_stacks(rows: list[dict]) -> None:
    print("stacks of weights: us, torch's time over ours")
    for r in rows:
        shape = f"{r['op']} {r['k']} to {r['n']}"
        print(f"{shape:20}{r['format']:7}{r['rows']:5}{r['us']:9.1f} {r['of_dense']:5.2f}")


def times_beside_torch(ours: Calls, dense: Calls, dequantized: Calls) -> dict[str, float]:
    """Theirs before and after ours: the clock of a warm GPU falls."""
    before = [median_us(dense), median_us(dequantized)]
    us = median_us(ours)
    dense_us = min(before[0], median_us(dense))
    torch_us = min(before[1], median_us(dequantized))
    return {
        "us": round(us, 2), "dense_us": round(dense_us, 2), "torch_us": round(torch_us, 2),
        "of_dense": round(dense_us / us, 3), "speedup": round(torch_us / us, 3),
    }  # fmt: skip


def print_many_rows(rows: list[dict]) -> None:
    print("us (torch's time over ours, for a bf16 weight / with dequantization to bf16 before it)")
    print(f"{'shape':13}{'format':7}" + "".join(f"{r:>19}" for r in MANY_ROWS))
    for label, *_ in SHAPES:
        for name in FORMATS:
            mine = [r for r in rows if r["shape"] == label and r["format"] == name]
            cells = "".join(
                f"{r['us']:9.1f} {r['of_dense']:4.2f}/{r['speedup']:4.2f}" for r in mine
            )
            print(f"{label:13}{name:7}{cells}")
    slower = [f"{r['shape']} {r['format']} {r['rows']} ({r['speedup']})" for r in rows
              if r["speedup"] < 1]  # fmt: skip
    print(f"slower than torch: {', '.join(slower) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", default=str(ROOT / "fastgpt/_ops.so"))
    parser.add_argument("--core", help="libfastgpt.so to load instead of the one beside --library")
    parser.add_argument("--small", action="store_true", help="few small shapes, as for a sanitizer")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--only-many-rows", action="store_true", help="time nothing else")
    parser.add_argument("--no-check", action="store_true", help="time only")
    args = parser.parse_args()
    if args.core:
        ctypes.CDLL(args.core, mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(args.library)
    torch.manual_seed(torch.initial_seed() & 0xFFFF)
    torch.backends.cuda.matmul.allow_tf32 = False

    check = Checker()
    if not args.no_check:
        check_quantizers(check)
        check_linear(check, args.small)
        check_grouped(check, args.small)
        check_batched(check, args.small)
        if not args.small:
            check_capture(check)
    torch.cuda.synchronize()
    print(f"correctness: {check.count} cases, {len(check.failures)} failed", end="; ")
    print(f"worst error over its bound {check.worst:.2f}")
    print("\n".join(check.failures[:40]))
    if args.no_timing:
        raise SystemExit(bool(check.failures))

    read_tbps = streaming_read()
    rows = [] if args.only_many_rows else list(time_products(read_tbps))
    many = list(time_many_rows())
    stacks = [*time_experts(), *time_heads()]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {commit}")
    print(f"streaming read {read_tbps:.3f} TB/s")
    print(f"{'shape':13}{'format':7}{'rows':>5}{'us':>9}{'limit':>7}{'TF/s':>7}{'torch us':>9}")
    for r in rows:
        print(
            f"{r['shape']:13}{r['format']:7}{r['rows']:5}{r['us']:9.1f}{r['limit']:7.2f}"
            f"{r['tflops']:7.0f}{r.get('torch_us', ''):>9}"
        )
    print_many_rows(many)
    print_stacks(stacks)
    print(
        json.dumps(
            {
                "failures": len(check.failures),
                "cases": check.count,
                "read_tbps": read_tbps,
                "times": rows,
                "many": many,
                "stacks": stacks,
            }
        )
    )
    raise SystemExit(bool(check.failures))


if __name__ == "__main__":
    main()
