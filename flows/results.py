"""What a command prints at its end: the artifact and its counts, or the table of a report and where its page lies."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from selfcascade.storage import Artifact, ArtifactRef, Store


def tell_artifact(store: Store, ref: ArtifactRef) -> None:
    """The address of an artifact and what its manifest counts."""
    table = Table(title=str(ref), title_justify="left", show_header=False)
    for name, value in Artifact(store, ref).manifest().counts.items():
        table.add_row(name, str(value))
    Console().print(table)


def tell_report(store: Store, ref: ArtifactRef) -> None:
    """The results of a report."""
    tell_artifact(store, ref)
