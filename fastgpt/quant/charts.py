"""Charts of a report as inline SVG: bars with ranges, and lines, on linear or logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Mark", "bar_chart", "line_chart"]

_WIDTH, _HEIGHT = 760, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 14, 40
_MAX_LABELS = 24
_MAX_LINEAR_RATIO = 50.0  # of the largest value to the least
_MIN_LOG_SHARE = 1e-6  # of the largest value: what is smaller is drawn there on a log axis


@dataclass(frozen=True)
class Bar:
    """One bar: its label, value, the range of what it is the mean of, and a value to compare."""

    label: str
    value: float
    low: float
    high: float
    reference: float | None = None


@dataclass(frozen=True)
class Mark:
    """A point with a name, or a horizontal line where x is None."""

    name: str
    x: float | None
    y: float


class _Axis:
    """Places values between two pixels, with ticks at round numbers."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool) -> None:
        self.log = log
        if log:
            low, high = math.log10(low), math.log10(high)
        if high <= low:
            low, high = low - 0.5, high + 0.5
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value: float) -> float:
        """Return the pixel of a value, the nearest end for one outside."""
        scaled = math.log10(value) if self.log and value > 0 else -math.inf if self.log else value
        share = min(1.0, max(0.0, (scaled - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return three to eight round values."""
        if self.log:
            first, last = math.ceil(self.low), math.floor(self.high)
            if last - first >= 1:
                step = max(1, (last - first) // 6)
                return [10.0**power for power in range(first, last + 1, step)]
            return [10**self.low, 10 ** ((self.low + self.high) / 2), 10**self.high]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 3))
        for factor in (5, 2):
            if (self.high - self.low) / (step * factor) >= 3:
                step *= factor
                break
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


def bar_chart(bars: Sequence[Bar], *, title: str, unit: str, reference: str = "") -> str:
    """Return bars with whiskers from low to high; short lines mark the values to compare.

    The axis is logarithmic where a linear one would leave some bars invisible.

    Args:
        bars: one or more, values >= 0.
        title: what a bar is, for readers who do not see it.
        unit: of the vertical axis.
        reference: what the short lines are.
    """
    top = max(max(bar.high, bar.reference or 0.0) for bar in bars)
    least = min((bar.low for bar in bars if bar.low > 0), default=top)
    log = top > _MAX_LINEAR_RATIO * least
    lowest = max(least / 2, top * _MIN_LOG_SHARE) if log else 0.0
    y = _Axis(lowest, top * (1.5 if log else 1.05) or 1.0, _HEIGHT - _BOTTOM, _TOP, log=log)
    slot = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    every = -(-len(bars) // _MAX_LABELS)
    body = []
    for i, bar in enumerate(bars):
        middle, half = _LEFT + slot * (i + 0.5), min(26.0, slot * 0.7) / 2
        head = y.at(bar.value)
        tip = f"{bar.label}: {_number(bar.value)} ({_number(bar.low)} to {_number(bar.high)})"
        if bar.reference is not None:
            tip += f"; {reference} {_number(bar.reference)}"
        body.append(
            f'<g><title>{escape(tip)}</title><rect class="bar" x="{middle - half:.1f}" '
            f'y="{head:.1f}" width="{2 * half:.1f}" height="{y.start - head:.1f}"/>'
            f'<path class="whisker" d="M{middle:.1f} {y.at(bar.low):.1f}V{y.at(bar.high):.1f}"/>'
        )
        if bar.reference is not None:
            start, at = middle - half - 2, y.at(bar.reference)
            body.append(f'<path class="reference" d="M{start:.1f} {at:.1f}h{2 * half + 4:.1f}"/>')
        body.append("</g>")
        if i % every == 0:
            body.append(_text(middle, _HEIGHT - _BOTTOM + 16, bar.label, "middle"))
    return _frame(title, unit, "", y, None, body)


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    title: str,
    x_unit: str,
    y_unit: str,
    marks: Sequence[Mark] = (),
    log: bool = False,
) -> str:
    """Return a line through points, with named points and levels.

    Args:
        points: (x, y), in the order of the line; two or more.
        title: what the line is.
        x_unit, y_unit: of the axes.
        marks: named points and horizontal lines.
        log: vertical axis; values <= 0 are drawn at its end.
    """
    xs = [x for x, _ in points] + [m.x for m in marks if m.x is not None]
    ys = [y for _, y in points] + [m.y for m in marks]
    highest = max(ys)
    floor = highest * _MIN_LOG_SHARE
    lowest = min([v for v in ys if v > floor], default=floor) if log else min(0.0, *ys)
    log = log and highest > 0
    y = _Axis(
        lowest / 1.3 if log else lowest,
        highest * (1.3 if log else 1.05) or 1.0,
        _HEIGHT - _BOTTOM,
        _TOP,
        log=log,
    )
    x = _Axis(min(xs), max(xs), _LEFT + 6, _WIDTH - _RIGHT - 6, log=False)
    path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in points)
    body = [f'<polyline class="line" points="{path}"/>']
    if len(points) <= 80:
        body += [
            f'<circle class="dot" r="2.5" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}"><title>'
            f"{_number(a)} {escape(x_unit)}: {_number(b)} {escape(y_unit)}</title></circle>"
            for a, b in points
        ]
    for mark in marks:
        at = y.at(mark.y)
        if mark.x is None:
            body.append(f'<path class="level" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
            body.append(_text(_WIDTH - _RIGHT, at - 4, mark.name, "end"))
            continue
        place = x.at(mark.x)
        is_right = place > _WIDTH / 2
        body.append(f'<circle class="mark" r="5" cx="{place:.1f}" cy="{at:.1f}"/>')
        body.append(
            _text(
                place + (-9 if is_right else 9), at - 8, mark.name, "end" if is_right else "start"
            )
        )
    return _frame(title, y_unit, x_unit, y, x, body)


def _frame(
    title: str, y_unit: str, x_unit: str, y: _Axis, x: _Axis | None, body: Sequence[str]
) -> str:
    """Return axes, grid and units around a chart's body."""
    lines = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for value in y.ticks():
        at = y.at(value)
        lines.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        lines.append(_text(_LEFT - 8, at + 4, _number(value), "end"))
    for value in x.ticks() if x is not None else []:
        lines.append(
            _text(x.at(value) if x else 0, _HEIGHT - _BOTTOM + 16, _number(value), "middle")
        )
    lines.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    lines.append(
        f'<text class="unit" text-anchor="middle" transform="translate(14 {middle}) rotate(-90)">'
        f"{escape(y_unit)}</text>"
    )
    if x_unit:
        lines.append(
            f'<text class="unit" text-anchor="middle" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" '
            f'y="{_HEIGHT - 6}">{escape(x_unit)}</text>'
        )
    return "".join([*lines, *body, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:.3g}"
