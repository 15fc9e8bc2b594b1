"""What the stages behind a report took: gathered from the records of runs, since a rerun does nothing and takes no time."""

from __future__ import annotations

import os
import platform

from selfcascade.evaluation.report import Cost, Times
from selfcascade.evaluation.results import Results
from selfcascade.storage import ArtifactRef, NotFound, Store, resolve
from selfcascade_tasks.record import StageCost, earlier_costs, run_id

TRAINED = {"upsampler": "upsamplers", "upscaler": "upscalers", "adapter": "adapters", "unet": "unets"}
"""Kind of the artifact that an input with this role may name."""


def times_of(store: Store, ref: ArtifactRef, results: Results) -> Times:
    """Cost by method and wall time by stage of the report ``ref`` and of everything that it rests on, this run's own records included."""
    costs = earlier_costs(store)
    artifacts = {str(ref)} | {row.artifact for row in results.rows} | {item.artifact for item in results.lineage}
    found = {row.label: _cost(store, row.artifact, row.pictures, costs) for row in results.rows}
    stages: dict[str, float] = {}
    for cost in reversed(costs):
        if cost.done and cost.artifact in artifacts:
            stages[cost.stage] = stages.get(cost.stage, 0.0) + cost.seconds
    methods = {label: cost for label, cost in found.items() if cost is not None}
    return Times(methods=methods, stages=stages, machine=f"{os.cpu_count()} cores, {platform.machine()} {platform.system()}", run=run_id())


def _cost(store: Store, artifact: str, pictures: int, costs: list[StageCost]) -> Cost | None:
    """Cost of all units of an artifact, over the runs that made them; None where records are missing."""
    mine = [cost for cost in costs if cost.artifact == artifact and cost.done]
    if not mine or sum(cost.done for cost in mine) < mine[0].units:
        return None
    return Cost(
        seconds=sum(cost.unit_seconds for cost in mine),
        pictures=pictures,
        peak_bytes=max(cost.peak_bytes for cost in mine),
        parameters=_parameters(store, artifact),
    )


def _parameters(store: Store, artifact: str) -> int | None:
    """Numbers that were trained for these samples; None where what holds them is not in this store."""
    inputs = resolve(store, artifact).manifest().inputs
    trained = [f"{kind}/{inputs[role]}" for role, kind in TRAINED.items() if role in inputs]
    try:
        return sum(int(resolve(store, reference).manifest().counts["parameters"]) for reference in trained)
    except (NotFound, KeyError):
        return None
