"""Adaptation as Prefect tasks: find dataset and base, encode one shard, train, commit the upsampler.

Each imports the networks when it runs: a command that only names the flow, as a deployment does, is seconds faster without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import get_run_logger, task

from selfcascade.config import AdaptationSettings, ExecutionSettings, StoreSettings
from selfcascade.storage import Artifact, ArtifactRef, Store, resolve
from selfcascade_tasks.artifacts import show_sheet
from selfcascade_tasks.metrics import meters
from selfcascade_tasks.network import NETWORK
from selfcascade_tasks.progress import StageProgress
from selfcascade_tasks.record import UnitCost, run_id
from selfcascade_tasks.store import opened
from selfcascade_tasks.workers import workers

if TYPE_CHECKING:
    from selfcascade.adaptation.adapt import AdaptationPlan
    from selfcascade.adaptation.rank_group import RankLine
    from selfcascade.adaptation.training_run import TrainingStep

SHEET = "previews/sheet.png"
ENCODING = 0.05
"""Latents of one picture, told in optimizer steps: 0.03 s against 0.6 s at the demo's sizes."""


def encoding_work(plan: AdaptationPlan, store: Store, *, shards: int) -> float:
    """What the latents of so many shards weigh, told in optimizer steps."""
    return ENCODING * float(resolve(store, plan.dataset).manifest().counts["kept"]) * shards / len(plan.shards)


def how_it_goes(reached: TrainingStep) -> str:
    """Losses, speed and memory of a training in a line."""
    validation = f", validation {reached.validation:.4f}" if reached.validation is not None else ""
    return f"loss {reached.loss:.4f}{validation}, {reached.samples_per_second:.3g} samples/s, {reached.memory_bytes / 2**30:.1f} GiB"


@task(name="plan-upsampler", task_run_name="plan {settings.name}", tags=["adapt"], **NETWORK)
def plan(settings: AdaptationSettings, store: StoreSettings, execution: ExecutionSettings) -> AdaptationPlan:
    """The address of the upsampler, the shards whose latents are missing, and the steps that are left."""
    from selfcascade.adaptation.adapt import plan_adaptation

    return plan_adaptation(settings, opened(store), device=execution.device)


@task(name="encode-shard", task_run_name="latents of shard {unit}", tags=["adapt"], **NETWORK)
def encode_shard(unit: int, settings: AdaptationSettings, store: StoreSettings, plan: AdaptationPlan, execution: ExecutionSettings) -> UnitCost:
    """Latents of one shard, in a worker process."""
    from selfcascade.adaptation.adapt import encode_unit

    held = opened(store)
    measured = workers(execution).run(encode_unit, settings, held, plan, unit, tries=execution.retries + 1, unit=unit)
    return UnitCost.of(unit, measured, encoding_work(plan, held, shards=1))


@task(name="train-upsampler", task_run_name="train {settings.name}", tags=["adapt"], **NETWORK)
def train(settings: AdaptationSettings, store: StoreSettings, plan: AdaptationPlan, execution: ExecutionSettings) -> UnitCost:
    """The optimizer steps that are left, in a worker process; losses, speed, memory and previews are shown while it trains.

    With several ``settings.processes`` the worker is their parent, and what they write is in the log of this task.
    """
    from selfcascade.adaptation.adapt import train_and_tell
    from selfcascade.adaptation.rank_group import RankLine

    held, log = opened(store), get_run_logger()
    with StageProgress("train", settings.name, start=plan.step, total=plan.steps, what="steps", meters=meters(execution, run_id())) as progress:

        def report(reached: TrainingStep | RankLine) -> None:
            if isinstance(reached, RankLine):
                log.info("%s", reached)
                return
            progress.reach(reached.step, note=how_it_goes(reached), seconds_left=reached.seconds_left)
            if reached.preview is not None:
                show_sheet("train", settings.name, held.read(reached.preview), title=f"{settings.name} at step {reached.step} of {reached.steps}")

        measured = workers(execution).run(train_and_tell, settings, held, plan, report=report, tries=execution.retries + 1, unit=len(plan.shards))
    return UnitCost.of(len(plan.shards), measured, measured.value)


@task(name="publish-upsampler", task_run_name="publish {settings.name}", tags=["adapt"], **NETWORK)
def publish(settings: AdaptationSettings, store: StoreSettings, plan: AdaptationPlan, execution: ExecutionSettings) -> ArtifactRef:
    """Write weights, card, loss log and previews and commit them."""
    from selfcascade.adaptation.adapt import publish_adaptation

    return workers(execution).run(publish_adaptation, settings, opened(store), plan, tries=execution.retries + 1).value


@task(name="show-upsampler", task_run_name="show {ref.name}", tags=["adapt"], **NETWORK)
def show(ref: ArtifactRef, store: StoreSettings) -> None:
    """The pictures of the model card."""
    artifact = Artifact(opened(store), ref)
    if SHEET in artifact.existing():
        show_sheet("adapt", ref.name, artifact.read(SHEET), title=f"Previews of {ref}")
