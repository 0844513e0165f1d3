"""What quantizing took and cost: bytes by role and format, and the error of every tensor."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fastgpt.units import format_bytes

__all__ = ["Report", "render_report"]

_NUM_WORST = 10


@dataclass
class _Row:
    """Sums over the tensors of one role stored in one format."""

    num_tensors: int = 0
    num_values: int = 0
    before_bytes: int = 0
    after_bytes: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0


@dataclass
class Report:
    """Collects one entry per tensor; `to_json` is what a container carries.

    The error of a tensor is its normalized mean squared error, sum (x - x̂)² / sum x², where x is
    what was to be stored (a folded weight, not the original) and x̂ what is read back. It is an
    error of weights, not of the model's answers.
    """

    rows: dict[tuple[str, str], _Row] = field(default_factory=dict)
    errors: list[tuple[float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        name: str,
        *,
        role: str,
        fmt: str,
        num_values: int,
        before_bytes: int,
        after_bytes: int,
        squared_error: float = 0.0,
        squared_norm: float = 0.0,
    ) -> None:
        """Count one stored tensor."""
        row = self.rows.setdefault((role, fmt), _Row())
        row.num_tensors += 1
        row.num_values += num_values
        row.before_bytes += before_bytes
        row.after_bytes += after_bytes
        row.squared_error += squared_error
        row.squared_norm += squared_norm
        if squared_error > 0:
            self.errors.append((squared_error / squared_norm, name))
            if len(self.errors) > 8 * _NUM_WORST:
                self.errors = sorted(self.errors, reverse=True)[:_NUM_WORST]

    def add_choice(
        self,
        name: str,
        *,
        algorithm: str,
        transform: str | None,
        error: float,
        nearest_error: float,
        on_outputs: bool,
    ) -> None:
        """Note how the codes of one tensor were chosen, and its error beside round-to-nearest's."""
        entry = {
            "algorithm": algorithm,
            "error": error,
            "nearest_error": nearest_error,
            "of": "outputs" if on_outputs else "weights",
        }
        self.choices[name] = entry if transform is None else {**entry, "transform": transform}

    @property
    def before_bytes(self) -> int:
        """Bytes of all weights in the source."""
        return sum(row.before_bytes for row in self.rows.values())

    @property
    def after_bytes(self) -> int:
        """Bytes of all stored parts, scales and padding of rows included."""
        return sum(row.after_bytes for row in self.rows.values())

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        num_values = sum(row.num_values for row in self.rows.values())
        return {
            "before_bytes": self.before_bytes,
            "after_bytes": self.after_bytes,
            "num_values": num_values,
            "bits_per_weight": 8 * self.after_bytes / num_values if num_values else 0.0,
            "rows": [
                {
                    "role": role,
                    "format": fmt,
                    "num_tensors": row.num_tensors,
                    "num_values": row.num_values,
                    "before_bytes": row.before_bytes,
                    "after_bytes": row.after_bytes,
                    "nmse": row.squared_error / row.squared_norm if row.squared_norm else 0.0,
                }
                for (role, fmt), row in sorted(self.rows.items())
            ],
            "worst": [
                {"name": name, "nmse": error}
                for error, name in sorted(self.errors, reverse=True)[:_NUM_WORST]
            ],
            "choices": self.choices,
            "calibration": self.calibration,
            "quality": self.quality,
            "allocation": self.allocation,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        """Return the table that `convert` prints."""
        return render_report(self.to_json())


def render_report(report: dict[str, Any]) -> str:
    """Return a report, as `to_json` gave it, as a table of plain text."""
    head = ("role", "format", "tensors", "before", "after", "bits/weight", "error (NMSE)")
    table = [head]
    for row in report["rows"]:
        bits = 8 * row["after_bytes"] / row["num_values"] if row["num_values"] else 0.0
        table.append(
            (
                row["role"],
                row["format"],
                str(row["num_tensors"]),
                format_bytes(row["before_bytes"]),
                format_bytes(row["after_bytes"]),
                f"{bits:.2f}",
                f"{100 * row['nmse']:.3g} %" if row["nmse"] else "0",
            )
        )
    before, after = report["before_bytes"], report["after_bytes"]
    num_tensors = sum(row["num_tensors"] for row in report["rows"])
    total_bits = f"{report['bits_per_weight']:.2f}"
    table.append(
        ("total", "", str(num_tensors), format_bytes(before), format_bytes(after), total_bits, "")
    )
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    lines = []
    for line in table:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if after:
        lines.append(f"{before / after:.2f} times smaller")
    lines += _chosen(report.get("choices", {}))
    if report.get("allocation"):
        lines.append(_allocated(report["allocation"]))
    if report.get("quality"):
        lines += _measured(report["quality"])
    return "\n".join(lines + [f"note: {note}" for note in report["notes"]])


def _chosen(choices: dict[str, dict[str, Any]]) -> list[str]:
    """Return what the search chose and won, a line for each kind of error."""
    lines = []
    for of in ("outputs", "weights"):
        entries = [entry for entry in choices.values() if entry["of"] == of]
        if not entries:
            continue
        ratios = [e["error"] / e["nearest_error"] if e["nearest_error"] else 1.0 for e in entries]
        counts = Counter(
            "+".join(filter(None, (e.get("transform"), e["algorithm"]))) for e in entries
        )
        kinds = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        where = "held-out outputs" if of == "outputs" else "weights"
        lines.append(
            f"searched codes: squared error of {where} {sum(ratios) / len(ratios):.2f} times "
            f"round-to-nearest's (mean of {len(entries)} tensors; {kinds})"
        )
    return lines


def _measured(figures: dict[str, Any]) -> list[str]:
    """Return the figures as lines for a reader."""
    low, high = figures["perplexity_ratio_95"]
    lines = [
        f"measured on {figures['positions']} positions ({figures['arithmetic']}): KL mean "
        f"{figures['kl_mean']:.3g}, p99 {figures['kl_p99']:.3g}, noise floor "
        f"{figures['noise_floor_kl']:.2g} nats",
        f"same top token {100 * figures['same_top1']:.2f} %, perplexity ratio "
        f"{figures['perplexity_ratio']:.4f} (95 % interval {low:.4f} to {high:.4f})",
    ]
    if figures["near_noise"]:
        lines.append("the KL is within three noise floors: indistinguishable by this measure")
    return lines


def _allocated(allocation: dict[str, Any]) -> str:
    """Return what the budget's solution promised."""
    limit = allocation["max_bytes"]
    within = f" of {format_bytes(limit)}" if limit else ""
    return (
        f"budget: {format_bytes(allocation['bytes'])}{within}, predicted KL "
        f"{allocation['predicted_kl']:.3g}; frontier of {len(allocation['frontier'])} choices"
    )
