"""Round-to-nearest: errors at the known limits, exact edges, odd shapes, refused values."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.errors import CheckpointError, ConfigError
from fastgpt.quant.rounding import (
    binary_residual,
    is_finite,
    round_in_torch,
    round_tensor,
)
from fastgpt.scheme import Format, QuantizedTensor

FP8_BLOCK = {"format": "fp8", "scale": "block"}
INT4_ASYM = {"format": "int4", "symmetric": False}
SHAPES = [(1, 1), (1, 7), (7, 1), (3, 127), (5, 129), (130, 257), (2, 3, 70)]


def nmse_percent(x: torch.Tensor, value) -> float:
    q = round_tensor(x, Format.parse(value), "x")
    return 100 * float(((q.dequantize() - x) ** 2).mean() / (x**2).mean())


@pytest.mark.parametrize(
    ("value", "expected"),
    [("fp8", 0.070), (FP8_BLOCK, 0.070), ("int8", 0.0062), ("int4", 1.38), (INT4_ASYM, 1.01)],
)
def test_rounding_error_on_gaussian_weights(value, expected: float):
    """Reference: normalized mean squared error in percent of a 1024 x 1024 Gaussian matrix."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    assert nmse_percent(x, value) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("value", ["fp8", FP8_BLOCK, "int8", "int4", INT4_ASYM])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_error_is_at_most_half_a_step(value, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    fmt = Format.parse(value)
    q = round_tensor(x, fmt, "x")
    assert q.shape == shape
    error = (q.dequantize() - x.float()).abs()
    if fmt.name == "fp8":
        # Half a unit in the last of 3 mantissa bits; below the normal range half of 2^-9 scales.
        amax = x.float().abs().amax()
        tolerance = torch.maximum(x.float().abs() / 16, amax / 448 * 2**-10) * (1 + 1e-5)
    elif fmt.name == "int8":
        tolerance = q.parts["scale"].unsqueeze(-1) * (0.5 + 1e-4)
    else:
        # Half a step; clamping at the end of the range adds what rounding the fp16 scale took.
        scale = q.parts["scale"].float().repeat_interleave(fmt.group_size, -1)[..., : shape[-1]]
        tolerance = scale * (0.5 + 16 * 2**-11 + 1e-5)
        if not fmt.symmetric:
            tolerance = tolerance + scale * 0.5  # the zero point is rounded too
    assert bool((error <= tolerance).all()), float((error / tolerance).max())


@pytest.mark.parametrize(
    "value", ["fp8", "int8", "int4", INT4_ASYM, {"format": "int4", "group_size": 32}]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_native_and_torch_give_the_same_bits(value, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    fmt = Format.parse(value)
    native, torch_only = round_tensor(x, fmt, "x"), round_in_torch(x, fmt, "x")
    assert native.parts.keys() == torch_only.parts.keys()
    for suffix, part in native.parts.items():
        assert torch.equal(part, torch_only.parts[suffix]), suffix


@pytest.mark.gpu
@pytest.mark.parametrize(
    "value",
    [
        "fp8",
        FP8_BLOCK,
        "int4",
        INT4_ASYM,
        {"format": "int3", "symmetric": False},
        {"format": "int2"},
    ],
)
@pytest.mark.parametrize("shape", [*SHAPES, (1030, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_on_cuda_gives_the_bits_of_the_cpu(value, shape, dtype):
    """By the native op and by torch, which divides by a plain number otherwise than the CPU."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    fmt = Format.parse(value)
    expected = round_in_torch(x, fmt, "x")
    for rounded in (round_tensor(x.cuda(), fmt, "x"), round_in_torch(x.cuda(), fmt, "x")):
        for suffix, part in rounded.parts.items():
            assert torch.equal(part.cpu(), expected.parts[suffix]), suffix


@pytest.mark.gpu
def test_int4_on_cuda_refuses_a_scale_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"w: .*above fp16's range"):
        round_tensor(torch.full((2, 128), 6e5, device="cuda"), Format.parse("int4"), "w")


def test_fp8_rounds_every_half_value_as_ml_dtypes():
    """Ties, subnormals, saturation: all finite fp16 values within e4m3's range, scale one."""
    x = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) <= 448)]
    expected = x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    q = round_tensor(torch.from_numpy(x).view(1, -1), Format.parse("fp8"), "x")
    assert float(q.parts["scale"]) == 1.0
    np.testing.assert_array_equal(q.parts["packed"][0].numpy(), expected)


@pytest.mark.parametrize("value", ["fp8", FP8_BLOCK, "int8", "int4", INT4_ASYM])
def test_rounding_zero_weights_gives_zero_and_a_usable_scale(value):
    q = round_tensor(torch.zeros(3, 130), Format.parse(value), "x")
    assert bool((q.dequantize() == 0).all())
    assert bool((q.parts["scale"] > 0).all())


@pytest.mark.parametrize("value", ["fp8", "int8", "int4", INT4_ASYM])
def test_rounding_tiny_weights_stays_finite(value):
    q = round_tensor(torch.full((2, 64), 1e-38), Format.parse(value), "x")
    assert bool(torch.isfinite(q.dequantize()).all())
    assert bool((q.parts["scale"] > 0).all())


@pytest.mark.parametrize("value", ["int4", INT4_ASYM])
@pytest.mark.parametrize("cols", [1, 31, 33, 130])
def test_int4_pad_codes_mean_zero(value, cols: int):
    x = torch.rand(2, cols, generator=torch.Generator().manual_seed(3)) + 0.5
    q = round_tensor(x, Format.parse(value), "x")
    packed = q.parts["packed"]
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[:, cols:]
    zero = q.parts["zero_point"][:, -1:] if "zero_point" in q.parts else 8
    assert codes.shape[1] > 0
    assert bool((codes == zero).all())


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4), cols=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_int4_stores_its_own_values_exactly(rows: int, cols: int, seed: int):
    """Codes -7 .. 7 times a power of two, each group reaching 7, come back unchanged."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-7, 8, (rows, cols), generator=generator).float()
    codes[:, ::128] = 7.0
    q = round_tensor(codes * 2**-5, Format.parse("int4"), "x")
    torch.testing.assert_close(q.dequantize(), codes * 2**-5, rtol=0, atol=0)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 300),
    spread=st.sampled_from([0.0, 0.15, 0.4, 2.0]),
    signs=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_binary_gain_times_residual_is_the_gain(n: int, spread: float, signs: bool, seed: int):
    """The two-level code with its residual folded is lossless up to float32 rounding."""
    generator = torch.Generator().manual_seed(seed)
    gain = torch.exp(torch.randn(n, generator=generator) * spread)
    if signs:
        gain = gain * torch.where(torch.rand(n, generator=generator) < 0.3, -1.0, 1.0)
    q = round_tensor(gain, Format.parse("binary"), "norm")
    residual = binary_residual(gain, q)
    assert bool(torch.isfinite(residual).all())
    torch.testing.assert_close(q.dequantize() * residual, gain, rtol=1e-6, atol=0)
    assert len(torch.unique(q.dequantize()[:128])) <= 2


HARD_GAINS = {
    "zeros": torch.zeros(130),
    "ones": torch.ones(5),
    "some-zeros": torch.tensor([0.0, 0.0, 3.0]),
    "mixed-signs": torch.tensor([-1.0, 1.0, -0.5, 0.5, 0.0]),
    "one-outlier": torch.cat((torch.full((127,), 1e-6), torch.tensor([10.0]))),
    "mean-zero": torch.tensor([-1e-3, 1e-3, 5.0, 5.0]),
}


@pytest.mark.parametrize("case", HARD_GAINS)
def test_binary_residual_is_bounded_on_hard_gains(case: str):
    gain = HARD_GAINS[case]
    q = round_tensor(gain, Format.parse("binary"), "norm")
    residual = binary_residual(gain, q)
    assert bool((residual.abs() <= 128).all())
    torch.testing.assert_close(q.dequantize() * residual, gain, rtol=1e-6, atol=0)


def test_binary_two_level_is_the_best_two_values():
    """Against the exhaustive search over all splits of the sorted group."""
    gain = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(5)) * 0.4)
    q = round_tensor(gain, Format.parse("binary"), "norm")
    got = float(((q.dequantize() - gain) ** 2).sum())
    ordered = gain.sort().values.double()
    best = min(
        float(((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum())
        for a, b in ((ordered[:i], ordered[i:]) for i in range(1, 64))
    )
    assert got == pytest.approx(best, rel=1e-5)


def test_binary_naive_stores_sign_times_mean():
    gain = torch.tensor([1.0, -2.0, 3.0, -6.0])
    q = round_tensor(gain, Format.parse({"format": "binary", "algorithm": "naive"}), "norm")
    assert q.dequantize().tolist() == [3.0, -3.0, 3.0, -3.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("value", ["fp16", "bf16", "fp8", "int8", "int4"])
def test_rounding_refuses_values_that_are_not_numbers(bad: float, value):
    x = torch.ones(4, 5)
    x[2, 3] = bad
    with pytest.raises(CheckpointError, match=r"layers\.3\.up\.weight .*\(2, 3\)"):
        round_tensor(x, Format.parse(value), "layers.3.up.weight")


def test_fp16_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"head\.weight reaches 70000.*bf16"):
        round_tensor(torch.tensor([[7e4]]), Format.parse("fp16"), "head.weight")
    kept = round_tensor(torch.tensor([[65504.0]]), Format.parse("fp16"), "head.weight")
    assert not isinstance(kept, QuantizedTensor)
    assert float(kept) == 65504


def test_int4_refuses_a_scale_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"up\.weight: .*fp16's range"):
        round_tensor(torch.full((1, 8), 1e6), Format.parse("int4"), "up.weight")


def test_rounding_refuses_an_empty_weight():
    with pytest.raises(ConfigError, match="nothing to quantize"):
        round_tensor(torch.empty(0, 8), Format.parse("fp8"), "up.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_finite_sees_every_bad_value(dtype: torch.dtype):
    assert is_finite(torch.empty(0, dtype=dtype))
    assert is_finite(torch.tensor([-torch.finfo(dtype).max, torch.finfo(dtype).max], dtype=dtype))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for at in range(5):
            values = torch.zeros(5, dtype=dtype)
            values[at] = bad
            assert not is_finite(values)
