"""One call of every registered op at an odd shape: what compute-sanitizer runs.

    python benchmarks/op_cases.py --device cuda          every op once
    compute-sanitizer --tool memcheck python benchmarks/op_cases.py --device cuda

The list is the op registry: an op without a case here is an error.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt import ops

__all__ = ["CASES", "registered_ops", "run"]

Maker = Callable[..., Tensor]


def registered_ops() -> list[str]:
    """Return the names of every op of the library, without the namespace."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.removeprefix("fastgpt::") for n in names if n.startswith("fastgpt::"))


def _rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=_device).to(dtype)


def _ints(values: list[int] | list[list[int]], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=_device)


_device = torch.device("cpu")
NUM_TOKENS = 7
HIDDEN = 200  # neither a multiple of the int4 group nor of 64
ROWS = 93
BLOCK_SIZE = 16


def _batch() -> dict[str, Tensor | int]:
    """Return two requests: a chunk of 5 queries over 37 keys, a decode over 18, and padding."""
    return {
        "block_tables": _ints([[4, 1, 3], [2, 0, 0], [0, 0, 0]], torch.int32),
        "cu_seqlens_q": _ints([0, 5, 6, NUM_TOKENS], torch.int32),
        "seq_lens": _ints([37, 18, 0], torch.int32),
        "max_seqlen_q": 5,
        "max_seq_len": 48,
    }


def _prefill_batch() -> dict[str, Tensor | int]:
    """Return a chunk of 53 queries over 131 keys, a decode over 18, and a whole prompt of 10."""
    return {
        "block_tables": _ints(
            [[4, 1, 3, 0, 5, 6, 7, 8, 9], [2, *[0] * 8], [10, *[0] * 8]], torch.int32
        ),
        "cu_seqlens_q": _ints([0, 53, 54, 64], torch.int32),
        "seq_lens": _ints([131, 18, 10], torch.int32),
        "max_seqlen_q": 53,
        "max_seq_len": 144,
    }


CODES = (torch.uint8, torch.int8)


def _codes(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return random codes, finite as e4m3 too."""
    return torch.randint(0, 120, shape, device=_device).to(dtype)


def _scale(*shape: int) -> Tensor:
    return torch.rand(shape, device=_device) / 50


def _attention() -> None:
    cache = _rand(5, 2, BLOCK_SIZE, 2, 64)
    ops.attention(_rand(NUM_TOKENS, 6, 64), cache, scale=0.125, **_batch())
    for dim_qk, dim_v in ((64, 64), (128, 128), (192, 128), (256, 256)):
        cache = _rand(12, 2, BLOCK_SIZE, 2, dim_qk)
        ops.attention(
            _rand(64, 6, dim_qk), cache, scale=0.125, head_dim_v=dim_v, **_prefill_batch()
        )
        for dtype in CODES:
            codes = _codes(12, 2, BLOCK_SIZE, 2, dim_qk, dtype=dtype)
            kv_scale = _scale(12, 2, 2, BLOCK_SIZE)
            for batch, num_tokens in ((_batch(), NUM_TOKENS), (_prefill_batch(), 64)):
                ops.attention(
                    _rand(num_tokens, 6, dim_qk), codes, scale=0.125, head_dim_v=dim_v,
                    kv_scale=kv_scale, **batch,
                )  # fmt: skip


def _mla_attention() -> None:
    cache = _rand(5, BLOCK_SIZE, 576)
    ops.mla_attention(_rand(NUM_TOKENS, 3, 576), cache, scale=0.07, **_batch())
    cache = _rand(12, BLOCK_SIZE, 576)
    ops.mla_attention(_rand(64, 3, 576), cache, scale=0.07, **_prefill_batch())
    for dtype in CODES:
        codes, kv_scale = _codes(12, BLOCK_SIZE, 512, dtype=dtype), _scale(12, BLOCK_SIZE, 4)
        ops.mla_attention(
            _rand(64, 3, 576), codes, scale=0.07, kv_scale=kv_scale,
            pe_cache=_rand(12, BLOCK_SIZE, 64), **_prefill_batch(),
        )  # fmt: skip


def _write_kv() -> None:
    slots = _ints([64, 17, -1, 3, 40, 41, 79])
    k, v = _rand(NUM_TOKENS, 2, 64), _rand(NUM_TOKENS, 2, 64)
    ops.write_kv(k, v, slots, _rand(5, 2, 16, 2, 64))
    for dtype in CODES:
        codes = _codes(5, 2, 16, 2, 64, dtype=dtype)
        ops.write_kv(k, v, slots, codes, kv_scale=_scale(5, 2, 2, 16))


def _rotary_write_kv() -> None:
    positions, slots = _ints([0, 1, 2, 3, 9, 30, 31]), _ints([64, 17, -1, 3, 40, 41, 79])
    qkv = _rand(NUM_TOKENS, 9, 64)
    table = _rand(32, 48, dtype=torch.float32)
    q, k, v = qkv.split_with_sizes((5, 2, 2), 1)
    for interleaved in (False, True):
        ops.rotary_write_kv(
            positions, table, q, k, v, slots, _rand(5, 2, 16, 2, 64), interleaved=interleaved
        )
        for dtype in CODES:
            ops.rotary_write_kv(
                positions, table, q, k, v, slots, _codes(5, 2, 16, 2, 64, dtype=dtype),
                interleaved=interleaved, kv_scale=_scale(5, 2, 2, 16),
            )  # fmt: skip


def _write_mla() -> None:
    slots = _ints([64, 17, -1, 3, 40, 41, 79])
    latent, k_pe = _rand(NUM_TOKENS, 512), _rand(NUM_TOKENS, 64)
    ops.write_mla(latent, k_pe, slots, _rand(5, BLOCK_SIZE, 576))
    for dtype in CODES:
        ops.write_mla(
            latent, k_pe, slots, _codes(5, BLOCK_SIZE, 512, dtype=dtype),
            kv_scale=_scale(5, BLOCK_SIZE, 4), pe_cache=_rand(5, BLOCK_SIZE, 64),
        )  # fmt: skip


def _weight(format: str, num_experts: int | None = None) -> ops.ArrangedWeight:
    count = num_experts or 1
    dense = _rand(count * ROWS, HIDDEN)
    stack = (count, ROWS) if num_experts else (ROWS,)
    if format == "fp8":
        packed, scale = ops.quantize_fp8(dense)
        return ops.arrange(packed.view(*stack, -1), scale.view(*stack), format=format)
    if format == "int8":
        packed, scale = ops.quantize_int8(dense)
        return ops.arrange(packed.view(*stack, -1), scale.view(*stack), format=format)
    if format == "int4":
        packed, scale, _ = ops.quantize_int4(dense, group_size=64)
        return ops.arrange(
            packed.view(*stack, -1),
            scale.view(*stack, -1),
            format=format,
            group_size=64,
            in_features=HIDDEN,
        )
    return ops.arrange(dense.view(*stack, HIDDEN), format=format)


def _linear(format: str) -> None:
    for num_rows in (1, 5, 33, 100, 300):  # every kernel and tile of CUDA
        ops.linear(_rand(num_rows, HIDDEN), _weight(format), _rand(ROWS))


def _grouped_linear(format: str) -> None:
    expert_ids = _ints([[0, 2], [2, 1], [0, 3], [3, 2], [0, 2], [0, 1], [2, 0]], torch.int32)
    sorted_rows, offsets = ops.moe_sort(expert_ids, 4)
    ops.grouped_linear(_rand(NUM_TOKENS, HIDDEN), _weight(format, 4), sorted_rows, offsets, 2)


def _moe_route() -> None:
    logits, bias = _rand(NUM_TOKENS, 24, dtype=torch.float32), _rand(24, dtype=torch.float32)
    for scoring, correction in (("sigmoid", bias), ("softmax", None)):
        ops.moe_route(
            logits, correction, top_k=3, num_groups=4, topk_groups=2, scoring=scoring,
            renormalize=True, scaling=2.5,
        )  # fmt: skip


def _sample() -> None:
    n = 4
    full = torch.full((n,), 1.0, device=_device)
    ops.sample(
        _rand(n, 1003, dtype=torch.float32), _ints([0, 1, 1, 1]).float(),
        _ints([0, 0, 50, 0], torch.int32), full * 0.9, full * 0.01, _ints([1, 2, 3, 4]),
        _ints([5, 6, 7, 8]),
    )  # fmt: skip


def _history() -> Tensor:
    return torch.zeros(3, 1003, dtype=torch.int32, device=_device)


def _penalize() -> None:
    one = torch.ones(2, device=_device)
    logits = _rand(2, 1003, dtype=torch.float32)
    ops.penalize(logits, _history(), _ints([2, -1]), one * 1.1, one * 0.5, one * 0.2)


def _record_tokens() -> None:
    ops.record_tokens(_history(), _ints([0, 2, 2, -1]), _ints([3, 1002, 1002, 5]), is_prompt=False)


def _add_rms_norm() -> None:
    x = _rand(NUM_TOKENS, HIDDEN)
    ops.add_rms_norm(x, _rand(NUM_TOKENS, HIDDEN), _rand(HIDDEN), 1e-6)


def _rotary() -> None:
    positions = _ints([0, 1, 2, 3, 9, 30, 31])
    table = _rand(32, 64, dtype=torch.float32)
    for interleaved in (False, True):
        ops.rotary(positions, table, _rand(7, 5, 64), _rand(7, 2, 64), interleaved=interleaved)


def _dequantize(format: str) -> None:
    x = _rand(ROWS, HIDDEN)
    if format == "fp8":
        ops.dequantize_fp8(*ops.quantize_fp8(x))
        ops.dequantize_fp8(*ops.quantize_fp8(x, per_block=True))
    elif format == "int8":
        ops.dequantize_int8(*ops.quantize_int8(x))
    elif format == "int4":
        for symmetric in (True, False):
            packed, scale, zero_point = ops.quantize_int4(x, group_size=64, symmetric=symmetric)
            ops.dequantize_int4(packed, scale, zero_point, group_size=64, cols=HIDDEN)
    else:
        ops.dequantize_binary(*ops.quantize_binary(_rand(HIDDEN)), numel=HIDDEN)


def _linear_eight_bit(format: str) -> None:
    """All kinds of scales; one tile, and whole and split ones."""
    for num_rows, n, k in ((5, 41, 72), (200, 300, 640)):
        x, weight = _rand(num_rows, k), _rand(n, k)
        for per_group in (False, True) if format == "fp8" else (False,):
            rows = ops.quantize_rows(x, format=format, per_group=per_group)
            parts = (
                ops.quantize_int8(weight)
                if format == "int8"
                else ops.quantize_fp8(weight, per_block=per_group)
            )
            arranged = ops.arrange(*parts, format=format)
            if ops.has_eight_bit_product(format, _device) or _device.type == "cpu":
                ops.linear_eight_bit(rows, arranged, _rand(n))


def _gptq_round() -> None:
    left, scale = _rand(37, ROWS, dtype=torch.float32), torch.full((37, ROWS), 0.1, device=_device)
    ops.gptq_round(left, scale, torch.full_like(scale, 8), torch.eye(37, device=_device), 15)


CASES: dict[str, Callable[[], object]] = {
    "add_rms_norm": _add_rms_norm,
    "arrange_weight": lambda: _weight("int4"),
    "attention": _attention,
    "batched_linear": lambda: ops.batched_linear(_rand(5, 3, 72), _rand(3, 41, 72)),
    "dequantize_binary": lambda: _dequantize("binary"),
    "dequantize_fp8": lambda: _dequantize("fp8"),
    "dequantize_int4": lambda: _dequantize("int4"),
    "dequantize_int8": lambda: _dequantize("int8"),
    "embedding": lambda: ops.embedding(_ints([0, 18, 3]), _rand(19, HIDDEN)),
    "gptq_round": _gptq_round,
    "grouped_linear": lambda: _grouped_linear("bf16"),
    "grouped_linear_fp8": lambda: _grouped_linear("fp8"),
    "grouped_linear_int4": lambda: _grouped_linear("int4"),
    "grouped_linear_int8": lambda: _grouped_linear("int8"),
    "linear": lambda: _linear("bf16"),
    "linear_fp8": lambda: _linear("fp8"),
    "linear_fp8_fp8": lambda: _linear_eight_bit("fp8"),
    "linear_int4": lambda: _linear("int4"),
    "linear_int8_int8": lambda: _linear_eight_bit("int8"),
    "linear_int8": lambda: _linear("int8"),
    "mla_attention": _mla_attention,
    "moe_combine": lambda: ops.moe_combine(
        _rand(7, 2, HIDDEN), _rand(7, 2, dtype=torch.float32), _rand(7, HIDDEN)
    ),
    "moe_route": _moe_route,
    "moe_sort": lambda: ops.moe_sort(_ints([[0, 2], [2, 1], [0, 3]], torch.int32), 4),
    "penalize": _penalize,
    "quantize_binary": lambda: _dequantize("binary"),
    "quantize_fp8": lambda: _dequantize("fp8"),
    "quantize_int4": lambda: _dequantize("int4"),
    "quantize_int8": lambda: _dequantize("int8"),
    "quantize_rows": lambda: _linear_eight_bit("fp8"),
    "record_tokens": _record_tokens,
    "rms_norm": lambda: ops.rms_norm(_rand(NUM_TOKENS, 5, HIDDEN), _rand(HIDDEN), 1e-6),
    "rotary": _rotary,
    "rotary_write_kv": _rotary_write_kv,
    "sample": _sample,
    "silu_mul": lambda: ops.silu_mul(_rand(NUM_TOKENS, 2 * ROWS)),
    "write_kv": _write_kv,
    "write_mla": _write_mla,
}


def run(device: str) -> int:
    """Call every registered op once; return how many there are.

    Raises:
        KeyError: naming ops that have no case, and cases that have no op.
    """
    global _device
    _device = torch.device(device)
    if different := set(registered_ops()) ^ set(CASES):
        raise KeyError(f"ops without a case, or cases without an op: {sorted(different)}")
    torch.manual_seed(0)
    for name, case in CASES.items():
        case()
        if _device.type == "cuda":
            torch.cuda.synchronize(_device)
        print(f"{name}: ran", flush=True)
    return len(CASES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    print(f"{run(parser.parse_args().device)} ops ran")
