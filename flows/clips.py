"""`selfcascade evaluate --clips SET SET…`: FVD and KVD of clips from anywhere."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from selfcascade.config import PipelineSettings
from selfcascade_flows.sets import WIDEST, explain

if TYPE_CHECKING:
    from rich.table import Table

    from selfcascade.evaluation.clip_comparison import ClipComparison


def compare_clip_sets(settings: PipelineSettings, sets: list[str], *, as_json: bool) -> int:
    """Print the numbers of every set of clips against the first.

    Raises:
        SettingsError: fewer than two sets, weights that are missing, or a clip that cannot be compared.
    """
    from selfcascade.evaluation.clip_comparison import compare_clips

    found = compare_clips(settings.evaluation, sets, device=settings.execution.device)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return 0
    from rich.console import Console

    Console(width=WIDEST, highlight=False).print(table(found))
    explain(found.made_with, found.notes)
    return 0


def table(found: ClipComparison) -> Table:
    """A row for each set that is compared with the reference."""
    from rich.markup import escape
    from rich.table import Table

    title = escape(f"against {found.reference}, {found.reference_count:,} clips of {found.frames} frames")
    made = Table(title=title, box=None, padding=(0, 2, 0, 0), title_justify="left")
    made.add_column("set", no_wrap=True, min_width=max(len(row.name) for row in found.rows))
    for heading in ("clips", "KVD", "FVD"):
        made.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        made.add_row(escape(row.name), f"{row.count:,}", _with_error(row.kvd, row.kvd_error), _with_error(row.fvd, row.fvd_error))
    return made


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"
