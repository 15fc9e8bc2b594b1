"""Spectra beside the real pictures' as inline SVG: it takes its colours from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from selfcascade.evaluation.loss_plot import log_ticks
from selfcascade.evaluation.results import Spectrum

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 120, 12, 40
_APART = 15
"""Least distance of two labels, in pixels."""
DASHES = ("", "8 4", "2 3", "10 3 2 3", "5 2", "1 5", "12 2")
"""How lines are told apart without colours."""


def spectrum_svg(spectra: Sequence[Spectrum]) -> str:
    """Power of each but the first over that of the first, by spatial frequency, on a logarithmic axis, as an ``<svg>`` element."""
    real, *others = spectra
    ratios = [[max(value, 1e-9) / max(reference, 1e-9) for value, reference in zip(item.power, real.power, strict=True)] for item in others]
    low = math.log(min(0.5, *(min(line) for line in ratios)))
    high = math.log(max(2.0, *(max(line) for line in ratios)))
    right, bottom, rings = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, len(real.power)

    def x(cycles: float) -> float:
        return _LEFT + cycles / 0.5 * (right - _LEFT)

    def y(ratio: float) -> float:
        return _TOP + (high - math.log(ratio)) / (high - low) * (bottom - _TOP)

    parts = [f'<svg class="curve spectra" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="power over that of real pictures, by spatial frequency">']
    for ratio in {1.0, *log_ticks(math.exp(low), math.exp(high))}:
        kind = "axis" if ratio == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{right}" y1="{y(ratio):.1f}" y2="{y(ratio):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(ratio) + 4:.1f}" text-anchor="end">{ratio:.4g}</text>')
    for cycles in (0, 0.1, 0.2, 0.3, 0.4, 0.5):
        parts.append(f'<text x="{x(cycles):.1f}" y="{bottom + 18}" text-anchor="middle">{cycles:g}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">cycles a pixel</text>')
    for number, line in enumerate(ratios):
        points = " ".join(f"{x((ring + 0.5) / rings / 2):.1f},{y(ratio):.1f}" for ring, ratio in enumerate(line))
        parts.append(f'<polyline class="mean" stroke-dasharray="{DASHES[number % len(DASHES)]}" points="{points}"/>')
    ends = spread([y(line[-1]) for line in ratios], lowest=bottom)
    parts += [f'<text x="{right + 8}" y="{end + 4:.1f}">{escape(item.label)}</text>' for item, end in zip(others, ends, strict=True)]
    return "".join([*parts, "</svg>"])


def spread(places: Sequence[float], *, lowest: float) -> list[float]:
    """Places of labels, moved as little as a pass from the top needs, so that no two are too close and none lies below ``lowest``."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda number: places[number])
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + _APART)
    excess = max(0.0, moved[order[-1]] - lowest) if order else 0.0
    return [place - excess for place in moved]
