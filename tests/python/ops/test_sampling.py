"""fastgpt.ops.sampling against its definition, and against the distribution it stands for."""

import numpy as np
import pytest
import torch
from compare import assert_close, poisoned
from torch import Tensor

from fastgpt import ops
from fastgpt.errors import InvalidArgument

from oracle import sampling as oracle
from shapes import VOCABULARY

# temperature, top_k, top_p, min_p
SETTINGS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 0.95, 0.0),
    (0.7, 50, 0.9, 0.0),
    (1.3, 5, 1.0, 0.0),
    (1.0, 0, 1.0, 0.1),
    (2.0, 1000, 0.5, 0.02),
    (1.0, 1, 1.0, 0.0),
    (1.0, 2**31 - 1, 1e-9, 1.0),
    (1e-30, 0, 1.0, 0.0),
    (1e30, 0, 0.3, 0.0),
]


def arguments(
    rows: int,
    device: torch.device,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 7,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One setting for all rows; every row has its own position."""
    return (
        torch.full((rows,), temperature, device=device),
        torch.full((rows,), top_k, dtype=torch.int32, device=device),
        torch.full((rows,), top_p, device=device),
        torch.full((rows,), min_p, device=device),
        torch.full((rows,), seed, dtype=torch.int64, device=device),
        torch.arange(rows, dtype=torch.int64, device=device),
    )


def random_logits(rows: int, vocab_size: int, device: torch.device, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(rows, vocab_size, generator=generator) * spread).to(device)


def test_philox_known_answers() -> None:
    """The vectors published with Random123, so that the oracle is Philox and not its likeness."""
    assert oracle.philox4x32((0, 0, 0, 0), (0, 0)) == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip
    ones = 0xFFFFFFFF
    assert oracle.philox4x32((ones,) * 4, (ones,) * 2) == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 17, 257, 5003])
def test_sample_matches_oracle(
    device: torch.device, vocab_size: int, settings: tuple[float, int, float, float]
) -> None:
    logits = random_logits(64, vocab_size + 3, device)[:, :vocab_size]
    args = arguments(64, device, *settings)
    ids = poisoned(64, dtype=torch.int64, device=device)
    assert ops.sample(logits, *args, ids=ids) is ids
    assert torch.equal(ids, oracle.sample(logits, *args))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sample_on_each_instruction_set(
    cpu_isa: str, settings: tuple[float, int, float, float]
) -> None:
    cpu = torch.device("cpu")
    for spread in (0.01, 3.0):  # nearly flat: many tokens carry top-p; then peaked
        logits = random_logits(8, 5003, cpu, spread)
        args = arguments(8, cpu, *settings)
        assert torch.equal(ops.sample(logits, *args), oracle.sample(logits, *args))


@pytest.mark.parametrize("settings", SETTINGS[:7], ids=str)
def test_sample_at_full_vocabulary(
    device: torch.device, settings: tuple[float, int, float, float]
) -> None:
    logits = random_logits(3, VOCABULARY, device)
    args = arguments(3, device, *settings)
    expected = oracle.sample(logits, *args)
    assert torch.equal(ops.sample(logits, *args), expected)
    for row in range(3):  # alone as in the batch
        alone = ops.sample(logits[row : row + 1], *(a[row : row + 1] for a in args))
        assert torch.equal(alone, expected[row : row + 1])


def test_sample_with_ties_everywhere(device: torch.device) -> None:
    """Ties at the edge of top-k and top-p all stay: with equal logits every token can be drawn."""
    logits = torch.zeros(400, 5, device=device)
    for settings in [(1.0, 2, 1.0, 0.0), (1.0, 0, 0.1, 0.0), (1.0, 0, 1.0, 1.0)]:
        args = arguments(400, device, *settings)
        ids = ops.sample(logits, *args)
        assert torch.equal(ids, oracle.sample(logits, *args))
        assert ids.unique().tolist() == [0, 1, 2, 3, 4]
    assert ops.sample(logits, *arguments(400, device, temperature=0.0)).unique().tolist() == [0]
    signed_zero = torch.tensor([[-0.0, 0.0, -1.0]], device=device)
    assert ops.sample(signed_zero, *arguments(1, device, temperature=0.0)).item() == 0


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[1], SETTINGS[6]], ids=str)
def test_sample_rows_without_finite_logits(
    device: torch.device, settings: tuple[float, int, float, float]
) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        [nan, nan, nan],
        [-inf, -inf, -inf],
        [nan, -inf, 1.0],
        [nan, inf, inf],
        [-inf, nan, -3e38],
        [3e38, -3e38, nan],
        [2.0, inf, nan],
    ]
    ids = ops.sample(torch.tensor(rows, device=device), *arguments(7, device, *settings))
    assert ids.tolist() == [0, 0, 2, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.5, 4, 1.0, 0.0), (1.5, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.2)],
)
def test_sample_frequencies_follow_the_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Chi-square of 20,000 draws against float64 probabilities computed another way."""
    count = 20_000
    logits = torch.tensor([2.0, 1.5, 1.0, 0.2, 0.0, -0.5, -1.0])
    args = arguments(count, torch.device("cpu"), temperature, top_k, top_p, min_p, seed=11)
    ids = ops.sample(logits.expand(count, -1), *args)
    p = (logits.double() / temperature).softmax(-1)  # logits stand in descending order
    kept = torch.ones(7, dtype=torch.bool)
    if top_k:
        kept[top_k:] = False
    p = p * kept / (p * kept).sum()
    kept &= (p.cumsum(-1) - p) < top_p
    kept &= p >= min_p * p.max()
    expected = p * kept / (p * kept).sum() * count
    observed = torch.bincount(ids, minlength=7).double()
    assert not observed[~kept].any(), "drew a token that was cut"
    chi_square = ((observed - expected)[kept].square() / expected[kept]).sum()
    assert chi_square < 22.5, "6 degrees of freedom pass this once in a thousand"


def test_sample_seeds_and_positions_are_independent(device: torch.device) -> None:
    logits = torch.zeros(64, 1000, device=device)
    args = list(arguments(64, device))
    first = ops.sample(logits, *args)
    assert torch.equal(ops.sample(logits, *args), first)
    assert first.unique().numel() > 50
    args[4] = args[4] + 2**40  # the high word of the seed counts
    assert not torch.equal(ops.sample(logits, *args), first)
    args = list(arguments(64, device))
    args[5] = args[5] - 2**40
    assert not torch.equal(ops.sample(logits, *args), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.5}, r"temperature\[0\] is -0.5"),
        ({"temperature": float("nan")}, r"temperature\[0\] is -?nan"),
        ({"top_k": -1}, r"top_k\[0\] is -1"),
        ({"top_p": 0.0}, r"top_p\[0\] is 0; expected more than 0"),
        ({"top_p": 1.5}, r"top_p\[0\] is 1.5"),
        ({"min_p": 1.5}, r"min_p\[0\] is 1.5"),
        ({"min_p": float("nan")}, r"min_p\[0\] is -?nan"),
    ],
)
def test_sample_setting_out_of_range_raises(changes: dict[str, float], message: str) -> None:
    args = arguments(1, torch.device("cpu"), **changes)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=message):
        ops.sample(torch.zeros(1, 4), *args)


def test_wrong_arguments_raise(device: torch.device) -> None:
    args = arguments(2, device)
    with pytest.raises(InvalidArgument, match="logits is float16; expected float32"):
        ops.sample(torch.zeros(2, 4, device=device).half(), *args)
    with pytest.raises(InvalidArgument, match="logits has 0 columns"):
        ops.sample(torch.zeros(2, 0, device=device), *args)
    with pytest.raises(InvalidArgument, match="temperature has size 2 in dimension 0; expected 3"):
        ops.sample(torch.zeros(3, 4, device=device), *args)
    history = torch.zeros(2, 5, dtype=torch.int32, device=device)
    with pytest.raises(InvalidArgument, match="history has size 5 in dimension 1; expected 4"):
        ops.penalize(torch.zeros(2, 4, device=device), history, args[4], *args[:1] * 3)
    with pytest.raises(InvalidArgument, match="slots has size 2 in dimension 0; expected 1"):
        ops.record_tokens(history, args[4], args[4][:1], is_prompt=False)


def test_record_and_penalize_match_oracle(device: torch.device) -> None:
    torch.manual_seed(0)
    history = torch.zeros(4, 50, dtype=torch.int32, device=device)
    expected_history = history.cpu().clone()
    for is_prompt in (True, False, False):
        slots = torch.randint(-1, 4, (60,))
        ids = torch.randint(0, 50, (60,))
        ops.record_tokens(history, slots.to(device), ids.to(device), is_prompt=is_prompt)
        oracle.record_tokens(expected_history, slots, ids, is_prompt=is_prompt)
    assert torch.equal(history.cpu(), expected_history)
    assert int((history < 0).sum()) > 10, "prompt bits"
    logits = torch.randn(5, 53)[:, :50] * 5
    slots = torch.tensor([2, -1, 0, 2, 3])
    penalties = [
        torch.tensor([1.3, 2.0, 1.0, 0.5, 1.0]),
        torch.tensor([0.5, 1.0, 0.0, -0.5, 0.0]),
        torch.tensor([0.2, 1.0, 0.7, 0.0, 0.0]),
    ]
    actual = logits.to(device, copy=True)
    ops.penalize(actual, history, slots.to(device), *(p.to(device) for p in penalties))
    expected = logits.clone()
    oracle.penalize(expected, expected_history, slots, *penalties)
    assert_close(actual.cpu(), expected, tolerance=1e-6, scale=5.0)
    assert torch.equal(actual[1].cpu(), logits[1]), "a negative slot leaves the row"


def test_history_out_of_range_raises() -> None:
    history = torch.zeros(2, 5, dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InvalidArgument, match=r"slots\[0\] is 2; the history has 2 slots"):
        ops.record_tokens(history, zero + 2, zero, is_prompt=True)
    for bad in (-1, 5):
        with pytest.raises(InvalidArgument, match=rf"ids\[0\] is {bad}; .* 5 tokens"):
            ops.record_tokens(history, zero, zero + bad, is_prompt=False)
    assert not history.any()
    one = torch.ones(1)
    with pytest.raises(InvalidArgument, match=r"repetition\[0\] is 0; expected more than 0"):
        ops.penalize(torch.zeros(1, 5), history, zero, one * 0, one, one)


def test_exp2_oracle_is_accurate() -> None:
    y = np.linspace(-64, 0, 100_001, dtype=np.float32)
    expected = np.exp2(y.astype(np.float64))
    assert np.max(np.abs(oracle.exp2_of(y) - expected) / expected) < 3e-7


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_opcheck(device: torch.device, rows: int, temperature: float) -> None:
    library = torch.ops.fastgpt
    logits = torch.randn(rows, 13, device=device)[:, 2:]
    args = arguments(rows, device, temperature)
    ids = torch.zeros(rows, dtype=torch.int64, device=device)
    torch.library.opcheck(library.sample.default, (logits, *args, ids))
    history = torch.zeros(4, 11, dtype=torch.int32, device=device)
    slots = torch.arange(rows, device=device) - 1
    ones = torch.ones(rows, device=device)
    torch.library.opcheck(
        library.penalize.default, (logits.clone(), history, slots, ones * 2, ones, ones)
    )
    torch.library.opcheck(library.record_tokens.default, (history, slots, ids, temperature > 0))


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    args = arguments(3, device)
    slots = torch.arange(3, device=device)
    ones = torch.ones(3, device=device)

    def step(logits: Tensor, history: Tensor) -> Tensor:
        logits = logits * 1.0
        ops.penalize(logits, history, slots, ones * 2, ones, ones)
        ids = ops.sample(logits, *args)
        ops.record_tokens(history, slots, ids, is_prompt=False)
        return ids

    logits = random_logits(3, 100, device)
    history = torch.zeros(3, 100, dtype=torch.int32, device=device)
    compiled_history = history.clone()
    expected = step(logits, history)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, compiled_history), expected)
    assert torch.equal(compiled_history, history)
