"""Generation as Prefect tasks: lay out the chunks, sample one, commit the samples."""

from __future__ import annotations

from prefect import task

from selfcascade.config import ExecutionSettings, GenerationSettings, StoreSettings
from selfcascade.generation.generate import GenerationPlan, generate_unit, plan_generation, publish_generation
from selfcascade.generation.samples import Sample, read_generated
from selfcascade.generation.sheet import contact_sheet
from selfcascade.storage import Artifact, ArtifactRef
from selfcascade_tasks.artifacts import show_sheet
from selfcascade_tasks.network import NETWORK
from selfcascade_tasks.record import UnitCost
from selfcascade_tasks.store import opened
from selfcascade_tasks.workers import workers

SHOWN = 12
"""Samples on the contact sheet in the UI."""


def work_of(settings: GenerationSettings, samples: int) -> float:
    """Samples counted as ones of 256 pixels and 50 steps: what rates are told in."""
    cascade = settings.cascade
    return samples * cascade.steps / 50 * cascade.height * cascade.width / 256**2


@task(name="plan-samples", task_run_name="plan {settings.name}", tags=["generate"], **NETWORK)
def plan(settings: GenerationSettings, store: StoreSettings) -> GenerationPlan:
    """The address of the samples and the chunks of prompts that are not in the store."""
    return plan_generation(settings, opened(store))


@task(name="sample-chunk", task_run_name="chunk {index} of {settings.name}", tags=["generate"], **NETWORK)
def sample_chunk(index: int, plan: GenerationPlan, settings: GenerationSettings, store: StoreSettings, execution: ExecutionSettings) -> UnitCost:
    """Sample and store one chunk in a worker process. ``plan`` holds this chunk alone."""
    measured = workers(execution).run(generate_unit, settings, opened(store), plan, index, execution.device, tries=execution.retries + 1)
    return UnitCost.of(index, measured, work_of(settings, measured.value.count), tier=measured.value.tier)


@task(name="publish-samples", task_run_name="publish {settings.name}", tags=["generate"], **NETWORK)
def publish(settings: GenerationSettings, store: StoreSettings, plan: GenerationPlan) -> ArtifactRef:
    """Commit the samples."""
    return publish_generation(settings, opened(store), plan)


@task(name="show-samples", task_run_name="show {ref.name}", tags=["generate"], **NETWORK)
def show(ref: ArtifactRef, store: StoreSettings) -> None:
    """A contact sheet of the first samples."""
    found: list[Sample] = []
    for sample in read_generated(Artifact(opened(store), ref)):
        found.append(sample)
        if len(found) == SHOWN:
            break
    prompts = [sample.prompt for sample in found]
    show_sheet("generate", ref.name, contact_sheet({ref.name: [sample.image for sample in found]}, prompts), title=f"First samples of {ref}", captions=prompts)
