"""Do the CPU products run at the memory limit for one row, and at the arithmetic one for many?

Times fastgpt.ops.linear over every weight of one r1-qwen-1.5b decode step (28 layers and the head),
streamed from memory as a step does, and a prefill of 256 tokens, against a streaming read measured
in the same run and against eager torch. "int8 x int8" are rows quantized on the fly.

    python benchmarks/cpu_linear.py [--repeat 7] [--layers 28] [--skip-torch]
    FASTGPT_NUM_THREADS=1 python benchmarks/cpu_linear.py --cpu-clock      # on a busy machine
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

from fastgpt import _C, ops

HIDDEN, FFN, VOCAB = 1536, 8960, 151_936
QKV = 12 * 128 + 2 * 2 * 128
SHAPES = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * FFN, HIDDEN)}
SHAPES["down"] = (HIDDEN, FFN)
POLICIES = {
    "four-tier": {"qkv": "fp8", "o": "fp8", "gate_up": "int4", "down": "int4", "head": "fp16"},
    "all-int4": dict.fromkeys([*SHAPES, "head"], "int4"),
}


clock = time.perf_counter


def times(run: Callable[[], object], repeat: int) -> list[float]:
    """Seconds of each of `repeat` runs, after one that warms up."""
    run()
    result = []
    for _ in range(repeat):
        start = clock()
        run()
        result.append(clock() - start)
    return result


def random_weight(n: int, k: int, form: str) -> ops.ArrangedWeight:
    """A weight of random codes; its values are of no interest here."""
    if form == "int4":
        packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
        scale = torch.full((n, k // 128), 0.01, dtype=torch.float16)
        return ops.arrange(packed, scale, format=form, in_features=k, group_size=128)
    if form == "int8":
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return ops.arrange(codes, torch.ones(n), format=form)
    if form == "fp8":
        codes = torch.randint(0, 120, (n, k), dtype=torch.uint8)
        return ops.arrange(codes, torch.ones(n), format=form)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[form]
    return ops.arrange((torch.rand(n, k) - 0.5).to(dtype), format=form)


def dequantized_check() -> None:
    """Correct first: one product of each format against float64."""
    weight = torch.randn(256, 512)
    x = torch.randn(3, 512).bfloat16()
    packed, scale, _ = ops.quantize_int4(weight)
    arranged = ops.arrange(packed, scale, format="int4", in_features=512, group_size=128)
    expected = x.double() @ ops.dequantize_int4(packed, scale, group_size=128).double().T
    error = (ops.linear(x, arranged, dtype=torch.float32) - expected).abs().max()
    assert error < 1e-3, f"int4 product is wrong by {error}"


def streaming_read(repeat: int) -> float:
    """GB/s of summing 1 GiB of float32 with torch."""
    data = torch.ones(1 << 28, dtype=torch.float32)
    return data.nbytes / min(times(lambda: data.sum(), repeat)) / 1e9


Layers = list[dict[str, ops.ArrangedWeight]]


def step(layers: Layers, head: ops.ArrangedWeight, inputs: dict[int, torch.Tensor]) -> None:
    """Every product of one forward pass; the head sees the last row alone."""
    for layer in layers:
        for weight in layer.values():
            ops.linear(inputs[weight.in_features], weight)
    ops.linear(inputs[HIDDEN][-1:], head, dtype=torch.float32)


def multiply_codes(x: torch.Tensor, weight: ops.ArrangedWeight) -> torch.Tensor:
    return ops.linear_eight_bit(ops.quantize_rows(x, format="int8"), weight)


def compare_with_torch(repeat: int, row_counts: list[int]) -> dict[str, object]:
    """Print and return our time and eager torch's bfloat16 one for each shape and format."""
    report: dict[str, object] = {}
    print("shape format, rows: ours / eager torch bf16, ms")
    for name, (n, k) in SHAPES.items():
        dense = [torch.randn(n, k).bfloat16() for _ in range(4)]
        for form in ("bf16", "fp16", "fp8", "int8", "int8 x int8", "int4"):
            copies = [random_weight(n, k, form.split()[0]) for _ in range(4)]
            op = multiply_codes if form == "int8 x int8" else ops.linear
            for rows in row_counts:
                x = torch.randn(rows, k).bfloat16()
                count = 3 if rows >= 256 else 2 * repeat
                ours = min(times(partial(products, op, x, copies), count)) / 4
                peer = min(times(partial(products, F.linear, x, dense), count)) / 4
                print(f"  {name} {form}, {rows}: {1e3 * ours:.2f} / {1e3 * peer:.2f}", flush=True)
                report[f"{name} {form} {rows}"] = {"ours_s": ours, "torch_bf16_s": peer}
    return report


def products(op: Callable[..., object], x: torch.Tensor, weights: list[object]) -> None:
    for weight in weights:
        op(x, weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 256], help="beside torch")
    parser.add_argument("--skip-torch", action="store_true", help="no comparison with torch")
    parser.add_argument("--cpu-clock", action="store_true", help="time of the calling thread alone")
    args = parser.parse_args()
    threads = _C.num_threads()
    if args.cpu_clock:
        if threads != 1:
            parser.error("--cpu-clock times one thread; set FASTGPT_NUM_THREADS=1")
        global clock
        clock = time.thread_time
    torch.set_num_threads(threads)
    dequantized_check()
    read = streaming_read(args.repeat)
    print(f"{platform.processor() or platform.machine()}, {_C.cpu_isa()}, {threads} threads")
    print(f"streaming read {read:.1f} GB/s")
    report: dict[str, object] = {"threads": threads, "isa": _C.cpu_isa(), "read_gb_s": read}
    for policy, formats in POLICIES.items():
        layers = [
            {name: random_weight(n, k, formats[name]) for name, (n, k) in SHAPES.items()}
            for _ in range(args.layers)
        ]
        head = random_weight(VOCAB, HIDDEN, formats["head"])
        nbytes = sum(w.nbytes for layer in layers for w in layer.values()) + head.nbytes
        for tokens in (1, 256):
            inputs = {k: torch.randn(tokens, k).bfloat16() for k in (HIDDEN, FFN)}

            repeat = args.repeat if tokens == 1 else 2
            seconds = times(partial(step, layers, head, inputs), repeat)
            best, median = min(seconds), statistics.median(seconds)
            line = f"{policy}, {tokens} tokens: {tokens / best:.1f} tok/s (median {median:.3f} s)"
            if tokens == 1:
                rate = nbytes / best / 1e9
                line += f", {nbytes / 1e9:.2f} GB, {rate:.1f} GB/s, {rate / read:.2f} of the read"
            else:
                flop = 2 * tokens * args.layers * sum(n * k for n, k in SHAPES.values())
                line += f", {flop / best / 1e9:.0f} GFLOP/s"
            print(line, flush=True)
            report[f"{policy} {tokens}"] = tokens / best
        del layers, head
    if not args.skip_torch:
        report |= compare_with_torch(args.repeat, args.rows)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
