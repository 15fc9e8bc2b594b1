"""The report as one HTML file that needs nothing else: no request, light and dark, on a phone and in print; its script only sorts and enlarges."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import pairwise

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from selfcascade.evaluation.distances import too_few
from selfcascade.evaluation.history_plot import history_svg
from selfcascade.evaluation.loss_plot import loss_svg
from selfcascade.evaluation.pictures import Pictures, data_uri
from selfcascade.evaluation.published import Past
from selfcascade.evaluation.results import NAMED, Difference, Metric, Number, Results, Row
from selfcascade.evaluation.spectrum_plot import spectrum_svg

_LEADING = ("kid_r", "fid_r", "fid_b", "objects_b")


@dataclass(frozen=True, slots=True)
class Cost:
    """What sampling by one method took."""

    seconds: float
    """Summed over its units, whether they ran side by side or not."""
    pictures: int
    peak_bytes: int | None = None
    parameters: int | None = None
    """Trainable parameters, 0 where nothing is trained."""


@dataclass(frozen=True, slots=True)
class Times:
    """What a run took: it differs between equal runs, so it is shown beside the artifact and never in it."""

    methods: Mapping[str, Cost] = field(default_factory=dict)
    """By label of the samples."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Wall seconds by stage."""
    machine: str = ""
    run: str = ""


@dataclass(frozen=True, slots=True)
class _Cell:
    """A cell of a table of numbers: what is shown, what is shown smaller, how it is marked, and what a reader is told on asking."""

    text: str
    small: str = ""
    mark: str = ""
    title: str = ""
    value: float | None = None
    """What the cell is sorted by."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """A picture on the page."""

    uri: str
    row: Row
    alt: str
    caption: str
    """What is told under it when it is shown large."""


def render_report(results: Results, pictures: Pictures, times: Times | None = None, history: Sequence[Past] = ()) -> str:
    """The page.

    Args:
        results: every number, the curves, the lineage, the settings.
        pictures: those of ``results.sheet`` and of ``results.extremes``.
        times: what the run took.
        history: this version and those before it. Without it and ``times`` the page is a function of the results and pictures alone, byte for byte.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_packaged("report.html.j2"))
    script = _packaged("report.js")
    shown = results.shown()
    direct = [row for row in results.rows if row.method == "direct"]
    return template.render(
        results=results,
        script=Markup(script),
        script_digest="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        metrics=results.metrics,
        judged=_judged(results),
        caption=results.caption(),
        rows=[(row, [_number_cell(metric, row, results) for metric in results.metrics]) for row in shown],
        floor=results.floor and (results.floor, [_number_cell(metric, results.floor) for metric in results.metrics]),
        reasons=_reasons(results),
        findings=_findings(results),
        pairs=_pairs(results),
        direct=[(row, [_number_cell(metric, row) for metric in results.metrics]) for row in direct] if len(direct) > 1 else [],
        sheet_labels=[row.label for row in shown],
        sheet=[
            (line.prompt, [_Shown(data_uri(pictures[row.label][line.key]), row, f"{row.label}: {line.prompt}", row.label) for row in shown])
            for line in results.sheet
        ],
        extremes=_extremes(results, pictures),
        spectra=Markup(spectrum_svg(results.spectra)) if len(results.spectra) > 1 else "",
        curves=[(curve, Markup(loss_svg(curve))) for curve in results.curves if len(curve.steps) > 1],
        history=_history(results, history),
        times=times,
        costs=_costs(results, times),
        settings=json.dumps(results.settings, indent=2, sort_keys=True, ensure_ascii=False),
        short=short,
        few=too_few(results.pictures, results.protocol.num_features),
    )


def _packaged(name: str) -> str:
    return files("selfcascade.evaluation").joinpath(name).read_text(encoding="utf-8")


def heading(metric: Metric) -> str:
    """Heading of a column with its factor."""
    return f"{metric.heading} × {metric.scale:,}" if metric.scale != 1 else metric.heading


def short(version: str) -> str:
    """A version, alone or after ``name@``, cut to the twelve digits that people read."""
    name, at, digest = version.rpartition("@")
    return name + at + (digest[:12] if len(digest) == 64 else digest)


def shown_difference(item: Difference, metric: Metric) -> str:
    """A difference with its sign, and its 95 % interval where the error is known."""
    span = item.interval
    interval = "" if span is None else f" ({shown_number(span.low, metric, signed=True)} to {shown_number(span.high, metric, signed=True)})"
    return shown_number(item.value, metric, signed=True) + interval


def shown_number(value: float, metric: Metric, *, signed: bool = False) -> str:
    """A value at the metric's scale and digits, with a true minus sign."""
    text = f"{value * metric.scale:{'+' if signed else ''},.{metric.digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def _number_cell(metric: Metric, row: Row, results: Results | None = None) -> _Cell:
    """A number of a row; it is marked if it is the best of ``results``."""
    number = row.numbers[metric.name]
    if number.value is None:
        return _Cell(text="–", mark="blank", title=number.why)
    mark = "best" if results is not None and results.is_best(row, metric) else ""
    told = _told(number, metric)
    return _Cell(text=shown_number(number.value, metric), small=_error(number, metric), mark=mark, title=told, value=number.value)


def _error(number: Number, metric: Metric) -> str:
    told = [] if number.error is None else [f"± {shown_number(number.error, metric)}"]
    return ", ".join(told + ([] if number.limit is None else [f"→ {shown_number(number.limit, metric)}"]))


def _told(number: Number, metric: Metric) -> str:
    told = [] if number.error is None else [f"standard error {shown_number(number.error, metric)}"]
    if number.spread is not None:
        told.append(f"standard deviation over subsets {shown_number(number.spread, metric)}")
    if number.limit is not None:
        told.append(f"extrapolated to ever more pictures {shown_number(number.limit, metric)}")
    return "; ".join(told)


def _difference_cell(difference: Difference | None, metric: Metric) -> _Cell:
    if difference is None:
        return _Cell(text="–", mark="blank", title="not defined for one of the two")
    text = shown_number(difference.value, metric, signed=True)
    interval = difference.interval
    if interval is None:
        return _Cell(text=text, small="no interval", title="too few or too many pictures for half-samples", value=difference.value)
    way = "lower" if difference.value < 0 else "higher"
    mark = "" if not interval.excludes_zero else "better" if way == metric.better else "worse"
    title = f"clearly {way}: {mark}" if mark else "the interval holds 0: not clear"
    return _Cell(
        text=text, small=f"{shown_number(interval.low, metric)} to {shown_number(interval.high, metric)}", mark=mark, title=title, value=difference.value
    )


def _judged(results: Results) -> list[Metric]:
    return [metric for metric in results.metrics if metric.judged]


def _reasons(results: Results) -> list[tuple[str, list[str], str]]:
    """Which columns of which row are blank, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in results.shown():
        for metric in results.metrics:
            if row.numbers[metric.name].value is None:
                found.setdefault((row.label, row.numbers[metric.name].why), []).append(metric.heading)
    return [(label, headings, why) for (label, why), headings in found.items()]


def _extremes(results: Results, pictures: Pictures) -> list[tuple[Row, list[tuple[str, _Shown]]]]:
    """Of each method that has any, the picture and what is written under it, from the least real to the most."""
    found = []
    for row in results.shown():
        cells = []
        for each in results.extremes:
            if each.label == row.label:
                side: str = each.side
                text = f"{each.realism:.2f} {each.prompt}"
                cells.append((side, _Shown(data_uri(pictures[row.label][each.key]), row, f"{row.label}, {side} real: {each.prompt}", text)))
        if cells:
            found.append((row, cells))
    return found


def _pairs(results: Results) -> list[tuple[str, str, list[_Cell]]]:
    """A row for each pair of methods, with a cell for each judged metric."""
    found = {(item.first, item.second, item.metric): item for item in results.differences}
    pairs = dict.fromkeys((item.first, item.second) for item in results.differences)
    return [(first, second, [_difference_cell(found.get((first, second, metric.name)), metric) for metric in _judged(results)]) for first, second in pairs]


def _findings(results: Results) -> list[tuple[str, str, list[tuple[str, _Cell]]]]:
    """What the reader wants first: each method against the one before it in the table."""
    labels = [row.label for row in results.shown() if row.method not in ("base", "lanczos", "latent-sr", "x4-upscaler")]
    found = {(item.first, item.second, item.metric): item for item in results.differences}
    return [
        (second, first, [(heading(NAMED[name]), _difference_cell(found.get((first, second, name)), NAMED[name])) for name in _LEADING])
        for first, second in pairwise(labels)
    ]


def _history(results: Results, history: Sequence[Past]) -> list[tuple[Metric, Markup]]:
    """Charts of the leading metrics over the versions, where there are at least two."""
    if len(history) < 2:
        return []
    labels = [row.label for row in results.shown()]
    charts = [(NAMED[name], history_svg(NAMED[name], history, labels)) for name in _LEADING]
    return [(metric, Markup(chart)) for metric, chart in charts if chart]


def _costs(results: Results, times: Times | None) -> list[dict[str, str]]:
    if times is None:
        return []
    direct = next((times.methods[row.label] for row in results.shown() if row.method == "direct" and row.label in times.methods), None)
    unit = direct.seconds / direct.pictures if direct and direct.pictures else 0.0
    costs = []
    for row in results.rows:
        cost = times.methods.get(row.label)
        if cost is None or not cost.pictures:
            continue
        each = cost.seconds / cost.pictures
        costs.append(
            {
                "label": row.label,
                "size": f"{row.height} × {row.width}",
                "each": f"{each:.2f} s",
                "ratio": f"{each / unit:.2f}×" if unit else "–",
                "total": f"{cost.seconds:,.0f} s",
                "memory": "–" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:,.0f} MiB",
                "parameters": "–" if cost.parameters is None else f"{cost.parameters:,}",
            }
        )
    return costs
