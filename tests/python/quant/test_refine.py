"""A plan measured as a whole: steps change what they say, losses follow, the law is anchored."""

import sys
from pathlib import Path

import pytest
import torch

from fastgpt.quant import Budget, Calibration, Quantizer
from fastgpt.quant.allocate import Additivity, Option, Unit, neighbours, solve
from fastgpt.quant.evaluate import Evaluation, SourceAnswers
from fastgpt.quant.family import quantize_family
from fastgpt.quant.observe import _split
from fastgpt.quant.plan import plan_family
from fastgpt.quant.policy import Policy
from fastgpt.quant.refine import MeasuredPlan, Step, measure_plan, rescaled, steps_around
from fastgpt.quant.report import Report
from fastgpt.quant.sensitivity import is_free, unit_of
from fastgpt.scheme import Format

sys.path.append(str(Path(__file__).parents[1] / "models"))
sys.path.append(str(Path(__file__).parent))
from test_allocate import CONFIG, TOKENS, random_units
from test_family import state_of
from test_layerwise import sequences
from tiny_models import CASES, reference_model

SIZES = {"int3": 30, "int4": 40, "int8": 80}


def unit(name: str, losses: dict[str, float]) -> Unit:
    return Unit(
        (name,), tuple(Option(Format.parse(f), SIZES[f], loss) for f, loss in losses.items())
    )


def test_steps_go_one_down_and_one_up_where_there_is_one():
    units = random_units(4)
    solution = solve(units, 0, max_bytes=6000, max_loss=None)
    steps = steps_around(units, solution.options)
    assert {step.unit for step in steps} == set(range(len(units)))
    for step in steps:
        chosen = solution.options[step.unit]
        assert step.option in neighbours(units[step.unit], chosen)
        is_up = step.option.num_bytes > chosen.num_bytes
        assert (step.predicted < 0) == is_up
    ends = neighbours(units[0], units[0].options[0]), neighbours(units[0], units[0].options[-1])
    assert [len(end) for end in ends] == [1, 1]


def test_losses_follow_what_was_measured_and_the_sum_is_anchored():
    """Unit a costs three times what was predicted, b what was; c was measured badly."""
    losses = {"int3": 0.4, "int4": 0.1, "int8": 0.0}
    units = [unit(name, losses) for name in "abc"]
    options = [u.options[1] for u in units]
    steps = steps_around(units, options)
    ratios = {0: (3.0, 1e-4), 1: (1.0, 1e-4), 2: (9.0, 10.0)}
    changes = [(ratios[s.unit][0] * s.predicted, ratios[s.unit][1]) for s in steps]
    scaled, law = rescaled(units, options, steps, MeasuredPlan(0.7, 0.6, changes))
    a, b, c = (u.options[1].loss for u in scaled)
    assert 0.25 < a <= 0.3
    assert 0.1 <= b < 0.13
    assert b < c < a  # near the mean of the others
    assert law.power == 1.0
    assert law.loss(a + b + c) == pytest.approx(0.7)
    assert [o.num_bytes for o in scaled[0].options] == [30, 40, 80]


def test_nothing_measured_leaves_the_losses():
    units = [unit("a", {"int4": 0.1, "int8": 0.0})]
    scaled, law = rescaled(units, [units[0].options[0]], [], MeasuredPlan(0.2, 0.2, []))
    assert scaled == units
    assert law == Additivity(2.0)


@pytest.mark.parametrize("name", ["qwen2", "v3"])
def test_steps_are_measured_around_the_whole_plan(name: str):
    """The same format again changes nothing; kept weights answer better; bits fewer, worse."""
    checkpoint = state_of(reference_model(CASES[name].hf_config))
    g32 = {"format": "int4", "group_size": 32}
    policy = {"attention_weights": g32, "residual_connections": g32, "io_layers": g32}
    planned, _ = plan_family(checkpoint, Policy.parse(policy))
    keys: dict[str, list[str]] = {}
    for item in planned:
        if is_free(item):
            keys.setdefault(unit_of(item.name), []).append(item.name)
    units = [Unit(tuple(names), ()) for names in keys.values()]
    tried = [Option(Format.parse(g32), 0, 0.0), Option(None, 0, 0.0)]
    tried.append(Option(Format.parse({"format": "int2"}), 0, 0.0))
    steps = [Step(i, option, 0.0) for i in range(len(units)) for option in tried]
    texts = sequences()
    measured = measure_plan(checkpoint, planned, units, steps, texts, None)
    assert measured.kl > 0
    same, kept, narrow = (measured.changes[at::3] for at in range(3))
    assert max(abs(change) for change, _ in same) < 1e-3 * measured.kl_all
    assert sum(change for change, _ in kept) < 0 < min(change for change, _ in narrow)
    alone = measure_plan(checkpoint, planned, units, [], texts, None)
    assert alone.kl == pytest.approx(measured.kl, rel=1e-6)
    tensors = list(quantize_family(checkpoint, planned, Report(), None, texts))
    evaluation = Evaluation(checkpoint, texts, None)
    assert len(list(evaluation.watch(tensors))) == len(planned)
    # Activations of the certificate may be 16 bits wide, those of a measured plan are not.
    assert evaluation.figures["kl_mean"] == pytest.approx(measured.kl_all, rel=0.25)


def test_budget_reports_what_sums_and_the_whole_plan_say():
    quantizer = Quantizer(
        reference_model(CASES["qwen2"].hf_config),
        CONFIG,
        calibration=TOKENS,
        budget=Budget(bits_per_weight=6.0),
    )
    quantizer.plan()
    allocation = quantizer.dry_run().allocation
    assert 0 < allocation["predicted_kl"] <= allocation["first_plan_kl"]
    assert allocation["additive_kl"] > 0
    assert 0.98 * allocation["max_bytes"] <= allocation["bytes"] <= allocation["max_bytes"]


def test_answers_of_the_source_are_the_same_for_every_model():
    """Figures with the source's answers at hand are those of running it beside the model."""
    checkpoint = state_of(reference_model(CASES["qwen2"].hf_config))
    planned, _ = plan_family(checkpoint, Policy.parse("fp8"))
    tensors = list(quantize_family(checkpoint, planned, Report(), None))
    texts = [ids[: 5 + i] for i, ids in enumerate(sequences())]
    answers = SourceAnswers.of(checkpoint, texts, None)
    figures = []
    for known in (None, answers):
        evaluation = Evaluation(checkpoint, texts, None, answers=known)
        assert list(evaluation.watch(tensors))
        figures.append(evaluation.figures)
    assert figures[0] == figures[1]
    assert figures[0]["positions"] == sum(map(len, texts))


def test_split_keeps_order_and_limit():
    texts = [[0] * n for n in (5, 1, 9, 2, 2, 30, 1)]
    members = [0, 2, 3, 4, 5, 6]
    runs = list(_split(members, texts, 13))
    assert [i for run in runs for i in run] == members
    assert runs == [[0], [2, 3, 4], [5], [6]]
    assert list(_split([], texts, 13)) == []


def test_prompts_that_are_given_are_all_answered():
    reference = reference_model(CASES["qwen2"].hf_config)
    calibration = Calibration(prompts=[[3, i] for i in range(20)], num_sequences=20, length=8)
    quantizer = Quantizer(reference, CONFIG, calibration=calibration)
    quantizer.convert(progress=False)
    assert (
        quantizer.report.calibration["num_sequences"]
        + len(quantizer.certificate["evaluation_tokens"])
        >= 20
    )


def test_device_limits_follow_the_work(monkeypatch):
    """More tokens are measured on a GPU where the runs are cheap, no more than on a CPU else."""
    from fastgpt.quant import sensitivity

    checkpoint = state_of(reference_model(CASES["qwen2"].hf_config))
    planned, _ = plan_family(checkpoint, Policy.parse("int4"))
    free = [item.name for item in planned if is_free(item)]
    texts = [[1] * 1000 for _ in range(100)]

    def count(device: str, runs: int) -> int:
        found = sensitivity.measured_tokens(checkpoint, free, texts, runs, torch.device(device))
        return sum(map(len, found))

    assert count("cpu", 10) == 8000
    assert count("cuda", 10) == 65000
    monkeypatch.setattr(sensitivity, "_GPU_WORK", 1)
    assert count("cuda", 10) == 8000
