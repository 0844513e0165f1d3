"""The quantized KV cache, fp8 and int8: what is written, and attention over it."""

import dataclasses
from typing import Any

import pytest
import torch
from attention_cases import MIXED, PREFILL, Case, make_case
from compare import HALF_STEP, assert_close, poisoned
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InvalidArgument

from oracle import attention as attention_oracle
from oracle import kv_cache as oracle
from shapes import FLOATS, GENERIC_HEADS, HEADS

CODES = [torch.uint8, torch.int8]
POISON = {torch.uint8: 0x7F, torch.int8: -128}  # the NaN of e4m3, and what quantizing never gives


@dataclasses.dataclass
class CodeCache:
    """One layer of a cache whose blocks carry three: codes, scales, rotary columns of a latent."""

    kv_cache: Tensor
    kv_scale: Tensor
    pe_cache: Tensor | None = None

    @property
    def extra(self) -> dict[str, Tensor]:
        """The keyword arguments beside kv_cache."""
        extra = {"kv_scale": self.kv_scale}
        return extra if self.pe_cache is None else {**extra, "pe_cache": self.pe_cache}

    def clone(self) -> "CodeCache":
        pe = None if self.pe_cache is None else self.pe_cache.clone()
        return CodeCache(self.kv_cache.clone(), self.kv_scale.clone(), pe)


def poisoned_cache(
    num_blocks: int, block_size: int, heads: int, width: int, dtype: torch.dtype, device: Any
) -> CodeCache:
    shape = (num_blocks, 3, 2, block_size, heads, width)
    codes = torch.full(shape, POISON[dtype], dtype=dtype, device=device)
    scale = poisoned(num_blocks, 3, 2, heads, block_size, dtype=torch.float32, device=device)
    return CodeCache(codes[:, 1], scale[:, 1])


def poisoned_latent_cache(
    num_blocks: int, block_size: int, latent: int, rope: int, dtype: torch.dtype,
    pe_dtype: torch.dtype, device: Any,
) -> CodeCache:  # fmt: skip
    shape = (num_blocks, 3, block_size)
    codes = torch.full((*shape, latent), POISON[dtype], dtype=dtype, device=device)
    scale = poisoned(*shape, -(-latent // 128), dtype=torch.float32, device=device)
    pe = poisoned(*shape, rope, dtype=pe_dtype, device=device)
    return CodeCache(codes[:, 1], scale[:, 1], pe[:, 1])


def assert_same_cache(actual: CodeCache, expected: CodeCache) -> None:
    """Bit for bit, what was not written included."""
    assert torch.equal(actual.kv_cache, expected.kv_cache)
    assert torch.equal(actual.kv_scale.nan_to_num(-1), expected.kv_scale.nan_to_num(-1))
    if actual.pe_cache is not None and expected.pe_cache is not None:
        assert torch.equal(actual.pe_cache.nan_to_num(-1), expected.pe_cache.nan_to_num(-1))


def slots_of(count: int, num_slots: int, device: torch.device) -> Tensor:
    slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(5))[:count]
    slots[1::3] = -1  # padding
    return slots.to(device)


def uneven_rows(*shape: int, seed: int = 0) -> Tensor:
    """Random rows whose magnitudes differ a thousandfold, one of zeros: scales must not mix."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10.0 ** (torch.rand(*shape[:-1], 1, generator=generator) * 3 - 2)
    rows = torch.randn(*shape, generator=generator) * magnitude
    if rows.numel():
        rows.view(-1, shape[-1])[-1] = 0.0
    return rows


@pytest.mark.parametrize("code", CODES)
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
    code: torch.dtype,
) -> None:
    cache = poisoned_cache(5, block_size, heads, max(dim_qk, dim_v), code, device)
    expected = cache.clone()
    kv = uneven_rows(tokens, heads, dim_qk + dim_v + 1).to(device, dtype)
    k, v = kv[..., :dim_qk], kv[..., dim_qk : dim_qk + dim_v]
    slots = slots_of(tokens, 5 * block_size, device)
    ops.write_kv(k, v, slots, cache.kv_cache, **cache.extra)
    oracle.write_kv(k, v, slots, expected.kv_cache, **expected.extra)
    assert_same_cache(cache, expected)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-30, 1.0, 448.0, 65504.0, 3e38])
def test_write_kv_of_extreme_magnitudes(
    device: torch.device, value: float, code: torch.dtype
) -> None:
    """Subnormal scales too: the largest element keeps the largest code, or all are zero."""
    k = torch.tensor([value, -value, value / 3, 0.0], device=device).view(1, 1, 4)
    cache = poisoned_cache(1, 16, 1, 4, code, device)
    expected = cache.clone()
    slots = torch.tensor([2], device=device)
    ops.write_kv(k, k, slots, cache.kv_cache, **cache.extra)
    oracle.write_kv(k, k, slots, expected.kv_cache, **expected.extra)
    assert_same_cache(cache, expected)
    read = oracle.dequantize_rows(cache.kv_cache[0, 0, 2], cache.kv_scale[0, 0, :, 2])
    assert read[0, 0].item() == pytest.approx(value, rel=1e-6, abs=1e-42)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_reads_as_nan(
    device: torch.device, bad: float, code: torch.dtype
) -> None:
    k = torch.ones(2, 2, 8, device=device)
    k[1, 0, 5] = bad
    cache = poisoned_cache(1, 16, 2, 8, code, device)
    slots = torch.tensor([0, 1], device=device)
    ops.write_kv(k, torch.ones_like(k), slots, cache.kv_cache, **cache.extra)
    scale = cache.kv_scale[0, :, :, :2]
    assert bool(scale[0, 0, 1].isnan())
    assert int(scale.isnan().sum()) == 1, "other rows are untouched"
    out = ops.attention(
        torch.ones(3, 2, 8, device=device), cache.kv_cache,
        torch.tensor([[0], [0]], device=device).int(), torch.tensor([0, 1, 3], device=device).int(),
        torch.tensor([1, 2], device=device).int(), 1.0, 2, 2, **cache.extra,
    )  # fmt: skip
    assert bool(out[2, 0].isnan().all()), "the query that sees the key"
    assert bool((out[0] == 1).all())
    assert bool((out[2, 1] == 1).all()), "the other head"


@pytest.mark.parametrize("code", CODES)
def test_later_tokens_do_not_change_earlier_ones(device: torch.device, code: torch.dtype) -> None:
    """Into one block: a token a hundred times as large, then one over an old slot."""
    k = uneven_rows(4, 2, 16).to(device)
    cache = poisoned_cache(2, 16, 2, 16, code, device)
    ops.write_kv(k, k, torch.arange(4, device=device), cache.kv_cache, **cache.extra)
    before = cache.clone()
    large = k[:1] * 100 + 1
    ops.write_kv(large, large, torch.tensor([4], device=device), cache.kv_cache, **cache.extra)
    assert torch.equal(cache.kv_cache[0, :, :4], before.kv_cache[0, :, :4])
    assert torch.equal(cache.kv_scale[0, :, :, :4], before.kv_scale[0, :, :, :4])
    ops.write_kv(large, large, torch.tensor([1], device=device), cache.kv_cache, **cache.extra)
    assert torch.equal(cache.kv_scale[0, ..., 1], cache.kv_scale[0, ..., 4]), "no stale scale"
    assert torch.equal(cache.kv_cache[0, :, 1], cache.kv_cache[0, :, 4])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("tokens", "heads", "dims"),
    [
        (0, (2, 1), (8, 8, 8)),
        (1, (12, 2), (128, 128, 128)),
        (7, (5, 1), (6, 11, 7)),
        (3, (1, 3), (0, 5, 9)),
        (40, (4, 2), (64, 192, 128)),
    ],
)
def test_rotary_write_kv_equals_the_two_calls(
    device: torch.device,
    tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int, int],
    dtype: torch.dtype,
    code: torch.dtype,
    interleaved: bool,
) -> None:
    rot_dim, dim_qk, dim_v = dims
    positions = (torch.arange(tokens, device=device) * 37) % 50
    table = torch.randn(50, rot_dim, generator=torch.Generator().manual_seed(3)).to(device)
    packed = uneven_rows(tokens, heads[0] + 2 * heads[1], max(dim_qk, dim_v)).to(device, dtype)
    q, k, v = packed.split_with_sizes((heads[0], heads[1], heads[1]), 1)
    q, k, v = q[..., :dim_qk], k[..., :dim_qk], v[..., :dim_v]
    slots = slots_of(tokens, 80, device)
    joined = poisoned_cache(5, 16, heads[1], max(dims), code, device)
    apart = joined.clone()
    results = []
    for cache in (joined, apart):
        one_q, one_k = q.clone(), k.clone()
        if cache is apart:
            ops.rotary(positions, table, one_q, one_k, interleaved=interleaved)
            ops.write_kv(one_k, v, slots, cache.kv_cache, **cache.extra)
        else:
            ops.rotary_write_kv(
                positions, table, one_q, one_k, v, slots, cache.kv_cache,
                interleaved=interleaved, **cache.extra,
            )  # fmt: skip
        results.append((one_q, one_k))
    assert_same_cache(joined, apart)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("pe_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("tokens", "latent", "rope"), [(0, 512, 64), (1, 512, 64), (19, 512, 64), (5, 24, 8)]
)
def test_write_mla_matches_oracle(
    device: torch.device,
    tokens: int,
    latent: int,
    rope: int,
    dtype: torch.dtype,
    pe_dtype: torch.dtype,
    code: torch.dtype,
) -> None:
    cache = poisoned_latent_cache(4, 16, latent, rope, code, pe_dtype, device)
    expected = cache.clone()
    rows = uneven_rows(tokens, latent + rope + 3).to(device, dtype)
    kv_latent, k_pe = rows[:, :latent], rows[:, latent : latent + rope]
    slots = slots_of(tokens, 64, device)
    ops.write_mla(kv_latent, k_pe, slots, cache.kv_cache, **cache.extra)
    oracle.write_mla(kv_latent, k_pe, slots, expected.kv_cache, **expected.extra)
    assert_same_cache(cache, expected)


def test_write_past_the_cache(device: torch.device) -> None:
    k = torch.ones(2, 1, 4, device=device)
    cache = poisoned_cache(2, 16, 1, 4, torch.int8, device)
    before = cache.clone()
    slots = torch.tensor([3, 32], device=device)
    if device.type == "cpu":
        with pytest.raises(InvalidArgument, match=r"slot_mapping\[1\] is 32; .* 32 slots"):
            ops.write_kv(k, k, slots, cache.kv_cache, **cache.extra)
        assert_same_cache(cache, before)
    else:
        ops.write_kv(k, k, slots, cache.kv_cache, **cache.extra)
        assert int((cache.kv_cache != before.kv_cache).sum()) == 8


def quantized(case: Case, dims: tuple[int, int], code: torch.dtype) -> tuple[CodeCache, Tensor]:
    """The case's cache as codes, rows of uneven magnitude, and what they stand for."""
    num_blocks, _, block_size, heads, width = case.kv_cache.shape
    generator = torch.Generator().manual_seed(9)
    shape = (num_blocks, 2, block_size, heads, 1)
    magnitude = torch.tensor([0.25, 1.0, 2.0])[torch.randint(0, 3, shape, generator=generator)]
    rows = case.kv_cache.double() * magnitude.to(case.q.device)
    cache = poisoned_cache(num_blocks, block_size, heads, width, code, case.q.device)
    read = torch.full_like(rows, float("nan"))
    for part, dim in enumerate(dims):
        codes, scale = oracle.quantize_rows(rows[:, part, ..., :dim], code)
        poison = scale.isnan()[..., None]  # slots that nobody wrote
        cache.kv_cache[:, part, ..., :dim] = torch.where(poison, POISON[code], codes)
        cache.kv_scale[:, part] = scale.transpose(1, 2)
        read[:, part, ..., :dim] = oracle.dequantize_rows(codes, scale)
    return cache, read


def quantized_latent(
    case: Case, latent: int, code: torch.dtype, pe_dtype: torch.dtype
) -> tuple[CodeCache, Tensor]:
    num_blocks, block_size, width = case.kv_cache.shape
    cache = poisoned_latent_cache(
        num_blocks, block_size, latent, width - latent, code, pe_dtype, case.q.device
    )
    magnitude = torch.tensor([0.25, 1.0, 2.0, 0.5, 1.0]).to(case.q.device)
    for group, first in enumerate(range(0, latent, 128)):
        part = case.kv_cache[..., first : min(first + 128, latent)].double() * magnitude[group]
        codes, scale = oracle.quantize_rows(part, code)
        cache.kv_cache[..., first : first + part.shape[-1]] = codes
        cache.kv_scale[..., group] = scale
    assert cache.pe_cache is not None
    cache.pe_cache[:] = case.kv_cache[..., latent:].to(pe_dtype)
    return cache, oracle.dequantize_latent(cache.kv_cache, cache.kv_scale, cache.pe_cache)


def check(case: Case, cache: CodeCache, read: Tensor, dim_v: int, *, mla: bool = False) -> None:
    function = ops.mla_attention if mla else ops.attention
    reference = attention_oracle.mla_attention if mla else attention_oracle.attention
    case = dataclasses.replace(case, kv_cache=cache.kv_cache)
    out = poisoned(*case.q.shape[:2], dim_v, dtype=case.q.dtype, device=case.q.device)
    assert function(*case.args, out=out, **cache.extra) is out
    expected = reference(*dataclasses.replace(case, kv_cache=read).args, head_dim_v=dim_v)
    # As test_attention.py: codes are exact, so the same roundings; values reach twice as far.
    factor = 2.01 if case.q.device.type == "cpu" else 6.0
    bound = {"tolerance": HALF_STEP[case.q.dtype] * factor + 1e-5, "scale": 2.0}
    assert_close(out, expected, **bound)
    assert_close(function(*case.args, head_dim_v=dim_v, **cache.extra), expected, **bound)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_matches_oracle(
    device: torch.device, heads: tuple[int, int, int, int], dtype: torch.dtype, code: torch.dtype
) -> None:
    case = make_case(MIXED, heads, device, dtype=dtype)
    check(case, *quantized(case, heads[2:], code), heads[3])


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("heads", GENERIC_HEADS, ids=str)
def test_attention_generic_head_sizes(
    device: torch.device, heads: tuple[int, int, int, int], code: torch.dtype
) -> None:
    case = make_case(MIXED, heads, device)
    check(case, *quantized(case, heads[2:], code), heads[3])


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("block_size", [16, 24, 32, 128])
def test_attention_block_sizes(device: torch.device, block_size: int, code: torch.dtype) -> None:
    case = make_case(MIXED, (4, 2, 64, 64), device, dtype=torch.bfloat16, block_size=block_size)
    check(case, *quantized(case, (64, 64), code), 64)


@pytest.mark.parametrize("code", CODES)
def test_attention_long_context(device: torch.device, code: torch.dtype) -> None:
    case = make_case([(1, 1500), (3, 1031), (65, 700)], (4, 2, 64, 64), device, dtype=torch.float16)
    check(case, *quantized(case, (64, 64), code), 64)


@pytest.mark.gpu
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "heads",
    [(4, 4, 64, 64), (4, 2, 80, 80), (2, 1, 96, 96), (7, 1, 128, 128), (4, 4, 192, 128),
     (4, 2, 256, 256), (3, 1, 128, 64)],
    ids=str,
)  # fmt: skip
def test_attention_prefill(
    heads: tuple[int, int, int, int], dtype: torch.dtype, code: torch.dtype
) -> None:
    case = make_case(PREFILL, heads, torch.device("cuda"), dtype=dtype)
    check(case, *quantized(case, heads[2:], code), heads[3])


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(1, 1)], [(3, 0)]], ids=str)
def test_attention_smallest_batches(
    device: torch.device, lengths: list[tuple[int, int]], code: torch.dtype
) -> None:
    case = make_case(lengths, (2, 1, 64, 64), device)
    check(case, *quantized(case, (64, 64), code), 64)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num_heads", [1, 4, 16, 20])
def test_mla_attention_matches_oracle(
    device: torch.device, num_heads: int, dtype: torch.dtype, code: torch.dtype
) -> None:
    case = make_case(MIXED, (num_heads, 1, 576, 512), device, dtype=dtype, mla=True)
    pe_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    check(case, *quantized_latent(case, 512, code, pe_dtype), 512, mla=True)


@pytest.mark.parametrize("code", CODES)
def test_mla_attention_of_other_sizes(code: torch.dtype) -> None:
    case = make_case(MIXED, (3, 1, 160, 150), torch.device("cpu"), mla=True)
    check(case, *quantized_latent(case, 150, code, torch.bfloat16), 150, mla=True)


@pytest.mark.gpu
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "block_size"), [(16, 16), (128, 64), (128, 24)])
def test_mla_attention_of_many_rows(
    num_heads: int, block_size: int, dtype: torch.dtype, code: torch.dtype
) -> None:
    decodes = [(1, 1), (1, 64), (0, 0), (2, 2009), (8, 127), (3, 0)]
    for lengths in (decodes, [*decodes, (129, 300), (17, 64)]):
        case = make_case(lengths, (num_heads, 1, 576, 512), torch.device("cuda"), dtype=dtype,
                         block_size=block_size, mla=True)  # fmt: skip
        check(case, *quantized_latent(case, 512, code, dtype), 512, mla=True)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("heads", [(6, 2, 24, 13), (12, 2, 128, 128)], ids=str)
def test_attention_on_each_instruction_set(
    cpu_isa: str, heads: tuple[int, int, int, int], code: torch.dtype
) -> None:
    case = make_case(MIXED, heads, torch.device("cpu"))
    check(case, *quantized(case, heads[2:], code), heads[3])
    case = make_case(MIXED, (3, 1, 160, 150), torch.device("cpu"), mla=True)
    check(case, *quantized_latent(case, 150, code, torch.float16), 150, mla=True)


def test_every_code_is_read_on_each_instruction_set(cpu_isa: str) -> None:
    """One key of each of the 254 finite e4m3 codes: values come back exactly."""
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[codes & 0x7F != 0x7F]
    row = codes[None, None, None, None].expand(1, 2, 1, 1, -1).contiguous()
    out = ops.attention(
        torch.zeros(1, 1, 254), row, torch.zeros(1, 1).int(), torch.tensor([0, 1]).int(),
        torch.ones(1).int(), 1.0, 1, 1, kv_scale=torch.full((1, 2, 1, 1), 0.5),
    )  # fmt: skip
    assert torch.equal(out[0, 0], codes.view(torch.float8_e4m3fn).float() * 0.5)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("mla", [False, True])
def test_attention_rows_are_bit_identical_in_any_batch(
    cpu_isa: str, mla: bool, code: torch.dtype
) -> None:
    heads = (3, 1, 576, 512) if mla else (6, 2, 64, 64)
    function = ops.mla_attention if mla else ops.attention
    length = 200
    case = make_case([(length, length), (4, 77)], heads, torch.device("cpu"), mla=mla)
    if mla:
        cache, _ = quantized_latent(case, 512, code, torch.bfloat16)
    else:
        cache, _ = quantized(case, heads[2:], code)
    case = dataclasses.replace(case, kv_cache=cache.kv_cache)
    whole = function(*case.args, head_dim_v=heads[3], **cache.extra)
    for first, last in [(0, 1), (0, 64), (90, 91), (100, 200)]:
        chunk = function(
            case.q[first:last], case.kv_cache, case.block_tables[:1],
            torch.tensor([0, last - first]).int(), torch.tensor([last]).int(), case.scale,
            last - first, last, head_dim_v=heads[3], **cache.extra,
        )  # fmt: skip
        assert torch.equal(chunk, whole[first:last]), (first, last)


def test_wrong_arguments_raise(device: torch.device) -> None:
    k = torch.zeros(2, 1, 16, device=device)
    slots = torch.zeros(2, dtype=torch.int64, device=device)
    cache = poisoned_cache(2, 16, 1, 16, torch.uint8, device)
    codes, scale = cache.kv_cache, cache.kv_scale
    with pytest.raises(InvalidArgument, match="kv_cache holds uint8 codes and kv_scale is missing"):
        ops.write_kv(k, k, slots, codes)
    with pytest.raises(InvalidArgument, match=r"kv_cache is int32; expected .* uint8 .* or int8"):
        ops.write_kv(k, k, slots, codes.int(), kv_scale=scale)
    with pytest.raises(InvalidArgument, match="kv_scale is given and kv_cache is float32"):
        ops.write_kv(k, k, slots, codes.float(), kv_scale=scale)
    with pytest.raises(InvalidArgument, match="kv_scale is float16; expected float32"):
        ops.write_kv(k, k, slots, codes, kv_scale=scale.half())
    with pytest.raises(InvalidArgument, match="kv_scale has size 15 in dimension 3; expected 16"):
        ops.write_kv(k, k, slots, codes, kv_scale=scale[..., :15])
    case = make_case([(2, 20)], (4, 2, 64, 64), device)
    with pytest.raises(InvalidArgument, match="kv_scale is missing"):
        ops.attention(*dataclasses.replace(case, kv_cache=case.kv_cache.to(torch.int8)).args)
    latent = poisoned_latent_cache(2, 16, 512, 64, torch.int8, torch.bfloat16, device)
    rows = torch.zeros(2, 576, device=device)
    with pytest.raises(InvalidArgument, match="pe_cache is missing and kv_cache is int8"):
        ops.write_mla(rows[:, :512], rows[:, 512:], slots, latent.kv_cache,
                      kv_scale=latent.kv_scale)  # fmt: skip
    with pytest.raises(InvalidArgument, match="kv_scale has size 3 in dimension 2; expected 4"):
        ops.write_mla(rows[:, :512], rows[:, 512:], slots, latent.kv_cache,
                      kv_scale=latent.kv_scale[..., :3], pe_cache=latent.pe_cache)  # fmt: skip


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("lengths", [MIXED, [(0, 0)]], ids=["mixed", "empty"])
def test_opcheck(device: torch.device, lengths: list[tuple[int, int]], code: torch.dtype) -> None:
    tokens = 3 if lengths == MIXED else 0
    slots = torch.tensor([5, -1, 17], device=device)[:tokens]
    k = torch.randn(tokens, 2, 8, device=device)
    codes = torch.zeros(2, 2, 16, 2, 8, dtype=code, device=device)
    scale = torch.zeros(2, 2, 2, 16, device=device)
    fastgpt = torch.ops.fastgpt
    torch.library.opcheck(fastgpt.write_kv.default, (k, k[..., :5], slots, codes, scale))
    positions = torch.tensor([3, 0, 8], device=device)[:tokens]
    table = torch.randn(9, 6, device=device)
    q = torch.randn(tokens, 3, 8, device=device)
    torch.library.opcheck(
        fastgpt.rotary_write_kv.default,
        (positions, table, q, k, k[..., :5].clone(), slots, codes, True, scale),
    )
    torch.library.opcheck(
        fastgpt.write_mla.default,
        (k[:, 0], k[:, 1, :5], slots, codes[:, 0, :, 0].clone(),
         torch.zeros(2, 16, 1, device=device), torch.zeros(2, 16, 5, device=device)),
    )  # fmt: skip
    case = make_case(lengths, (4, 2, 64, 64), device)
    cache, _ = quantized(case, (64, 64), code)
    args = dataclasses.replace(case, kv_cache=cache.kv_cache).args
    out = torch.zeros_like(case.q)
    torch.library.opcheck(fastgpt.attention.default, (*args, out, None, cache.kv_scale))
    case = make_case(lengths, (2, 1, 576, 512), device, mla=True)
    cache, _ = quantized_latent(case, 512, code, torch.bfloat16)
    args = dataclasses.replace(case, kv_cache=cache.kv_cache).args
    out = case.q.new_zeros(*case.q.shape[:2], 512)
    torch.library.opcheck(
        fastgpt.mla_attention.default, (*args, out, None, cache.kv_scale, cache.pe_cache)
    )


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    k = torch.randn(2, 1, 16, device=device)
    slots = torch.tensor([3, 17], device=device)

    def write(codes: Tensor, scale: Tensor) -> Tensor:
        ops.write_kv(k, k * 2, slots, codes, kv_scale=scale)
        return codes.sum() + scale.sum()

    cache = torch.zeros(2, 2, 16, 1, 16, dtype=torch.int8, device=device)
    scale = torch.zeros(2, 2, 1, 16, device=device)
    compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cache.clone(), scale.clone()), write(cache, scale))
