"""Generation as Prefect tasks: lay out the chunks, sample one, commit the samples."""

from __future__ import annotations

from collections.abc import Iterator

from prefect import task
from prefect.runtime import task_run

from selfcascade.config import ExecutionSettings, GenerationSettings, StoreSettings
from selfcascade.generation.generate import GenerationPlan, generate_units, part_of, plan_generation, publish_generation
from selfcascade.generation.samples import Sample, read_generated
from selfcascade.generation.sheet import contact_sheet
from selfcascade.storage import Artifact, ArtifactRef
from selfcascade_tasks.artifacts import show_sheet
from selfcascade_tasks.network import NETWORK
from selfcascade_tasks.record import UnitCost
from selfcascade_tasks.store import opened
from selfcascade_tasks.workers import side_by_side, workers

SHOWN = 12
"""Samples on the contact sheet in the UI."""
MOST = 4
"""Chunks of a task: all but the last of them are stored while the next is sampled."""
SHARES = 16
"""Tasks for each worker, if there are so many chunks: the last tasks end nearly together."""


def work_of(settings: GenerationSettings, samples: int) -> float:
    """Samples counted as ones of 256 pixels and 50 steps: what rates are told in."""
    cascade = settings.cascade
    return samples * cascade.steps / 50 * cascade.height * cascade.width / 256**2


@task(name="plan-samples", task_run_name="plan {settings.name}", tags=["generate"], **NETWORK)
def plan(settings: GenerationSettings, store: StoreSettings) -> GenerationPlan:
    """The address of the samples and the chunks of prompts that are not in the store."""
    return plan_generation(settings, opened(store))


def parts(settings: GenerationSettings, store: StoreSettings, plan: GenerationPlan, execution: ExecutionSettings) -> Iterator[GenerationPlan]:
    """The chunks that are left, some for each task, made as they are asked for; none where all are stored and not yet published."""
    size = max(1, min(MOST, -(-len(plan.todo) // (SHARES * side_by_side(execution)))))
    for start in range(0, len(plan.todo), size):
        yield part_of(settings, opened(store), plan, plan.todo[start : start + size])


def _named() -> str:
    """A task run by its chunks, as far as they go."""
    part, name = task_run.parameters["part"], task_run.parameters["settings"].name
    return f"chunk{'s' * (len(part.chunks) > 1)} {_span(part)} of {name}"


def _span(part: GenerationPlan) -> str:
    """Which chunks these are: 3, or 3 to 6."""
    first, last = min(part.chunks), max(part.chunks)
    return f"{first}" if first == last else f"{first} to {last}"


@task(name="sample-chunks", task_run_name=_named, tags=["generate"], **NETWORK)
def sample_chunks(part: GenerationPlan, settings: GenerationSettings, store: StoreSettings, execution: ExecutionSettings) -> UnitCost:
    """Sample and store some chunks in a worker process: those that ``part`` holds."""
    measured = workers(execution).run(
        generate_units, settings, opened(store), part, tuple(part.chunks), execution.device, tries=execution.retries + 1, unit=_span(part)
    )
    samples = sum(report.count for report in measured.value)
    tiers = tuple(report.tier for report in measured.value)
    return UnitCost.of(min(part.chunks), measured, work_of(settings, samples), pictures=samples, tiers=tiers)


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
