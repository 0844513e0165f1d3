"""Budgets: the knapsack against every combination, sizes met, limits kept, mistakes named."""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgpt.errors import ConfigError
from fastgpt.quant import Budget, Calibration, Quantizer
from fastgpt.quant.allocate import Additivity, Option, Unit, solve
from fastgpt.quant.refine import rescaled
from fastgpt.quant.sensitivity import _power_laws, _Probed, _with_unseen, unit_of
from fastgpt.scheme import Format

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import CASES, reference_model

TOKENS = Calibration(num_sequences=16, num_evaluation=4, length=48)
CONFIG = {"attention_weights": "int4", "residual_connections": "int4", "io_layers": "fp16"}


def random_units(seed: int, count: int = 6) -> list[Unit]:
    generator = torch.Generator().manual_seed(seed)
    units = []
    for i in range(count):
        weight = float(torch.rand((), generator=generator)) + 0.1
        size = int(torch.randint(50, 500, (), generator=generator))
        options = tuple(
            Option(Format("bf16"), size * bits, weight * 4.0**-bits) for bits in (2, 3, 4, 8)
        )
        units.append(Unit((f"{i}",), options))
    return units


@pytest.mark.parametrize("seed", range(8))
def test_solve_finds_the_best_of_all_combinations(seed: int):
    units = random_units(seed)
    combinations = [
        (100 + sum(o.num_bytes for o in pick), sum(o.loss for o in pick))
        for pick in itertools.product(*(unit.options for unit in units))
    ]
    smallest, largest = min(combinations)[0], max(combinations)[0]
    for share in (0.2, 0.5, 0.9):
        limit = smallest + share * (largest - smallest)
        best = min(loss for size, loss in combinations if size <= limit)
        solution = solve(units, 100, max_bytes=limit, max_loss=None)
        assert solution.num_bytes <= limit
        assert solution.num_bytes == 100 + sum(o.num_bytes for o in solution.options)
        assert solution.loss == pytest.approx(best, rel=1e-9)
    losses = [loss for _, loss in solution.frontier]
    assert losses == sorted(losses, reverse=True)
    assert [size for size, _ in solution.frontier] == sorted(s for s, _ in solution.frontier)


def test_solve_spends_a_large_budget_to_the_last_cell():
    """Sizes of a real model, rounded up to cells: what they leave is spent on single changes."""
    units = [
        Unit(u.names, tuple(replace(o, num_bytes=o.num_bytes * 100_003) for o in u.options))
        for u in random_units(7, count=40)
    ]
    smallest = sum(min(o.num_bytes for o in u.options) for u in units)
    limit = 1.6 * smallest
    solution = solve(units, 0, max_bytes=limit, max_loss=None)
    assert 0.998 * limit < solution.num_bytes <= limit


def test_additivity_goes_through_both_measurements():
    law = Additivity.through([0.2, 0.01], [0.15, 0.011])
    assert law.loss(0.2) == pytest.approx(0.15)
    assert law.loss(0.01) == pytest.approx(0.011)
    assert law.total(law.loss(0.05)) == pytest.approx(0.05)
    assert law.loss(0.0) == law.total(0.0) == 0.0
    assert Additivity.through([0.0, 0.0], [0.1, 0.1]) == Additivity()


def test_solve_predicts_what_units_cost_together():
    units, law = random_units(3), Additivity(0.5, 0.9)
    alone = solve(units, 0, max_bytes=6000, max_loss=None)
    both = solve(units, 0, max_bytes=6000, max_loss=None, together=law)
    assert both.options == alone.options
    assert both.loss == pytest.approx(law.loss(alone.loss))
    limited = solve(units, 0, max_bytes=None, max_loss=0.05, together=law)
    assert limited.loss <= 0.05


def test_power_laws_trust_slopes_that_are_measured_well():
    """KL = a error^b from two points; a noisy unit takes the slope of the others."""

    def points(a: float, b: float, noise: float) -> list[_Probed]:
        return [_Probed(e, a * e**b, noise * a * e**b) for e in (1e-2, 1e-3)]

    probed = {f"{i}": points(2.0 + i, 0.6, 0.01) for i in range(6)}
    probed["steep"] = points(1.0, 0.9, 0.01)
    probed["noisy"] = points(1.0, 1.6, 3.0)
    laws = _power_laws(probed)
    for i in range(6):
        assert laws[f"{i}"](3e-3) == pytest.approx((2.0 + i) * 3e-3**0.6, rel=0.03)
    assert laws["steep"](1e-4) == pytest.approx(1e-4**0.9, rel=0.1)
    slope = math.log(laws["noisy"](1e-2) / laws["noisy"](1e-4)) / math.log(100)
    assert slope == pytest.approx(0.64, abs=0.05)


def test_a_unit_that_showed_nothing_still_counts_an_event():
    """Ten units exchange an expert now and then; the eleventh did not on these tokens."""
    generator = torch.Generator().manual_seed(5)
    kl = {
        f"{i}": torch.where(torch.rand(1000, generator=generator) < 0.01, 0.4, 1e-7).double()
        for i in range(10)
    }
    kl["silent"] = torch.full((1000,), 1e-7, dtype=torch.float64)
    found = _with_unseen(kl)
    mean, error = found["silent"]
    assert mean == pytest.approx(0.4 / 1000, rel=0.01)
    assert error >= 0.9 * mean  # so its slope is that of the others
    assert found["0"][0] == pytest.approx(float(kl["0"].mean()) + 0.4 / 1000, rel=1e-4)


def test_solve_meets_a_loss_with_few_bytes():
    units = random_units(3)
    whole = solve(units, 0, max_bytes=None, max_loss=0.0)
    some = solve(units, 0, max_bytes=None, max_loss=0.05)
    assert some.loss <= 0.05
    assert some.num_bytes < whole.num_bytes
    with pytest.raises(ConfigError, match="the smallest choice takes"):
        solve(units, 0, max_bytes=10, max_loss=None)


def test_units_are_what_kernels_join():
    layer = "model.layers.3"
    attention = [f"{layer}.self_attn.{n}_proj.weight" for n in "qkv"]
    assert len({unit_of(name) for name in attention}) == 1
    assert unit_of(f"{layer}.mlp.gate_proj.weight") == unit_of(f"{layer}.mlp.up_proj.weight")
    assert unit_of(f"{layer}.mlp.gate_proj.weight") != unit_of(f"{layer}.mlp.down_proj.weight")
    experts = [f"{layer}.mlp.experts.{e}.{n}_proj.weight" for e in (0, 11) for n in ("up", "gate")]
    assert len({unit_of(name) for name in experts}) == 1


@pytest.fixture(scope="module", params=["qwen2", "v3"])
def reference(request):
    return reference_model(CASES[request.param].hf_config)


def test_budget_of_bytes_is_met_and_spent_where_it_counts(reference):
    plain = Quantizer(reference, CONFIG, calibration=TOKENS)
    plain.convert(progress=False)
    # One byte in twenty more than the smallest choice, for matrices of 80 to 130 columns.
    limit = int(plain.report.after_bytes * 1.05)
    quantizer = Quantizer(reference, CONFIG, calibration=TOKENS, budget=Budget(bytes=limit))
    quantizer.convert(progress=False)
    assert 0.97 * limit <= quantizer.report.after_bytes <= limit
    allocation = quantizer.report.to_json()["allocation"]
    assert allocation["predicted_kl"] < allocation["frontier"][0][1]
    assert len({row["format"] for row in quantizer.report.to_json()["rows"]}) > 2
    assert quantizer.certificate["kl_mean"] < plain.certificate["kl_mean"] * 1.02


def test_budget_of_loss_is_met_with_fewer_bytes_than_int8(reference):
    uniform = Quantizer(reference, CONFIG, calibration=TOKENS)
    uniform.convert(progress=False)
    limit = uniform.certificate["kl_mean"] / 3
    quantizer = Quantizer(reference, CONFIG, calibration=TOKENS, budget=Budget(max_kl=limit))
    quantizer.convert(progress=False)
    assert quantizer.certificate["kl_mean"] <= limit
    int8 = dict.fromkeys(("attention_weights", "residual_connections", "io_layers"), "int8")
    assert quantizer.report.after_bytes < Quantizer(reference, int8).dry_run().after_bytes


def test_budget_of_loss_is_met_by_promotion_where_prediction_fails(monkeypatch):
    """Predictions of a tenth of the loss choose too little; measuring notices and promotes."""

    def hopeful(*args):
        units, law = rescaled(*args)
        return units, Additivity(0.1 * law.scale, law.power)

    monkeypatch.setattr("fastgpt.quant.planner.rescaled", hopeful)
    reference = reference_model(CASES["qwen2"].hf_config)
    plain = Quantizer(reference, CONFIG, calibration=TOKENS)
    plain.convert(progress=False)
    limit = plain.certificate["kl_mean"] / 3
    quantizer = Quantizer(reference, CONFIG, calibration=TOKENS, budget=Budget(max_kl=limit))
    quantizer.convert(progress=False)
    assert quantizer.certificate["kl_mean"] <= limit
    assert any(note.startswith("promoted to meet the limits") for note in quantizer.report.notes)


def test_sensitive_auto_names_what_it_keeps():
    config = CASES["qwen2"].hf_config
    deep = config.__class__(**{**config.to_dict(), "num_hidden_layers": 12, "layer_types": None})
    reference = reference_model(deep)
    quantizer = Quantizer(reference, CONFIG, calibration=TOKENS, sensitive="auto")
    planned = quantizer.plan()
    kept = [i.name for i in planned if i.format == Format("fp16") and ".layers." in i.name]
    notes = quantizer.dry_run().notes
    assert kept
    assert all(any(name in note for note in notes) for name in kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "names one of bytes"),
        ({"bytes": 5, "max_kl": 0.1}, "names 2"),
        ({"max_kl": 0.0}, "not possible"),
        ({"bytes": 10, "min_top1": 2}, "share between 0 and 1"),
    ],
)
def test_budget_mistakes_are_named(options, message: str):
    with pytest.raises(ConfigError, match=message):
        Budget(**options)


def test_budget_parses_what_people_write():
    assert Budget.parse("4.7GB").bytes == 4_700_000_000
    assert Budget.parse("4.5bpw").bits_per_weight == 4.5
    assert Budget.parse(1000).bytes == 1000
    with pytest.raises(ConfigError, match="is no number"):
        Budget.parse("manybpw")
