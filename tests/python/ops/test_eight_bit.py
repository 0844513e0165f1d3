"""fastgpt.ops.eight_bit: codes against their definition, products against those of the numbers that
the codes stand for, in float64."""

import pytest
import torch
from compare import HALF_STEP, poisoned
from instruction_sets import instruction_set
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InvalidArgument, UnsupportedFormat

from oracle import gemm as oracle
from shapes import FLOATS

FORMATS = ["fp8", "fp8_block", "int8"]
ISAS = ["portable", "avx2", "avx512"]
LARGEST = {"fp8": 448.0, "int8": 127.0}
# (rows, k, n): 1, primes, one below and above a block, more rows than a tile, a long k.
SHAPES = [(1, 1, 1), (3, 7, 5), (2, 131, 63), (7, 256, 65), (37, 300, 130), (70, 700, 257)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_weight(
    n: int, k: int, form: str, device: torch.device
) -> tuple[ops.ArrangedWeight, Tensor]:
    """Return (weight, the values it stands for in float32)."""
    values = random(n, k, seed=k).to(device)
    if form == "int8":
        packed, scale = ops.quantize_int8(values)
        return ops.arrange(packed, scale, format="int8"), ops.dequantize_int8(packed, scale)
    packed, scale = ops.quantize_fp8(values, per_block=form == "fp8_block")
    return ops.arrange(packed, scale, format="fp8"), ops.dequantize_fp8(packed, scale)


def quantized(x: Tensor, form: str) -> ops.QuantizedRows:
    """Return codes in memory that held something else before."""
    rows, k = x.shape
    width, groups = -(-k // 128) * 128, -(-k // 128) if form == "fp8_block" else 1
    dtype = torch.int8 if form == "int8" else torch.uint8
    return ops.quantize_rows(
        x,
        format=form.removesuffix("_block"),
        per_group=form == "fp8_block",
        codes=poisoned(rows, width, dtype=dtype, device=x.device),
        scale=poisoned(groups, -(-rows // 4) * 4, dtype=torch.float32, device=x.device),
    )


def reference(x: Tensor, form: str) -> Tensor:
    """Return what rows become, written down from the definition.

    On the CPU: torch divides by a number on CUDA by multiplying with its inverse.
    """
    name = form.removesuffix("_block")
    device, x = x.device, x.cpu().float()
    out = torch.empty_like(x)
    step = 128 if form == "fp8_block" else x.shape[1]
    for start in range(0, x.shape[1], step):
        part = x[:, start : start + step]
        scale = (part.abs().amax(1, keepdim=True) / LARGEST[name]).clamp(min=2.0**-100)
        scaled = part * (1.0 / scale)
        codes = scaled.round() if name == "int8" else scaled.to(torch.float8_e4m3fn).float()
        out[:, start : start + step] = codes * scale
    return out.to(device)


def assert_product(
    actual: Tensor, rows: ops.QuantizedRows, exact: Tensor, bias: Tensor | None
) -> None:
    """Fail where the product differs from that of the dequantized operands by more than its sums.

    int8 sums are exact: three roundings are left. e4m3 products within 128 columns are added with
    13 bits behind the largest one's leading bit (CUDA): each of 128 terms is cut by 2^-14 of the
    largest one on average, which is about 1 / 12 of their magnitudes' sum, 128 2^-14 / 12 < 2^-10
    of that sum if all cuts had one sign. Sums of steps, and the CPU's, are float32.
    """
    x = rows.dequantize()
    expected = oracle.linear(x, exact, bias)
    magnitude = oracle.linear(x.abs(), exact.abs(), None if bias is None else bias.abs())
    relative = 8 * 2.0**-24
    if rows.format == "fp8":
        relative = 2.0**-10 if actual.device.type == "cuda" else 32 * 2.0**-24
    bound = relative * magnitude + HALF_STEP[actual.dtype] * 1.01 * expected.abs()
    bound += 1e-30 if actual.dtype != torch.float16 else 2.0**-24
    assert not actual.isnan().any(), "NaN where a number belongs: something was not written"
    error = (actual.double() - expected).abs()
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"worst at {worst}: {actual.flatten()[worst]} instead of {expected.flatten()[worst]}, "
        f"allowed {bound.flatten()[worst]:.3g}"
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_rows_rounds_to_nearest(
    device: torch.device, form: str, dtype: torch.dtype
) -> None:
    for isa in ISAS if device.type == "cpu" else ISAS[:1]:
        with instruction_set(isa):
            for num_rows, k in [(1, 1), (3, 7), (5, 128), (9, 333), (2, 1536), (3, 5000)]:
                x = random(num_rows, k, seed=k) * 2.0 ** random(num_rows, 1).mul(3).round()
                x = x.to(device, dtype)
                assert torch.equal(quantized(x, form).dequantize(), reference(x, form)), (isa, k)


@pytest.mark.parametrize("form", FORMATS)
def test_codes_and_scales_behind_the_end_are_zero(device: torch.device, form: str) -> None:
    rows = quantized(random(3, 200).to(device), form)
    if device.type == "cpu" and form != "int8":
        assert bool((rows.codes[:, 200:] == 0).all())
    assert int((rows.codes != 0).sum()) <= 3 * 200
    assert bool((rows.scale[:, 3:] == 0).all())


@pytest.mark.parametrize("form", FORMATS)
def test_zero_tiny_and_outlier_rows(device: torch.device, form: str) -> None:
    """Zeros stay zeros; tiny rows lose what lies below 2^-101; one outlier coarsens its row (or
    group) alone."""
    x = random(4, 300)
    x[0] = 0
    x[1] *= 1e-36
    x[2, 5] = 3e38
    x = x.to(device)
    found = quantized(x, form).dequantize()
    assert torch.equal(found, reference(x, form))
    assert bool((found[0] == 0).all())
    assert float(found[2, 5]) == pytest.approx(3e38, rel=1e-6)
    weight, exact = make_weight(40, 300, form, device)
    rows = quantized(x[[0, 1, 3]].contiguous(), form)
    assert_product(ops.linear_eight_bit(rows, weight), rows, exact, None)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_nan_or_infinity_is_nan_and_no_other(
    device: torch.device, form: str, bad: float
) -> None:
    x = random(5, 300).to(device)
    x[2, 140] = bad
    weight, _ = make_weight(70, 300, form, device)
    out = ops.linear_eight_bit(quantized(x, form), weight)
    assert bool(out[2].isnan().all())
    assert not bool(out[[0, 1, 3, 4]].isnan().any())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_eight_bit_matches_float64(
    device: torch.device, form: str, dtype: torch.dtype
) -> None:
    for isa in ISAS if device.type == "cpu" else ISAS[:1]:
        with instruction_set(isa):
            for num_rows, k, n in SHAPES:
                weight, exact = make_weight(n, k, form, device)
                rows = quantized(random(num_rows, k, seed=1).to(device, dtype), form)
                bias = random(n, seed=2).to(device, dtype)
                for with_bias in (None, bias):
                    out = poisoned(num_rows, n, dtype=dtype, device=device)
                    assert ops.linear_eight_bit(rows, weight, with_bias, out=out) is out
                    assert_product(out, rows, exact, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
def test_linear_eight_bit_cuda_reaches_every_plan(form: str) -> None:
    """Tiles of 64 to 256 rows, whole and split, alone and in clusters; k and n of models."""
    cuda = torch.device("cuda")
    for num_rows, k, n in [
        (64, 4096, 512), (127, 3584, 4608), (200, 8960, 1536), (513, 1536, 2048),
        (1024, 3584, 3584), (2048, 2304, 8192), (700, 18944, 3584), (300, 129, 12345),
    ]:  # fmt: skip
        weight, exact = make_weight(n, k, form, cuda)
        rows = quantized(torch.randn(num_rows, k, device=cuda).bfloat16(), form)
        bias = torch.randn(n, device=cuda)
        for dtype in (torch.bfloat16, torch.float32):
            out = poisoned(num_rows, n, dtype=dtype, device=cuda)
            ops.linear_eight_bit(rows, weight, bias, out=out)
            assert_product(out, rows, exact, bias)


@pytest.mark.parametrize("form", FORMATS)
def test_linear_eight_bit_writes_its_columns_alone(device: torch.device, form: str) -> None:
    weight, exact = make_weight(72, 320, form, device)
    rows = quantized(random(70, 320, seed=3).to(device, torch.bfloat16), form)
    for first in (8, 3):  # aligned to 16 bytes, and not
        wide = poisoned(70, 90, dtype=torch.bfloat16, device=device)
        out = ops.linear_eight_bit(rows, weight, out=wide[:, first : first + 72])
        assert_product(out, rows, exact, None)
        assert bool(wide[:, :first].isnan().all())
        assert bool(wide[:, first + 72 :].isnan().all())


def test_int8_bits_are_the_same_in_every_batch_and_set() -> None:
    x = random(300, 700, seed=3)
    weight, _ = make_weight(200, 700, "int8", torch.device("cpu"))
    found = []
    for isa in ISAS:
        with instruction_set(isa):
            whole = ops.linear_eight_bit(quantized(x, "int8"), weight)
            for first, last in [(0, 1), (5, 7), (20, 24), (40, 57), (0, 257)]:
                part = ops.linear_eight_bit(quantized(x[first:last], "int8"), weight)
                assert torch.equal(part, whole[first:last]), f"rows {first}..{last - 1}, {isa}"
            found.append(whole)
    assert all(torch.equal(found[0], other) for other in found)


def test_int8_sums_are_exact_at_the_ends_of_the_range(device: torch.device) -> None:
    """-128 among the weight's codes, and sums near 2^31: every product of codes is the largest."""
    k = 1 << 17
    codes = torch.full((3, k), -128, dtype=torch.int8, device=device)
    codes[1] = 127
    weight = ops.arrange(codes, torch.ones(3, device=device), format="int8")
    x = torch.stack([torch.full((k,), 127.0), torch.full((k,), -127.0)]).to(device)
    out = ops.linear_eight_bit(quantized(x, "int8"), weight, dtype=torch.float32)
    expected = (x.double() @ codes.double().T).float()
    assert torch.equal(out, expected)
    with pytest.raises(InvalidArgument, match="131073 columns; expected 1 to 131072"):
        ops.quantize_rows(torch.zeros(1, k + 1, device=device), format="int8")


@pytest.mark.parametrize("form", FORMATS)
def test_no_rows(device: torch.device, form: str) -> None:
    weight, _ = make_weight(24, 48, form, device)
    rows = quantized(torch.empty(0, 48, device=device), form)
    assert ops.linear_eight_bit(rows, weight).shape == (0, 24)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    x = random(4, 300).to(device)
    fp8, _ = make_weight(24, 300, "fp8", device)
    block, _ = make_weight(24, 300, "fp8_block", device)
    int8, _ = make_weight(24, 300, "int8", device)
    with pytest.raises(UnsupportedFormat, match="not 'int4'"):
        ops.quantize_rows(x, format="int4")
    with pytest.raises(UnsupportedFormat, match="per_group is for fp8"):
        ops.quantize_rows(x, format="int8", per_group=True)
    with pytest.raises(InvalidArgument, match="x has 1 dimensions"):
        ops.quantize_rows(x[0], format="fp8")
    with pytest.raises(InvalidArgument, match="rows have 0 columns"):
        ops.quantize_rows(x[:, :0], format="fp8")
    with pytest.raises(UnsupportedFormat, match="fp8 rows multiply one fp8 weight, not int8"):
        ops.linear_eight_bit(quantized(x, "fp8"), int8)
    with pytest.raises(InvalidArgument, match="scale has 1 rows; expected 3"):
        ops.linear_eight_bit(quantized(x, "fp8"), block)
    with pytest.raises(InvalidArgument, match="scale has 3 rows; expected 1"):
        ops.linear_eight_bit(quantized(x, "fp8_block"), fp8)
    with pytest.raises(InvalidArgument, match="packed has shape"):
        ops.linear_eight_bit(quantized(x[:, :100], "fp8"), fp8)


@pytest.mark.parametrize("form", FORMATS)
def test_eight_bit_ops_pass_opcheck(device: torch.device, form: str) -> None:
    x = random(5, 200).to(device)
    rows = quantized(x, form)
    torch.library.opcheck(torch.ops.fastgpt.quantize_rows.default, (x, rows.codes, rows.scale))
    weight, _ = make_weight(20, 200, form, device)
    name = "linear_int8_int8" if form == "int8" else "linear_fp8_fp8"
    for bias in (None, random(20).to(device)):
        torch.library.opcheck(
            getattr(torch.ops.fastgpt, name).default,
            (rows.codes, rows.scale, 200, weight.packed, weight.scale, bias,
             torch.empty(5, 20, device=device)),
        )  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_torch_compile_gives_the_same_bits(device: torch.device, form: str) -> None:
    weight, _ = make_weight(40, 160, form, device)

    def layer(x: Tensor) -> Tensor:
        name = form.removesuffix("_block")
        rows = ops.quantize_rows(x, format=name, per_group=form == "fp8_block")
        return ops.linear_eight_bit(rows, weight)

    x = random(6, 160).to(device)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
def test_eight_bit_ops_replay_in_a_cuda_graph(form: str) -> None:
    cuda = torch.device("cuda")
    weight, exact = make_weight(520, 640, form, cuda)
    x = torch.randn(192, 640, device=cuda).bfloat16()
    out = torch.empty(192, 520, device=cuda)
    quantized(x, form)  # what is asked of the device once is asked now
    ops.linear_eight_bit(quantized(x, form), weight, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = ops.quantize_rows(
            x, format=form.removesuffix("_block"), per_group=form == "fp8_block"
        )
        ops.linear_eight_bit(rows, weight, out=out)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        out.fill_(float("nan"))
        graph.replay()
        assert_product(out, quantized(x, form), exact, None)
