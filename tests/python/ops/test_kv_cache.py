"""fastgpt.ops.kv_cache against plain torch."""

import pytest
import torch
from compare import poisoned
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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [0, 3])
def test_opcheck(device: torch.device, tokens: int, dtype: torch.dtype) -> None:
    slots = torch.tensor([5, -1, 17], device=device)[:tokens]
    k = torch.randn(tokens, 2, 8, device=device).to(dtype)
    cache = torch.zeros(2, 3, 2, 16, 2, 8, device=device)[:, 1]
    torch.library.opcheck(torch.ops.fastgpt.write_kv.default, (k, k[..., :5], slots, cache))
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
