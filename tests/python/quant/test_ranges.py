"""Activations that float16 cannot hold are found in calibration, named, and kept out of float16."""

import logging
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt.checkpoint import Container
from fastgpt.errors import ConfigError
from fastgpt.models.placement import resolve_dtype
from fastgpt.quant import Calibration, Quantizer
from fastgpt.quant.ranges import ActivationRanges

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import CASES, reference_model, worst_error

TOKENS = Calibration(num_sequences=8, num_evaluation=2, length=24)
FACTOR = 2.0**18  # exact in every type with the exponents of float32
FP8 = {"attention_weights": "fp8", "residual_connections": "fp8", "io_layers": "bf16"}
IDS = torch.randint(100, (2, 19), generator=torch.Generator().manual_seed(4))


def twin_of(kind: str):
    """Return a model of the same function whose second layer's down_proj reads huge values."""
    model = reference_model(CASES[kind].hf_config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("model.layers.1.") and "up_proj" in name:
                rows = weight.shape[-2] // 2 if "gate_up" in name else 0
                weight[..., rows:, :] *= FACTOR
            elif name.startswith("model.layers.1.") and "down_proj" in name:
                weight /= FACTOR
    return model


@pytest.fixture(scope="module", params=["qwen2", "v3"])
def files(request, tmp_path_factory):
    """The twin, its directory, and the files made of the original and of the twin."""
    folder = tmp_path_factory.mktemp(request.param)
    twin = twin_of(request.param)
    twin.save_pretrained(folder / "twin")
    original = reference_model(CASES[request.param].hf_config)
    original.save_pretrained(folder / "original")
    for name in ("original", "twin"):
        Quantizer(folder / name, FP8, calibration=TOKENS).write(
            folder / f"{name}.pt", progress=False
        )
    return original, twin, folder


def test_twin_has_the_same_function_and_overflows_in_float16(files):
    original, twin, folder = files
    with torch.no_grad():
        assert worst_error(twin(IDS).logits, original(IDS).logits) < 1e-5
    logits = fastgpt.load(folder / "twin", device="cpu", dtype="float16")(IDS)
    assert not logits.isfinite().all()


def test_guard_marks_the_twin_and_not_the_original(files):
    _, _, folder = files
    safe, marked = Container(folder / "original.pt"), Container(folder / "twin.pt")
    assert safe.fp16_overflows == {}
    assert safe.metadata.report["ranges"]["amax"] < 3e4
    over = marked.fp16_overflows
    assert over
    assert all(name.startswith("model.layers.1.mlp") for name in over), over
    assert any("down_proj" in name for name in over)
    assert min(over.values()) > 3e4
    figures = marked.metadata.certificate
    assert figures["arithmetic"] in {"bfloat16 on cpu", "float32 on cpu"}
    assert figures["kl_mean"] == pytest.approx(safe.metadata.certificate["kl_mean"], rel=0.5)


def test_guard_is_in_the_printed_report_and_on_the_page(files):
    from fastgpt.quant import render_report
    from fastgpt.quant.report_page import report_page

    _, _, folder = files
    marked = Container(folder / "twin.pt")
    assert "float16 is not safe" in render_report(marked.metadata.report)
    assert "float16 is not safe" in report_page(marked)
    safe = Container(folder / "original.pt")
    assert "float16 is not safe" not in render_report(safe.metadata.report)
    assert "float16 is not safe" not in report_page(safe)


def test_guard_keeps_the_loaded_model_out_of_float16(files):
    _, _, folder = files
    with pytest.raises(ConfigError, match=r"dtype is float16, but activations at model\.layers\.1"):
        fastgpt.load(folder / "twin.pt", device="cpu", dtype="float16")
    assert fastgpt.load(folder / "original.pt", device="cpu", dtype="float16")(IDS).isfinite().all()
    assert fastgpt.load(folder / "twin.pt", device="cpu", dtype="bfloat16")(IDS).isfinite().all()
    # A model that was loaded and is quantized again keeps what is known of it.
    model = Quantizer(folder / "twin", FP8, calibration=TOKENS).convert(progress=False)
    assert model.checkpoint.fp16_overflows


@pytest.mark.parametrize(
    ("capability", "named", "overflows", "expected"),
    [
        ((9, 0), "float16", {}, torch.float16),
        ((9, 0), "float16", {"w": 1e6}, torch.bfloat16),
        ((9, 0), "bfloat16", {"w": 1e6}, torch.bfloat16),
        ((7, 5), "bfloat16", {}, torch.float16),
        ((7, 5), "bfloat16", {"w": 1e6}, torch.float32),
    ],
)
def test_dtype_auto_avoids_float16_where_it_overflows(
    monkeypatch, caplog, capability, named, overflows, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(logging.getLogger("fastgpt"), "propagate", True)
    config = {"torch_dtype": named}
    with caplog.at_level(logging.WARNING, "fastgpt"):
        assert resolve_dtype("auto", torch.device("cuda", 0), config, overflows) == expected
    assert ("running in float32" in caplog.text) == (expected == torch.float32)


def test_ranges_take_nan_for_infinite_and_ignore_nothing():
    ranges = ActivationRanges()
    ranges.add(["a", "b"], torch.tensor([1.0, -7.0]), torch.empty(0))
    ranges.add(["a", "b"], torch.tensor([2.0]))
    ranges.add(["c"], torch.tensor([1.0, float("nan")]))
    assert ranges.values()["a"] == ranges.values()["b"] == 7.0
    assert list(ranges.fp16_overflows()) == ["c"]
    assert ActivationRanges().to_json() == {}
