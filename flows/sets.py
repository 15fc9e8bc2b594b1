"""`selfcascade evaluate SET SET…`: pictures from anywhere, compared without a report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from selfcascade.config import PipelineSettings
from selfcascade.settings import SettingsError

if TYPE_CHECKING:
    from rich.table import Table

    from selfcascade.evaluation.comparison import Comparison

WIDEST = 1000
"""Columns of a table with long paths: a terminal wraps it, a file keeps it."""
SHARES = ("precision", "recall", "density", "coverage")


def compare_sets(settings: PipelineSettings, sets: list[str], *, as_json: bool, statistics: Path | None) -> int:
    """Print the numbers of every set against the first, and write the first one's statistics where asked to.

    Raises:
        SettingsError: fewer than two sets and nothing to write, or a set that cannot be read.
    """
    from selfcascade.evaluation.comparison import compare
    from selfcascade.storage import Store

    if len(sets) < 2 and statistics is None:
        raise SettingsError(f"{sets[0]} alone cannot be compared; give a second set, or --statistics to write its statistics")
    if statistics is not None and statistics.suffix != ".npz":
        raise SettingsError(f"--statistics {statistics}: the name must end in .npz")
    with ExitStack() as end:
        found = compare(settings.evaluation, sets, lambda: end.enter_context(Store.open(settings.store, read_only=True)), device=settings.execution.device)
    if statistics is not None:
        statistics.parent.mkdir(parents=True, exist_ok=True)
        statistics.write_bytes(found.statistics)
    if as_json:
        kept = {name: value for name, value in asdict(found).items() if name != "statistics"}
        typer.echo(json.dumps(kept, indent=2))
        return 0
    from rich.console import Console

    if found.rows:
        Console(width=WIDEST, highlight=False).print(table(found))
    written = [] if statistics is None else [f"statistics of {found.reference}: {statistics}"]
    explain(found.made_with, [*found.notes, *written])
    return 0


def explain(made_with: Mapping[str, str], notes: Iterable[str]) -> None:
    """Print what belongs under a table: with what its numbers were made, and what is to be known of them."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{made_with['network']}, weights {made_with['weights'][:12]}, resize: {made_with['resize']}")
    for note in notes:
        console.print(note)


def table(found: Comparison) -> Table:
    """A row for each set that is compared with the reference."""
    from rich.markup import escape
    from rich.table import Table

    count = "" if found.reference_count is None else f", {found.reference_count:,} pictures"
    made = Table(title=escape(f"against {found.reference}{count}"), box=None, padding=(0, 2, 0, 0), title_justify="left")
    made.add_column("set", no_wrap=True, min_width=max(len(row.name) for row in found.rows))
    scored = any(row.inception_score is not None for row in found.rows)
    cut = any(row.patch_fid is not None for row in found.rows)
    for heading in ("pictures", "KID x 1000", "FID", *(("pKID x 1000", "pFID") if cut else ()), *SHARES, *(("IS",) if scored else ())):
        made.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        kernel = _spread(row.kid, row.kid_spread, 1000)
        patches = [_spread(row.patch_kid, row.patch_kid_spread, 1000), "-" if row.patch_fid is None else f"{row.patch_fid:.3f}"] if cut else []
        shares = ["-" if (value := getattr(row, name)) is None else f"{value:.3f}" for name in SHARES]
        score = [_spread(row.inception_score, row.inception_spread)] if scored else []
        made.add_row(escape(row.name), "?" if row.count is None else f"{row.count:,}", kernel, f"{row.fid:.3f}", *patches, *shares, *score)
    return made


def _spread(value: float | None, spread: float | None, scale: int = 1) -> str:
    return "-" if value is None or spread is None else f"{scale * value:.2f} ± {scale * spread:.2f}"
