"""A loss curve as inline SVG: it takes its colours from the page, so it suits light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import accumulate

from selfcascade.evaluation.results import Curve

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 40


def loss_svg(curve: Curve) -> str:
    """The curve with its running mean, loss on a logarithmic axis, as an ``<svg>`` element."""
    losses = [max(loss, 1e-12) for loss in curve.losses]
    smooth = running_mean(losses, max(1, len(losses) // 40))
    shown = sorted(losses)
    low, high = math.log(shown[0]), math.log(shown[-1])
    if high - low < 1e-9:
        low, high = low - 0.1, high + 0.1
    first, last = curve.steps[0], max(curve.steps[-1], curve.steps[0] + 1)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(loss: float) -> float:
        return _TOP + (high - math.log(loss)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def path(values: Sequence[float], kind: str) -> str:
        points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in zip(curve.steps, values, strict=True))
        return f'<polyline class="{kind}" points="{points}"/>'

    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(curve.name)}: loss against step">']
    for loss in log_ticks(math.exp(low), math.exp(high)):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(loss):.1f}" y2="{y(loss):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.4g}</text>')
    for step in step_ticks(first, last):
        parts.append(f'<text x="{x(step):.1f}" y="{bottom + 18}" text-anchor="middle">{step}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>')
    parts += [path(losses, "raw"), path(smooth, "mean"), "</svg>"]
    return "".join(parts)


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and of up to ``reach`` neighbours on either side; fewer near an end, as many on one side as on the other."""
    sums = [0.0, *accumulate(values)]
    means = []
    for place in range(len(values)):
        near = min(reach, place, len(values) - 1 - place)
        means.append((sums[place + near + 1] - sums[place - near]) / (2 * near + 1))
    return means


def log_ticks(low: float, high: float) -> list[float]:
    """At most about six round values between ``low`` and ``high`` on a logarithmic axis; the two ends where no round value lies between."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [float(f"{step * 10.0**decade:.6g}") for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return ticks if len(ticks) == 2 else [low, high]


def step_ticks(first: int, last: int) -> list[int]:
    """Round steps from ``first`` to ``last``, about six."""
    raw = (last - first) / 6
    unit = 10 ** math.floor(math.log10(max(raw, 1)))
    size = max(1, int(next(factor for factor in (1, 2, 5, 10) if factor * unit >= raw) * unit))
    return list(range(-(-first // size) * size, last + 1, size))
