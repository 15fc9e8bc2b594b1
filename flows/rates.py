"""How long work takes: by the records of earlier runs, else by rates that were measured once, else nobody knows."""

from __future__ import annotations

from collections.abc import Sequence

from selfcascade.config import PipelineSettings
from selfcascade_flows.outlook import Step
from selfcascade_tasks.record import StageCost

SOURCE = "the records of earlier runs on this store, else by rates measured on 2 CPU cores with the shipped base"
MEASURED_BASE = "tiny-emoji"

SECONDS: dict[tuple[str, str | None], float] = {
    ("curate", None): 0.012,
    ("pretrain", None): 0.6,
    ("adapt", None): 0.65,
    ("generate", "base"): 0.5,
    ("generate", "lanczos"): 0.05,
    ("generate", "direct"): 1.4,
    ("generate", "tuning-free"): 0.7,
    ("generate", "tuned"): 0.85,
    ("evaluate", None): 0.05,
}
"""Seconds of one worker for one piece of work as :class:`selfcascade_tasks.record.UnitCost` counts it."""


def seconds_of(step: Step, run: PipelineSettings, costs: Sequence[StageCost]) -> float | None:
    """Wall seconds of what is left of ``step``, or None when nothing is known. ``costs`` are of earlier runs, newest first."""
    left = step.units - step.done
    if step.published or not left:
        return 0.0
    rate = _recorded(step, costs) or _measured(step, run)
    return None if rate is None else rate * step.work / (1 if step.serial else min(run.execution.workers, left))


def _recorded(step: Step, costs: Sequence[StageCost]) -> float | None:
    """Seconds a piece of work in the newest record of an artifact of this name: another name may mean another base."""
    for cost in costs:
        if (cost.stage, cost.method, cost.name) == (step.stage, step.method, step.name) and cost.work:
            return cost.unit_seconds / cost.work
    return None


def _measured(step: Step, run: PipelineSettings) -> float | None:
    if run.generation.base != MEASURED_BASE and step.stage not in ("curate", "evaluate"):
        return None
    return SECONDS.get((step.stage, step.method))
