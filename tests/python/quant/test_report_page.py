"""The report: every figure with its metric, the page whole in itself, names from files harmless."""

import html.parser
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fastgpt.checkpoint import Container
from fastgpt.cli.main import app
from fastgpt.quant import Calibration, Quantizer
from fastgpt.quant.charts import Bar, Mark, bar_chart, line_chart
from fastgpt.quant.evaluate import bootstrap_interval
from fastgpt.quant.report_page import report_json, report_page

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import CASES, reference_model

TOKENS = Calibration(num_sequences=12, num_evaluation=3, length=24)
INT4 = {"attention_weights": "fp8", "residual_connections": {"format": "int4", "group_size": 32}}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    reference_model(CASES["qwen2"].hf_config).save_pretrained(folder)
    Quantizer(folder, INT4, calibration=TOKENS, budget="6bpw").write(
        folder / "m.pt", progress=False
    )
    return folder / "m.pt"


def test_page_shows_every_figure_with_its_metric(made):
    container = Container(made)
    page = Page(report_page(container))
    report = container.metadata.report
    for words in (
        "bits per weight",
        "KL divergence from the source, mean, 95 % interval",
        "same top token as the source, 95 % interval",
        "perplexity over the source's, 95 % interval",
        "noise floor: KL between the source in float32 and in bfloat16",
        "KL divergence, median",
        "KL divergence, 99th percentile",
        "Largest |x|",
        "no NaN or infinity",
        container.metadata.certificate["source_sha256"],
        container.metadata.certificate["evaluation_sha256"],
        report["calibration"]["sha256"],
        f"{report['bits_per_weight']:.3f}",
        f"{report['quality']['kl_mean']:.3g} nats",
    ):
        assert words in page.text, words
    assert "precision loss" not in page.text.lower()
    assert page.tags.count("svg") == 3  # frontier, errors by layer, ranges
    plain = page.text.replace("\u200b", "")
    assert all(name in plain for name in report["tensors"])


def test_page_loads_nothing(made):
    page = Page(report_page(Container(made)))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "action"} & {name for name, _ in page.attributes}
    assert "url(" not in report_page(Container(made))


def test_page_of_a_module_of_another_library_escapes_its_names(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<script>alert(1)</script>", nn.Linear(32, 8))

        def forward(self, x):
            return self.get_submodule("<script>alert(1)</script>")(x)

    path = tmp_path / "m.pt"
    Quantizer(Net(), {"default": "int4"}).convert(progress=False).save(path)
    page = Page(report_page(Container(path)))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert "were not measured" in page.text


def test_json_has_sizes_errors_and_origin(made):
    report = report_json(Container(made))
    assert report["file_bytes"] == made.stat().st_size
    assert report["after_bytes"] == sum(e["after_bytes"] for e in report["tensors"].values())
    searched = [e for e in report["tensors"].values() if "algorithm" in e]
    assert all(e["of"] == "outputs" and e["error"] <= e["nearest_error"] for e in searched)
    assert len(searched) > 5
    assert "evaluation_tokens" not in report["certificate"]
    quality = report["quality"]
    assert quality["kl_median"] <= quality["kl_p99"]
    for key in ("kl_mean", "same_top1"):
        low, high = quality[f"{key}_95"]
        assert low <= quality[key] <= high
    json.dumps(report, allow_nan=False)


def test_cli_writes_page_and_json(made, tmp_path):
    def run(*args: object):
        return CliRunner().invoke(app, ["inspect", str(made), *map(str, args)])

    assert run("--report", tmp_path / "r.html").exit_code == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert run("--report", tmp_path / "r.json").exit_code == 0
    assert json.loads((tmp_path / "r.json").read_text())["file"] == "m.pt"
    assert json.loads(run("--report").stdout)["file"] == "m.pt"
    assert "a .html or .json file, not to" in run("--report", tmp_path / "r.pdf").stderr
    assert "--report writes a report there" in run(tmp_path / "r.html").stderr
    assert "cannot be written" in run("--report", tmp_path / "none/r.html").stderr
    shown = CliRunner().invoke(app, ["inspect", str(made.parent), "--report"])
    assert "is not quantized" in shown.stderr


def test_charts_place_values_in_order():
    """Larger values are drawn higher, at the scale of the axis."""
    drawn = bar_chart(
        [Bar("a", 1.0, 0.5, 2.0), Bar("b", 2.0, 1.0, 4.0, 3.0)], title="t", unit="u", reference="r"
    )
    tops = [float(y) for y in re.findall(r'class="bar" x="[^"]*" y="([^"]*)"', drawn)]
    assert tops[1] < tops[0]
    assert (260 - 40 - tops[1]) == pytest.approx(2 * (260 - 40 - tops[0]), abs=0.2)
    logarithmic = bar_chart(
        [Bar("a", 1e-4, 1e-5, 1e-3), Bar("b", 1.0, 0.1, 2.0)], title="t", unit="u"
    )
    tops = [float(y) for y in re.findall(r'class="bar" x="[^"]*" y="([^"]*)"', logarithmic)]
    assert tops[0] - tops[1] > 50
    assert tops[0] < 260 - 40 - 5  # visible
    line = line_chart(
        [(0, 1.0), (1, 0.1), (2, 0.0)], title="t", x_unit="x", y_unit="y", log=True,
        marks=[Mark("m", 1, 0.1), Mark("limit", None, 0.5)],
    )  # fmt: skip
    points = re.search(r'class="line" points="([^"]*)"', line)
    heights = [float(p.split(",")[1]) for p in points[1].split()]
    assert heights == sorted(heights)
    for chart in (drawn, logarithmic, line, bar_chart([Bar("a", 0, 0, 0)], title="", unit="")):
        Page(chart)
        assert "nan" not in chart


def test_bootstrap_interval_is_that_of_independent_sequences():
    """Equal values within each sequence: the interval is the mean's, 1.96 spreads of the groups."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(100, generator=generator, dtype=torch.float64)
    groups = [mean.expand(7) for mean in means]
    low, high = bootstrap_interval(groups)
    expected = 1.96 * float(means.std()) / 10
    assert low < float(means.mean()) < high
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    assert bootstrap_interval([torch.ones(3, dtype=torch.float64)]) == [1.0, 1.0]
