"""Exact changes of weights: orthogonal to 1e-6, and in float64 the same function to 1e-12."""

import pytest
import torch

from fastgpt.models.spec import ValueHeads
from fastgpt.quant.input_stats import InputStats
from fastgpt.quant.layerwise import _rows_divided, _rows_rotated
from fastgpt.quant.rounding import binary_residual, round_tensor
from fastgpt.quant.transforms import (
    column_scale,
    hadamard,
    reading_heads,
    rotated,
    scaled,
    value_rows,
)
from fastgpt.scheme import Format


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 8, 64, 128, 256])
def test_hadamard_is_orthogonal_and_symmetric(size: int):
    matrix = hadamard(size)
    assert matrix is not None
    assert float((matrix @ matrix.T - torch.eye(size)).abs().max()) < 1e-6
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("size", [0, 1, 3, 96])
def test_hadamard_of_other_sizes_is_none(size: int):
    assert hadamard(size) is None


def heads_output(
    writer: torch.Tensor, reader: torch.Tensor, heads: ValueHeads, x: torch.Tensor
) -> torch.Tensor:
    """Return what o_proj makes of values that attention has mixed over tokens."""
    rows = value_rows(heads, writer.shape[0], x.device)
    values = (x @ writer.T)[:, rows]  # [tokens, num_kv_heads, head_dim]
    mixed = torch.einsum("st,tkd->skd", random(len(x), len(x), seed=9).softmax(-1), values)
    repeated = mixed.repeat_interleave(heads.num_heads // heads.num_kv_heads, 1)
    return repeated.flatten(1) @ reader.T


HEADS = [
    ValueHeads(module="v_proj", num_heads=6, num_kv_heads=3, head_dim=16, first_row=0),
    # As in MLA's kv_b_proj: four rows of keys come before the values of each head.
    ValueHeads(module="kv_b_proj", num_heads=3, num_kv_heads=3, head_dim=16, first_row=4),
]


@pytest.mark.parametrize("heads", HEADS, ids=lambda h: h.module)
@pytest.mark.parametrize("kind", ["scaled", "rotated"])
def test_values_and_readers_change_together(heads: ValueHeads, kind: str):
    rows = heads.num_kv_heads * (heads.head_dim + heads.first_row)
    writer, x = random(rows, 20, seed=1), random(7, 20, seed=2)
    reader = random(11, heads.num_heads * heads.head_dim, seed=3)
    where = value_rows(heads, rows, x.device)
    before = heads_output(writer, reader, heads, x)
    if kind == "scaled":
        scale = random(heads.num_kv_heads, heads.head_dim, seed=4).exp()
        writer_after = _rows_divided(writer, where, scale)
        reader_after = reader * reading_heads(heads, scale)
    else:
        rotation = hadamard(heads.head_dim)
        assert rotation is not None
        rotation = rotation.double()
        writer_after = _rows_rotated(writer, where, rotation)
        reader_after = (reader.unflatten(1, (-1, heads.head_dim)) @ rotation).flatten(1)
    after = heads_output(writer_after, reader_after, heads, x)
    assert float((after - before).abs().max()) < 1e-12
    assert not torch.allclose(writer_after, writer)


def test_binary_gain_times_its_residual_is_the_gain():
    gain = random(300, seed=5).exp()
    stored = round_tensor(gain.float(), Format.parse("binary"), "gain")
    residual = binary_residual(gain, stored)
    assert residual.dtype == torch.float64
    weight, x = random(9, 300, seed=6), random(4, 300, seed=7)
    before = (x * gain) @ weight.T
    after = (x * stored.dequantize().double()) @ (weight * residual).T
    assert float((after - before).abs().max()) < 1e-12 * float(before.abs().max())


def stats_of(x: torch.Tensor, *, full: bool = True) -> InputStats:
    stats = InputStats.empty(x.shape[1], x.device, full=full)
    stats.add(x.float(), held_out=False)
    stats.add(x.float(), held_out=True)
    return stats


@pytest.mark.parametrize("full", [True, False])
def test_statistics_follow_the_inputs(full: bool):
    x, scale = random(40, 32, seed=8), random(32, seed=9).exp().float()
    got = scaled(stats_of(x, full=full), scale).gram()
    torch.testing.assert_close(got, stats_of(x / scale, full=full).gram(), rtol=1e-4, atol=1e-4)
    if full:
        rotation = hadamard(16)
        assert rotation is not None
        turned = (x.float().unflatten(1, (-1, 16)) @ rotation).flatten(1)
        got = rotated(stats_of(x), rotation).gram()
        torch.testing.assert_close(got, stats_of(turned).gram(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_column_scale_undoes_a_scaling_of_its_weights(alpha: float):
    """Writer and readers scaled against each other come out the same."""
    weight, x = random(24, 16, seed=10).float(), random(200, 16, seed=11)
    factor = torch.where(torch.arange(16) % 5 == 0, 32.0, 1.0)
    results = []
    for w, inputs in ((weight, x), (weight / factor, x * factor)):
        scale = column_scale([w], stats_of(inputs).gram(), alpha)
        assert float(scale.log().mean().abs()) < 1e-5
        ratio = w * scale
        results.append(ratio / ratio.norm())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
