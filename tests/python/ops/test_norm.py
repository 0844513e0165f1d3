"""fastgpt.ops.norm against plain torch."""

import pytest
import torch
from compare import HALF_STEP, assert_close, poisoned
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InvalidArgument

from oracle import norm as oracle
from shapes import FLOATS, HIDDEN, ROWS

EPS = 1e-6


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def tolerance(dtype: torch.dtype) -> float:
    """One step of dtype, as near a tie the two sides round apart, plus float32 arithmetic."""
    return HALF_STEP[dtype] * 2.01 + 2e-6


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm_matches_oracle(
    device: torch.device, rows: int, hidden: int, dtype: torch.dtype
) -> None:
    x = random(rows, hidden, dtype=dtype, device=device)
    weight = random(hidden, dtype=torch.float32, device=device, seed=1)
    out = poisoned(rows, hidden, dtype=dtype, device=device)
    assert ops.rms_norm(x, weight, EPS, out=out) is out
    assert_close(out, oracle.rms_norm(x, weight, EPS), tolerance=tolerance(dtype), scale=1e-2)


@pytest.mark.parametrize("weight_dtype", [*FLOATS, None])
def test_rms_norm_of_heads_reads_strided_rows(
    device: torch.device, weight_dtype: torch.dtype | None
) -> None:
    qkv = random(5, 8, 24, dtype=torch.bfloat16, device=device)
    x = qkv[:, 2:5, :20]
    weight = None if weight_dtype is None else random(20, dtype=weight_dtype, device=device)
    out = poisoned(5, 6, 24, dtype=torch.bfloat16, device=device)
    ops.rms_norm(x, weight, EPS, out=out[:, 1:4, :20])
    expected = oracle.rms_norm(x, weight, EPS)
    assert_close(out[:, 1:4, :20], expected, tolerance=tolerance(torch.bfloat16), scale=1e-2)
    assert int(out.isnan().sum()) == out.numel() - expected.numel(), "wrote outside its slice"
    assert torch.equal(ops.rms_norm(x, weight, EPS), out[:, 1:4, :20])


@pytest.mark.parametrize("residual_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "hidden"), [(0, 8), (1, 1), (3, 17), (7, 1536)])
def test_add_rms_norm_matches_oracle(
    device: torch.device, rows: int, hidden: int, dtype: torch.dtype, residual_dtype: torch.dtype
) -> None:
    x = random(rows, hidden, dtype=dtype, device=device)
    residual = random(rows, hidden, dtype=residual_dtype, device=device, seed=1)
    weight = random(hidden, dtype=dtype, device=device, seed=2)
    expected_residual = residual.clone()
    expected = oracle.add_rms_norm(x, expected_residual, weight, EPS)
    out = poisoned(rows, hidden, dtype=dtype, device=device)
    ops.add_rms_norm(x, residual, weight, EPS, out=out)
    assert torch.equal(residual, expected_residual)
    assert_close(out, expected, tolerance=tolerance(dtype), scale=1e-2)


def test_add_rms_norm_may_overwrite_x(device: torch.device) -> None:
    x = random(4, 64, dtype=torch.float32, device=device)
    residual = random(4, 64, dtype=torch.float32, device=device, seed=1)
    expected = oracle.add_rms_norm(x, residual.clone(), None, EPS)
    ops.add_rms_norm(x, residual, None, EPS, out=x)
    assert_close(x, expected, tolerance=tolerance(torch.float32))


def cos_sin_table(positions: int, rot_dim: int, device: torch.device) -> Tensor:
    inverse = 10000.0 ** (-torch.arange(0, rot_dim, 2, dtype=torch.float64) / max(rot_dim, 1))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * inverse
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "rot_dim"),
    [(0, 2, 1, 8, 8), (1, 1, 1, 2, 2), (5, 4, 2, 64, 64), (7, 3, 0, 80, 38), (33, 12, 2, 128, 128)],
)
def test_rotary_matches_oracle(
    device: torch.device,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rot_dim: int,
    dtype: torch.dtype,
    interleaved: bool,
) -> None:
    table = cos_sin_table(100, rot_dim, device)
    positions = (torch.arange(tokens, device=device) * 37) % 100
    q = random(tokens, heads, head_dim, dtype=dtype, device=device)
    k = random(tokens, kv_heads, head_dim, dtype=dtype, device=device, seed=1) if kv_heads else None
    expected_q, expected_k = q.clone(), None if k is None else k.clone()
    oracle.rotary(positions, table, expected_q, expected_k, interleaved=interleaved)
    ops.rotary(positions, table, q, k, interleaved=interleaved)
    # A difference of products cancels: the float32 error is relative to the inputs.
    bound = {"tolerance": tolerance(dtype), "scale": 0.1}
    assert_close(q, expected_q, **bound)
    if k is not None:
        assert_close(k, expected_k, **bound)


def test_rotary_of_a_slice_leaves_the_rest(device: torch.device) -> None:
    """MLA rotates the last 64 columns of a query head."""
    q = random(3, 2, 192, dtype=torch.float32, device=device)
    before = q.clone()
    positions = torch.tensor([3, 0, 99], device=device)
    table = cos_sin_table(100, 64, device)
    ops.rotary(positions, table, q[..., 128:], interleaved=True)
    assert torch.equal(q[..., :128], before[..., :128])
    oracle.rotary(positions, table, before[..., 128:], interleaved=True)
    assert_close(q, before, tolerance=1e-6, scale=0.1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 1), (2, 7), (3, 129), (5, 8960)])
def test_silu_mul_matches_oracle(
    device: torch.device, rows: int, width: int, dtype: torch.dtype
) -> None:
    x = random(rows, 2 * width, dtype=dtype, device=device) * 4
    out = poisoned(rows, width + 3, dtype=dtype, device=device)
    ops.silu_mul(x, out=out[:, :width])
    assert_close(out[:, :width], oracle.silu_mul(x), tolerance=tolerance(dtype), scale=1e-2)
    assert bool(out[:, width:].isnan().all())


def test_silu_mul_at_the_ends_of_the_range(device: torch.device) -> None:
    gates = [-float("inf"), -1e4, -200.0, -90.0, -88.0, 0.0, 88.0, 1e4, float("inf"), float("nan")]
    gate = torch.tensor([gates], device=device)
    out = ops.silu_mul(torch.cat([gate, torch.ones_like(gate)], dim=-1))
    expected = torch.nn.functional.silu(gate.double())
    expected[0, 0] = out[0, 0].double()  # 0 or NaN: -inf * 0
    # Below -87 silu is under 1e-36: a kernel may return 0 or what its clamped exponent gives.
    assert_close(out, expected.float(), tolerance=1e-5, scale=1e-28)


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "hidden"), [(0, 8), (1, 1), (5, 33), (64, 1536)])
def test_embedding_matches_oracle(
    device: torch.device, tokens: int, hidden: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    weight = random(50, hidden + 2, dtype=dtype, device=device)[:, :hidden]
    ids = (torch.arange(tokens, device=device) * 17) % 50
    out = poisoned(tokens, hidden, dtype=out_dtype, device=device)
    ops.embedding(ids, weight, out=out)
    expected = oracle.embedding(ids, weight, dtype=out_dtype)
    assert torch.equal(out, expected)
    assert torch.equal(ops.embedding(ids, weight, dtype=out_dtype), expected)


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_embedding_of_an_unknown_id(device: torch.device, bad: int) -> None:
    weight = random(50, 8, dtype=torch.float32, device=device)
    ids = torch.tensor([3, bad], device=device)
    if device.type == "cpu":
        with pytest.raises(InvalidArgument, match=rf"ids\[1\] is {bad}; .* 50 tokens"):
            ops.embedding(ids, weight)
    else:
        out = ops.embedding(ids, weight)
        assert torch.equal(out[0], weight[3])
        assert bool(out[1].isnan().all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [5, 67, 256])
def test_on_each_instruction_set(cpu_isa: str, width: int, dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    x = random(3, 2 * width, dtype=dtype, device=cpu)
    residual = random(3, 2 * width, dtype=torch.float32, device=cpu, seed=1)
    bound = {"tolerance": tolerance(dtype), "scale": 0.1}
    assert_close(ops.rms_norm(x, x[0], EPS), oracle.rms_norm(x, x[0], EPS), **bound)
    assert_close(ops.silu_mul(x), oracle.silu_mul(x), **bound)
    expected = oracle.add_rms_norm(x, residual.clone(), x[1], EPS)
    assert_close(ops.add_rms_norm(x, residual.clone(), x[1], EPS), expected, **bound)
    table, positions = cos_sin_table(50, 2 * width, cpu), torch.tensor([0, 7, 49])
    for interleaved in (False, True):
        actual, expected = x[:, None].clone(), x[:, None].clone()
        ops.rotary(positions, table, actual, interleaved=interleaved)
        oracle.rotary(positions, table, expected, interleaved=interleaved)
        assert_close(actual, expected, **bound)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_rows_do_not_depend_on_the_batch(device: torch.device, rows: int) -> None:
    x = random(40, 2 * 1536, dtype=torch.float32, device=device)
    weight = random(3072, dtype=torch.float32, device=device)
    assert torch.equal(ops.rms_norm(x[:rows], weight, EPS), ops.rms_norm(x, weight, EPS)[:rows])
    assert torch.equal(ops.silu_mul(x[:rows]), ops.silu_mul(x)[:rows])


def test_wrong_arguments_raise(device: torch.device) -> None:
    x = torch.zeros(2, 8, device=device)
    heads = torch.zeros(2, 1, 8, device=device)
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(InvalidArgument, match="weight has 7 elements"):
        ops.rms_norm(x, x[0, :7], EPS)
    with pytest.raises(InvalidArgument, match="eps is -1"):
        ops.rms_norm(x, None, -1.0)
    with pytest.raises(InvalidArgument, match="x has stride 8 in its last dimension"):
        ops.rms_norm(x.t(), None, EPS)
    with pytest.raises(InvalidArgument, match="out is float16, x is float32"):
        ops.rms_norm(x, None, EPS, out=x.half())
    with pytest.raises(InvalidArgument, match="residual has size 3 in dimension 0; expected 2"):
        ops.add_rms_norm(x, torch.zeros(3, 8, device=device), None, EPS)
    with pytest.raises(InvalidArgument, match="cos_sin has 7 columns; expected an even"):
        ops.rotary(ids, torch.zeros(9, 7, device=device), heads)
    with pytest.raises(InvalidArgument, match="q has head size 8; cos_sin rotates 10"):
        ops.rotary(ids, torch.zeros(9, 10, device=device), heads)
    with pytest.raises(InvalidArgument, match="positions is int32; expected int64"):
        ops.rotary(ids.int(), torch.zeros(9, 8, device=device), heads)
    with pytest.raises(InvalidArgument, match="x has 7 columns"):
        ops.silu_mul(x[:, :7])
    with pytest.raises(InvalidArgument, match="ids is int32"):
        ops.embedding(ids.int(), x)


def test_rotary_position_out_of_range_raises() -> None:
    q = torch.zeros(2, 1, 8)
    with pytest.raises(InvalidArgument, match=r"positions\[1\] is 9; cos_sin covers 0 to 8"):
        ops.rotary(torch.tensor([0, 9]), torch.zeros(9, 8), q)


def opcheck_cases(device: torch.device) -> list[tuple[str, tuple[object, ...]]]:
    x = random(4, 16, dtype=torch.bfloat16, device=device)
    wide = random(4, 40, dtype=torch.float16, device=device)
    weight = random(16, dtype=torch.float32, device=device)
    heads = random(4, 3, 16, dtype=torch.float32, device=device)
    table = cos_sin_table(9, 8, device)
    ids = torch.tensor([0, 3, 3, 8], device=device)
    none = ids[:0]
    return [
        ("rms_norm", (x, weight, EPS, torch.empty_like(x))),
        ("rms_norm", (x[:0], None, EPS, torch.empty_like(x[:0]))),
        ("rms_norm", (wide[:, 3:19], None, EPS, torch.empty_like(wide[:, 3:19]))),
        ("add_rms_norm", (x, x.float(), weight, EPS, torch.empty_like(x))),
        ("add_rms_norm", (wide[:, :16], wide[:, 20:36].clone(), None, EPS, wide.new_empty(4, 16))),
        ("rotary", (ids, table, heads, heads[:, :1].clone(), False)),
        ("rotary", (none, table, heads[:0], None, True)),
        ("rotary", (ids, table, heads.clone()[..., 4:], None, True)),
        ("silu_mul", (x, x.new_empty(4, 8))),
        ("silu_mul", (wide[:, 5:25], wide.new_empty(4, 10))),
        ("silu_mul", (x[:0], x.new_empty(0, 8))),
        ("embedding", (ids, random(9, 5, dtype=torch.float16, device=device), x.new_empty(4, 5))),
        ("embedding", (none, weight[None], weight.new_empty(0, 16))),
    ]


@pytest.mark.parametrize("case", range(13))
def test_opcheck(device: torch.device, case: int) -> None:
    name, args = opcheck_cases(device)[case]
    torch.library.opcheck(getattr(torch.ops.fastgpt, name).default, args)


def test_ops_compile_without_graph_breaks(device: torch.device) -> None:
    table = cos_sin_table(9, 16, device)
    weight = random(16, dtype=torch.float32, device=device)
    positions = torch.tensor([1, 2, 8], device=device)

    def chain(ids: Tensor, residual: Tensor) -> Tensor:
        x = ops.embedding(ids, weight.repeat(9, 1))
        x = ops.add_rms_norm(x, residual, weight, EPS)
        heads = x.view(3, 1, 16).clone()
        ops.rotary(positions, table, heads)
        return ops.silu_mul(ops.rms_norm(heads, None, EPS).view(3, 16))

    ids = torch.tensor([0, 5, 8], device=device)
    residual = random(3, 16, dtype=torch.float32, device=device)
    compiled_residual = residual.clone()
    expected = chain(ids, residual)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, compiled_residual), expected)
    assert torch.equal(compiled_residual, residual)
