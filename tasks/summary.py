"""A run at a glance: of every stage whether it was done, skipped or failed, how fast, at what cost, and where its output is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.artifacts import create_table_artifact

from selfcascade.config import ExecutionSettings
from selfcascade_tasks.record import RunRecord, StageCost, current_record

log = logging.getLogger(__name__)
KEY = "run-summary"


def rows_of(record: RunRecord, price: float) -> list[dict[str, str]]:
    """A row for each stage, in the order in which they ended; ``price`` is that of an hour, 0 for none."""
    return [_row(stage, price) for stage in record.stages]


@contextmanager
def summarised(execution: ExecutionSettings) -> Iterator[None]:
    """Show the stages of the run so far as an artifact once the block has ended, well or badly."""
    try:
        yield
    finally:
        record = current_record()
        try:
            create_table_artifact(rows_of(record, execution.price), key=KEY, description=f"Stages of run {record.run}, begun {record.started}")
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
