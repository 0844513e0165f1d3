"""fastgpt.ops.gemm against float64, on every instruction set, and its bits across batches."""

import os
import subprocess
import sys

import pytest
import torch
from compare import HALF_STEP, poisoned
from instruction_sets import instruction_set
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InvalidArgument, UnsupportedFormat

from oracle import gemm as oracle
from shapes import FLOATS

FORMATS = ["rows", "fp32", "bf16", "fp16", "fp8", "fp8_block", "int8", "int4", "int4_asymmetric"]
DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (rows, k, n): 1, primes, one below and above a block, more rows than a tile, a long k.
SHAPES = [(1, 1, 1), (3, 7, 5), (2, 131, 63), (7, 256, 65), (37, 300, 130), (1, 1536, 256)]
ISAS = ["portable", "avx2", "avx512", "avx512bf16"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_weight(
    n: int, k: int, form: str, device: torch.device, stack: int = 0, group_size: int = 32
) -> tuple[Tensor | ops.ArrangedWeight, Tensor]:
    """Return (weight, its exact values in float32), one weight or a stack."""
    values = random(*((stack, n, k) if stack else (n, k)), seed=k).to(device)
    if form == "rows":
        dense = values.to(torch.bfloat16)
        return dense, dense.float()
    if form in DENSE:
        dense = values.to(DENSE[form])
        return ops.arrange(dense, format=form), dense.float()
    flat = values.view(-1, n, k)
    parts: list[list[Tensor]] = []
    exact = []
    for weight in flat:
        if form.startswith("fp8"):
            packed, scale = ops.quantize_fp8(weight, per_block=form == "fp8_block")
            parts.append([packed, scale])
            exact.append(ops.dequantize_fp8(packed, scale))
        elif form == "int8":
            packed, scale = ops.quantize_int8(weight)
            parts.append([packed, scale])
            exact.append(ops.dequantize_int8(packed, scale))
        else:
            symmetric = form == "int4"
            packed, scale, zero = ops.quantize_int4(
                weight, group_size=group_size, symmetric=symmetric
            )
            parts.append([packed, scale] if zero is None else [packed, scale, zero])
            exact.append(ops.dequantize_int4(packed, scale, zero, group_size=group_size, cols=k))
    joined = [torch.stack(part) if stack else part[0] for part in zip(*parts, strict=True)]
    arranged = ops.arrange(
        *joined,
        format=form.split("_")[0],
        in_features=k,
        group_size=group_size if form.startswith("int4") else 0,
    )
    return arranged, torch.stack(exact) if stack else exact[0]


def assert_product(actual: Tensor, expected: Tensor, magnitude: Tensor, device: str) -> None:
    """Fail where |actual - expected| > one rounding of the result + the error of the sum.

    A sum of float32 products in chains of 128 (int4: of a group) whose sums are added up errs by at
    most (128 + k / 128) 2^-24 times the sum of the magnitudes, if every rounding is a worst one of
    one sign. On random data they add up like a random walk, sqrt(128) + sqrt(k / 128) < 16 for the
    sizes here; twice that is allowed.
    """
    bound = 32 * 2.0**-24 * magnitude + HALF_STEP[actual.dtype] * 1.01 * expected.abs()
    bound += 1e-30 if actual.dtype != torch.float16 else 2.0**-24
    error = (actual.double() - expected).abs()
    assert not actual.isnan().any(), "NaN where a number belongs: something was not written"
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"{device}: worst at {worst}: {actual.flatten()[worst]} instead of "
        f"{expected.flatten()[worst]}, allowed {bound.flatten()[worst]:.3g}"
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_matches_float64(isa: str, form: str, dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    with instruction_set(isa):
        for rows, k, n in SHAPES:
            x = random(rows, k, seed=1).to(dtype)
            bias = random(n, seed=2).to(dtype)
            weight, exact = make_weight(n, k, form, cpu)
            magnitude = oracle.linear(x.abs(), exact.abs(), bias.abs())
            for out_dtype in {dtype, torch.float32}:
                out = poisoned(rows, n, dtype=out_dtype)
                assert ops.linear(x, weight, bias, out=out) is out
                assert_product(out, oracle.linear(x, exact, bias), magnitude, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_row_has_the_same_bits_in_every_batch(
    isa: str, form: str, dtype: torch.dtype
) -> None:
    cpu = torch.device("cpu")
    with instruction_set(isa):
        for k, n in [(300, 70), (640, 200)]:
            weight, _ = make_weight(n, k, form, cpu)
            x = random(300, k, seed=3).to(dtype)
            whole = ops.linear(x, weight)
            for first, last in [(0, 1), (5, 7), (10, 13), (20, 24), (30, 35), (40, 57), (0, 257)]:
                part = ops.linear(x[first:last], weight)
                assert torch.equal(part, whole[first:last]), f"rows {first}..{last - 1} of {k}x{n}"


def test_row_major_and_arranged_weights_give_the_same_bits() -> None:
    for isa in ISAS[:3]:
        with instruction_set(isa):
            weight = random(100, 333).to(torch.bfloat16)
            x = random(9, 333, seed=1).to(torch.bfloat16)
            arranged = ops.arrange(weight, format="bf16")
            assert torch.equal(ops.linear(x, weight), ops.linear(x, arranged))


def test_linear_does_not_depend_on_the_number_of_threads() -> None:
    """A child process with one thread prints the same bits as one with three."""
    code = (
        "import hashlib, torch; from fastgpt import ops\n"
        "g = torch.Generator().manual_seed(0)\n"
        "w = torch.randn(777, 513, generator=g); h = hashlib.sha256()\n"
        "p, s, z = ops.quantize_int4(w, group_size=64, symmetric=False)\n"
        "a = ops.arrange(p, s, z, format='int4', in_features=513, group_size=64)\n"
        "b = ops.arrange(*ops.quantize_fp8(w), format='fp8')\n"
        "c = ops.arrange(*ops.quantize_int8(w), format='int8')\n"
        "for rows in (1, 3, 20):\n"
        "    x = torch.randn(rows, 513, generator=g).bfloat16()\n"
        "    for weight in (w, a, b, c):\n"
        "        h.update(ops.linear(x, weight, dtype=torch.float32).numpy().tobytes())\n"
        "print(h.hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "FASTGPT_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in ("1", "3")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("group_size", [2, 6, 36, 128, 512])
@pytest.mark.parametrize("form", ["int4", "int4_asymmetric"])
def test_int4_groups_of_any_even_size(form: str, group_size: int) -> None:
    for isa in ISAS:
        with instruction_set(isa):
            weight, exact = make_weight(70, 301, form, torch.device("cpu"), group_size=group_size)
            for rows in (1, 6):
                x = random(rows, 301, seed=4).to(torch.bfloat16)
                out = ops.linear(x, weight, dtype=torch.float32)
                magnitude = 4 * oracle.linear(x.abs(), exact.abs())
                assert_product(out, oracle.linear(x, exact), magnitude, isa)


def test_fp8_codes_are_multiplied_exactly() -> None:
    """Every finite code, subnormals too: x is a unit vector, so the product is the code itself."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(-1, 1).expand(-1, 5).contiguous()
    values = codes.view(torch.float8_e4m3fn).float()
    for isa in ISAS:
        with instruction_set(isa):
            weight = ops.arrange(codes, torch.ones(len(codes)), format="fp8")
            for dtype in FLOATS:
                eye = torch.eye(5, dtype=dtype)
                assert torch.equal(ops.linear(eye, weight, dtype=torch.float32), values.T)


def test_int8_codes_are_multiplied_exactly(device: torch.device) -> None:
    """Every code, -128 too: x is a unit vector, so the product is the code itself."""
    codes = torch.arange(-128, 128, dtype=torch.int8, device=device)
    codes = torch.stack([codes.roll(i) for i in range(7)], 1)  # every code at every place
    for isa in ISAS if device.type == "cpu" else ISAS[:1]:
        with instruction_set(isa):
            weight = ops.arrange(codes, torch.ones(256, device=device), format="int8")
            for dtype in FLOATS:
                eye = torch.eye(7, dtype=dtype, device=device)
                assert torch.equal(ops.linear(eye, weight, dtype=torch.float32), codes.T.float())


def test_linear_reads_and_writes_strided_rows(device: torch.device) -> None:
    x = random(5, 90).to(device)
    out = poisoned(5, 100, dtype=torch.float32, device=device)
    weight, exact = make_weight(40, 64, "rows", device)
    ops.linear(x[:, 10:74], weight, out=out[:, 30:70])
    expected = oracle.linear(x[:, 10:74], exact)
    magnitude = oracle.linear(x[:, 10:74].abs(), exact.abs())
    assert_product(out[:, 30:70], expected, magnitude, str(device))
    assert bool(out[:, :30].isnan().all()), "wrote left of its columns"
    assert bool(out[:, 70:].isnan().all()), "wrote right of its columns"
    wide = random(40, 80).to(device)
    strided = ops.linear(x[:, :64], wide[:, 8:72])
    assert torch.equal(strided, ops.linear(x[:, :64].contiguous(), wide[:, 8:72].contiguous()))


@pytest.mark.parametrize("form", FORMATS)
def test_linear_of_nothing(device: torch.device, form: str) -> None:
    weight, _ = make_weight(24, 48, form, device)
    assert ops.linear(torch.empty(0, 48, device=device), weight).shape == (0, 24)


def test_linear_without_columns_is_the_bias(device: torch.device) -> None:
    x = torch.empty(3, 0, device=device)
    bias = random(4).to(device)
    out = ops.linear(x, torch.empty(4, 0, device=device), bias)
    assert torch.equal(out, bias.expand(3, 4))


def routing(rows: int, experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, experts, (rows,), generator=generator)
    order = torch.argsort(ids, stable=True).int()
    offsets = torch.zeros(experts + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(ids, minlength=experts).cumsum(0)
    return order.to(device), offsets.to(device)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 3), (11, 2), (40, 4)])
def test_grouped_linear_matches_float64(
    device: torch.device, form: str, tokens: int, top_k: int
) -> None:
    weight, exact = make_weight(50, 96, form, device, stack=5)
    x = random(tokens, 96, seed=5).to(device, torch.bfloat16)
    rows, offsets = routing(tokens * top_k, 5, device)
    out = poisoned(tokens * top_k, 50, dtype=torch.float32, device=device)
    ops.grouped_linear(x, weight, rows, offsets, top_k, out=out)
    if tokens == 0:
        return
    expected = oracle.grouped_linear(x, exact, rows, offsets, top_k)
    magnitude = oracle.grouped_linear(x.abs(), exact.abs(), rows, offsets, top_k)
    assert_product(out, expected, magnitude, str(device))


@pytest.mark.parametrize("form", ["rows", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_batched_linear_matches_float64(
    device: torch.device, form: str, dtype: torch.dtype
) -> None:
    weight, exact = make_weight(33, 24, form, device, stack=3)
    x = random(7, 5, 30, seed=6).to(device, dtype)[:, 1:4, 3:27]
    out = poisoned(7, 4, 40, dtype=dtype, device=device)
    ops.batched_linear(x, weight, out=out[:, 1:, 2:35])
    magnitude = oracle.batched_linear(x.abs(), exact.abs())
    assert_product(out[:, 1:, 2:35], oracle.batched_linear(x, exact), magnitude, str(device))
    assert bool(out[:, 0].isnan().all()), "wrote outside its heads"


def test_wrong_arguments_are_named(device: torch.device) -> None:
    x = torch.zeros(2, 8, device=device)
    weight = torch.zeros(4, 8, device=device)
    with pytest.raises(InvalidArgument, match="weight has shape"):
        ops.linear(x[:, :6], weight)
    with pytest.raises(InvalidArgument, match="bias has 3 elements"):
        ops.linear(x, weight, torch.zeros(3, device=device))
    with pytest.raises(InvalidArgument, match="out is float16"):
        ops.linear(x, weight, out=torch.zeros(2, 4, dtype=torch.float16, device=device))
    with pytest.raises(UnsupportedFormat, match="'int5'"):
        ops.arrange(weight, format="int5")
    with pytest.raises(InvalidArgument, match="weight is float32; expected int8"):
        ops.arrange(weight, torch.ones(4, device=device), format="int8")
    with pytest.raises(InvalidArgument, match="scale is missing"):
        ops.arrange(weight.to(torch.int8), format="int8")
    with pytest.raises(InvalidArgument, match="in_features is missing"):
        ops.arrange(torch.zeros(4, 16, dtype=torch.uint8, device=device), format="int4")


def test_arranged_weight_refuses_a_width_that_is_not_its_own() -> None:
    """Its layout is padded: 199 columns were multiplied with a weight of 200, and 92 rows written
    where it has 93."""
    weight = ops.arrange(torch.zeros(93, 200), format="fp32")
    stack = ops.arrange(torch.zeros(2, 93, 200), format="fp32")
    rows, offsets = torch.arange(4, dtype=torch.int32), torch.tensor([0, 2, 4], dtype=torch.int32)
    message = "x has 199 columns and out 93; the weight takes 200 and gives 93"
    with pytest.raises(InvalidArgument, match=message):
        ops.linear(torch.zeros(4, 199), weight)
    with pytest.raises(InvalidArgument, match=message):
        ops.grouped_linear(torch.zeros(4, 199), stack, rows, offsets, 1)
    with pytest.raises(InvalidArgument, match=message):
        ops.batched_linear(torch.zeros(4, 2, 199), stack)
    with pytest.raises(InvalidArgument, match="out 92; the weight takes 200 and gives 93"):
        ops.linear(torch.zeros(4, 200), weight, out=torch.zeros(4, 92))


def test_arrange_refuses_nan_codes() -> None:
    codes = torch.zeros(4, 8, dtype=torch.uint8)
    codes[3, 5] = 0x7F
    with pytest.raises(InvalidArgument, match="NaN code 127"):
        ops.arrange(codes, torch.ones(4), format="fp8")


def test_grouped_linear_refuses_wrong_indices() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(3, 4, 8)
    rows = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(InvalidArgument, match=r"sorted_rows\[1\] is 5"):
        ops.grouped_linear(x, weight, rows, torch.tensor([0, 1, 2, 2], dtype=torch.int32), 1)
    with pytest.raises(InvalidArgument, match="offsets run from 0 to 1"):
        ops.grouped_linear(x, weight, rows, torch.tensor([0, 1, 1, 1], dtype=torch.int32), 1)


def test_gemm_ops_pass_opcheck(device: torch.device) -> None:
    fns = torch.ops.fastgpt
    x = random(3, 40).to(device)
    out = torch.empty(3, 20, device=device)
    rows, offsets = routing(3, 2, device)
    for bias in (None, random(20).to(device)):
        dense, _ = make_weight(20, 40, "rows", device)
        torch.library.opcheck(fns.linear.default, (x, dense, bias, out))
        fp8, _ = make_weight(20, 40, "fp8", device)
        torch.library.opcheck(fns.linear_fp8.default, (x, fp8.packed, fp8.scale, bias, out))
        int8, _ = make_weight(20, 40, "int8", device)
        torch.library.opcheck(fns.linear_int8.default, (x, int8.packed, int8.scale, bias, out))
        for form in ("int4", "int4_asymmetric"):
            int4, _ = make_weight(20, 40, form, device)
            parts = (int4.packed, int4.scale, int4.zero_point, 32)
            torch.library.opcheck(fns.linear_int4.default, (x, *parts, bias, out))
    tail = (rows, offsets, 1, out)
    dense, _ = make_weight(20, 40, "rows", device, stack=2)
    torch.library.opcheck(fns.grouped_linear.default, (x, dense, *tail))
    fp8, _ = make_weight(20, 40, "fp8", device, stack=2)
    torch.library.opcheck(fns.grouped_linear_fp8.default, (x, fp8.packed, fp8.scale, *tail))
    int8, _ = make_weight(20, 40, "int8", device, stack=2)
    torch.library.opcheck(fns.grouped_linear_int8.default, (x, int8.packed, int8.scale, *tail))
    for form in ("int4", "int4_asymmetric"):
        int4, _ = make_weight(20, 40, form, device, stack=2)
        parts = (int4.packed, int4.scale, int4.zero_point, 32)
        torch.library.opcheck(fns.grouped_linear_int4.default, (x, *parts, *tail))
    heads = random(3, 2, 40).to(device)
    torch.library.opcheck(
        fns.batched_linear.default, (heads, dense, torch.empty(3, 2, 20, device=device))
    )
    canonical = random(20, 40).to(device)
    arranged = ops.arrange(canonical, format="fp32")
    torch.library.opcheck(
        fns.arrange_weight.default,
        (canonical, None, None, "dense", 40, 0, arranged.packed, None, None),
    )
