"""fastgpt.ops.moe against plain torch."""

import pytest
import torch
from compare import HALF_STEP, assert_close, poisoned
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InvalidArgument

from oracle import moe as oracle
from shapes import FLOATS

# num_experts, top_k, num_groups, topk_groups: tiny, prime, V2-Lite, V2, V3.
LAYERS = [(1, 1, 1, 1), (7, 3, 1, 1), (64, 6, 1, 1), (160, 6, 8, 3), (256, 8, 8, 4)]


def random_logits(tokens: int, experts: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    return torch.randn(tokens, experts, generator=generator).to(device)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_moe_route_matches_oracle(
    device: torch.device,
    tokens: int,
    layer: tuple[int, int, int, int],
    scoring: str,
    with_bias: bool,
    renormalize: bool,
) -> None:
    experts, top_k, num_groups, topk_groups = layer
    logits = random_logits(tokens, experts, device)
    bias = random_logits(1, experts, device)[0] * 0.1 if with_bias else None
    settings = {
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "scoring": scoring,
        "renormalize": renormalize,
        "scaling": 2.5,
    }
    ids = poisoned(tokens, top_k, dtype=torch.int32, device=device)
    weights = poisoned(tokens, top_k, dtype=torch.float32, device=device)
    ops.moe_route(logits, bias, top_k, **settings, expert_ids=ids, weights=weights)
    expected_ids, expected_weights = oracle.moe_route(logits, bias, top_k, **settings)
    assert torch.equal(ids, expected_ids)
    assert_close(weights, expected_weights, tolerance=4e-6)


def test_moe_route_ties_go_to_the_lower_id(device: torch.device) -> None:
    logits = torch.zeros(2, 8, device=device)
    logits[1, 5:] = 1.0
    ids, weights = ops.moe_route(logits, None, 4, renormalize=True)
    assert ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 0]]
    assert_close(weights.sum(-1), torch.ones(2, device=device), tolerance=1e-6)
    ids, _ = ops.moe_route(logits[:1], None, 3, num_groups=4, topk_groups=2)
    assert ids.tolist() == [[0, 1, 2]]


def test_moe_route_never_leaves_the_best_groups(device: torch.device) -> None:
    """Also when the bias makes every score in them negative."""
    logits = random_logits(20, 16, device)
    bias = torch.full((16,), -5.0, device=device)
    ids, _ = ops.moe_route(
        logits, bias, 4, num_groups=4, topk_groups=1, scoring="sigmoid", renormalize=True
    )
    assert bool((ids // 4 == ids[:, :1] // 4).all())


def test_moe_route_nan_logits_give_distinct_valid_experts(device: torch.device) -> None:
    logits = torch.full((2, 8), float("nan"), device=device)
    ids, _ = ops.moe_route(logits, None, 4, num_groups=4, topk_groups=2)
    for row in ids.tolist():
        assert len(set(row)) == 4
        assert all(0 <= expert < 8 for expert in row)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 1), (37, 6, 64)])
def test_moe_sort_matches_oracle(
    device: torch.device, tokens: int, top_k: int, experts: int
) -> None:
    ids, _ = ops.moe_route(random_logits(tokens, experts, device), None, top_k)
    rows = poisoned(tokens * top_k, dtype=torch.int32, device=device)
    offsets = poisoned(experts + 1, dtype=torch.int32, device=device)
    ops.moe_sort(ids, experts, sorted_rows=rows, offsets=offsets)
    expected_rows, expected_offsets = oracle.moe_sort(ids, experts)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(offsets, expected_offsets)


def test_moe_sort_of_an_unknown_expert_raises() -> None:
    with pytest.raises(InvalidArgument, match="expert_ids holds 4 at flat index 1; there are 4"):
        ops.moe_sort(torch.tensor([[0, 4]]).int(), 4)


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(0, 2, 8), (1, 1, 1), (5, 6, 37)])
def test_moe_combine_matches_oracle(
    device: torch.device,
    tokens: int,
    top_k: int,
    hidden: int,
    with_shared: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(tokens, top_k + 1, hidden + 2, generator=generator).to(device, dtype)
    y, shared = wide[:, :top_k, :hidden], wide[:, top_k, 2:] if with_shared else None
    weights = torch.rand(tokens, top_k, generator=generator).to(device)
    out = poisoned(tokens, hidden, dtype=out_dtype, device=device)
    ops.moe_combine(y, weights, shared, out=out)
    wide_shared = None if shared is None else shared.double()
    expected = oracle.moe_combine(y.double(), weights, wide_shared).to(out_dtype)
    assert_close(out, expected, tolerance=HALF_STEP[out_dtype] * 2.01 + 1e-6, scale=1.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_moe_combine_on_each_instruction_set(cpu_isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, 4, 37, generator=generator).to(dtype)
    weights = torch.rand(3, 4, generator=generator)
    actual = ops.moe_combine(y, weights, y[:, 0])
    expected = oracle.moe_combine(y, weights, y[:, 0])
    assert_close(actual, expected, tolerance=HALF_STEP[dtype] * 2.01 + 1e-6, scale=1.0)


def test_wrong_arguments_raise(device: torch.device) -> None:
    logits = torch.zeros(2, 8, device=device)
    with pytest.raises(InvalidArgument, match="scoring is 'tanh'; expected softmax or sigmoid"):
        ops.moe_route(logits, None, 2, scoring="tanh")
    with pytest.raises(InvalidArgument, match="top_k is 3; expected 1 to 2"):
        ops.moe_route(logits, None, 3, num_groups=4, topk_groups=1)
    with pytest.raises(InvalidArgument, match="num_groups is 3; expected a divisor of the 8"):
        ops.moe_route(logits, None, 2, num_groups=3, topk_groups=1)
    with pytest.raises(InvalidArgument, match="correction_bias has size 7"):
        ops.moe_route(logits, logits[0, :7], 2)
    with pytest.raises(InvalidArgument, match="expert_ids is int64; expected int32"):
        ops.moe_sort(logits.long(), 8)
    with pytest.raises(InvalidArgument, match="weights has size 3 in dimension 1; expected 4"):
        ops.moe_combine(logits.view(2, 4, 2), logits[:, :3])


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("with_optional", [False, True])
def test_opcheck(device: torch.device, tokens: int, with_optional: bool) -> None:
    logits = random_logits(tokens, 12, device)[:, 2:10]
    bias = random_logits(1, 8, device)[0] if with_optional else None
    ids = torch.zeros(tokens, 2, dtype=torch.int32, device=device)
    weights = torch.zeros(tokens, 2, device=device)
    library = torch.ops.fastgpt
    route = (logits, bias, 2, 4, 2, "sigmoid", True, 2.5, ids, weights)
    torch.library.opcheck(library.moe_route.default, route)
    rows = torch.zeros(tokens * 2, dtype=torch.int32, device=device)
    offsets = torch.zeros(9, dtype=torch.int32, device=device)
    torch.library.opcheck(library.moe_sort.default, (ids, 8, rows, offsets))
    y = torch.randn(tokens, 2, 5, device=device, dtype=torch.bfloat16)
    shared = y[:, 0].clone() if with_optional else None
    out = torch.zeros(tokens, 5, device=device)
    torch.library.opcheck(library.moe_combine.default, (y, weights, shared, out))


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    def layer(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids, weights = ops.moe_route(logits, None, 2, renormalize=True)
        rows, offsets = ops.moe_sort(ids, 8)
        return ops.moe_combine(logits.view(-1, 2, 4), weights), rows, offsets

    logits = random_logits(3, 8, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(logits), layer(logits), strict=True):
        assert torch.equal(actual, expected)
