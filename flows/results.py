"""What a command prints at its end: an artifact and its counts, or the table of a report and where its page lies."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from selfcascade.storage import Artifact, ArtifactRef, Store

if TYPE_CHECKING:
    from selfcascade.evaluation.results import Results

LEADING = ("kid_r", "fid_r", "fid_b")
REPORTS = Path(".selfcascade/reports")
"""Where the page of a report is put for the browser."""


def tell_artifact(store: Store, ref: ArtifactRef, run: str) -> None:
    """The address of an artifact and what its manifest counts."""
    table = Table(show_header=False)
    for name, value in Artifact(store, ref).manifest().counts.items():
        table.add_row(name, str(value))
    console = Console(soft_wrap=True)
    console.print(f"{ref}", highlight=False)
    console.print(table)


def tell_report(store: Store, ref: ArtifactRef, run: str) -> None:
    """The results of a report, and its page as a file."""
    from selfcascade.evaluation.published import read_results
    from selfcascade_tasks.evaluate import page_key

    results = read_results(store, ref)
    console = Console(soft_wrap=True, highlight=False)
    console.print()
    console.print(results_table(results))
    console.print()
    console.print(
        f"{results.pictures} pictures of {results.prompts} prompts a method against {results.real_pictures} real ones, {results.protocol.network} features.\n"
        "Lower is better. KID is unbiased; FID is biased at such counts."
    )
    for line in differences(results):
        console.print(line)
    page = REPORTS / f"{ref.name}.html"
    store.download(page_key(run), page)
    console.print(f"\nReport:  {page}   ({ref})")


def results_table(results: Results) -> Table:
    """A row for each method, a column for each distance, of which lower is better; narrow enough for 80 columns."""
    from selfcascade.evaluation.report import shown_number

    judged = [metric for metric in results.metrics if metric.better == "lower"]
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True, min_width=max(len(row.label) for row in results.shown()))
    for metric in judged:
        table.add_column(metric.heading + (f"\nx {metric.scale}" if metric.scale != 1 else ""), justify="right", no_wrap=True)
    for row in results.shown():
        numbers = [row.numbers[metric.name].value for metric in judged]
        cells = ["-" if value is None else shown_number(value, metric) for value, metric in zip(numbers, judged, strict=True)]
        table.add_row(row.label, *cells)
    return table


def differences(results: Results) -> list[str]:
    """Each step of the method against the one before it, with the 95 % interval of the paired difference."""
    from selfcascade.evaluation.report import shown_difference
    from selfcascade.evaluation.results import METRICS

    metrics = {metric.name: metric for metric in METRICS if metric.name in LEADING}
    labels = [row.label for row in results.shown() if row.method not in ("base", "lanczos", "latent-sr", "x4-upscaler")]
    lines = []
    for first, second in pairwise(labels):
        parts = []
        for item in results.differences:
            if (item.first, item.second) == (first, second) and item.metric in metrics:
                metric = metrics[item.metric]
                parts.append(f"{metric.heading} {shown_difference(item, metric)}")
        lines.append(f"{second} minus {first}:  " + "  ".join(parts))
    return lines
