"""Generation as units of work: a chunk of samples is one unit and one shard, and an artifact holds them all."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field

from selfcascade.config import GenerationSettings, Memory
from selfcascade.curation.shards import table_name, tar_name
from selfcascade.generation.chunks import chunks_of, lay_out
from selfcascade.generation.gallery import INDEX, index_page, page_name, shard_page
from selfcascade.generation.inputs import check_networks, find_networks, relevant, way_of
from selfcascade.generation.samples import shard_table, write_shard
from selfcascade.generation.seeds import SampleSpec
from selfcascade.storage import Artifact, ArtifactRef, Plan, Store, entry_of


class GenerationPlan(Plan):
    """How many samples there are, in how many chunks, from which versions of base, upsampler and prompts."""

    inputs: dict[str, str] = Field(description="versions of base, prompts and, where there is one, upsampler, latent or x4 upscaler, LoRA, fine-tuned UNet")
    base: str = Field(description="the base as a worker finds it again, at a fixed version where it is an artifact")
    upsampler: str | None = Field(description="the same of the upsampler")
    upscaler: str | None = Field(description="the same of the latent upscaler")
    finetuned: str | None = Field(None, description="the same of the LoRA or the fine-tuned UNet")
    prompts: int = Field(description="prompts in all")
    samples: int = Field(description="samples in all")
    samples_left: int = Field(description="samples of the remaining units")
    chunks: dict[int, tuple[SampleSpec, ...]] = Field({}, description="samples of the units that this part of a plan is for; a whole plan holds none")


@dataclass(frozen=True)
class UnitReport:
    """What a unit did and what it cost; goes to the run's record, never into the artifact."""

    count: int
    """Samples that were made: 0 where the shard was there already."""
    seconds: float
    peak_mb: float
    """Largest memory in MiB: of the CUDA device where there is one, else resident memory of the process so far."""
    tier: Memory
    """The leanest memory tier that a batch was sampled in: below the settings' own where memory ran out."""


def plan_generation(settings: GenerationSettings, store: Store) -> GenerationPlan:
    """Find the inputs, and which chunks are not in the store. Writes nothing and loads no weights but those of upsampler and latent upscaler.

    Prompts are sorted on disk, and a chunk's samples are computed when :func:`part_of` or :func:`generate_unit` wants them: memory stays flat.

    Raises:
        SettingsError: no prompts, a bad prompt file, no such base or upsampler, an upsampler or LoRA of another base, or a size that the base cannot make.
    """
    networks = find_networks(settings, store)
    chunks = lay_out(settings, store)
    inputs = networks.versions | {"prompts": chunks.prompts.version}
    artifact = _artifact(settings, store, inputs)
    published = artifact.published()
    if not published:
        check_networks(settings, store, networks)
    there = artifact.existing()
    done = tuple(index for index in chunks if {table_name(index), page_name(index)} <= there)
    finished = set(done)
    todo = tuple(index for index in chunks if index not in finished)
    left = sum(chunks.size_of(index) for index in todo)
    return GenerationPlan(
        artifact_ref=artifact.ref,
        published=published,
        units=len(chunks),
        done=done,
        todo=todo,
        bytes_planned=left * settings.cascade.height * settings.cascade.width * 3,
        inputs=inputs,
        base=networks.base,
        upsampler=networks.upsampler,
        upscaler=networks.upscaler,
        finetuned=networks.finetuned,
        prompts=len(chunks.prompts),
        samples=chunks.samples,
        samples_left=left,
    )


def part_of(settings: GenerationSettings, store: Store, plan: GenerationPlan, indices: Sequence[int]) -> GenerationPlan:
    """The plan as a worker needs it for some units, a small record: with the samples of these units, and without the list of all others.

    Raises:
        SettingsError: this process did not make the plan, and the prompts are others by now.
    """
    chunks = chunks_of(settings, store, plan.inputs["prompts"])
    return plan.model_copy(update={"done": (), "todo": plan.todo[:1], "chunks": {index: chunks[index] for index in indices}})


def generate_unit(settings: GenerationSettings, store: Store, plan: GenerationPlan, index: int, device: str = "auto") -> UnitReport:
    """Sample one chunk and store its shard, see :func:`generate_units`."""
    return generate_units(settings, store, plan, (index,), device)[0]


def generate_units(settings: GenerationSettings, store: Store, plan: GenerationPlan, indices: Sequence[int], device: str = "auto") -> tuple[UnitReport, ...]:
    """Sample chunks one after another; while one is sampled, the one before it is stored. A shard that is there is not touched, and whatever is missing of it
    is made from what is there.

    Each shard is stored on its own, so what a killed process loses is the chunk that it samples, and the one before where that was not stored yet.

    Args:
        settings: those of the plan.
        store: of the plan.
        plan: from :func:`plan_generation`, whole, or :func:`part_of` it for these units.
        indices: of the units.
        device: torch device, or "auto".

    Raises:
        OutOfMemory: a batch does not fit the device; names the settings to lower.
        SettingsError: base or upsampler do not load, or the prompts have changed.
        StoreError: a shard could not be stored; at the latest when the next one is sampled.
    """
    artifact = _artifact(settings, store, plan.inputs)
    if artifact.ref != plan.ref:
        raise ValueError(f"settings lead to {artifact.ref}, the plan to {plan.ref}")
    reports: list[UnitReport] = []
    with ThreadPoolExecutor(1, thread_name_prefix="storing") as background:
        storing: Future[UnitReport] | None = None
        for index in indices:
            shard = _made(artifact, settings, store, plan, index, device)
            if storing is not None:  # one shard at a time waits on disk, and its error ends the work
                reports.append(storing.result())
            storing = background.submit(shard)
        if storing is not None:
            reports.append(storing.result())
    return tuple(reports)


def _made(artifact: Artifact, settings: GenerationSettings, store: Store, plan: GenerationPlan, index: int, device: str) -> Callable[[], UnitReport]:
    """Sample a chunk, unless it is there; what is returned stores it."""
    started = time.perf_counter()
    if artifact.has(table_name(index)) and artifact.has(page_name(index)):
        return partial(UnitReport, 0, time.perf_counter() - started, _peak_mb(), settings.memory)
    folder = tempfile.TemporaryDirectory(prefix="selfcascade-")
    path, count, tier = Path(folder.name, tar_name(index)), 0, settings.memory
    stored = artifact.has(tar_name(index))
    if not stored:
        count, tier = _sample(settings, store, plan, index, device, path)

    def store_it() -> UnitReport:
        with folder:
            if stored or artifact.put(tar_name(index), path).sha256 != entry_of(tar_name(index), path).sha256:
                artifact.download(tar_name(index), path)  # the table is made from what the store holds: another run may have been first
            artifact.put(table_name(index), shard_table(path))
            artifact.put(page_name(index), shard_page(path, index, artifact, settings, shards=plan.units))
        return UnitReport(count, time.perf_counter() - started, _peak_mb(), tier)

    return store_it


def publish_generation(settings: GenerationSettings, store: Store, plan: GenerationPlan) -> ArtifactRef:
    """Commit the artifact once every unit is done.

    Raises:
        NotFound: a shard is missing; names it.
    """
    artifact = _artifact(settings, store, plan.inputs)
    names = [name(index) for index in range(plan.units) for name in (tar_name, table_name, page_name)]
    if not artifact.published() and artifact.existing().issuperset(names):
        sizes = [min(settings.chunk, plan.samples - first) for first in range(0, plan.samples, settings.chunk)]
        artifact.put(INDEX, index_page(artifact, settings, sizes))
    counts = {"samples": plan.samples, "prompts": plan.prompts, "shards": plan.units, "method": settings.method}
    return artifact.publish(counts=counts, objects=[*names, INDEX])


def _artifact(settings: GenerationSettings, store: Store, inputs: dict[str, str]) -> Artifact:
    return Artifact.plan(store, "samples", settings.name, relevant(settings), inputs)


def _sample(settings: GenerationSettings, store: Store, plan: GenerationPlan, index: int, device: str, path: Path) -> tuple[int, Memory]:
    import torch

    from selfcascade.generation.models import load_pipeline, load_x4, resolve_device
    from selfcascade.generation.precision import warn_of_slow_precision
    from selfcascade.generation.sampling import samples

    torch.set_num_threads(settings.compute.threads)
    if plan.todo[:1] == (index,):  # once a run
        warn_of_slow_precision("generation.compute.dtype", settings.compute.dtype, resolve_device(device))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    dtype = settings.compute.dtype
    pipeline = load_pipeline(
        plan.base,
        plan.upsampler,
        store,
        upscaler=plan.upscaler,
        finetuned=None if plan.finetuned is None else (way_of(settings), plan.finetuned),
        versions=plan.inputs,
        scheduler=settings.cascade.scheduler,
        dtype=dtype,
        compiled=relevant(settings).compiled,
        device=device,
    )
    if settings.method == "x4-upscaler":
        load_x4(settings.baselines.x4.model, version=plan.inputs["x4"], dtype=dtype, device=str(pipeline._execution_device))
    digest = relevant(settings).digest()
    tiers: list[Memory] = [settings.memory]
    specs = plan.chunks.get(index) or chunks_of(settings, store, plan.inputs["prompts"])[index]
    made = samples(pipeline, specs, settings, store=store, base=plan.inputs["base"], on_tier=tiers.append)
    return write_shard(path, made, method=settings.method, settings=digest, ahead=settings.batch + 1), tiers[-1]


def _peak_mb() -> float:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated() / 2**20)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)
