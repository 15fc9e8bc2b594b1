"""What two equal runs do not share: clock, host, packages, seconds, memory. Kept as `runs/<run-id>.json`, never in an artifact."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field

from selfcascade.storage import Store, StoreError
from selfcascade.traffic import Traffic, take
from selfcascade_tasks.workers import Measured

PACKAGES = ("selfcascade", "torch", "diffusers", "transformers", "numpy", "pillow", "pyarrow", "boto3", "prefect", "torchmetrics")


class UnitCost(BaseModel):
    """What one unit of work took; what a task returns to its flow."""

    model_config = ConfigDict(frozen=True)

    unit: int
    work: float = Field(description="what the unit held: inputs, optimizer steps, pictures, or samples of 256 pixels and 50 steps")
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    pictures: int = Field(0, description="pictures that were kept, sampled or measured; 0 of a training")
    traffic: Traffic = Field(Traffic(), description="what went between its worker and the store")
    tiers: tuple[str, ...] = Field((), description="memory tiers that its chunks were sampled in: of a unit that is several")

    @classmethod
    def of(cls, unit: int, measured: Measured[Any], work: float, *, pictures: int = 0, tiers: tuple[str, ...] = ()) -> UnitCost:
        """The cost of a unit that ran in a worker; of ``tiers`` there is one for each chunk of samples, which then count as units."""
        return cls(
            unit=unit,
            work=work,
            seconds=measured.seconds,
            cpu_seconds=measured.cpu_seconds,
            peak_bytes=measured.peak_bytes,
            pictures=pictures,
            traffic=measured.traffic,
            tiers=tiers,
        )

    @property
    def units(self) -> int:
        """How many units it counts as."""
        return len(self.tiers) or 1


class StageCost(BaseModel):
    """One stage of one run, for one method where it has one."""

    stage: str
    name: str
    method: str | None = None
    artifact: str = ""
    units: int = Field(0, description="units of the whole artifact")
    done: int = Field(0, description="units done by this run; the others were finished before")
    made: bool = Field(False, description="whether the artifact was not published before")
    started: str = ""
    seconds: float = Field(0.0, description="wall time of the stage")
    work: float = Field(0.0, description="what these units held, counted as in a unit's cost")
    unit_seconds: float = Field(0.0, description="sum over the units of this run, side by side or not")
    cpu_seconds: float = 0.0
    peak_bytes: int = Field(0, description="largest resident memory of one worker during a unit")
    traffic: Traffic = Field(Traffic(), description="what went between the run and the store since the stage before, for the plan and for publishing, too")
    error: str = Field("", description="why the stage failed, in a line; empty where it did not")
    tiers: dict[str, int] = Field({}, description="units sampled in each memory tier: a lower one than the settings' where memory ran out")

    @property
    def state(self) -> Literal["failed", "done", "skipped"]:
        """``skipped`` if everything had been done before."""
        return "failed" if self.error else "done" if self.done or self.made else "skipped"

    def add(self, cost: UnitCost) -> None:
        """Count a unit that is done."""
        self.done += cost.units
        self.work += cost.work
        self.unit_seconds += cost.seconds
        self.cpu_seconds += cost.cpu_seconds
        self.peak_bytes = max(self.peak_bytes, cost.peak_bytes)
        self.traffic += cost.traffic
        for tier in cost.tiers:
            self.tiers[tier] = self.tiers.get(tier, 0) + 1


class RunRecord(BaseModel):
    """The record of one run: a stage on its own, or all stages of a pipeline."""

    run: str
    started: str
    host: dict[str, str | int] = {}
    packages: dict[str, str] = {}
    stages: list[StageCost] = []

    @property
    def key(self) -> str:
        """Where the record lies in the store."""
        return f"runs/{self.run}.json"


_records: dict[str, RunRecord] = {}
_guard = threading.Lock()


@contextmanager
def recorded(
    store: Store, stage: str, name: str, method: str | None = None, *, ended: Callable[[StageCost, Traffic], None] = lambda *_: None
) -> Iterator[StageCost]:
    """Time the stage that the block runs and write the record of the run, with all its stages so far, at the end, also at a bad one.

    Args:
        store: that gets the record.
        stage: what runs.
        name: of its artifact.
        method: where it has one.
        ended: hears of the end, with what went over the network besides the units.
    """
    record = current_record()
    cost = StageCost(stage=stage, name=name, method=method, started=_now())
    start = time.perf_counter()

    def write() -> None:
        cost.seconds = time.perf_counter() - start
        own = take()
        cost.traffic += own
        ended(cost, own)
        record.stages.append(cost)
        store.put_cache(record.key, record.model_dump_json(indent=1).encode())

    try:
        yield cost
    except BaseException as error:
        cost.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        with suppress(StoreError):  # the error under way is the one to see
            write()
        raise
    write()


def earlier_records(store: Store, *, newest: int = 50) -> list[RunRecord]:
    """The newest records in the store, the newest first. Records of another form are passed over."""
    found = sorted(store.list("runs/"), key=lambda info: (info.modified, info.key), reverse=True)
    records: list[RunRecord] = []
    for info in found:
        if len(records) == newest:
            break
        with suppress(ValueError, StoreError):
            records.append(RunRecord.model_validate(json.loads(store.read(info.key))))
    return records


def earlier_costs(store: Store, *, newest: int = 50) -> list[StageCost]:
    """Stages of the newest records in the store, newest record first."""
    return [cost for record in earlier_records(store, newest=newest) for cost in record.stages]


def run_id() -> str:
    """The flow run that everything now under way belongs to."""
    return str(flow_run.root_flow_run_id or flow_run.id or "local")


def current_record() -> RunRecord:
    """The record of the run that everything now under way belongs to."""
    run = run_id()
    with _guard:
        if run not in _records:
            _records[run] = RunRecord(run=run, started=_now(), host=_host(), packages=_packages())
        return _records[run]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _host() -> dict[str, str | int]:
    return {"name": platform.node(), "system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count() or 0}


def _packages() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
