"""fastgpt.ops.quant against plain torch: the same codes and scales, bit for bit."""

import pytest
import torch

from fastgpt import ops
from fastgpt.errors import InvalidArgument

from oracle import quant as oracle
from shapes import FLOATS

SHAPES = [(1, 1), (3, 7), (5, 128), (130, 257), (64, 1536)]


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    scale = torch.exp(torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator))
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_block", [False, True])
def test_fp8_matches_torch(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype, per_block: bool
) -> None:
    x = random(*shape, dtype=dtype, device=device)
    packed, scale = ops.quantize_fp8(x, per_block=per_block)
    scheme = {"format": "fp8", "scale": "block" if per_block else "channel"}
    expected = oracle.quantize(x.cpu(), scheme).to(device)  # CUDA torch divides by multiplying
    assert torch.equal(scale, expected.parts["scale"])
    assert torch.equal(packed, expected.parts["packed"])
    assert torch.equal(ops.dequantize_fp8(packed, scale), expected.dequantize())
    assert torch.equal(ops.dequantize_fp8(packed, scale, dtype=dtype), expected.dequantize(dtype))


def test_fp8_every_code_decodes_as_torch(device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(1, 256)
    value = ops.dequantize_fp8(codes, torch.ones(1, device=device))
    assert torch.equal(value.nan_to_num(nan=1e9), oracle.e4m3(codes).nan_to_num(nan=1e9))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_matches_torch(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = random(*shape, dtype=dtype, device=device)
    packed, scale = ops.quantize_int8(x)
    expected = oracle.quantize(x.cpu(), "int8").to(device)
    assert torch.equal(scale, expected.parts["scale"])
    assert torch.equal(packed, expected.parts["packed"])
    assert torch.equal(ops.dequantize_int8(packed, scale), expected.dequantize())
    assert torch.equal(ops.dequantize_int8(packed, scale, dtype=dtype), expected.dequantize(dtype))


def test_int8_every_code_decodes_and_rounds_back(device: torch.device) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8, device=device).view(1, 256)
    value = ops.dequantize_int8(codes, torch.full((1,), 0.25, device=device))
    assert torch.equal(value, codes.float() / 4)
    packed, scale = ops.quantize_int8(value[:, 1:])  # amax 127 / 4
    assert torch.equal(packed, codes[:, 1:])
    assert float(scale) == 0.25


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_matches_torch(
    device: torch.device,
    shape: tuple[int, int],
    dtype: torch.dtype,
    group_size: int,
    symmetric: bool,
) -> None:
    x = random(*shape, dtype=dtype, device=device)
    packed, scale, zero_point = ops.quantize_int4(x, group_size=group_size, symmetric=symmetric)
    expected = oracle.quantize(
        x.cpu(), {"format": "int4", "group_size": group_size, "symmetric": symmetric}
    ).to(device)
    assert torch.equal(scale, expected.parts["scale"])
    assert torch.equal(packed, expected.parts["packed"])
    assert (zero_point is None) == symmetric
    if zero_point is not None:
        assert torch.equal(zero_point, expected.parts["zero_point"])
    value = ops.dequantize_int4(
        packed, scale, zero_point, group_size=group_size, cols=shape[1], dtype=dtype
    )
    assert torch.equal(value, expected.dequantize(dtype))


@pytest.mark.parametrize("numel", [1, 7, 128, 300, 1536])
def test_binary_stores_the_two_best_values(device: torch.device, numel: int) -> None:
    x = 1 + 0.3 * random(numel, dtype=torch.float32, device=device) / 4
    packed, scale, offset = ops.quantize_binary(x)
    value = ops.dequantize_binary(packed, scale, offset, numel=numel).double()
    for first in range(0, numel, 128):
        group = x[first : first + 128].double().sort().values
        # Brute force over every split; equal up to the float32 rounding of the two levels.
        best = min(
            float(((group[:i] - group[:i].mean()) ** 2).sum())
            + float(((group[i:] - group[i:].mean()) ** 2).sum() if i < len(group) else 0.0)
            for i in range(1, len(group) + 1)
        )
        error = float(((x[first : first + 128].double() - value[first : first + 128]) ** 2).sum())
        assert error <= best * (1 + 1e-5) + 1e-10


def test_quantizers_accept_empty_and_zero(device: torch.device) -> None:
    for shape in [(0, 16), (3, 0)]:
        packed, scale = ops.quantize_fp8(torch.zeros(shape, device=device))
        assert packed.shape == shape
        assert scale.shape == (shape[0],)
        packed, scale = ops.quantize_int8(torch.zeros(shape, device=device))
        assert ops.dequantize_int8(packed, scale).shape == shape
    packed, scale = ops.quantize_int8(torch.zeros(2, 5, device=device))
    assert torch.equal(scale, torch.ones_like(scale))
    assert not bool(packed.any())
    packed, scale, _ = ops.quantize_int4(torch.zeros(2, 40, device=device))
    assert torch.equal(scale, torch.ones_like(scale))
    assert bool((packed == 0x88).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantizers_refuse_values_that_are_not_finite(bad: float) -> None:
    x = torch.zeros(4, 130)
    x[2, 129] = bad
    with pytest.raises(InvalidArgument, match=r"x\[2, 129\]"):
        ops.quantize_fp8(x)
    with pytest.raises(InvalidArgument, match=r"x\[2, 129\]"):
        ops.quantize_int8(x)
    with pytest.raises(InvalidArgument, match=r"x\[2, 129\]"):
        ops.quantize_int4(x)
    with pytest.raises(InvalidArgument, match=r"x\[129\]"):
        ops.quantize_binary(x[2])


def test_int4_scale_above_float16_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="float16's range"):
        ops.quantize_int4(torch.full((1, 32), 1e6))


def test_int4_odd_group_size_is_refused(device: torch.device) -> None:
    with pytest.raises(InvalidArgument, match="group_size is 7"):
        ops.quantize_int4(torch.zeros(1, 32, device=device), group_size=7)


@pytest.mark.parametrize("symmetric", [True, False])
def test_quant_ops_pass_opcheck(device: torch.device, symmetric: bool) -> None:
    x = random(5, 70, dtype=torch.bfloat16, device=device)
    fns = torch.ops.fastgpt
    packed, scale, zero_point = ops.quantize_int4(x, group_size=32, symmetric=symmetric)
    torch.library.opcheck(fns.quantize_int4.default, (x, 32, packed, scale, zero_point))
    torch.library.opcheck(
        fns.dequantize_int4.default, (packed, scale, zero_point, 32, torch.empty_like(x))
    )
    packed, scale = ops.quantize_fp8(x, per_block=symmetric)
    torch.library.opcheck(fns.quantize_fp8.default, (x, packed, scale))
    torch.library.opcheck(fns.dequantize_fp8.default, (packed, scale, torch.empty_like(x)))
    codes, scale = ops.quantize_int8(x)
    torch.library.opcheck(fns.quantize_int8.default, (x, codes, scale))
    torch.library.opcheck(fns.dequantize_int8.default, (codes, scale, torch.empty_like(x)))
    gain = x[0].contiguous()
    parts = ops.quantize_binary(gain)
    torch.library.opcheck(fns.quantize_binary.default, (gain, *parts))
    torch.library.opcheck(fns.dequantize_binary.default, (*parts, torch.empty_like(gain)))


def gptq_inputs(cols: int, rows: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return left, scale, zero and an upper factor with a dominant diagonal, as strided slices."""
    generator = torch.Generator().manual_seed(cols * 1000 + rows)
    left = torch.randn(cols + 2, rows, generator=generator)[1:-1]
    scale = torch.rand(cols + 2, rows, generator=generator).add(0.05)[1:-1]
    zero = torch.randint(16, (cols, rows), generator=generator).float()
    spread = torch.randn(cols + 3, cols + 5, generator=generator).triu()[:cols, :cols] * 0.3
    spread += 2 * torch.eye(cols)
    return tuple(part.to(device) for part in (left, scale, zero, spread))


def gptq_in_float64(left, scale, zero, spread, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    left, scale, zero, spread = (part.cpu().double() for part in (left, scale, zero, spread))
    left = left.clone()
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    for i in range(len(left)):
        codes[i] = (torch.round(left[i] / scale[i]) + zero[i]).clamp(0, top)
        errors[i] = (left[i] - (codes[i] - zero[i]) * scale[i]) / spread[i, i]
        left[i + 1 :] -= spread[i, i + 1 :, None] * errors[i]
    return codes, errors


@pytest.mark.parametrize(
    ("cols", "rows"), [(1, 1), (1, 70), (7, 3), (37, 65), (128, 33), (128, 500)]
)
@pytest.mark.parametrize("top", [1, 15, 255])
def test_gptq_round_matches_float64(device, cols: int, rows: int, top: int) -> None:
    """Codes agree but where a value lies within float32's rounding of the middle of two codes."""
    inputs = gptq_inputs(cols, rows, device)
    before = inputs[0].clone()
    codes = torch.full((cols, rows), 0xEE, dtype=torch.uint8, device=device)
    errors = torch.full((cols, rows), float("nan"), device=device)
    ops.gptq_round(*inputs, top, codes=codes, errors=errors)
    assert torch.equal(inputs[0], before)
    wanted_codes, wanted_errors = gptq_in_float64(*inputs, top)
    same_rows = (codes.cpu() == wanted_codes).all(0)  # one other code changes all that follow
    assert float((~same_rows).float().mean()) <= 0.02
    assert same_rows.any()
    torch.testing.assert_close(
        errors.cpu().double()[:, same_rows], wanted_errors[:, same_rows], rtol=1e-3, atol=1e-4
    )


def test_gptq_round_gives_a_row_the_same_bits_beside_any_others() -> None:
    left, scale, zero, spread = gptq_inputs(65, 131, torch.device("cpu"))
    whole = ops.gptq_round(left, scale, zero, spread, 15)
    part = slice(60, 77)
    alone = ops.gptq_round(*(x[:, part].contiguous() for x in (left, scale, zero)), spread, 15)
    assert all(torch.equal(a[:, part], b) for a, b in zip(whole, alone, strict=True))


def test_gptq_round_refuses_what_does_not_fit(device: torch.device) -> None:
    left, scale, zero, spread = gptq_inputs(8, 5, device)
    with pytest.raises(InvalidArgument, match="left has 129 columns"):
        ops.gptq_round(*gptq_inputs(129, 5, device), 15)
    with pytest.raises(InvalidArgument, match="top is 256"):
        ops.gptq_round(left, scale, zero, spread, 256)
    with pytest.raises(InvalidArgument, match=r"scale is \[7, 5\]; expected \[8, 5\]"):
        ops.gptq_round(left, scale[1:], zero, spread, 15)
    with pytest.raises(InvalidArgument, match="zero is int32"):
        ops.gptq_round(left, scale, zero.int(), spread, 15)
    with pytest.raises(InvalidArgument, match="spread has stride"):
        ops.gptq_round(left, scale, zero, spread.T, 15)
    codes, errors = ops.gptq_round(left[:0], scale[:0], zero[:0], spread[:0, :0], 15)
    assert codes.shape == errors.shape == (0, 5)


def test_gptq_round_passes_opcheck(device: torch.device) -> None:
    inputs = gptq_inputs(9, 20, device)
    torch.library.opcheck(
        torch.ops.fastgpt.gptq_round.default, (*inputs, 15, *ops.gptq_round(*inputs, 15))
    )
