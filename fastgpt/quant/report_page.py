"""A quantized file's report as one HTML page: figures with their metric, charts, every tensor.

The page loads nothing: style and charts are inside it, so it can be mailed or kept beside the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fastgpt.checkpoint.container import Container
from fastgpt.quant.charts import Bar, Mark, bar_chart, line_chart
from fastgpt.quant.ranges import FP16_LIMIT
from fastgpt.units import format_bytes

__all__ = ["report_json", "report_page"]

_NUM_WORST = 15
_LAYER = re.compile(r"^model\.layers\.(\d+)(?:\.|$)")

_STYLE = """
:root{--ink:#1c2127;--soft:#5d6772;--line:#dfe3e8;--back:#fff;--card:#f6f8fa;--bar:#3f72af;
--accent:#c8553d;--ok:#2e7d4f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#98a2ad;--line:#333a43;--back:#14181d;
--card:#1c2229;--bar:#6ea0dc;--accent:#e88468;--ok:#6cc494}}
*{box-sizing:border-box}
body{margin:0 auto;padding:32px 24px 64px;max-width:900px;color:var(--ink);background:var(--back);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0 0 2px;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 4px}
p{margin:4px 0 12px}.soft,.sub{color:var(--soft)}.sub{font-size:13px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(250px,1fr));gap:12px;margin:20px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.card b{display:block;font-size:23px;font-weight:600;line-height:1.25}
.card span{display:block;font-size:12.5px;color:var(--soft)}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:4px 10px 4px 0;border-bottom:1px solid var(--line);
vertical-align:top}
th{font-weight:600;color:var(--soft)}th.l,td.l{text-align:left;overflow-wrap:anywhere}
.wide{overflow-x:auto}
.share{display:inline-block;height:9px;background:var(--bar);border-radius:2px}
svg{width:100%;height:auto;display:block;margin:6px 0}
svg text{fill:var(--soft);font-size:11.5px}svg .unit{font-size:12px}
.bar{fill:var(--bar)}.whisker{stroke:var(--ink);stroke-width:1.3}
.reference{stroke:var(--accent);stroke-width:2}.line{fill:none;stroke:var(--bar);stroke-width:2}
.dot{fill:var(--bar)}.mark{fill:var(--accent)}.grid{stroke:var(--line)}.axis{stroke:var(--soft)}
.level{stroke:var(--accent);stroke-dasharray:5 4}
.good{color:var(--ok)}.bad{color:var(--accent)}
.name{font-size:12.5px;min-width:215px}
code{font-size:12px;overflow-wrap:anywhere}summary{cursor:pointer;margin:8px 0}
li{margin:4px 0;overflow-wrap:anywhere}
"""


def report_json(container: Container) -> dict[str, Any]:
    """Return the report of a file with its size, policy and certificate, as JSON values."""
    metadata = container.metadata
    certificate = {k: v for k, v in metadata.certificate.items() if k != "evaluation_tokens"}
    return {
        "file": container.path.name,
        "file_bytes": container.path.stat().st_size,
        "format_version": metadata.format_version,
        "architectures": (container.config or {}).get("architectures"),
        "policy": metadata.policy,
        "certificate": certificate,
        **metadata.report,
    }


def report_page(container: Container) -> str:
    """Return the report of a file as an HTML page."""
    report = report_json(container)
    model = ", ".join(report["architectures"] or ["a module of another library"])
    parts = [
        f"<h1>{escape(report['file'])}</h1>",
        f'<p class="soft">{escape(model)}, quantized by FastGPT</p>',
        _cards(report),
        _quality(report.get("quality", {})),
        _sizes(report),
        _frontier(report.get("allocation", {})),
        _layers(report.get("tensors", {})),
        _worst(report.get("tensors", {})),
        _ranges(report.get("ranges", {})),
        _origin(report),
        _notes(report.get("notes", [])),
        _all_tensors(report.get("tensors", {})),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report['file'])}: quantization report</title><style>{_STYLE}</style>"
        f"</head><body>{''.join(parts)}</body></html>\n"
    )


def _cards(report: Mapping[str, Any]) -> str:
    before, after = report["before_bytes"], report["after_bytes"]
    cards = [
        (
            format_bytes(after),
            f"all weights with scales; {format_bytes(before)} before, "
            f"{before / after if after else 0:.2f} times smaller",
        ),
        (f"{report['bits_per_weight']:.3f}", "bits per weight, scales and padding included"),
    ]
    if quality := report.get("quality"):
        cards += [
            (
                f"{quality['kl_mean']:.3g} nats",
                f"KL divergence from the source, mean{_interval(quality, 'kl_mean_95')}",
            ),
            (
                f"{100 * quality['same_top1']:.2f} %",
                f"same top token as the source{_interval(quality, 'same_top1_95', 100, ' %')}",
            ),
            (
                f"{quality['perplexity_ratio']:.4f}",
                f"perplexity over the source's{_interval(quality, 'perplexity_ratio_95')}",
            ),
            (
                f"{quality['noise_floor_kl']:.2g} nats",
                "noise floor: KL between the source in float32 and in bfloat16",
            ),
        ]
    inner = "".join(
        f'<div class="card"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in cards
    )
    return f'<div class="cards">{inner}</div>'


def _interval(quality: Mapping[str, Any], key: str, factor: float = 1, unit: str = "") -> str:
    if key not in quality:
        return ""
    low, high = quality[key]
    return f", 95 % interval {factor * low:.4g} to {factor * high:.4g}{unit}"


def _quality(quality: Mapping[str, Any]) -> str:
    if not quality:
        return (
            "<h2>Answers</h2><p>The model's answers were not measured: it was quantized without "
            "calibration data. Errors below are of weights, which say little of answers.</p>"
        )
    rows = [
        ("KL divergence, mean", f"{quality['kl_mean']:.4g} nats"),
        ("KL divergence, median", _nats(quality.get("kl_median"))),
        ("KL divergence, 99th percentile", _nats(quality.get("kl_p99"))),
        ("noise floor (KL)", _nats(quality.get("noise_floor_kl"))),
        ("same top token", f"{100 * quality['same_top1']:.3f} %"),
        ("perplexity ratio", f"{quality['perplexity_ratio']:.5f}"),
        ("negative log-likelihood a token", f"{quality['nll_source']:.4f} → {quality['nll']:.4f}"),
        ("positions, sequences", f"{quality['positions']}, {quality.get('num_sequences', '?')}"),
        ("arithmetic", str(quality.get("arithmetic", "?"))),
    ]
    verdict = (
        '<p class="bad">The KL divergence is within three noise floors: by this measure the file '
        "cannot be told from its source, nor from a better file.</p>"
        if quality.get("near_noise")
        else ""
    )
    return (
        "<h2>Answers</h2><p class=sub>Next-token distributions on text that chose nothing, all "
        "positions; intervals by drawing whole sequences anew.</p>"
        + verdict
        + _table((), [[("l", a), ("", b)] for a, b in rows])
    )


def _nats(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g} nats"


def _sizes(report: Mapping[str, Any]) -> str:
    largest = max((row["after_bytes"] for row in report["rows"]), default=1) or 1
    head = ("role", "format", "tensors", "before", "after", "bits/weight", "weight error", "")
    rows = []
    for row in report["rows"]:
        bits = 8 * row["after_bytes"] / row["num_values"] if row["num_values"] else 0.0
        width = 90 * row["after_bytes"] / largest
        rows.append(
            [
                ("l", row["role"]),
                ("l", row["format"]),
                ("", str(row["num_tensors"])),
                ("", format_bytes(row["before_bytes"])),
                ("", format_bytes(row["after_bytes"])),
                ("", f"{bits:.3f}"),
                ("", _percent(row["nmse"])),
                ("raw", f'<span class="share" style="width:{width:.0f}px"></span>'),
            ]
        )
    return (
        "<h2>Bytes</h2><p class=sub>Weight error: squared error over squared size of what was to "
        "be stored. It is not a loss of answers.</p>" + _table(head, rows)
    )


def _frontier(allocation: Mapping[str, Any]) -> str:
    points = [(size / 1e9, loss) for size, loss in allocation.get("frontier", [])]
    if len(points) < 2:
        return ""
    unit, factor = ("GB", 1.0) if points[-1][0] >= 0.1 else ("MB", 1000.0)
    points = [(factor * size, loss) for size, loss in points]
    chosen = Mark(
        "this file", factor * allocation["bytes"] / 1e9, max(allocation["predicted_kl"], 0.0)
    )
    chart = line_chart(
        points,
        title="size and predicted loss of every best choice of formats",
        x_unit=f"all weights, {unit}",
        y_unit="predicted KL, nats",
        marks=[chosen],
        log=True,
    )
    return (
        "<h2>Size and loss</h2><p class=sub>Every point is a best choice of formats: none is both "
        f"smaller and nearer to the source. {len(points)} choices.</p>{chart}"
    )


def _layers(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the error of every layer: of outputs where it was measured, else of weights."""
    on_outputs = any(entry.get("of") == "outputs" for entry in tensors.values())
    layers: dict[int, list[tuple[float, float | None]]] = {}
    for name, entry in tensors.items():
        match = _LAYER.match(name)
        if match is None or (on_outputs and entry.get("of") != "outputs"):
            continue
        error = entry.get("error", 0.0) if on_outputs else entry.get("nmse", 0.0)
        if error > 0:
            nearest = entry.get("nearest_error") if on_outputs else None
            layers.setdefault(int(match[1]), []).append((error, nearest))
    if not layers:
        return ""
    bars = []
    for index, found in sorted(layers.items()):
        errors = [100 * error for error, _ in found]
        nearest = [100 * value for _, value in found if value is not None]
        bars.append(
            Bar(
                str(index),
                sum(errors) / len(errors),
                min(errors),
                max(errors),
                sum(nearest) / len(nearest) if nearest else None,
            )
        )
    of = "outputs on held-out inputs" if on_outputs else "weights"
    rest = "; the red line is round-to-nearest's mean" if on_outputs else ""
    chart = bar_chart(
        bars,
        title=f"relative squared error of {of}, by layer",
        unit=f"error of {'outputs' if on_outputs else 'weights'}, %",
        reference="round-to-nearest",
    )
    return (
        f"<h2>Error by layer</h2><p class=sub>Relative squared error of {of}: mean of the layer's "
        f"weights, whiskers from the least to the largest{rest}.</p>{chart}"
    )


def _worst(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    ranked = sorted(tensors.items(), key=lambda item: -_error(item[1]))[:_NUM_WORST]
    ranked = [(name, entry) for name, entry in ranked if _error(entry) > 0]
    if not ranked:
        return ""
    return f"<h2>Largest errors</h2>{_tensor_table(ranked)}"


def _error(entry: Mapping[str, Any]) -> float:
    return float(entry.get("error") or entry.get("nmse", 0.0))


def _tensor_table(tensors: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    head = ("tensor", "format", "bits", "weight error", "output error", "of nearest", "codes")
    rows = []
    for name, entry in tensors:
        is_of_outputs = entry.get("of") == "outputs"
        nearest = entry.get("nearest_error", 0.0)
        ratio = f"{entry['error'] / nearest:.2f}" if nearest and "error" in entry else ""
        how = " + ".join(filter(None, (entry.get("transform"), entry.get("algorithm"))))
        rows.append(
            [
                ("l name", name.replace(".", ".\u200b")),  # a line may break behind a dot
                ("l", entry["format"]),
                ("", f"{8 * entry['after_bytes'] / max(1, entry['num_values']):.2f}"),
                ("", _percent(entry.get("nmse", 0.0))),
                ("", _percent(entry.get("error", 0.0)) if is_of_outputs else ""),
                ("", ratio),
                ("l", how),
            ]
        )
    return _table(head, rows)


def _ranges(ranges: Mapping[str, Any]) -> str:
    if not ranges:
        return (
            "<h2>Range of activations</h2><p>Not measured: there was no calibration data. NaN and "
            "infinity in weights are refused in any case.</p>"
        )
    over = ranges.get("fp16_overflows", {})
    words = (
        f'<p class="bad">float16 is not safe: {len(over)} places pass {FP16_LIMIT:.0f}, the '
        f"largest is {escape(next(iter(over)))}. The run-time type <code>auto</code> takes "
        "bfloat16 for this file, or float32 where there is none.</p>"
        if over
        else '<p class="good">float16 holds all activations that were seen, twice over.</p>'
    )
    layers: dict[int, float] = {}
    for name, amax in ranges.get("tensors", {}).items():
        if match := _LAYER.match(name):
            layers[int(match[1])] = max(layers.get(int(match[1]), 0.0), amax)
    chart = ""
    if len(layers) > 1:
        chart = line_chart(
            [(float(i), amax) for i, amax in sorted(layers.items())],
            title="largest activation of every layer",
            x_unit="layer",
            y_unit="largest |x|",
            marks=[Mark("limit for float16", None, FP16_LIMIT)],
            log=True,
        )
    at = escape(str(ranges.get("at")))
    return (
        f"<h2>Range of activations</h2><p>Largest |x| {ranges['amax']:.4g} at <code>{at}</code>; "
        f"no NaN or infinity in any weight.</p>{words}{chart}"
    )


def _origin(report: Mapping[str, Any]) -> str:
    calibration, certificate = report.get("calibration", {}), report["certificate"]
    rows = [("source, SHA-256 of all weights", certificate.get("source_sha256", "not stated"))]
    if calibration:
        rows += [
            ("calibration", calibration["source"]),
            (
                "its sequences, tokens",
                f"{calibration['num_sequences']}, {calibration['num_tokens']}",
            ),
            ("its SHA-256", calibration["sha256"]),
        ]
    if "evaluation_sha256" in certificate:
        rows.append(("evaluation tokens, SHA-256", certificate["evaluation_sha256"]))
    rows.append(
        ("file", f"{report['file_bytes']:,} bytes, format version {report['format_version']}")
    )
    return (
        "<h2>Where it comes from</h2><p class=sub>Every tensor's SHA-256 is in the file; "
        "<code>fastgpt verify</code> computes them and these figures again.</p>"
        + _table((), [[("l", a), ("l", str(b))] for a, b in rows])
        + "<details><summary>Policy</summary><code>"
        + f"{escape(str(report['policy']))}</code></details>"
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"


def _all_tensors(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    return (
        f"<h2>Tensors</h2><details><summary>All {len(tensors)}</summary>"
        f"{_tensor_table(tensors.items())}</details>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """Return a table; a cell is (class, text), and text of class "raw" is HTML already."""
    lines = []
    if head:
        is_left = {"role", "format", "tensor", "codes"}
        cells = "".join(
            f'<th class="{"l" if cell in is_left else ""}">{escape(cell)}</th>' for cell in head
        )
        lines.append(f"<tr>{cells}</tr>")
    for row in rows:
        cells = "".join(
            f"<td>{text}</td>" if kind == "raw" else f'<td class="{kind}">{escape(text)}</td>'
            for kind, text in row
        )
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share else "0"
