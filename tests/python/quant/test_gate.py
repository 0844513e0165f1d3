"""The gate: limits on measured figures promote the costliest weights until the file meets them."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastgpt.checkpoint import Container
from fastgpt.cli.main import app
from fastgpt.errors import ConfigError
from fastgpt.quant import Budget, Calibration, Quantizer
from fastgpt.quant.journal import Journal
from fastgpt.quant.planner import Planner

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import CASES, reference_model

TOKENS = Calibration(num_sequences=8, num_evaluation=3, length=24)
POLICY = {"attention_weights": "int4", "residual_connections": "int4", "io_layers": "fp16"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qwen2")
    reference_model(CASES["qwen2"].hf_config).save_pretrained(path)
    return path


def run_cli(directory: Path, output: Path, *args: object):
    policy = directory / "policy.json"
    policy.write_text(json.dumps(POLICY))
    return CliRunner().invoke(
        app,
        ["quantize", *map(str, (directory, "-o", output, "--policy", policy, *args))],
    )


@pytest.fixture
def small_calibration(monkeypatch) -> None:
    """The command's calibration, but with few tokens."""
    monkeypatch.setattr(Calibration, "parse", staticmethod(lambda value: TOKENS))


def first_attempt_fails(monkeypatch) -> list[dict]:
    """Call the first file not good enough; return the figures of every attempt."""
    is_met_by, attempts = Planner.is_met_by, []

    def failing(self, figures) -> bool:
        attempts.append(dict(figures))
        return len(attempts) > 1 and is_met_by(self, figures)

    monkeypatch.setattr(Planner, "is_met_by", failing)
    return attempts


@pytest.mark.parametrize("option", [("--max-kl", 0.02), ("--min-top1", 0.9)])
def test_cli_meets_the_limit_and_names_what_it_promoted(
    directory, tmp_path, monkeypatch, small_calibration, option
):
    attempts = first_attempt_fails(monkeypatch)
    output = tmp_path / "m.pt"
    done = run_cli(directory, output, *option)
    assert done.exit_code == 0, done.stderr
    container = Container(output)
    figures = container.metadata.certificate
    key, limit = option
    assert figures["kl_mean"] <= limit if key == "--max-kl" else figures["same_top1"] >= limit
    assert figures["kl_mean"] < attempts[0]["kl_mean"]
    notes = [n for n in container.metadata.report["notes"] if n.startswith("promoted")]
    assert len(notes) == len(attempts) - 1 >= 1
    named = [part.split()[0] for part in notes[0].partition("): ")[2].split(", ")]
    assert named
    assert set(named) <= set(container.names())
    assert " -> " in notes[0]
    assert "promoted to meet the limits" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]  # nothing of the first attempt


def test_cli_says_when_a_limit_cannot_be_met(directory, tmp_path, small_calibration):
    done = run_cli(directory, tmp_path / "m.pt", "--max-kl", 1e-12)
    assert done.exit_code == 1
    assert "cannot be met even with the weights kept: KL mean" in done.stderr
    done = run_cli(directory, tmp_path / "n.pt", "--budget", "7bpw", "--min-top1", 0.9999)
    assert done.exit_code == 1
    assert "min_top1 cannot be met within the size budget" in done.stderr
    assert not list(tmp_path.glob("*.pt"))
    done = run_cli(directory, tmp_path / "o.pt", "--budget", "5bpw", "--max-kl", 0.1)
    assert "--budget or --max-kl, not both" in done.stderr


def test_resume_in_the_second_attempt(directory, tmp_path, monkeypatch):
    def made(output: Path, *, resume: bool) -> None:
        Quantizer(directory, POLICY, budget=Budget(max_kl=0.02), calibration=TOKENS).write(
            output, progress=False, resume=resume
        )

    with monkeypatch.context() as patch:
        first_attempt_fails(patch)
        made(tmp_path / "whole.pt", resume=False)
    output = tmp_path / "m.pt"
    add_block, plans = Journal.add_block, []
    set_plan = Journal.set_plan

    def stop_in_second(self, block) -> None:
        add_block(self, block)
        if len(plans) == 2 and len(self.blocks) == 2:
            raise KeyboardInterrupt

    def counted(self, plan) -> None:
        plans.append(plan)
        set_plan(self, plan)

    with monkeypatch.context() as patch:
        first_attempt_fails(patch)
        patch.setattr(Journal, "add_block", stop_in_second)
        patch.setattr(Journal, "set_plan", counted)
        with pytest.raises(KeyboardInterrupt):
            made(output, resume=False)
    assert plans[0]["formats"] != plans[1]["formats"]
    made(output, resume=True)
    assert output.read_bytes() == (tmp_path / "whole.pt").read_bytes()


def test_limits_alone_are_budgets():
    assert Budget(min_top1=0.9).max_kl is None
    with pytest.raises(ConfigError, match="or min_top1"):
        Budget()
    with pytest.raises(ConfigError, match="share between 0 and 1"):
        Budget(min_top1=1.5)
