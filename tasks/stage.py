"""The frame of every stage: its lease, its progress, its record. Inside it the units run and the artifact is published."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from typing import Any

from prefect.events import emit_event
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run

from selfcascade.config import ExecutionSettings, StoreSettings
from selfcascade.storage import Artifact, ArtifactRef, Plan
from selfcascade.traffic import Traffic
from selfcascade_tasks.logs import begin_lines
from selfcascade_tasks.metrics import OFF, Meters, meters
from selfcascade_tasks.progress import StageProgress
from selfcascade_tasks.record import StageCost, UnitCost, recorded, run_id
from selfcascade_tasks.scope import scope, within
from selfcascade_tasks.store import opened
from selfcascade_tasks.summary import summarised
from selfcascade_tasks.workers import close_workers, side_by_side

log = logging.getLogger(__name__)
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
    meters: Meters = OFF

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
                done = self._ended_well(ended.get())
                self.cost.add(done)
                self.meters.done(self.cost, done)
                self.progress.advance(done.units)
                log.info("unit %s of %s is done", done.unit, self.cost.artifact, extra={"unit": str(done.unit), "seconds": done.seconds, "work": done.work})
                under_way += _started(islice(remaining, 1), ended) - 1
        except BaseException as error:
            if not isinstance(error, Exception):
                close_workers(0.0 if isinstance(error, KeyboardInterrupt) else PATIENCE)
            raise

    def _ended_well(self, unit: PrefectFuture[UnitCost]) -> UnitCost:
        try:
            return unit.result()
        except Exception:
            self.meters.failed(self.cost)
            raise


@contextmanager
def running(stage: str, plan: Plan, store: StoreSettings, execution: ExecutionSettings, *, method: str | None = None) -> Iterator[StageRun]:
    """Hold the artifact of ``plan`` while it is made, count its units in the UI, on the terminal and in metrics, and write what it cost to the run's record."""
    held, run = opened(store), run_id()
    ref, told = plan.ref, meters(execution, run)

    def ended(cost: StageCost, own: Traffic) -> None:
        told.ended(cost, own)
        # Whoever reads text has the error from the command or from Prefect already.
        level = logging.ERROR if cost.error and scope().logs == "json" else logging.INFO
        log.log(level, "%s", cost.error or f"{stage} is {cost.state}: {ref}", extra={"state": cost.state, "seconds": cost.seconds, "done": cost.done})

    with logged(store, execution), within(stage=stage, artifact=str(ref)):
        log.info("%s begins: %s of %s units were done before", stage, len(plan.done), plan.units)
        with (
            summarised(execution),
            recorded(held, stage, ref.name, method, ended=ended) as cost,
            StageProgress(stage, ref.name, start=len(plan.done), total=plan.units, meters=told) as progress,
            Artifact(held, ref).writing(),
        ):
            cost.artifact, cost.units, cost.made = str(ref), plan.units, not plan.published
            yield StageRun(cost, progress, window=2 * side_by_side(execution), meters=told)
    if not plan.published:
        tell(ref)


@contextmanager
def logged(store: StoreSettings, execution: ExecutionSettings) -> Iterator[None]:
    """Log lines of the block, in the form that ``execution.logs`` wants, name the run, and hold no key of ``store``."""
    secrets = tuple(key for key in (store.access_key, store.secret_key) if key is not None)
    run = str(flow_run.root_flow_run_id or flow_run.id or "")
    with within(run=run, flow=flow_run.name or "", logs=execution.logs, secrets=secrets):
        begin_lines()
        yield


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
