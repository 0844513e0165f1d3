"""fastgpt.ops.kv_cache against plain torch."""

import pytest
import torch
from compare import HALF_STEP, assert_close, poisoned
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InvalidArgument

from oracle import kv_cache as oracle
from shapes import FLOATS


def same(actual: Tensor, expected: Tensor) -> bool:
    """Equal, NaN included: what was not written stays poisoned."""
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(
        actual.nan_to_num(), expected.nan_to_num()
    )


def slots_of(count: int, num_slots: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    slots = torch.randperm(num_slots, generator=generator)[:count]
    slots[1::3] = -1  # padding
    return slots.to(device)


@pytest.mark.parametrize("cache_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("tokens", "heads", "dim_qk", "dim_v", "block_size"),
    [(0, 1, 8, 8, 16), (1, 1, 1, 1, 16), (7, 3, 24, 13, 16), (40, 2, 192, 128, 128)],
)
def test_write_kv_matches_oracle(
    device: torch.device,
    tokens: int,
    heads: int,
    dim_qk: int,
    dim_v: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> None:
    """Into one layer of a cache whose blocks carry three."""
    torch.manual_seed(0)
    layers = poisoned(
        5, 3, 2, block_size, heads, max(dim_qk, dim_v), dtype=cache_dtype, device=device
    )
    expected = layers.clone()
    qkv = torch.randn(tokens, heads, dim_qk + dim_v + 1, device=device).to(dtype)
    k, v = qkv[..., :dim_qk], qkv[..., dim_qk : dim_qk + dim_v]
    slots = slots_of(tokens, 5 * block_size, device)
    ops.write_kv(k, v, slots, layers[:, 1])
    oracle.write_kv(k, v, slots, expected[:, 1])
    assert same(layers, expected)


def rotary_inputs(
    tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Positions, table, and q, k, v as slices of one projection; dims: rotary, qk, v."""
    generator = torch.Generator().manual_seed(3)
    rot_dim, dim_qk, dim_v = dims
    positions = (torch.arange(tokens, device=device) * 37) % 50
    table = torch.randn(50, rot_dim, generator=generator).to(device)
    packed = torch.randn(tokens, heads[0] + 2 * heads[1], max(dim_qk, dim_v), generator=generator)
    q, k, v = packed.to(device, dtype).split_with_sizes((heads[0], heads[1], heads[1]), 1)
    return positions, table, q[..., :dim_qk], k[..., :dim_qk], v[..., :dim_v]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cache_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("tokens", "heads", "dims"),
    [
        (0, (2, 1), (8, 8, 8)),
        (1, (12, 2), (128, 128, 128)),  # r1-qwen-1.5b
        (7, (5, 1), (6, 11, 7)),  # a part of the head turns
        (3, (1, 3), (0, 5, 9)),  # nothing turns
        (40, (4, 2), (64, 192, 128)),
    ],
)
def test_rotary_write_kv_equals_the_two_calls(
    device: torch.device,
    tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int, int],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    interleaved: bool,
) -> None:
    """Bit for bit, and near the oracle."""
    positions, table, q, k, v = rotary_inputs(tokens, heads, dims, dtype, device)
    slots = slots_of(tokens, 5 * 16, device)
    cache = poisoned(5, 3, 2, 16, heads[1], max(dims), dtype=cache_dtype, device=device)
    results = []
    for run in ("joined", "apart", "oracle"):
        one_q, one_k, one_cache = q.clone(), k.clone(), cache.clone()
        if run == "apart":
            ops.rotary(positions, table, one_q, one_k, interleaved=interleaved)
            ops.write_kv(one_k, v, slots, one_cache[:, 1])
        else:
            call = ops.rotary_write_kv if run == "joined" else oracle.rotary_write_kv
            call(positions, table, one_q, one_k, v, slots, one_cache[:, 1], interleaved=interleaved)
        results.append((one_q, one_k, one_cache))
    for joined, apart, expected in zip(*results, strict=True):
        assert same(joined, apart)
        # A difference of products cancels, so the error is relative to the inputs; the cache may
        # round what was rounded before.
        step = HALF_STEP[dtype] + HALF_STEP[cache_dtype]
        assert_close(joined, expected, tolerance=step * 2.01 + 2e-6, scale=4.0)


def test_rotary_write_kv_outside_its_bounds(device: torch.device) -> None:
    positions, table, q, k, v = rotary_inputs(2, (1, 1), (8, 8, 8), torch.float32, device)
    cache = torch.zeros(2, 2, 16, 1, 8, device=device)
    slots = torch.tensor([3, 32], device=device)
    bad = torch.tensor([0, 50], device=device)
    before = q.clone(), k.clone()
    if device.type == "cpu":
        with pytest.raises(InvalidArgument, match=r"slot_mapping\[1\] is 32; .* 32 slots"):
            ops.rotary_write_kv(positions, table, q, k, v, slots, cache)
        with pytest.raises(InvalidArgument, match=r"positions\[1\] is 50; cos_sin covers 0 to 49"):
            ops.rotary_write_kv(bad, table, q, k, v, slots[:1].repeat(2), cache)
        assert torch.equal(q, before[0]), "changed before the check"
        assert torch.equal(k, before[1]), "changed before the check"
        assert not cache.any()
    else:
        ops.rotary_write_kv(bad, table, q, k, v, slots, cache)
        assert int(cache.count_nonzero()) == 16
        assert bool(q[1].isnan().all())
        assert not q[0].isnan().any()


@pytest.mark.parametrize("cache_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_write_mla_matches_oracle(
    device: torch.device, tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layers = poisoned(4, 2, 16, 576, dtype=cache_dtype, device=device)
    expected = layers.clone()
    latent_and_pe = torch.randn(tokens, 600, device=device).to(dtype)
    latent, pe = latent_and_pe[:, :512], latent_and_pe[:, 512:576]
    slots = slots_of(tokens, 64, device)
    ops.write_mla(latent, pe, slots, layers[:, 1])
    oracle.write_mla(latent, pe, slots, expected[:, 1])
    assert same(layers, expected)


def test_write_past_the_cache(device: torch.device) -> None:
    k = torch.ones(2, 1, 4, device=device)
    cache = torch.zeros(2, 2, 16, 1, 4, device=device)
    slots = torch.tensor([3, 32], device=device)
    if device.type == "cpu":
        with pytest.raises(InvalidArgument, match=r"slot_mapping\[1\] is 32; .* 32 slots"):
            ops.write_kv(k, k, slots, cache)
        assert not cache.any(), "nothing is written before the check"
        with pytest.raises(InvalidArgument, match="has 32 slots"):
            ops.write_mla(k[:, 0], k[:, 0], slots, torch.zeros(2, 16, 8))
    else:
        ops.write_kv(k, k, slots, cache)
        assert int(cache.count_nonzero()) == 8


def test_wrong_arguments_raise(device: torch.device) -> None:
    k = torch.zeros(2, 1, 4, device=device)
    cache = torch.zeros(2, 2, 16, 1, 4, device=device)
    slots = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(InvalidArgument, match="v is float16, k is float32"):
        ops.write_kv(k, k.half(), slots, cache)
    with pytest.raises(InvalidArgument, match="slot_mapping has size 1"):
        ops.write_kv(k, k, slots[:1], cache)
    with pytest.raises(InvalidArgument, match="kv_cache has rows of 3 elements; k has head size 4"):
        ops.write_kv(k, k, slots, cache[..., :3])
    with pytest.raises(InvalidArgument, match="kv_cache has size 8 in dimension 2; expected 7"):
        ops.write_mla(k[:, 0], k[:, 0, :3], slots, torch.zeros(2, 16, 8, device=device))
    table = torch.zeros(4, 6, device=device)
    with pytest.raises(InvalidArgument, match="q has head size 4; cos_sin rotates 6 columns"):
        ops.rotary_write_kv(slots, table, k.clone(), k, k, slots, cache)
    with pytest.raises(InvalidArgument, match="v is float16, k is float32"):
        ops.rotary_write_kv(slots, table[:, :4], k.clone(), k, k.half(), slots, cache)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [0, 3])
def test_opcheck(device: torch.device, tokens: int, dtype: torch.dtype) -> None:
    slots = torch.tensor([5, -1, 17], device=device)[:tokens]
    k = torch.randn(tokens, 2, 8, device=device).to(dtype)
    cache = torch.zeros(2, 3, 2, 16, 2, 8, device=device)[:, 1]
    torch.library.opcheck(torch.ops.fastgpt.write_kv.default, (k, k[..., :5], slots, cache))
    positions = torch.tensor([3, 0, 8], device=device)[:tokens]
    table = torch.randn(9, 6, device=device)
    q = torch.randn(tokens, 3, 8, device=device).to(dtype)
    torch.library.opcheck(
        torch.ops.fastgpt.rotary_write_kv.default,
        (positions, table, q, k, k[..., :5].clone(), slots, cache, True),
    )
    latent = torch.zeros(3, 16, 13, device=device, dtype=dtype)
    torch.library.opcheck(
        torch.ops.fastgpt.write_mla.default, (k[:, 0], k[:, 1, :5], slots, latent)
    )


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    k = torch.randn(2, 1, 4, device=device)
    slots = torch.tensor([3, 17], device=device)

    def write(cache: Tensor) -> Tensor:
        ops.write_kv(k, k * 2, slots, cache)
        return cache.sum()

    cache = torch.zeros(2, 2, 16, 1, 4, device=device)
    compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cache.clone()), write(cache))
