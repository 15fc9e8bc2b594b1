"""What a command prints at its end: an artifact and its counts, or the table of a report and where its page lies."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from selfcascade.storage import Artifact, ArtifactRef, Store

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
    from selfcascade.evaluation.evaluate import read_results
    from selfcascade_tasks.evaluate import page_key, table_rows

    results = read_results(store, ref)
    rows = table_rows(results)
    table = Table()
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(
        f"{results.pictures} pictures of {results.prompts} prompts a method against {results.real_pictures} real ones; {results.protocol.network} features. "
        "Lower is better; ± is a standard error.",
        highlight=False,
    )
    page = REPORTS / f"{ref.name}.html"
    store.download(page_key(run), page)
    console.print(f"\nReport:  {page}   ({ref})", highlight=False)
