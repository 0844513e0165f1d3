"""Grids and GPTQ: known errors, codes an independent reader decodes, correlated inputs."""

import numpy as np
import pytest
import torch

from fastgpt import ops
from fastgpt.errors import ConfigError, InvalidArgument
from fastgpt.quant.gptq import _upper_factor, gptq_codes
from fastgpt.quant.grid import clipped_grid, encode, nearest_grid, pack_codes, unpack_codes
from fastgpt.quant.rounding import round_tensor
from fastgpt.quant.transforms import hadamard
from fastgpt.scheme import Format

SYM, ASYM = {"format": "int4"}, {"format": "int4", "symmetric": False}
ASYM64 = {**ASYM, "group_size": 64}
NARROW = [
    {"format": f"int{bits}", "symmetric": symmetric, "group_size": group_size}
    for bits in (2, 3)
    for symmetric in (True, False)
    for group_size in (32, 64)
]


def synthetic(kind: str) -> torch.Tensor:
    """Return a 1024 x 1024 matrix: Gaussian, Student's t with 5 degrees, or outlier columns."""
    rng = np.random.default_rng(0)
    gaussian, student = rng.standard_normal((1024, 1024)), rng.standard_t(5, (1024, 1024))
    columns = np.exp(0.5 * rng.standard_normal((1, 1024)))
    columns[:, rng.choice(1024, 8, replace=False)] *= 12
    table = {"gaussian": gaussian, "student": student, "outliers": gaussian * columns}
    return torch.from_numpy(table[kind]).float()


@pytest.mark.parametrize(
    ("value", "kind", "percent"),
    [
        (SYM, "gaussian", 1.02),
        (SYM, "student", 2.18),
        (SYM, "outliers", 5.60),
        (ASYM64, "gaussian", 0.76),
        (ASYM64, "student", 1.17),
        (ASYM64, "outliers", 1.79),
    ],
)
def test_clipped_grid_reaches_the_reference_error(value, kind: str, percent: float):
    """Normalized mean squared error in percent, within 5 % of an independent NumPy search."""
    x, fmt = synthetic(kind), Format.parse(value)
    grid = clipped_grid(x, fmt)
    error = ((grid.values(encode(x, grid)) - x) ** 2).sum() / (x**2).sum()
    assert 100 * float(error) == pytest.approx(percent, rel=0.05)


@pytest.mark.parametrize(
    ("value", "percents"),
    [
        ("fp8", (0.070, 0.067, 0.045)),
        ({"format": "fp8", "scale": "block"}, (0.070, 0.069, 0.067)),
        (SYM, (1.38, 2.96, 6.53)),
        (ASYM, (1.01, 1.78, 3.39)),
    ],
    ids=str,
)
def test_round_to_nearest_has_the_reference_error(value, percents):
    """Within 5 %, and half a unit of the reference's last digit where it shows only two."""
    for kind, percent in zip(("gaussian", "student", "outliers"), percents, strict=True):
        x = synthetic(kind)
        stored = round_tensor(x, Format.parse(value), "x")
        error = float(((stored.dequantize() - x) ** 2).sum() / (x**2).sum())
        assert 100 * error == pytest.approx(percent, rel=0.05, abs=5e-4), kind


@pytest.mark.parametrize(("value", "percent"), [(SYM, 0.67), (ASYM64, 0.54)])
def test_rotated_outliers_have_the_reference_error(value, percent: float):
    """Hadamard blocks of 128 columns spread what eight outlier columns hold."""
    x, fmt = synthetic("outliers"), Format.parse(value)
    rotation = hadamard(128)
    x = (x.unflatten(1, (-1, 128)) @ rotation).flatten(1)
    grid = clipped_grid(x, fmt)
    error = ((grid.values(encode(x, grid)) - x) ** 2).sum() / (x**2).sum()
    assert 100 * float(error) == pytest.approx(percent, rel=0.05)


@pytest.mark.parametrize("value", [SYM, ASYM, ASYM64, {**SYM, "group_size": 32}])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (5, 129), (2, 300)])
def test_clipped_grid_is_never_worse_than_nearest(value, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    fmt = Format.parse(value)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(2)) ** 8
    grid = clipped_grid(x, fmt, importance)
    nearest = round_tensor(x, fmt, "x").dequantize()

    def error(y: torch.Tensor) -> float:
        return float(((y - x) ** 2 * importance).sum())

    assert error(grid.values(encode(x, grid))) <= error(nearest) * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("value", [SYM, ASYM, ASYM64])
@pytest.mark.parametrize("cols", [1, 31, 64, 130])
def test_packed_codes_decode_in_an_independent_reader(value, cols: int):
    fmt = Format.parse(value)
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(3)) + 0.3
    grid = clipped_grid(x, fmt)
    codes = encode(x, grid)
    stored = pack_codes(codes, grid, fmt)
    packed = stored.parts["packed"].numpy()
    low_first = np.stack((packed & 15, packed >> 4), -1).reshape(3, -1)
    np.testing.assert_array_equal(low_first[:, :cols], codes.numpy())
    zero = stored.parts["zero_point"].numpy() if "zero_point" in stored.parts else None
    group = np.arange(cols) // fmt.group_size
    per_column = 8 if zero is None else zero.astype(np.float32)[:, group]
    scale = stored.parts["scale"].numpy().astype(np.float32)[:, group]
    np.testing.assert_array_equal(
        stored.dequantize().numpy(), (codes.numpy() - np.float32(per_column)) * scale
    )
    pad = low_first[:, cols:]
    assert (pad == (8 if zero is None else zero[:, -1:])).all()
    again, again_grid = unpack_codes(stored)
    assert torch.equal(again, codes)
    assert torch.equal(again_grid.scale, grid.scale)


def test_nearest_grid_is_what_rounding_stores():
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(4))
    for value in (SYM, ASYM64):
        fmt = Format.parse(value)
        grid, stored = nearest_grid(x, fmt), round_tensor(x, fmt, "x")
        assert torch.equal(grid.scale, stored.parts["scale"].float())
        if not fmt.symmetric:
            assert torch.equal(grid.zero, stored.parts["zero_point"].float())


def test_clipped_grid_refuses_a_scale_that_does_not_fit():
    with pytest.raises(ConfigError, match="fp16's range"):
        clipped_grid(torch.full((1, 8), 1e6), Format.parse("int4"))


def inputs(kind: str, count: int = 4096, cols: int = 256) -> torch.Tensor:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((count, cols))
    if kind == "chain":  # neighbours correlate by .9
        for i in range(1, cols):
            x[:, i] = 0.9 * x[:, i - 1] + np.sqrt(0.19) * x[:, i]
    if kind == "low rank":
        basis = rng.standard_normal((cols // 8, cols)) / np.sqrt(cols // 8)
        x = rng.standard_normal((count, cols // 8)) @ basis + 0.3 * x
        scale = np.exp(0.5 * rng.standard_normal(cols))
        scale[rng.choice(cols, 4, replace=False)] *= 15
        x = x * scale
    return torch.from_numpy(x).float()


@pytest.mark.parametrize(
    ("kind", "clipped", "most"),
    [("chain", 0.73, 0.2), ("low rank", 0.47, 0.2), ("independent", 0.74, 0.79)],
)
def test_gptq_with_clipping_on_held_out_inputs(kind: str, clipped: float, most: float):
    """Output error over round-to-nearest's: at most a fifth where inputs correlate.

    The reference's ratios are of 512 columns; these 256 come within a tenth of them.
    """
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(6)) * 0.02
    x = inputs(kind)
    fit, held_out = x[:2048].T @ x[:2048] / 2048, x[2048:]
    fmt = Format.parse("int4")

    def error(value: torch.Tensor) -> float:
        return float(((held_out @ (value - weight).T) ** 2).sum())

    nearest = error(round_tensor(weight, fmt, "w").dequantize())
    grid = clipped_grid(weight, fmt, fit.diagonal())
    assert error(grid.values(encode(weight, grid))) <= 1.1 * clipped * nearest
    codes = [gptq_codes(weight, grid, fit, by_use=by_use) for by_use in (True, False)]
    bound = most if most < 0.5 else 1.1 * most
    assert min(error(grid.values(c)) for c in codes) <= bound * nearest


def test_gptq_without_correlation_is_round_to_nearest():
    weight = torch.randn(8, 70, generator=torch.Generator().manual_seed(7))
    grid = clipped_grid(weight, Format.parse("int4"))
    codes = gptq_codes(weight, grid, torch.eye(70), damping=0.0)
    assert torch.equal(codes, encode(weight, grid))


def test_gptq_takes_a_matrix_that_is_not_positive():
    """Fewer tokens than columns, and a column that is never used."""
    weight = torch.randn(8, 70, generator=torch.Generator().manual_seed(8))
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(9))
    x[:, 3] = 0
    grid = clipped_grid(weight, Format.parse("int4"), x.square().mean(0))
    value = grid.values(gptq_codes(weight, grid, x.T @ x))
    assert bool(torch.isfinite(value).all())
    nearest = grid.values(encode(weight, grid))
    assert float(((value - weight) @ x.T).norm()) < float(((nearest - weight) @ x.T).norm())


@pytest.mark.parametrize("kind", ["gaussian", "student", "outliers"])
def test_int2_search_reaches_the_reference_error(kind: str):
    """At most 5 % above an independent search of asymmetric 2-bit groups of 64."""
    percent = {"gaussian": 12.7, "student": 16.8, "outliers": 13.2}[kind]
    x, fmt = synthetic(kind), Format.parse({"format": "int2", "group_size": 64})
    grid = clipped_grid(x, fmt)
    error = ((grid.values(encode(x, grid)) - x) ** 2).sum() / (x**2).sum()
    assert 100 * float(error) <= 1.05 * percent


@pytest.mark.parametrize("value", NARROW, ids=str)
@pytest.mark.parametrize("cols", [1, 33, 64, 130])
def test_narrow_codes_survive_packing(value, cols: int):
    fmt = Format.parse(value)
    x = torch.randn(5, cols, generator=torch.Generator().manual_seed(21))
    grid = clipped_grid(x, fmt)
    codes = encode(x, grid)
    stored = pack_codes(codes, grid, fmt)
    assert stored.parts["packed"].shape[1] % 16 == 0
    assert torch.equal(stored.codes(), codes)
    assert torch.equal(stored.dequantize(), grid.values(codes))


@pytest.mark.parametrize("value", NARROW, ids=str)
@pytest.mark.parametrize("cols", [1, 33, 130])
def test_narrow_products_are_those_of_the_stored_values(value, cols: int):
    """The kernels' int4 layout holds exactly the codes of narrower formats, odd shapes too."""
    fmt = Format.parse(value)
    generator = torch.Generator().manual_seed(22)
    weight, x = (
        torch.randn(37, cols, generator=generator),
        torch.randn(4, cols, generator=generator),
    )
    stored = round_tensor(weight, fmt, "w")
    arranged = ops.arrange(
        stored.parts["packed"],
        stored.parts["scale"],
        stored.parts.get("zero_point"),
        format=fmt.name,
        in_features=cols,
        group_size=fmt.group_size,
    )
    expected = x.double() @ stored.dequantize().double().T
    error = (ops.linear(x, arranged).double() - expected).abs().max()
    assert float(error) < 1e-5 * cols**0.5  # float32 sums


def test_narrow_weights_of_another_width_are_refused():
    with pytest.raises(InvalidArgument, match="expected uint8 with rows of 32 bytes"):
        ops.arrange(
            torch.zeros(2, 16, dtype=torch.uint8),
            torch.ones(2, 2, dtype=torch.float16),
            format="int3",
            in_features=64,
            group_size=32,
        )


@pytest.mark.parametrize("cols", [1, 2, 37])
def test_gptq_factor_is_that_of_the_inverse(cols: int):
    """Uᵀ U is the inverse of the damped Gram matrix, U upper with a positive diagonal."""
    x = torch.randn(3 * cols, cols, dtype=torch.float64)
    gram = (x.T @ x / len(x)).float()
    factor = _upper_factor(gram, 0.01).double()
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(cols).double()
    wanted = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    # float32's half step of what is at most `wanted`'s largest value.
    torch.testing.assert_close(
        factor, wanted, rtol=0, atol=2.0**-24 * 2 * float(wanted.abs().amax())
    )
    assert factor.tril(-1).abs().sum() == 0
