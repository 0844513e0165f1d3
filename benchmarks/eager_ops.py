"""Is every op at least as fast as eager torch? Shapes of r1-qwen-1.5b and V2-Lite.

    python benchmarks/eager_ops.py [--device cpu|cuda]

One line a case: microseconds of ours, of torch, and the ratio. On the CPU the best of several
calls, on as many threads. On CUDA a call from Python, back to back, and the device's own time as
a replay of a CUDA graph (where torch's version can be captured). The last line is JSON and names
every case where ours is slower. An op of the registry without a case is an error.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from op_cases import registered_ops
from report import print_machine
from torch import Tensor
from torch.nn import functional

from fastgpt import _C, ops

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1536, 8960, 12, 2, 128, 151_936
EXPERTS, TOP_K, EXPERT_FFN, MLA_HEADS, LATENT, ROPE = 64, 6, 1408, 16, 512, 64  # V2-Lite
BLOCK_SIZE = 32
EPS = 1e-6
DENSE = {torch.float32: "fp32", torch.bfloat16: "bf16"}
NO_EAGER = {"arrange_weight"}  # a change of layout at load; torch has nothing like it

Call = Callable[[], object]
device = torch.device("cpu")


@dataclass
class Case:
    """One op at one shape: ours and the torch code it stands for."""

    op: str
    shape: str
    ours: Call
    eager: Call


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def rotate(heads: Tensor, table: Tensor, positions: Tensor) -> None:
    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
    a, b = heads.float().chunk(2, dim=-1)
    heads.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))


def write(cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    cache[blocks, 0, offsets] = k
    cache[blocks, 1, offsets] = v


def row_cases(rows: int, dtype: torch.dtype) -> list[Case]:
    """What stands between the products."""
    x, residual = randn(rows, HIDDEN, dtype=dtype), randn(rows, HIDDEN, dtype=dtype)
    weight, wide = randn(HIDDEN, dtype=dtype), randn(rows, 2 * FFN, dtype=dtype)
    q, k = randn(rows, HEADS, HEAD_DIM, dtype=dtype), randn(rows, KV_HEADS, HEAD_DIM, dtype=dtype)
    v = randn(rows, KV_HEADS, HEAD_DIM, dtype=dtype)
    positions = torch.arange(rows, device=device)
    table = torch.rand(rows, HEAD_DIM, device=device)
    vocabulary = randn(32_000, HIDDEN, dtype=dtype)
    ids = torch.randint(32_000, (rows,), device=device)
    num_blocks = -(-rows // BLOCK_SIZE)
    cache = randn(num_blocks, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype)
    latent, k_pe = randn(rows, LATENT, dtype=dtype), randn(rows, ROPE, dtype=dtype)
    mla_cache = randn(num_blocks, BLOCK_SIZE, LATENT + ROPE, dtype=dtype)

    def eager_rotary() -> None:
        rotate(q, table, positions)
        rotate(k, table, positions)

    def eager_rotary_write() -> None:
        eager_rotary()
        write(cache, positions, k, v)

    def eager_write_mla() -> None:
        mla_cache[positions // BLOCK_SIZE, positions % BLOCK_SIZE] = torch.cat([latent, k_pe], -1)

    def eager_silu_mul() -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def eager_add_norm() -> Tensor:
        residual.add_(x)
        return functional.rms_norm(residual, (HIDDEN,), weight, EPS)

    pairs: dict[str, tuple[Call, Call]] = {
        "rms_norm": (
            lambda: ops.rms_norm(x, weight, EPS),
            lambda: functional.rms_norm(x, (HIDDEN,), weight, EPS),
        ),
        "add_rms_norm": (lambda: ops.add_rms_norm(x, residual, weight, EPS), eager_add_norm),
        "rotary": (lambda: ops.rotary(positions, table, q, k), eager_rotary),
        "rotary_write_kv": (
            lambda: ops.rotary_write_kv(positions, table, q, k, v, positions, cache),
            eager_rotary_write,
        ),
        "write_kv": (
            lambda: ops.write_kv(k, v, positions, cache),
            lambda: write(cache, positions, k, v),
        ),
        "write_mla": (lambda: ops.write_mla(latent, k_pe, positions, mla_cache), eager_write_mla),
        "silu_mul": (lambda: ops.silu_mul(wide), eager_silu_mul),
        "embedding": (
            lambda: ops.embedding(ids, vocabulary),
            lambda: functional.embedding(ids, vocabulary),
        ),
    }
    shape = f"{rows} rows {name_of(dtype)}"
    return [Case(op, shape, *pair) for op, pair in pairs.items()]


def eager_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return (x.float() / scale).round_().to(torch.int8), scale


def product_cases(rows: int, dtype: torch.dtype) -> list[Case]:
    """Products with one weight, in every format; torch multiplies by the 16- or 32-bit weight."""
    cases = []
    for name, n, k in (("qkv", 2048, HIDDEN), ("gate_up", 2 * FFN, HIDDEN), ("down", HIDDEN, FFN)):
        x, weight = randn(rows, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5
        arranged = {"linear": ops.arrange(weight, format=DENSE[dtype])}
        packed, scale = ops.quantize_fp8(weight)
        arranged["linear_fp8"] = ops.arrange(packed, scale, format="fp8")
        packed, scale = ops.quantize_int8(weight)
        arranged["linear_int8"] = ops.arrange(packed, scale, format="int8")
        packed, scale, _ = ops.quantize_int4(weight, group_size=128)
        arranged["linear_int4"] = ops.arrange(
            packed, scale, format="int4", group_size=128, in_features=k
        )
        cases += [
            Case(
                op,
                f"{name} {rows} rows {name_of(dtype)}",
                lambda x=x, w=w: ops.linear(x, w),
                lambda x=x, weight=weight: functional.linear(x, weight),
            )
            for op, w in arranged.items()
        ]
        for op, form in (("linear_fp8_fp8", "fp8"), ("linear_int8_int8", "int8")):
            codes = ops.quantize_rows(x, format=form)
            cases.append(
                Case(
                    op,
                    f"{name} {rows} rows {name_of(dtype)}",
                    lambda codes=codes, w=arranged[f"linear_{form}"]: ops.linear_eight_bit(
                        codes, w
                    ),
                    lambda x=x, weight=weight: functional.linear(x, weight),
                )
            )
        if name == "qkv":
            continue  # as wide as gate_up
        cases.append(
            Case(
                "quantize_rows",
                f"{rows} x {k} {name_of(dtype)}",
                lambda x=x: ops.quantize_rows(x, format="int8"),
                lambda x=x: eager_quantize_rows(x),
            )
        )
    x, heads = randn(rows, MLA_HEADS, 128, dtype=dtype), randn(MLA_HEADS, LATENT, 128, dtype=dtype)
    cases.append(
        Case(
            "batched_linear",
            f"{rows} rows {MLA_HEADS} heads {name_of(dtype)}",
            lambda: ops.batched_linear(x, heads),
            lambda: torch.einsum("rhk,hmk->rhm", x, heads),
        )
    )
    return cases


def expert_cases(rows: int, dtype: torch.dtype) -> list[Case]:
    """A mixture of experts; torch multiplies expert by expert."""
    logits, bias = randn(rows, EXPERTS), randn(EXPERTS)
    expert_ids, weights = ops.moe_route(logits, bias, TOP_K, scoring="sigmoid")
    sorted_rows, offsets = ops.moe_sort(expert_ids, EXPERTS)
    x, y = randn(rows, HIDDEN, dtype=dtype), randn(rows, TOP_K, HIDDEN, dtype=dtype)
    weight = randn(EXPERTS, EXPERT_FFN, HIDDEN, dtype=dtype) / HIDDEN**0.5
    bounds, order = offsets.tolist(), sorted_rows.long()
    out = torch.empty(rows * TOP_K, EXPERT_FFN, dtype=dtype, device=device)

    def eager_route() -> Tensor:
        scores = logits.sigmoid()
        return scores.gather(1, (scores + bias).topk(TOP_K).indices)

    def eager_sort() -> Tensor:
        flat = expert_ids.flatten()
        return torch.cat(
            [flat.argsort(stable=True), torch.bincount(flat, minlength=EXPERTS).cumsum(0)]
        )

    def eager_grouped() -> None:
        for e in range(EXPERTS):
            if bounds[e] < bounds[e + 1]:
                chosen = order[bounds[e] : bounds[e + 1]]
                out[chosen] = functional.linear(x[chosen // TOP_K], weight[e])

    arranged = {"grouped_linear": ops.arrange(weight, format=DENSE[dtype])}
    packed, scale = ops.quantize_fp8(weight.flatten(0, 1))
    stack = (EXPERTS, EXPERT_FFN)
    arranged["grouped_linear_fp8"] = ops.arrange(
        packed.view(*stack, -1), scale.view(*stack), format="fp8"
    )
    packed, scale = ops.quantize_int8(weight.flatten(0, 1))
    arranged["grouped_linear_int8"] = ops.arrange(
        packed.view(*stack, -1), scale.view(*stack), format="int8"
    )
    packed, scale, _ = ops.quantize_int4(weight.flatten(0, 1), group_size=128)
    arranged["grouped_linear_int4"] = ops.arrange(
        packed.view(*stack, -1),
        scale.view(*stack, -1),
        format="int4",
        group_size=128,
        in_features=HIDDEN,
    )
    pairs: dict[str, tuple[Call, Call]] = {
        "moe_route": (lambda: ops.moe_route(logits, bias, TOP_K, scoring="sigmoid"), eager_route),
        "moe_sort": (lambda: ops.moe_sort(expert_ids, EXPERTS), eager_sort),
        "moe_combine": (
            lambda: ops.moe_combine(y, weights),
            lambda: (y.float() * weights.unsqueeze(-1)).sum(1).to(dtype),
        ),
    }
    for op, w in arranged.items():
        pairs[op] = (
            lambda w=w: ops.grouped_linear(x, w, sorted_rows, offsets, TOP_K),
            eager_grouped,
        )
    shape = f"{rows} rows {name_of(dtype)}"
    return [Case(op, shape, *pair) for op, pair in pairs.items()]


def attention_cases(batch: int, q_len: int, seq_len: int, dtype: torch.dtype) -> list[Case]:
    """Ours reads a paged cache, torch a contiguous one."""
    per_request = -(-seq_len // BLOCK_SIZE)
    tables = torch.arange(batch * per_request, dtype=torch.int32, device=device)
    arguments = (
        tables.view(batch, per_request),
        torch.arange(batch + 1, dtype=torch.int32, device=device) * q_len,
        torch.full((batch,), seq_len, dtype=torch.int32, device=device),
    )
    cache = randn(batch * per_request, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype)
    q = randn(batch * q_len, HEADS, HEAD_DIM, dtype=dtype)
    k, v = (
        part.reshape(batch, -1, KV_HEADS, HEAD_DIM)[:, :seq_len].transpose(1, 2).contiguous()
        for part in cache.unbind(1)
    )
    heads = q.view(batch, q_len, HEADS, HEAD_DIM).transpose(1, 2).contiguous()
    scale = HEAD_DIM**-0.5
    shape = f"{batch} x {q_len} of {seq_len} {name_of(dtype)}"

    def workspace(num_heads: int, dim_v: int) -> Tensor | None:
        if device.type == "cpu":
            return None
        num_bytes = ops.attention_workspace_bytes(batch * q_len, num_heads, dim_v, seq_len, device)
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    space = workspace(HEADS, HEAD_DIM)
    cases = [
        Case(
            "attention",
            shape,
            lambda: ops.attention(q, cache, *arguments, scale, q_len, seq_len, workspace=space),
            lambda: functional.scaled_dot_product_attention(
                heads, k, v, is_causal=q_len > 1, enable_gqa=True
            ),
        )
    ]
    if q_len > 1:
        return cases
    mla_cache = randn(batch * per_request, BLOCK_SIZE, LATENT + ROPE, dtype=dtype)
    mla_q = randn(batch, MLA_HEADS, LATENT + ROPE, dtype=dtype)
    keys = mla_cache.view(batch, -1, LATENT + ROPE)[:, :seq_len].contiguous()
    mla_space = workspace(MLA_HEADS, LATENT)

    def eager_mla() -> Tensor:
        scores = torch.bmm(mla_q, keys.transpose(1, 2)) * scale
        return torch.bmm(scores.softmax(-1), keys[..., :LATENT])

    cases.append(
        Case(
            "mla_attention",
            shape,
            lambda: ops.mla_attention(
                mla_q, mla_cache, *arguments, scale, q_len, seq_len, workspace=mla_space
            ),
            eager_mla,
        )
    )
    return cases


def sample_cases(rows: int) -> list[Case]:
    logits = randn(rows, VOCAB) * 3
    one = torch.ones(rows, device=device)
    numbers = torch.arange(rows, device=device)
    cases = []
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.6, 0, 0.95), (0.7, 50, 0.9)):

        def eager(temperature=temperature, top_k=top_k, top_p=top_p) -> Tensor:
            if temperature == 0:
                return logits.argmax(-1)
            scaled = logits / temperature
            if top_k:
                edge = scaled.topk(top_k).values[:, -1:]
                scaled = scaled.masked_fill(scaled < edge, float("-inf"))
            if top_p < 1:
                values, order = scaled.sort(descending=True)
                p = values.softmax(-1)
                values = values.masked_fill(p.cumsum(-1) - p >= top_p, float("-inf"))
                scaled = torch.full_like(scaled, float("-inf")).scatter(1, order, values)
            return torch.multinomial(scaled.softmax(-1), 1)

        arguments = (
            one * temperature, (one * top_k).int(), one * top_p, one * 0, numbers, numbers,
        )  # fmt: skip
        cases.append(
            Case(
                "sample",
                f"{rows} rows t {temperature} k {top_k} p {top_p}",
                lambda arguments=arguments: ops.sample(logits, *arguments),
                eager,
            )
        )
    history = torch.zeros(rows, VOCAB, dtype=torch.int32, device=device)
    history[:, ::97] = 1
    penalties = (one * 1.1, one * 0.5, one * 0.2)
    ids = torch.randint(VOCAB, (rows,), device=device)

    def eager_penalize() -> None:
        repetition, presence, frequency = (p.unsqueeze(1) for p in penalties)
        seen = history != 0
        scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits.copy_(torch.where(seen, scaled, logits) - frequency * history - presence * seen)

    def eager_record() -> None:
        history.scatter_add_(1, ids.unsqueeze(1), one.int().unsqueeze(1))

    cases.append(
        Case(
            "penalize",
            f"{rows} rows",
            lambda: ops.penalize(logits, history, numbers, *penalties),
            eager_penalize,
        )
    )
    cases.append(
        Case(
            "record_tokens",
            f"{rows} rows",
            lambda: ops.record_tokens(history, numbers, ids, is_prompt=False),
            eager_record,
        )
    )
    return cases


def codec_cases(n: int, k: int, dtype: torch.dtype) -> list[Case]:
    """Rounding to codes and back, as eager torch writes it."""
    x = randn(n, k, dtype=dtype)
    fp8, fp8_scale = ops.quantize_fp8(x)
    int8, int8_scale = ops.quantize_int8(x)
    int4, int4_scale, _ = ops.quantize_int4(x, group_size=128)
    gains = randn(k).abs() + 0.1
    binary = ops.quantize_binary(gains)
    left, spread = randn(128, n), torch.eye(128, device=device) + randn(128, 128).triu(1) / 32
    gptq_scale, gptq_zero = torch.full_like(left, 0.1), torch.full_like(left, 8.0)

    def eager_fp8() -> Tensor:
        scale = x.float().abs().amax(1, keepdim=True) / 448
        return (x.float() / scale).to(torch.float8_e4m3fn)

    def eager_int8() -> Tensor:
        scale = x.float().abs().amax(1, keepdim=True) / 127
        return (x.float() / scale).round().clamp(-127, 127).to(torch.int8)

    def eager_int4() -> Tensor:
        groups = x.float().view(n, -1, 128)
        scale = groups.abs().amax(-1, keepdim=True) / 7
        codes = ((groups / scale).round().clamp(-7, 7) + 8).to(torch.uint8).view(n, k)
        return codes[:, ::2] | codes[:, 1::2] << 4

    def eager_from_int4() -> Tensor:
        codes = torch.stack([int4 & 15, int4 >> 4], -1).view(n, -1, 128)
        return ((codes.float() - 8) * int4_scale.float().unsqueeze(-1)).to(dtype)

    def eager_gptq() -> Tensor:
        rest, errors = left.clone(), torch.empty_like(left)
        for i in range(len(left)):
            codes = ((rest[i] / gptq_scale[i]).round() + gptq_zero[i]).clamp(0, 15)
            errors[i] = (rest[i] - (codes - gptq_zero[i]) * gptq_scale[i]) / spread[i, i]
            rest[i + 1 :].addr_(spread[i, i + 1 :], errors[i], alpha=-1)
        return errors

    def eager_binary() -> Tensor:
        groups = gains.view(-1, 128)
        high = groups > groups.mean(-1, keepdim=True)
        upper = (groups * high).sum(-1) / high.sum(-1)
        lower = (groups * ~high).sum(-1) / (~high).sum(-1)
        return torch.where(high, upper.unsqueeze(-1), lower.unsqueeze(-1))

    def eager_from_binary() -> Tensor:
        shifts = torch.arange(8, device=device)
        bits = (binary[0].view(-1, 1) >> shifts & 1).flatten()[:k].view(-1, 128)
        return bits * binary[1].unsqueeze(-1) + binary[2].unsqueeze(-1)

    pairs: dict[str, tuple[Call, Call]] = {
        "quantize_fp8": (lambda: ops.quantize_fp8(x), eager_fp8),
        "dequantize_fp8": (
            lambda: ops.dequantize_fp8(fp8, fp8_scale, dtype=dtype),
            lambda: (fp8.view(torch.float8_e4m3fn).float() * fp8_scale.unsqueeze(1)).to(dtype),
        ),
        "quantize_int8": (lambda: ops.quantize_int8(x), eager_int8),
        "dequantize_int8": (
            lambda: ops.dequantize_int8(int8, int8_scale, dtype=dtype),
            lambda: (int8.float() * int8_scale.unsqueeze(1)).to(dtype),
        ),
        "quantize_int4": (lambda: ops.quantize_int4(x, group_size=128), eager_int4),
        "dequantize_int4": (
            lambda: ops.dequantize_int4(int4, int4_scale, group_size=128, cols=k, dtype=dtype),
            eager_from_int4,
        ),
        "gptq_round": (
            lambda: ops.gptq_round(left, gptq_scale, gptq_zero, spread, 15),
            eager_gptq,
        ),
        "quantize_binary": (lambda: ops.quantize_binary(gains), eager_binary),
        "dequantize_binary": (lambda: ops.dequantize_binary(*binary, numel=k), eager_from_binary),
    }
    return [Case(op, f"{n} x {k} {name_of(dtype)}", *pair) for op, pair in pairs.items()]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_cases() -> Iterator[Case]:
    """Yield every case; a group's tensors live until the next group's are made."""
    small, large = (1, 256) if device.type == "cpu" else (1, 2048)
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,)
    for dtype in dtypes:
        for rows in (small, large):
            yield from row_cases(rows, dtype)
            yield from expert_cases(rows, dtype)
        for rows in (small, 32, large):
            yield from product_cases(rows, dtype)
        lengths = [(1, 1, 1024), (1, 1, 8192), (1, 256, 256)]
        if device.type == "cuda":
            lengths += [(32, 1, 4096), (1, 1024, 1024), (1, 4096, 4096), (1, 16384, 16384)]
        for lengths_of_case in lengths:
            yield from attention_cases(*lengths_of_case, dtype)
        yield from codec_cases(FFN, HIDDEN, dtype)
    for rows in (1,) if device.type == "cpu" else (1, 32):
        yield from sample_cases(rows)


def best_us(function: Call, runs: int = 9) -> float:
    """Return the shortest time of one call on the CPU, in microseconds."""
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def event_us(function: Call, calls: int, runs: int = 7) -> float:
    """Return the median time of one call between device events, in microseconds."""
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def graph_us(function: Call) -> float:
    """Return the device's time for one call in a CUDA graph; NaN if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(8):
                function()
    except RuntimeError:
        torch.cuda.synchronize()
        return float("nan")
    graph.replay()
    return event_us(graph.replay, 3) / 8


def measure(function: Call) -> dict[str, float]:
    if device.type == "cpu":
        return {"call_us": best_us(function)}
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    once = event_us(function, 1, 3)
    return {
        "call_us": event_us(function, max(1, min(50, int(2000 / once)))),
        "graph_us": graph_us(function),
    }


def main() -> None:
    global device
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    torch.set_num_threads(_C.num_threads())
    facts = print_machine(options.device)
    results, slower, missing = {}, [], set(registered_ops()) - NO_EAGER
    for case in make_cases():
        missing.discard(case.op)
        if options.only not in case.op:
            continue
        name = f"{case.op} {case.shape}"
        ours, eager = measure(case.ours), measure(case.eager)
        results[name] = {
            "ours": {key: round(us, 1) for key, us in ours.items()},
            "torch": {key: round(us, 1) for key, us in eager.items()},
        }
        line = f"{name:44}"
        for key, us in ours.items():
            line += f"  {key[:-3]} {us:9.1f} torch {eager[key]:9.1f} us {eager[key] / us:6.2f}x"
            if us > eager[key]:
                slower.append(f"{name}: {key[:-3]} {us:.1f} against {eager[key]:.1f} us")
        print(line, flush=True)
    if missing:
        raise KeyError(f"ops without a case: {sorted(missing)}")
    print("slower than torch:", *(slower or ["none"]), sep="\n  ")
    print(json.dumps({**facts, "results": results, "slower_than_torch": slower}))


if __name__ == "__main__":
    main()
