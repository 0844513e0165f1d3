"""Layer by layer: transformations keep the function, choices beat round-to-nearest."""

import sys
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoint import StateDict
from fastgpt.errors import ConfigError
from fastgpt.quant import Calibration, Quantizer, layerwise
from fastgpt.quant.calibration import token_sequences
from fastgpt.quant.family import LayerSearch, quantize_family
from fastgpt.quant.plan import plan_family
from fastgpt.quant.policy import Policy
from fastgpt.quant.report import Report
from fastgpt.quant.transforms import hadamard
from fastgpt.scheme import QuantizedTensor

sys.path.append(str(Path(__file__).parents[1] / "models"))
sys.path.append(str(Path(__file__).parent))
from test_family import logits_with, plain_logits, state_of
from tiny_models import CASES, reference_model, worst_error

FAMILIES = ["llama", "qwen2", "qwen3", "v2", "v2_lite", "v3"]
ROLES = ("attention_weights", "residual_connections")
INT4_G32 = {"format": "int4", "group_size": 32}
INT4 = {**dict.fromkeys(ROLES, INT4_G32), "io_layers": "fp32"}


def sequences(vocab_size: int = 100, count: int = 8, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


@pytest.fixture(scope="module")
def references() -> dict:
    return {name: reference_model(CASES[name].hf_config) for name in FAMILIES}


def searched(checkpoint: StateDict, config) -> tuple[dict, Report]:
    report = Report()
    planned, _ = plan_family(checkpoint, Policy.parse(config))
    stored = dict(quantize_family(checkpoint, planned, report, None, sequences()))
    return stored, report


@pytest.mark.parametrize("kind", ["scaled", "rotated"])
@pytest.mark.parametrize("name", FAMILIES)
def test_transformations_leave_the_model_as_it_was(references, monkeypatch, name: str, kind: str):
    """Every transformation applied, nothing rounded: the logits stay."""
    applied = []

    def always(layer, changed, stats, what) -> bool:
        layer.dense.update(changed)
        layer.stats.update(stats)
        applied.append(what)
        return True

    def unrounded(self, item, source, work, before):
        if item.name in self.norms:
            return self.norms[item.name]
        return work.dense[item.name].clone()  # the next layer comes into this memory

    monkeypatch.setattr(layerwise, "_LEAST_GAIN", -1e9)
    monkeypatch.setattr(layerwise, "_keep_if_better", always)
    monkeypatch.setattr(LayerSearch, "_store", unrounded)
    if kind == "rotated":
        monkeypatch.setattr(layerwise, "ALPHAS", ())
    else:
        monkeypatch.setattr(layerwise, "hadamard", lambda size, device: None)
    reference = references[name]
    stored, _ = searched(state_of(reference), INT4)
    config = reference.config
    head_dim = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "v_head_dim", getattr(config, "head_dim", head_dim))
    if kind == "rotated" and hadamard(head_dim) is None:
        assert not applied
    else:
        assert set(applied) == {kind}
        assert len(applied) >= config.num_hidden_layers * (1 if kind == "rotated" else 2)
    error = worst_error(logits_with(reference, stored), plain_logits(reference))
    assert error < 5e-5, error  # float32 rounding of the changed weights, through the layers


@pytest.mark.parametrize("name", ["qwen2", "v3"])
def test_search_is_never_worse_than_nearest_on_held_out_tokens(references, name: str):
    reference = references[name]
    stored, report = searched(state_of(reference), INT4)
    names = [n for n, t in stored.items() if isinstance(t, QuantizedTensor)]
    assert set(report.choices) == set(names)
    on_outputs = [c for c in report.choices.values() if c["of"] == "outputs"]
    assert len(on_outputs) > len(names) / 2  # an expert may get no token
    assert all(c["error"] <= c["nearest_error"] * (1 + 1e-6) for c in report.choices.values())
    ratios = [c["error"] / c["nearest_error"] for c in on_outputs]
    assert sum(ratios) / len(ratios) < 0.8
    assert {c["algorithm"] for c in on_outputs} >= {"gptq"}


def outlier_twin(reference) -> StateDict:
    """Return the same function with gains, values and gates scaled by powers of two."""
    state = {k: v.detach().clone() for k, v in reference.state_dict().items()}
    generator = torch.Generator().manual_seed(12)

    def factors(count: int) -> torch.Tensor:
        chosen = torch.rand(count, generator=generator) < 0.06
        return torch.where(chosen, 32.0, 1.0)

    for i in range(reference.config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for norm, readers in (
            ("input_layernorm", [f"self_attn.{n}_proj" for n in "qkv"]),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            f = factors(reference.config.hidden_size)
            state[f"{layer}.{norm}.weight"] *= f
            for reader in readers:
                state[f"{layer}.{reader}.weight"] /= f
        f = factors(reference.config.intermediate_size)
        state[f"{layer}.mlp.up_proj.weight"] *= f.unsqueeze(1)
        state[f"{layer}.mlp.down_proj.weight"] /= f
    return StateDict(reference.config.to_dict(), state)


def test_search_undoes_outliers_that_round_to_nearest_cannot(references):
    """Twins compute the same; nearest loses many times as much on one, the search does not."""
    reference = references["qwen2"]
    errors = {}
    for label, checkpoint in (("plain", state_of(reference)), ("twin", outlier_twin(reference))):
        _, report = searched(checkpoint, INT4)
        chosen = [c["error"] for c in report.choices.values()]
        nearest = [c["nearest_error"] for c in report.choices.values()]
        errors[label] = sum(chosen), sum(nearest)
    assert errors["twin"][1] > 3 * errors["plain"][1]
    assert errors["twin"][0] < 1.3 * errors["plain"][0]


def test_search_without_data_judges_by_the_weights(references):
    checkpoint = state_of(references["qwen2"])
    report = Report()
    planned, _ = plan_family(checkpoint, Policy.parse(INT4))
    dict(quantize_family(checkpoint, planned, report, None))
    assert {c["of"] for c in report.choices.values()} == {"weights"}
    ratios = [c["error"] / c["nearest_error"] for c in report.choices.values()]
    assert max(ratios) <= 1
    assert sum(ratios) / len(ratios) < 0.9


def test_search_gptq_by_name_needs_data(references):
    config = {"residual_connections": {"format": "int4", "algorithm": "gptq"}}
    checkpoint = state_of(references["qwen2"])
    planned, _ = plan_family(checkpoint, Policy.parse(config))
    with pytest.raises(ConfigError, match="gptq needs calibration data"):
        dict(quantize_family(checkpoint, planned, Report(), None))
    stored = dict(quantize_family(checkpoint, planned, Report(), None, sequences()))
    assert stored["model.layers.0.mlp.up_proj.weight"].format.algorithm == "gptq"


def test_calibration_sources(references, tmp_path):
    checkpoint = state_of(references["qwen2"])
    own = Calibration(num_sequences=8, num_evaluation=2, length=24)
    drawn, kept_apart = token_sequences(own, checkpoint, None)
    assert 4 <= len(drawn) <= 8
    assert len(kept_apart) == 2
    assert max(map(len, drawn)) <= 24
    assert (drawn, kept_apart) == token_sequences(own, checkpoint, None)
    given = [[1, 2, 3]] * 5
    assert token_sequences(Calibration.parse(given), checkpoint, None) == (given, [])
    assert token_sequences(Calibration.parse(None), checkpoint, None) == ([], [])
    asked = Calibration(prompts=[[5, 6, 7]], num_sequences=4, num_evaluation=0)
    prompted, _ = token_sequences(asked, checkpoint, None)
    assert all(ids[:3] == [5, 6, 7] for ids in prompted)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("missing.txt", "is no file"),
        (3, "expected 'self'"),
        ([[1, 2]] * 3, "gives 3 sequences"),
        ([[1, 2]] * 3 + [[1, 100_000]], "holds token 100000"),
        (["text"] * 4, "has no tokenizer"),
    ],
)
def test_calibration_mistakes_are_named(references, value, message: str):
    with pytest.raises(ConfigError, match=message):
        token_sequences(Calibration.parse(value), state_of(references["qwen2"]), None)


def test_quantizer_reports_the_calibration(references):
    quantizer = Quantizer(references["qwen2"], INT4, calibration=sequences())
    quantizer.convert(progress=False)
    report = quantizer.report.to_json()
    assert report["calibration"]["num_tokens"] == 320
    assert len(report["calibration"]["sha256"]) == 64
    assert "searched codes" in str(quantizer.report)
