"""CUDA products against float64 on shapes that reach every kernel; benchmarks/micro/gemm_cuda.py
draws many more."""

import dataclasses

import pytest
import torch

from fastgpt import ops
from fastgpt.errors import InvalidArgument
from fastgpt.ops import quant

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# Rows: one and few (streaming, one and two tiles of x), two passes of it, tiles of 64 and up.
ROWS = [1, 7, 16, 31, 33, 65, 150, 257]
SHAPES = [(1, 128), (130, 200), (4352, 264), (17000, 392)]  # the last: two weight tiles a warp


def quantized(format: str, weight: torch.Tensor) -> tuple[ops.ArrangedWeight, torch.Tensor]:
    """Return the arranged weight and the values it stands for, in float64."""
    name, *options = format.split("_")
    if name == "fp8":
        packed, scale = quant.quantize_fp8(weight, per_block="block" in options)
        values = quant.dequantize_fp8(packed, scale)
        return ops.arrange(packed, scale, format="fp8"), values.double()
    if name == "int8":
        packed, scale = quant.quantize_int8(weight)
        values = quant.dequantize_int8(packed, scale)
        return ops.arrange(packed, scale, format="int8"), values.double()
    if name == "int4":
        group_size, symmetric = int(options[0]), "asym" not in options
        packed, scale, zero = quant.quantize_int4(
            weight, group_size=group_size, symmetric=symmetric
        )
        cols = weight.shape[1]
        values = quant.dequantize_int4(packed, scale, zero, group_size=group_size, cols=cols)
        arranged = ops.arrange(
            packed, scale, zero, format="int4", in_features=cols, group_size=group_size
        )
        return arranged, values.double()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return ops.arrange(weight.to(dtype), format=name), weight.to(dtype).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "format",
    [
        "fp32",
        "bf16",
        "fp16",
        "fp8",
        "fp8_block",
        "int8",
        "int4_32",
        "int4_64_asym",
        "int4_128",
        "int4_256",
    ],
)
def test_linear_cuda_matches_float64(
    format: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    n, k = shape
    arranged, values = quantized(format, torch.randn(n, k, device=DEVICE))
    bias = torch.randn(n, device=DEVICE, dtype=dtype)
    for rows in ROWS:
        x = torch.randn(rows, k, device=DEVICE).to(dtype)
        wide = torch.full((rows, n + 3), float("nan"), device=DEVICE)
        out = ops.linear(x, arranged, bias, out=wide[:, :n])
        want = x.double() @ values.T + bias.double()
        # Products are exact; float32 sums of at most 392 terms lose far less than this.
        size = x.double().abs() @ values.abs().T + bias.double().abs()
        worst = ((out.double() - want).abs() / size).max().item()
        assert worst <= 2e-5, f"{rows} rows: error {worst:.2e} of the terms' size"
        assert bool(wide[:, n:].isnan().all())


@pytest.mark.parametrize("rows", [33, 127, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["same", "fp8", "fp8_block", "int8", "int4_32_asym", "int4_128"])
def test_linear_cuda_takes_strided_rows_and_writes_column_slices(
    format: str, dtype: torch.dtype, rows: int
) -> None:
    """x and out are slices of wider tensors, aligned to 16 bytes or not; out is wide or x's."""
    n, k = 328, 712
    if format == "same":
        format = "bf16" if dtype == torch.bfloat16 else "fp16"
    arranged, values = quantized(format, torch.randn(n, k, device=DEVICE))
    half_ulp = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    for pad, offset in ((8, 8), (3, 1)):
        x = torch.randn(rows, k + pad + offset, device=DEVICE).to(dtype)[:, offset : offset + k]
        want = x.double() @ values.T
        size = x.double().abs() @ values.abs().T
        for out_dtype in (dtype, torch.float32):
            wide = torch.full((rows, n + pad + offset), float("nan"), device=DEVICE).to(out_dtype)
            out = ops.linear(x, arranged, out=wide[:, offset : offset + n])
            # Half a unit of the last place where out is rounded to 16 bits, the smallest float16.
            rounding = want.abs() * half_ulp + 6e-8 if out_dtype == dtype else 0.0
            excess = ((out.double() - want).abs() - rounding) / size
            assert not bool(out.isnan().any())
            assert excess.max().item() <= 2e-5
            assert bool(wide[:, :offset].isnan().all() and wide[:, offset + n :].isnan().all())


@pytest.mark.parametrize("rows", [1, 40, 200])
def test_linear_cuda_sums_groups_of_any_scale(rows: int) -> None:
    """Scales of 0 and scales 2^24 apart: a sum kept in units of a scale must survive both."""
    n, k, group_size = 130, 768, 128
    groups = k // group_size
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    exponents = torch.randint(-14, 11, (n, groups), device=DEVICE)
    scale = torch.where(
        torch.rand(n, groups, device=DEVICE) < 0.3, 0.0, torch.exp2(exponents.double())
    ).half()
    scale[0] = 0
    arranged = ops.arrange(packed, scale, format="int4", in_features=k, group_size=group_size)
    values = quant.dequantize_int4(packed, scale, None, group_size=group_size, cols=k).double()
    x = torch.randn(rows, k, device=DEVICE).bfloat16()
    out = ops.linear(x, arranged, dtype=torch.float32)
    size = x.double().abs() @ values.abs().T
    error = (out.double() - x.double() @ values.T).abs()
    assert bool((error <= 2e-5 * size).all()), (error / size).nan_to_num().max().item()


@pytest.mark.parametrize("tokens", [40, 190, 700])
@pytest.mark.parametrize(
    "format", ["bf16", "fp8", "fp8_block", "int8", "int4_32", "int4_64_asym", "int4_128"]
)
def test_grouped_linear_cuda_many_rows_match_float64(format: str, tokens: int) -> None:
    """Experts of no, one, few and most rows: tiles of rows that lie apart."""
    num_experts, top_k, n, k = 5, 2, 392, 456
    dense = torch.randn(num_experts, n, k, device=DEVICE)
    weights, values = zip(*(quantized(format, w) for w in dense), strict=True)
    ids = torch.multinomial(
        torch.tensor([0.6, 0.35, 0.05, 1e-9, 1e-9], device=DEVICE), tokens * top_k, True
    )
    ids[-1] = 4  # one row; expert 3 has none
    sorted_rows = torch.argsort(ids, stable=True).int()
    counts = torch.bincount(ids, minlength=num_experts)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
    stack = dataclasses.replace(
        weights[0],
        num_weights=num_experts,
        packed=torch.stack([w.packed for w in weights]),
        scale=None if weights[0].scale is None else torch.stack([w.scale for w in weights]),
        zero_point=None
        if weights[0].zero_point is None
        else torch.stack([w.zero_point for w in weights]),
    )
    x = torch.randn(tokens, k, device=DEVICE).bfloat16()
    out = torch.full((tokens * top_k, n), float("nan"), device=DEVICE)
    ops.grouped_linear(x, stack, sorted_rows, offsets, top_k, out=out)
    rows = x.double().repeat_interleave(top_k, 0)
    want, size = torch.empty_like(out, dtype=torch.float64), torch.empty_like(out).double()
    for expert, value in enumerate(values):
        mine = ids == expert
        want[mine] = rows[mine] @ value.T
        size[mine] = rows[mine].abs() @ value.abs().T
    assert bool(((out.double() - want).abs() <= 2e-5 * size).all())


@pytest.mark.parametrize("rows", [33, 130, 600])
@pytest.mark.parametrize(("n", "k"), [(512, 128), (128, 512), (72, 200)])
def test_batched_linear_cuda_many_rows_match_float64(n: int, k: int, rows: int) -> None:
    """Heads whose rows and columns end within a tile, in slices of wider tensors."""
    heads = 3
    x = torch.randn(rows, heads, k + 8, device=DEVICE).bfloat16()[..., :k]
    weight = torch.randn(heads, n, k, device=DEVICE).bfloat16()
    wide = torch.full((rows, heads, n + 8), float("nan"), device=DEVICE)
    out = ops.batched_linear(x, weight, out=wide[..., :n])
    want = torch.einsum("rhk,hnk->rhn", x.double(), weight.double())
    size = torch.einsum("rhk,hnk->rhn", x.double().abs(), weight.double().abs())
    assert bool(((out.double() - want).abs() <= 2e-5 * size).all())
    assert bool(wide[..., n:].isnan().all())


def test_arrange_cuda_refuses_odd_group_sizes() -> None:
    weight = torch.randn(8, 96, device=DEVICE)
    packed, scale, _ = quant.quantize_int4(weight, group_size=48)
    with pytest.raises(InvalidArgument, match="group_size is 48"):
        ops.arrange(packed, scale, format="int4", in_features=96, group_size=48)
