"""The page of a dataset: one HTML file that needs nothing else: no request, no script, light and dark."""

from __future__ import annotations

import base64
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from selfcascade.curation.statistics import Histogram, Statistics

WIDTH, HEIGHT, FOOT = 320, 130, 18


def render_page(statistics: Statistics) -> str:
    """The page; text of the dataset is escaped wherever it is shown."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("selfcascade.curation").joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        statistics=statistics,
        histograms=[(histogram.title, Markup(bars(histogram))) for histogram in statistics.histograms],
        uri=_uri,
    )


def bars(histogram: Histogram) -> str:
    """The histogram as an ``<svg>`` element: rejected values stand on the kept ones."""
    highest = max(int((histogram.kept + histogram.rejected).max()), 1)
    count = len(histogram.kept)
    step = WIDTH / count
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT + FOOT}" role="img" aria-label="{escape(histogram.title)}">']
    for place, (kept, rejected) in enumerate(zip(histogram.kept.tolist(), histogram.rejected.tolist(), strict=True)):
        low, high = histogram.edges[place], histogram.edges[place + 1]
        top = HEIGHT * (1 - (kept + rejected) / highest)
        middle = HEIGHT * (1 - kept / highest)
        x, width = place * step + 0.5, step - 1
        title = f"<title>{_short(low)} to {_short(high)}: {kept} kept, {rejected} rejected</title>"
        parts.append(f'<g>{title}<rect class="rejected" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{middle - top:.1f}"/>')
        parts.append(f'<rect class="kept" x="{x:.1f}" y="{middle:.1f}" width="{width:.1f}" height="{HEIGHT - middle:.1f}"/></g>')
    parts.append(f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT}" y2="{HEIGHT}"/>')
    for share, anchor in ((0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end")):
        parts.append(f'<text x="{share * WIDTH:.0f}" y="{HEIGHT + 13}" text-anchor="{anchor}">{_short(histogram.edges[round(share * count)])}</text>')
    return "".join([*parts, "</svg>"])


def _uri(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode()


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
