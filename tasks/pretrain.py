"""Pretraining as Prefect tasks: find the dataset, train both phases, commit the base.

Each imports the networks when it runs, see :mod:`selfcascade_tasks.adapt`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import task

from selfcascade.config import ExecutionSettings, PretrainingSettings, StoreSettings
from selfcascade.storage import ArtifactRef
from selfcascade_tasks.metrics import meters
from selfcascade_tasks.network import NETWORK
from selfcascade_tasks.progress import StageProgress
from selfcascade_tasks.record import UnitCost, run_id
from selfcascade_tasks.store import opened
from selfcascade_tasks.workers import workers

if TYPE_CHECKING:
    from selfcascade.adaptation.pretrain import PretrainingPlan, PretrainingStep


@task(name="plan-base", task_run_name="plan {settings.name}", tags=["pretrain"], **NETWORK)
def plan(settings: PretrainingSettings, store: StoreSettings, execution: ExecutionSettings) -> PretrainingPlan:
    """The address of the base and the phases that are left."""
    from selfcascade.adaptation.pretrain import plan_pretraining

    return plan_pretraining(settings, opened(store), device=execution.device)


@task(name="train-base", task_run_name="train {settings.name}", tags=["pretrain"], **NETWORK)
def train(settings: PretrainingSettings, store: StoreSettings, plan: PretrainingPlan, execution: ExecutionSettings) -> UnitCost:
    """The optimizer steps that are left of both phases, in a worker process."""
    from selfcascade.adaptation.pretrain import steps_done, steps_planned, train_base

    held = opened(store)
    before = steps_done(settings, held, plan)
    planned = steps_planned(settings)
    total = sum(planned.values())
    with StageProgress("train", settings.name, start=sum(before.values()), total=total, what="steps", meters=meters(execution, run_id())) as progress:

        def report(reached: PretrainingStep) -> None:
            first = planned["autoencoder"] if reached.phase == "denoiser" else 0
            progress.reach(first + reached.step, note=f"{reached.phase}, loss {reached.loss:.4f}")

        measured = workers(execution).run(train_base, settings, held, plan, report=report, tries=execution.retries + 1, unit=0)
    return UnitCost.of(0, measured, total - sum(before.values()))


@task(name="publish-base", task_run_name="publish {settings.name}", tags=["pretrain"], **NETWORK)
def publish(settings: PretrainingSettings, store: StoreSettings, plan: PretrainingPlan) -> ArtifactRef:
    """Commit the base."""
    from selfcascade.adaptation.pretrain import publish_pretraining

    return publish_pretraining(settings, opened(store), plan)
