"""What do activations of eight bits gain on a GPU, and from how many rows on?

Right first: products of codes against float64 ones of the numbers that the codes stand for. Then
timed, in CUDA graphs over weights that together exceed L2: the product of codes, the same with
quantize_rows in front, the product of 16-bit rows with the same stored weight, and torch's:
bf16 (cuBLAS), _scaled_mm with a scale a row and a channel, _int_mm. "limit" is the share of the
eight-bit rate in NVIDIA's data sheet of the H100 SXM, dense, which no clock under load reaches.
Talks to the op library alone, so it runs where the class module is not compiled.

    python benchmarks/micro/gemm_eight_bit.py [--library fastgpt/_ops.so] [--small] [--no-timing]
"""

import argparse
import ctypes
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from gemm_cuda import DEV, L2_BYTES, MAKERS, OPS, ROOT, ceil_div, median_us, random_weight
from torch import Tensor

FORMATS = ("fp8", "fp8_block", "int8")
DATA_SHEET_TFLOPS = 1979.0
SHAPES = [
    ("7b gate_up", 37888, 3584), ("7b down", 3584, 18944), ("7b qkv", 4608, 3584),
    ("1.5b gate_up", 17920, 1536), ("1.5b o", 1536, 1536),
]  # fmt: skip
ROWS = (32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)


def codes_of(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Memory for the rows' codes and scales."""
    rows, k = x.shape
    dtype = torch.int8 if name == "int8" else torch.uint8
    codes = torch.empty(rows, ceil_div(k, 128) * 128, dtype=dtype, device=DEV)
    groups = ceil_div(k, 128) if name == "fp8_block" else 1
    return codes, torch.full((groups, ceil_div(rows, 4) * 4), float("nan"), device=DEV)


def product(name: str) -> Callable[..., None]:
    return OPS.linear_int8_int8 if name == "int8" else OPS.linear_fp8_fp8


def spread(scale: Tensor, rows: int, k: int) -> Tensor:
    """The scale of every code, float64, or of every row."""
    per_row = scale[:, :rows].T.double()
    return per_row if scale.shape[0] == 1 else per_row.repeat_interleave(128, 1)[:, :k]


def values_of(codes: Tensor, scale: Tensor, k: int) -> Tensor:
    """What codes stand for, from the layout of csrc/gemm/layout.cuh."""
    rows, width = codes.shape
    raw = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)
    # [64 columns][chunk of 16][slot of 32 columns][half of 8][byte]: bytes are columns 0 2 1 3.
    parts = raw.double().view(rows, width // 64, 4, 2, 2, 4)[..., [0, 2, 1, 3]]
    ordered = parts.permute(0, 1, 3, 2, 4, 5).reshape(rows, width)
    return ordered[:, :k] * spread(scale, rows, k)


def check(small: bool) -> int:
    """Print and return the number of wrong products."""
    shapes = [(1, 1, 1), (33, 130, 200), (70, 520, 392), (200, 129, 640)]
    if not small:
        shapes += [(513, 4096, 1536), (1000, 3584, 4608), (192, 1536, 8960), (4096, 777, 1000)]
    failures = 0
    for name in FORMATS:
        worst = 0.0
        for rows, n, k in shapes:
            weight, parts = MAKERS[name]((), n, k)
            x = torch.randn(rows, k, device=DEV).bfloat16()
            codes, scale = codes_of(x, name)
            OPS.quantize_rows(x, codes, scale)
            exact = values_of(codes, scale, k)
            step = spread(scale, rows, k)
            step = step if name == "int8" else step * 2.0**-9 + x.double().abs() * 2.0**-3
            rounding = ((exact - x.double()).abs() / (0.501 * step)).max().item()
            bias = torch.randn(n, device=DEV)
            out = torch.full((rows, n + 3), float("nan"), device=DEV)
            product(name)(codes, scale, k, *parts, bias, out[:, :n])
            want = exact @ weight.T + bias.double()
            size = exact.abs() @ weight.abs().T + bias.double().abs()
            error = ((out[:, :n].double() - want).abs() / size).max().item()
            bound = 1e-6 if name == "int8" else 2.0**-10
            bad = not (error <= bound and rounding <= 1.0 and bool(out[:, n:].isnan().all()))
            if bad:
                failures += 1
                print(f"{name} {rows} x {n} x {k}: error {error:.2e}, rounding {rounding:.2f}")
            worst = max(worst, error)
        print(f"{name}: {len(shapes)} shapes, worst error {worst:.2e} of the terms' size")
    return failures


def repeated(calls: list[Callable[[], object]]) -> list[Callable[[], object]]:
    """Eight calls or more, so that launching a graph does not show."""
    return calls * ceil_div(8, len(calls))


def torch_calls(name: str, rows: int, n: int, k: int, copies: int, out: Tensor) -> dict:
    """torch's products of the same size, by name."""
    calls: dict[str, list[Callable[[], object]]] = {}
    if name == "int8":
        a = torch.randint(-127, 128, (rows, k), device=DEV, dtype=torch.int8)
        b = [torch.randint(-127, 128, (n, k), device=DEV, dtype=torch.int8) for _ in range(copies)]
        calls["int_mm"] = [partial(torch._int_mm, a, w.T) for w in b]
    elif name == "fp8":
        a = torch.randn(rows, k, device=DEV).to(torch.float8_e4m3fn)
        b = [torch.randn(n, k, device=DEV).to(torch.float8_e4m3fn) for _ in range(copies)]
        scales = (torch.ones(rows, 1, device=DEV), torch.ones(1, n, device=DEV))
        for fast in (False, True):
            calls["scaled_mm_fast" if fast else "scaled_mm"] = [
                partial(torch._scaled_mm, a, w.T, *scales, out_dtype=torch.bfloat16,
                        use_fast_accum=fast)
                for w in b
            ]  # fmt: skip
        x = torch.randn(rows, k, device=DEV, dtype=torch.bfloat16)
        dense = [torch.randn(n, k, device=DEV, dtype=torch.bfloat16) for _ in range(copies)]
        calls["bf16"] = [partial(torch.mm, x, w.T, out=out) for w in dense]
    return calls


def time_products(shapes: list, row_counts: tuple[int, ...]) -> Iterator[dict]:
    for label, n, k in shapes:
        copies = max(2, min(8, ceil_div(2 * L2_BYTES, n * k)))
        for name in FORMATS:
            family = name.split("_")[0]
            if name == "fp8_block":
                weights = [MAKERS[name]((), n, k)[1] for _ in range(copies)]
            else:
                weights = [random_weight(name, n, k)[0] for _ in range(copies)]
            for rows in row_counts:
                x = torch.randn(rows, k, device=DEV, dtype=torch.bfloat16)
                out = torch.empty(rows, n, device=DEV, dtype=torch.bfloat16)
                codes, scale = codes_of(x, name)
                OPS.quantize_rows(x, codes, scale)
                calls = {
                    "codes": [
                        partial(product(name), codes, scale, k, *w, None, out) for w in weights
                    ],
                    "quantize": [partial(OPS.quantize_rows, x, codes, scale)] * copies,
                    "rows": [
                        partial(getattr(OPS, f"linear_{family}"), x, *w, None, out)
                        for w in weights
                    ],
                }  # fmt: skip
                us = {key: median_us(repeated(each)) for key, each in calls.items()}
                for key, each in torch_calls(name, rows, n, k, copies, out).items():
                    try:
                        us[key] = median_us(repeated(each))
                    except RuntimeError as error:  # rows or columns that torch does not take
                        print(f"torch {key} {rows} x {n} x {k}: {str(error).splitlines()[0]}")
                row = {"shape": label, "n": n, "k": k, "format": name, "rows": rows}
                row |= {f"{key}_us": round(value, 2) for key, value in us.items()}
                row["tflops"] = round(2e-6 * rows * n * k / us["codes"], 1)
                row["limit"] = round(row["tflops"] / DATA_SHEET_TFLOPS, 3)
                row["gain"] = round(us["rows"] / (us["codes"] + us["quantize"]), 3)
                yield row
            del weights
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", default=str(ROOT / "fastgpt/_ops.so"))
    parser.add_argument("--core", help="libfastgpt.so to load instead of the one beside --library")
    parser.add_argument("--small", action="store_true", help="few small shapes, as for a sanitizer")
    parser.add_argument("--no-timing", action="store_true")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="time the first ones")
    args = parser.parse_args()
    if args.core:
        ctypes.CDLL(args.core, mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(Path(args.library)))
    torch.manual_seed(0)
    failures = check(args.small)
    torch.cuda.synchronize()
    print(f"{failures} products are wrong", flush=True)
    if args.no_timing or failures:
        raise SystemExit(bool(failures))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("us of the product of codes (+ quantizing), of 16-bit rows; TFLOP/s; torch's us")
    rows = []
    for row in time_products(SHAPES[: args.shapes], tuple(args.rows)):
        rows.append(row)
        peers = {key: row[f"{key}_us"] for key in ("bf16", "scaled_mm", "scaled_mm_fast", "int_mm")
                 if f"{key}_us" in row}  # fmt: skip
        print(
            f"{row['shape']:13}{row['format']:10}{row['rows']:5}{row['codes_us']:9.1f}"
            f" +{row['quantize_us']:6.1f}{row['rows_us']:9.1f} gain {row['gain']:.2f}"
            f"{row['tflops']:7.0f} ({row['limit']:.2f}) "
            + " ".join(f"{key} {value:.1f}" for key, value in peers.items()),
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
