"""A run at a glance: of every stage whether it was done, skipped or failed, how fast, at what cost, and where its output is."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prefect.artifacts import create_markdown_artifact

from selfcascade.config import ExecutionSettings
from selfcascade_tasks.artifacts import escaped
from selfcascade_tasks.record import RunRecord, StageCost, current_record

log = logging.getLogger(__name__)
KEY = "run-summary"
FIRST = ("state", "units", "output or error")
"""Columns of the first table of the page, after the stage; the others are in the second. All of them beside each other would run out of the page."""
WORDS = ("stage", "what", *FIRST)
"""Columns that hold words; the others hold numbers."""


def rows_of(record: RunRecord, price: float) -> list[dict[str, str]]:
    """A row for each stage, in the order in which they ended; ``price`` is that of an hour, 0 for none."""
    return [_row(stage, price) for stage in record.stages]


def page_of(record: RunRecord, price: float) -> str:
    """The same in Markdown: how it went in a line, what each stage did and where its output is, what it took."""
    states = Counter(stage.state for stage in record.stages)
    seconds = sum(stage.seconds for stage in record.stages)
    told = ", ".join(f"{states[state]} {state}" for state in ("done", "skipped", "failed") if states[state])
    line = f"**{told}** in {seconds:,.0f} s" + (f", at a cost of {seconds / 3600 * price:,.4f}" if price else "")
    rows = [{"stage": f"{row.pop('stage')} {row.pop('what')}", **row} for row in rows_of(record, price)]
    others = [name for name in (rows[0] if rows else ()) if name not in ("stage", *FIRST)]
    return "\n\n".join([line, _table(rows, ("stage", *FIRST)), _table(rows, ("stage", *others))]) + "\n"


@contextmanager
def summarised(execution: ExecutionSettings) -> Iterator[None]:
    """Show the stages of the run so far as an artifact of the flow under way once the block has ended, well or badly."""
    try:
        yield
    finally:
        record = current_record()
        try:
            create_markdown_artifact(page_of(record, execution.price), key=KEY, description=f"Stages of run {record.run}, begun {record.started}")
        except Exception as error:  # what a run has done is worth more than its summary
            log.warning("the summary of the run cannot be shown: %s", error)


def _row(stage: StageCost, price: float) -> dict[str, str]:
    row = {
        "stage": stage.stage,
        "what": stage.name,
        "state": stage.state,
        "units": f"{stage.units} before" if stage.state == "skipped" else f"{stage.done} of {stage.units} now",
        "seconds": f"{stage.seconds:,.0f}",
        "a second": f"{stage.work / stage.seconds:,.2f}" if stage.done and stage.seconds else "–",
        "peak MiB": f"{stage.peak_bytes / 2**20:,.0f}" if stage.done else "–",
        "MiB up": f"{stage.traffic.sent / 2**20:,.1f}",
        "MiB down": f"{stage.traffic.received / 2**20:,.1f}",
    }
    if price:
        row["cost"] = f"{stage.seconds / 3600 * price:,.4f}"
    return row | {"output or error": stage.error or stage.artifact}


def _table(rows: Sequence[dict[str, str]], names: Sequence[str]) -> str:
    lines = [[*names], [":---" if name in WORDS else "---:" for name in names]]
    lines += [[f"**{row[name]}**" if row[name] == "failed" else escaped(row[name]) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
