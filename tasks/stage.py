"""The frame of every stage: its lease, its progress, its record. Inside it the units run and the artifact is published."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from typing import Any

from prefect.events import emit_event
from prefect.futures import PrefectFuture

from selfcascade.config import ExecutionSettings, StoreSettings
from selfcascade.storage import Artifact, ArtifactRef, Plan
from selfcascade_tasks.progress import StageProgress
from selfcascade_tasks.record import StageCost, UnitCost, recorded
from selfcascade_tasks.store import opened
from selfcascade_tasks.summary import summarised
from selfcascade_tasks.workers import close_workers, side_by_side

PUBLISHED = "selfcascade.artifact.published"
PATIENCE = 20.0
"""Seconds for a training to store its last step: less than the 30 that a machine or a container usually has after SIGTERM."""


@dataclass(frozen=True)
class StageRun:
    """A stage at work."""

    cost: StageCost
    progress: StageProgress
    window: int
    """Most tasks under way: twice as many as run side by side, so that a worker that is done finds the next one waiting."""

    def wait(self, units: Iterable[PrefectFuture[UnitCost]]) -> None:
        """Until every unit is done, in whatever order.

        ``units`` is drawn as units end: each is submitted when there is room for it, so that neither memory nor the UI holds tens of thousands that wait.

        At the first failure no further unit begins, and those under way come to their end, which is kept. At Ctrl-C they are ended at once: otherwise the
        flow, which waits for them, could not end itself. At a request to terminate, a machine is about to be taken away, a training first stores its last step.

        Raises:
            Exception: what the failed unit raised.
        """
        try:
            remaining, ended = iter(units), SimpleQueue[PrefectFuture[UnitCost]]()
            under_way = _started(islice(remaining, self.window), ended)
            while under_way:
                done = ended.get().result()
                self.cost.add(done)
                self.progress.advance(done.units)
                under_way += _started(islice(remaining, 1), ended) - 1
        except BaseException as error:
            if not isinstance(error, Exception):
                close_workers(0.0 if isinstance(error, KeyboardInterrupt) else PATIENCE)
            raise


@contextmanager
def running(stage: str, plan: Plan, store: StoreSettings, execution: ExecutionSettings, *, method: str | None = None) -> Iterator[StageRun]:
    """Hold the artifact of ``plan`` while it is made, count its units in the UI and on the terminal, and write what it cost to the run's record."""
    held = opened(store)
    ref = plan.ref
    with (
        summarised(execution),
        recorded(held, stage, ref.name, method) as cost,
        StageProgress(stage, ref.name, start=len(plan.done), total=plan.units) as progress,
        Artifact(held, ref).writing(),
    ):
        cost.artifact, cost.units = str(ref), plan.units
        yield StageRun(cost, progress, window=2 * side_by_side(execution))
    if not plan.published:
        tell(ref)


def _started(units: Iterable[PrefectFuture[UnitCost]], ended: SimpleQueue[PrefectFuture[UnitCost]]) -> int:
    """How many there are; each goes to ``ended`` when it is done."""
    count = 0
    for unit in units:
        unit.add_done_callback(ended.put)
        count += 1
    return count


def tell(ref: ArtifactRef) -> None:
    """Send ``selfcascade.artifact.published``, for automations to go on from: the resource is ``selfcascade.KIND.NAME``, the payload its address."""
    resource = {"prefect.resource.id": f"selfcascade.{ref.kind}.{ref.name}", "prefect.resource.name": str(ref)}
    emit_event(PUBLISHED, resource, payload={"kind": ref.kind, "name": ref.name, "version": ref.version, "uri": ref.uri})


def counts_of(plan: Plan, store: StoreSettings) -> dict[str, Any]:
    """What the manifest of the published artifact counts."""
    return dict(Artifact(opened(store), plan.ref).manifest().counts)
