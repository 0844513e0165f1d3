"""What quantizing took and cost: bytes by role and format, and the error of every tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from fastgpt.scheme import BLOCK, QuantizedTensor
from fastgpt.units import format_bytes

__all__ = ["Report", "TensorEntry", "render_report", "squared_errors"]

_NUM_WORST = 10
_AT_ONCE = 1 << 25  # values whose errors are computed together


class TensorEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the report says of one tensor.

    Attributes:
        role, format: as in the policy.
        num_values: of the tensor.
        before_bytes, after_bytes: stored, scales and padding of rows included.
        nmse: sum (x - x̂)² / sum x², where x is what was to be stored (a folded weight, not the
            original) and x̂ what is read back; of weights, not of the model's answers.
        squared_norm: sum x², by which rows weight their tensors; 0 where nothing was rounded.
        algorithm: which found the codes, where they were searched.
        transform: what was applied to the weight first, or None.
        error, nearest_error: relative squared error of the chosen codes and of round-to-nearest.
        of: "outputs" (of the weight, on held-out inputs) or "weights".
    """

    role: str
    format: str
    num_values: int
    before_bytes: int
    after_bytes: int
    nmse: float = 0.0
    squared_norm: float = 0.0
    algorithm: str | None = None
    transform: str | None = None
    error: float = 0.0
    nearest_error: float = 0.0
    of: str = ""


@dataclass
class Report:
    """Collects one entry per tensor; `to_json` is what a container carries."""

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    ranges: dict[str, Any] = field(default_factory=dict)
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
        self.tensors[name] = TensorEntry(
            role=role,
            format=fmt,
            num_values=num_values,
            before_bytes=before_bytes,
            after_bytes=after_bytes,
            nmse=squared_error / squared_norm if squared_error > 0 else 0.0,
            squared_norm=squared_norm,
        )

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
        """Note how the codes of a counted tensor were chosen, and its error beside the nearest."""
        self.tensors[name] = msgspec.structs.replace(
            self.tensors[name],
            algorithm=algorithm,
            transform=transform,
            error=error,
            nearest_error=nearest_error,
            of="outputs" if on_outputs else "weights",
        )

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """How the codes of every searched tensor were found."""
        keys = ("algorithm", "error", "nearest_error", "of", "transform")
        return {
            name: {k: getattr(entry, k) for k in keys if getattr(entry, k) is not None}
            for name, entry in self.tensors.items()
            if entry.algorithm is not None
        }

    def entries(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return entries as JSON values, which `restore` takes."""
        return {name: msgspec.to_builtins(self.tensors[name]) for name in names}

    def restore(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over entries of a run before this one."""
        for name, entry in entries.items():
            self.tensors[name] = msgspec.convert(entry, TensorEntry)

    @property
    def before_bytes(self) -> int:
        """Bytes of all weights in the source."""
        return sum(entry.before_bytes for entry in self.tensors.values())

    @property
    def after_bytes(self) -> int:
        """Bytes of all stored parts, scales and padding of rows included."""
        return sum(entry.after_bytes for entry in self.tensors.values())

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        num_values = sum(entry.num_values for entry in self.tensors.values())
        worst = sorted(((e.nmse, n) for n, e in self.tensors.items() if e.nmse > 0), reverse=True)
        return {
            "before_bytes": self.before_bytes,
            "after_bytes": self.after_bytes,
            "num_values": num_values,
            "bits_per_weight": 8 * self.after_bytes / num_values if num_values else 0.0,
            "rows": self._rows(),
            "worst": [{"name": name, "nmse": error} for error, name in worst[:_NUM_WORST]],
            "tensors": self.entries(self.tensors),
            "calibration": self.calibration,
            "quality": self.quality,
            "ranges": self.ranges,
            "allocation": self.allocation,
            "notes": self.notes,
        }

    def _rows(self) -> list[dict[str, Any]]:
        """Return sums over the tensors of one role stored in one format."""
        groups: dict[tuple[str, str], list[TensorEntry]] = {}
        for entry in self.tensors.values():
            groups.setdefault((entry.role, entry.format), []).append(entry)
        rows = []
        for (role, fmt), entries in sorted(groups.items()):
            norm = sum(e.squared_norm for e in entries)
            rows.append(
                {
                    "role": role,
                    "format": fmt,
                    "num_tensors": len(entries),
                    "num_values": sum(e.num_values for e in entries),
                    "before_bytes": sum(e.before_bytes for e in entries),
                    "after_bytes": sum(e.after_bytes for e in entries),
                    "nmse": sum(e.nmse * e.squared_norm for e in entries) / norm if norm else 0.0,
                }
            )
        return rows

    def __str__(self) -> str:
        """Return the table that `convert` prints."""
        return render_report(self.to_json())


def squared_errors(
    stored: torch.Tensor | QuantizedTensor, wanted: torch.Tensor
) -> tuple[float, float]:
    """Return sum (stored - wanted)² and sum wanted², in float64, a few rows at a time."""
    error = norm = 0.0
    step = max(1, _AT_ONCE // max(1, wanted[0].numel())) if wanted.ndim > 1 else len(wanted)
    step = -(-step // BLOCK) * BLOCK  # scales may be of blocks of rows
    if isinstance(stored, QuantizedTensor) and len(stored.shape) != 2:
        step = len(wanted)
    for first in range(0, len(wanted), step):
        exact = wanted[first : first + step].to(torch.float32)
        if isinstance(stored, torch.Tensor):
            got = stored[first : first + step].to(torch.float32)
        else:
            got = _rows(stored, first, first + len(exact)).dequantize()
        norm += float(torch.linalg.vector_norm(exact, dtype=torch.float64)) ** 2
        error += float(torch.linalg.vector_norm(got - exact, dtype=torch.float64)) ** 2
    return error, norm


def _rows(stored: QuantizedTensor, first: int, last: int) -> QuantizedTensor:
    """Return rows first .. last - 1 of a weight [rows, cols]; whole weights may have any rank."""
    if (first, last) == (0, stored.shape[0]):
        return stored
    is_blocks = stored.format.scale == "block"
    parts = {
        suffix: part[first // BLOCK : -(-last // BLOCK)]
        if is_blocks and suffix == "scale"
        else part[first:last]
        for suffix, part in stored.parts.items()
    }
    return QuantizedTensor(stored.format, (last - first, stored.shape[1]), parts)


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
    lines += _chosen(report.get("tensors", {}))
    if report.get("allocation"):
        lines.append(_allocated(report["allocation"]))
    if report.get("quality"):
        lines += _measured(report["quality"])
    lines += _range(report.get("ranges", {}))
    return "\n".join(lines + [f"note: {note}" for note in report["notes"]])


def _chosen(tensors: dict[str, dict[str, Any]]) -> list[str]:
    """Return what the search chose and won, a line for each kind of error."""
    lines = []
    for of in ("outputs", "weights"):
        entries = [entry for entry in tensors.values() if entry.get("of") == of]
        if not entries:
            continue
        ratios = [_ratio(e) for e in entries]
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


def _ratio(entry: dict[str, Any]) -> float:
    """Return the error of searched codes over that of round-to-nearest."""
    nearest = entry.get("nearest_error", 0.0)
    return float(entry.get("error", 0.0) / nearest) if nearest else 1.0


def _range(ranges: dict[str, Any]) -> list[str]:
    """Return the largest activation, and whether float16 holds it."""
    if not ranges:
        return []
    largest = f"largest activation {ranges['amax']:.4g} at {ranges['at']}"
    if over := ranges["fp16_overflows"]:
        names = ", ".join(list(over)[:3])
        largest += f": float16 is not safe ({names}), dtype auto takes another type"
    return [largest]


def _measured(figures: dict[str, Any]) -> list[str]:
    """Return the figures as lines for a reader."""
    low, high = figures["perplexity_ratio_95"]
    lines = [
        f"measured on {figures['positions']} positions ({figures['arithmetic']}): KL mean "
        f"{figures['kl_mean']:.3g}{_interval(figures, 'kl_mean_95')}, p99 "
        f"{figures['kl_p99']:.3g}, noise floor {figures['noise_floor_kl']:.2g} nats",
        f"same top token {100 * figures['same_top1']:.2f} %"
        f"{_interval(figures, 'same_top1_95', 100)}, perplexity ratio "
        f"{figures['perplexity_ratio']:.4f} (95 % interval {low:.4f} to {high:.4f})",
    ]
    if figures["near_noise"]:
        lines.append("the KL is within three noise floors: indistinguishable by this measure")
    return lines


def _interval(figures: dict[str, Any], key: str, factor: float = 1.0) -> str:
    if key not in figures:
        return ""
    low, high = figures[key]
    return f" (95 % interval {factor * low:.3g} to {factor * high:.3g})"


def _allocated(allocation: dict[str, Any]) -> str:
    """Return what the budget's solution promised."""
    limit = allocation["max_bytes"]
    within = f" of {format_bytes(limit)}" if limit else ""
    return (
        f"budget: {format_bytes(allocation['bytes'])}{within}, predicted KL "
        f"{allocation['predicted_kl']:.3g}; frontier of {len(allocation['frontier'])} choices"
    )
