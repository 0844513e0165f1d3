"""fastgpt.ops.attention against plain torch, and its promise of bit-identical rows."""

import pytest
import torch
from attention_cases import MIXED, PREFILL, Case, make_case
from compare import HALF_STEP, assert_close, poisoned
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InvalidArgument

from oracle import attention as oracle
from shapes import FLOATS, GENERIC_HEADS, HEADS


def check(case: Case, dim_v: int, *, mla: bool = False) -> None:
    function, reference = (
        (ops.mla_attention, oracle.mla_attention) if mla else (ops.attention, oracle.attention)
    )
    out = poisoned(
        case.q.shape[0], case.q.shape[1], dim_v, dtype=case.q.dtype, device=case.q.device
    )
    assert function(*case.args, out=out) is out
    expected = reference(*case.args, head_dim_v=dim_v)
    # Scores here reach 10 and are float32 sums over up to 576 columns: an error of 1e-6 times 10
    # moves a probability by 1e-5 of itself. Then one rounding of the result; a CUDA kernel for
    # bfloat16 or float16 rounds the probabilities to that dtype as well.
    factor = 2.01 if case.q.device.type == "cpu" else 6.0
    bound = {"tolerance": HALF_STEP[case.q.dtype] * factor + 1e-5, "scale": 1.0}
    assert_close(out, expected, **bound)
    assert_close(function(*case.args, head_dim_v=dim_v), expected, **bound)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_matches_oracle(
    device: torch.device, heads: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    check(make_case(MIXED, heads, device, dtype=dtype), heads[3])


@pytest.mark.parametrize("heads", GENERIC_HEADS, ids=str)
def test_attention_generic_head_sizes(heads: tuple[int, int, int, int]) -> None:
    check(make_case(MIXED, heads, torch.device("cpu")), heads[3])


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_attention_block_sizes(device: torch.device, block_size: int) -> None:
    check(make_case(MIXED, (4, 2, 64, 64), device, block_size=block_size), 64)


@pytest.mark.parametrize("cache_dtype", FLOATS)
def test_attention_reads_a_cache_of_another_dtype(cache_dtype: torch.dtype) -> None:
    case = make_case(MIXED, (4, 2, 64, 64), torch.device("cpu"), cache_dtype=cache_dtype)
    check(case, 64)


def test_attention_long_context(device: torch.device) -> None:
    lengths = [(1, 1500), (3, 1031), (65, 700)]
    check(make_case(lengths, (4, 2, 64, 64), device), 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "heads",
    [
        (4, 4, 64, 64), (14, 2, 64, 64), (4, 2, 80, 80), (2, 1, 96, 96), (7, 1, 128, 128),
        (16, 2, 128, 128), (2, 2, 128, 128), (4, 4, 192, 128), (4, 2, 256, 256), (3, 1, 128, 64),
    ],
    ids=str,
)  # fmt: skip
def test_attention_prefill(heads: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    block_size = 16 if dtype == torch.float16 else 32
    case = make_case(PREFILL, heads, torch.device("cuda"), dtype=dtype, block_size=block_size)
    check(case, heads[3])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(7, 1, 128, 128), (2, 1, 256, 256)], ids=str)
@pytest.mark.parametrize("block_size", [8, 24, 64, 128, 256])
def test_attention_prefill_block_sizes(heads: tuple[int, int, int, int], block_size: int) -> None:
    """Bulk copies cut blocks of 8 up to any multiple of a tile, but not those of 24."""
    case = make_case(
        PREFILL, heads, torch.device("cuda"), dtype=torch.bfloat16, block_size=block_size
    )
    check(case, heads[3])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "heads",
    [(4, 4, 64, 64), (12, 2, 128, 128), (40, 2, 128, 64), (4, 2, 96, 80), (2, 1, 256, 256)],
    ids=str,
)
@pytest.mark.parametrize("longest", [65, 500, 4100])
def test_attention_decode_of_split_keys(
    heads: tuple[int, int, int, int], longest: int, dtype: torch.dtype
) -> None:
    """Splits that meet in a cluster and those of a second kernel; fewer keys than splits."""
    device = torch.device("cuda")
    batch = [(2, longest), (1, 1), (0, 0), (1, 64), (8, 65), (3, 0), (1, longest // 3)]
    for lengths in ([(1, longest)], batch):
        check(make_case(lengths, heads, device, dtype=dtype), heads[3])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "block_size"), [(16, 16), (20, 64), (128, 128), (128, 24)])
def test_mla_attention_of_many_rows(num_heads: int, block_size: int, dtype: torch.dtype) -> None:
    """Enough rows for 64 a CTA: decodes alone, split and not, then prefill between them."""
    device = torch.device("cuda")
    heads = (num_heads, 1, 576, 512)
    decodes = [(1, 1), (1, 64), (1, 65), (0, 0), (2, 2009), (1, 640), (8, 127), (3, 0)]
    for lengths in (decodes, [*decodes, (129, 300), (9, 9), (17, 64)]):
        case = make_case(lengths, heads, device, dtype=dtype, block_size=block_size, mla=True)
        check(case, 512, mla=True)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(9, 9), (127, 127), (131, 1201), (577, 577), (40, 0)], ids=str)
def test_attention_prefill_of_one_request(lengths: tuple[int, int]) -> None:
    device = torch.device("cuda")
    for heads in [(7, 1, 128, 128), (8, 8, 64, 64)]:
        check(make_case([lengths], heads, device, dtype=torch.bfloat16), heads[3])


@pytest.mark.gpu
def test_attention_captured_prefill_serves_other_lengths() -> None:
    """The launch is fixed by the maxima; lengths are read on the device."""
    heads = (14, 2, 128, 128)
    case = make_case([(150, 700), (150, 150), (150, 300)], heads, torch.device("cuda"),
                     dtype=torch.bfloat16)  # fmt: skip
    out = poisoned(450, 14, 128, dtype=torch.bfloat16, device=case.q.device)
    ops.attention(*case.args, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.attention(*case.args, out=out)
    bound = {"tolerance": HALF_STEP[torch.bfloat16] * 6.0 + 1e-5, "scale": 1.0}
    for lengths in [
        [(150, 700), (150, 150), (150, 300)], [(1, 640), (0, 0), (33, 299)], [(130, 131), (9, 9)]
    ]:  # fmt: skip
        filled = lengths + [(0, 0)] * (3 - len(lengths))
        starts = torch.tensor([0, *(q_len for q_len, _ in filled)]).cumsum(0).int()
        case.cu_seqlens_q.copy_(starts)
        case.seq_lens.copy_(torch.tensor([seq_len for _, seq_len in filled]).int())
        out.fill_(float("nan"))
        graph.replay()
        num_tokens = int(starts[-1])
        assert_close(out[:num_tokens], oracle.attention(*case.args)[:num_tokens], **bound)
        assert bool(out[num_tokens:].isnan().all())


@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(1, 1)], [(3, 0)]], ids=str)
def test_attention_smallest_batches(device: torch.device, lengths: list[tuple[int, int]]) -> None:
    check(make_case(lengths, (2, 1, 64, 64), device), 64)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num_heads", [1, 4, 16])
def test_mla_attention_matches_oracle(
    device: torch.device, num_heads: int, dtype: torch.dtype
) -> None:
    case = make_case(MIXED, (num_heads, 1, 576, 512), device, dtype=dtype, mla=True)
    check(case, 512, mla=True)


def test_attention_writes_only_its_slice(device: torch.device) -> None:
    """q and out may be column slices of wider tensors; rows past the batch stay as they are."""
    case = make_case(MIXED, (4, 2, 64, 64), device)
    rows = case.q.shape[0]
    wide = poisoned(rows + 2, 6, 80, dtype=torch.float32, device=device)
    wide[:rows, 1:5, 8:72] = case.q
    case.q = wide[:, 1:5, 8:72]
    out = poisoned(rows + 2, 6, 80, dtype=torch.float32, device=device)
    ops.attention(*case.args, out=out[:, 1:5, 8:72])
    expected = oracle.attention(*case.args)[:rows]
    assert_close(out[:rows, 1:5, 8:72], expected, tolerance=1e-5, scale=0.3)
    assert int(out.isnan().sum()) == out.numel() - expected.numel()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heads", [(6, 2, 24, 13), (12, 2, 128, 128)], ids=str)
def test_attention_on_each_instruction_set(
    cpu_isa: str, heads: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    check(make_case(MIXED, heads, torch.device("cpu"), dtype=dtype), heads[3])


@pytest.mark.parametrize("mla", [False, True])
def test_attention_rows_are_bit_identical_in_any_batch(cpu_isa: str, mla: bool) -> None:
    """One query row over the same keys: whole prefill, chunks, decode and a larger batch agree."""
    heads = (3, 1, 576, 512) if mla else (6, 2, 64, 64)
    function = ops.mla_attention if mla else ops.attention
    length = 300
    case = make_case([(length, length), (4, 77)], heads, torch.device("cpu"), mla=mla)
    whole = function(*case.args, head_dim_v=heads[3])
    for first, last in [(0, 1), (0, 64), (17, 90), (90, 91), (255, 257), (299, 300), (100, 300)]:
        chunk = function(
            case.q[first:last], case.kv_cache, case.block_tables[:1],
            torch.tensor([0, last - first]).int(), torch.tensor([last]).int(), case.scale,
            last - first, last, head_dim_v=heads[3],
        )  # fmt: skip
        assert torch.equal(chunk, whole[first:last]), (first, last)


def test_attention_sharp_scores_do_not_overflow(device: torch.device) -> None:
    case = make_case([(4, 60)], (2, 1, 64, 64), device)
    case.q *= 1000
    check(case, 64)


def test_wrong_arguments_raise(device: torch.device) -> None:
    case = make_case([(2, 20)], (4, 2, 64, 64), device)

    def attend(**changes: object) -> None:
        ops.attention(*Case(**{**vars(case), **changes}).args)  # type: ignore[arg-type]

    with pytest.raises(InvalidArgument, match="q has 3 heads, not a multiple of the 2"):
        attend(q=case.q[:, :3])
    with pytest.raises(InvalidArgument, match="kv_cache has rows of 60 elements"):
        attend(kv_cache=case.kv_cache[..., :60])
    with pytest.raises(InvalidArgument, match="seq_lens is int64; expected int32"):
        attend(seq_lens=case.seq_lens.long())
    with pytest.raises(InvalidArgument, match="cu_seqlens_q has size 1"):
        attend(cu_seqlens_q=case.cu_seqlens_q[:1])


def test_lengths_that_do_not_fit_raise() -> None:
    case = make_case([(2, 20)], (4, 2, 64, 64), torch.device("cpu"))

    def attend(**changes: object) -> None:
        ops.attention(*Case(**{**vars(case), **changes}).args)  # type: ignore[arg-type]

    with pytest.raises(InvalidArgument, match=r"seq_lens\[0\] is 1; the request has 2 queries"):
        attend(seq_lens=torch.tensor([1]).int())
    with pytest.raises(InvalidArgument, match="max_seq_len is 19"):
        attend(max_seq_len=19)
    with pytest.raises(InvalidArgument, match="max_seqlen_q is 1"):
        attend(max_seqlen_q=1)
    with pytest.raises(InvalidArgument, match="block_tables holds 1 blocks of 16"):
        attend(block_tables=case.block_tables[:, :1])
    with pytest.raises(InvalidArgument, match=r"block_tables\[0\]\[1\] is 99; the cache has 4"):
        attend(block_tables=torch.tensor([[0, 99]]).int())
    with pytest.raises(InvalidArgument, match=r"cu_seqlens_q\[1\] is 3; expected 0 to 2"):
        attend(cu_seqlens_q=torch.tensor([0, 3]).int())


def test_workspace_bytes() -> None:
    assert ops.attention_workspace_bytes(32, 28, 128, 4096, "cpu") == 0
    with pytest.raises(ValueError, match="expected 0 or more"):
        ops.attention_workspace_bytes(-1, 28, 128, 4096, "cpu")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lengths", [MIXED, [(0, 0)]], ids=["mixed", "empty"])
@pytest.mark.parametrize("with_workspace", [False, True])
def test_opcheck(
    device: torch.device, lengths: list[tuple[int, int]], dtype: torch.dtype, with_workspace: bool
) -> None:
    workspace = torch.zeros(1 << 20, dtype=torch.uint8, device=device) if with_workspace else None
    case = make_case(lengths, (4, 2, 64, 64), device, dtype=dtype)
    out = torch.zeros_like(case.q)
    torch.library.opcheck(torch.ops.fastgpt.attention.default, (*case.args, out, workspace))
    case = make_case(lengths, (2, 1, 576, 512), device, dtype=dtype, mla=True)
    out = case.q.new_zeros(*case.q.shape[:2], 512)
    torch.library.opcheck(torch.ops.fastgpt.mla_attention.default, (*case.args, out, workspace))


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    case = make_case(MIXED, (4, 2, 64, 64), device)

    def attend(q: Tensor) -> Tensor:
        return ops.attention(q * 2, *case.args[1:]) + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.q), attend(case.q))
