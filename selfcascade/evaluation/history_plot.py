"""A metric over the versions of a report as inline SVG: it takes its colours from the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from selfcascade.evaluation.intervals import Interval
from selfcascade.evaluation.published import Past
from selfcascade.evaluation.results import Metric
from selfcascade.evaluation.spectrum_plot import DASHES, spread

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 120, 12, 40
_ASIDE = 4
"""Pixels from one label's intervals to the next one's, which would else hide each other."""
_DATES = 6
"""Versions under which a date is written, at most."""


def history_svg(metric: Metric, history: Sequence[Past], labels: Sequence[str]) -> str:
    """The metric of ``labels`` over at least two versions, each with its 95 % interval, as an ``<svg>`` element; empty where no version has it."""
    lines = {label: _line(metric, history, label) for label in labels}
    lines = {label: line for label, line in lines.items() if line}
    if not lines:
        return ""
    ends = [end for line in lines.values() for _, interval in line for end in (interval.low, interval.high)]
    low, high = min(ends), max(ends)
    margin = (high - low or abs(high) or 1.0) * 0.05
    low, high, right, bottom = low - margin, high + margin, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(place: float) -> float:
        return _LEFT + 16 + place / (len(history) - 1) * (right - _LEFT - 32)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (bottom - _TOP)

    parts = [f'<svg class="curve history" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(metric.heading)} over versions of the report">']
    for number in range(5):
        value = low + (high - low) * number / 4
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value * metric.scale:,.{metric.digits}f}</text>')
    for place in range(0, len(history), -(-len(history) // _DATES)):
        told = f"{history[place].published:%Y-%m-%d}"
        parts.append(f'<text x="{x(place):.1f}" y="{bottom + 18}" text-anchor="middle"><title>{history[place].version[:12]}</title>{told}</text>')
    for label, line in lines.items():
        number = list(labels).index(label)
        aside = _ASIDE * (number - (len(labels) - 1) / 2)
        for at, interval in line:
            parts.append(f'<line class="axis" x1="{x(at) + aside:.1f}" x2="{x(at) + aside:.1f}" y1="{y(interval.low):.1f}" y2="{y(interval.high):.1f}"/>')
        points = " ".join(f"{x(at) + aside:.1f},{y(interval.value):.1f}" for at, interval in line)
        parts.append(f'<polyline class="mean" stroke-dasharray="{DASHES[number % len(DASHES)]}" points="{points}"/>')
    places = spread([y(line[-1][1].value) for line in lines.values()], lowest=bottom)
    parts += [f'<text x="{right + 8}" y="{place + 4:.1f}">{escape(label)}</text>' for label, place in zip(lines, places, strict=True)]
    return "".join([*parts, "</svg>"])


def _line(metric: Metric, history: Sequence[Past], label: str) -> list[tuple[int, Interval]]:
    """Place and value of each version that has the metric for this label."""
    found = []
    for place, past in enumerate(history):
        number = next((row.numbers[metric.name] for row in past.results.rows if row.label == label and metric.name in row.numbers), None)
        if number is not None and number.value is not None:
            found.append((place, Interval(number.value, number.error or 0.0)))
    return found
