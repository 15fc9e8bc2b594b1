"""Fill the tables of the README from the committed results and from the list of methods: ``python docs/tables.py``. Figures are never typed by hand."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import get_args

from selfcascade.baselines.registry import BASELINES
from selfcascade.config import Method
from selfcascade.evaluation.report import heading, shown_number
from selfcascade.evaluation.results import METRICS, Metric, Number, Results

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "docs/results/demo.json"
"""The ``metrics.json`` of the demo's report: ``selfcascade pull reports/demo FOLDER``."""
CASCADE = {
    "base": "the base's own picture, at its own size",
    "lanczos": "the base's own picture, enlarged by Pillow's Lanczos filter",
    "tuning-free": "the cascade: each stage starts from the noised latent of the one below",
    "tuned": "the cascade, with the pivot's features added by an upsampler",
}
"""What the methods do that are no baselines of the registry."""
NEEDS = {
    "latent-sr": "`adapt` with `adaptation.trainable=latent-upscaler`",
    "x4-upscaler": "a folder or hub id of the upscaler, `generation.baselines.x4.model`",
    "hidiffusion": "the extra `peers`; SD 1.5, SD 2.1, SDXL",
    "lora": "the extra `lora`; `run` trains each entry of `finetunes`, `adapt` one with `adaptation.trainable=lora`",
    "full": "`run` trains it by `finetunes`, `adapt` with `adaptation.trainable=full`",
    "tuned": "`run` trains it, `adapt` with `adaptation.trainable=upsampler`",
}
"""What a method needs beside the base."""


def filled(text: str) -> str:
    """The README with the tables between their marks made anew."""
    results = table(Results.model_validate_json(RESULTS.read_bytes())) if RESULTS.exists() else "`make demo` prints them."
    return between(between(text, "results", results), "methods", methods())


def between(text: str, block: str, body: str) -> str:
    """The page with what lies between the marks of a block made anew."""
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{body}\n{end}{after}"


def methods() -> str:
    """Markdown: a row for each method of `generate`, in the order of reports."""
    lines = [_row(["method", "what it draws", "what it needs beside the base"]), _row(["---", "---", "---"])]
    for name in get_args(Method):
        lines.append(_row([f"`{name}`", CASCADE[name] if name in CASCADE else BASELINES[name].summary, NEEDS.get(name, "")]))
    return "\n".join(lines)


def table(results: Results) -> str:
    """Markdown: a row for each method, a column for each metric; then each step of the method against the one before it."""
    metrics = [metric for metric in METRICS if metric.judged]
    lines = [_row(["", *(heading(metric) for metric in metrics)]), _row(["---", *["---:"] * len(metrics)])]
    for row in results.shown():
        lines.append(_row([row.label, *(_cell(row.numbers[metric.name], metric) for metric in metrics)]))
    lines += ["", "Paired differences with 95 % intervals; below 0 the second method is better:", ""]
    lines += [_row(["", *(heading(metric) for metric in metrics)]), _row(["---", *["---:"] * len(metrics)])]
    found = {(item.first, item.second, item.metric): item for item in results.differences}
    for first, second in pairwise(row.label for row in results.shown() if row.method not in ("base", "lanczos")):
        cells = []
        for metric in metrics:
            item = found.get((first, second, metric.name))
            if item is None:
                cells.append("–")
                continue
            span = item.interval
            interval = "" if span is None else f" ({shown_number(span.low, metric, signed=True)} to {shown_number(span.high, metric, signed=True)})"
            cells.append(shown_number(item.value, metric, signed=True) + interval)
        lines.append(_row([f"{second} against {first}", *cells]))
    counts = f"{results.pictures} pictures of {results.prompts} held-out prompts a method against {results.real_pictures} real ones ({results.real})"
    chosen = f"Settings were chosen on the {results.chosen_on} split."
    lines += ["", f"{results.protocol.caption(counts)} {chosen} Lower is better everywhere; ± is a standard error."]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(number: Number, metric: Metric) -> str:
    if number.value is None:
        return "–"
    return shown_number(number.value, metric) + ("" if number.error is None else f" ± {shown_number(number.error, metric)}")


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
