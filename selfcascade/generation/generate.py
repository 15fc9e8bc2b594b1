"""Generation as units of work: a chunk of samples is one unit and one shard, and an artifact holds them all."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from pydantic import Field

from selfcascade.bases import HUB_ID, ResolvedBase, names_artifact, resolve_base
from selfcascade.config import BaselineSettings, CascadeSettings, GenerationSettings, Memory, Method
from selfcascade.curation.shards import table_name, tar_name
from selfcascade.generation.prompts import load_prompts, prompts_version
from selfcascade.generation.samples import shard_table, write_shard
from selfcascade.generation.seeds import SampleSpec, sample_specs
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, ArtifactRef, Kind, Plan, Store, entry_of, resolve

if TYPE_CHECKING:
    from selfcascade.baselines.finetune import Way
    from selfcascade.cascade.families import BaseSpec

_STAGES = ("start", "upscale", "t_min", "strength", "later_steps", "guidance_interval", "pivot_every")
_UNUSED: Mapping[Method, tuple[str, ...]] = MappingProxyType(
    {
        "base": _STAGES,
        "lanczos": _STAGES,
        "latent-sr": _STAGES,
        "x4-upscaler": _STAGES,
        "direct": _STAGES,
        "attention-scaling": (*_STAGES, "eta"),
        "scalecrafter": (*_STAGES, "eta"),
        "hidiffusion": (*_STAGES, "eta"),
        "lora": (*_STAGES, "eta"),
        "full": (*_STAGES, "eta"),
        "tuning-free": ("t_min", "strength", "pivot_every"),
        "tuned": (),
    }
)
"""Settings of the cascade that a method does not look at."""
_INSIDE_BLOCKS: frozenset[Method] = frozenset({"attention-scaling", "scalecrafter", "hidiffusion"})
"""Methods that change the UNet inside the blocks that ``compiled`` compiles: they sample with one that is not."""
_USED: Mapping[Method, tuple[str, ...]] = MappingProxyType(
    {
        "x4-upscaler": ("x4",),
        "attention-scaling": ("eta",),
        "scalecrafter": ("eta", "scalecrafter"),
        "hidiffusion": ("eta",),
        "lora": ("eta",),
        "full": ("eta",),
    }
)
"""Settings of the baselines that a method looks at. Of these methods each applies to some bases and sizes only."""


class GenerationPlan(Plan):
    """Which samples there are, in which chunks, from which versions of base, upsampler and prompts."""

    inputs: dict[str, str] = Field(description="versions of base, prompts and, where there is one, upsampler, latent or x4 upscaler, LoRA, fine-tuned UNet")
    base: str = Field(description="the base as a worker finds it again, at a fixed version where it is an artifact")
    upsampler: str | None = Field(description="the same of the upsampler")
    upscaler: str | None = Field(description="the same of the latent upscaler")
    finetuned: str | None = Field(None, description="the same of the LoRA or the fine-tuned UNet")
    chunks: dict[int, tuple[SampleSpec, ...]] = Field(description="samples of each unit, in key order")

    def only(self, index: int) -> GenerationPlan:
        """The plan as one unit needs it: a small record, where the whole may hold tens of thousands of prompts."""
        return self.model_copy(update={"chunks": {index: self.chunks[index]}})


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


def relevant(settings: GenerationSettings) -> GenerationSettings:
    """Settings in which whatever the method does not look at has its default, so that a sweep over ``start`` does not sample the base again."""
    defaults = CascadeSettings()
    unused = {name: getattr(defaults, name) for name in _UNUSED[settings.method]}
    used = {name: getattr(settings.baselines, name) for name in _USED.get(settings.method, ())}
    changes = {"cascade": settings.cascade.model_copy(update=unused), "baselines": BaselineSettings().model_copy(update=used)}
    return settings.model_copy(update=changes | {"compiled": settings.compiled and settings.method not in _INSIDE_BLOCKS})


def needs_upscaler(settings: GenerationSettings) -> bool:
    """Whether the latent upscaler has a part in these samples."""
    return settings.method == "latent-sr" or (settings.method in ("tuning-free", "tuned") and settings.cascade.upscale == "learned")


def plan_generation(settings: GenerationSettings, store: Store) -> GenerationPlan:
    """Find the inputs and lay out the chunks. Writes nothing and loads no weights but those of upsampler and latent upscaler.

    Raises:
        SettingsError: no prompts, a bad prompt file, no such base or upsampler, an upsampler or LoRA of another base, or a size that the base cannot make.
    """
    base, base_reference = _find_base(settings, store)
    prompts = load_prompts(settings.prompts, store)
    inputs = {"base": str(base), "prompts": prompts_version(prompts)}
    upsampler = upscaler = finetuned = None
    if settings.method == "tuned":
        upsampler, inputs["upsampler"] = _find_upsampler(settings, store)
    if needs_upscaler(settings):
        upscaler, inputs["upscaler"] = _find_upscaler(settings, store)
    if settings.method in ("lora", "full"):
        finetuned, role, version = _find_finetuned(settings, store)
        inputs[role] = version
    if settings.method == "x4-upscaler":
        from selfcascade.baselines.upscaler_x4 import resolve_upscaler

        inputs["x4"] = resolve_upscaler(settings.baselines.x4.model, store).version
    artifact = _artifact(settings, store, inputs)
    published = artifact.published()
    if not published:
        _check(settings, store, base, upsampler, upscaler, finetuned)
    specs = sample_specs(prompts, run_seed=settings.seed, per_prompt=settings.prompts.per_prompt, negative_prompt=settings.negative_prompt)
    chunks = {start // settings.chunk: specs[start : start + settings.chunk] for start in range(0, len(specs), settings.chunk)}
    there = artifact.existing()
    done = tuple(index for index in chunks if table_name(index) in there)
    todo = tuple(index for index in chunks if table_name(index) not in there)
    return GenerationPlan(
        artifact_ref=artifact.ref,
        published=published,
        units=len(chunks),
        done=done,
        todo=todo,
        bytes_planned=sum(len(chunks[index]) for index in todo) * settings.cascade.height * settings.cascade.width * 3,
        inputs=inputs,
        base=base_reference,
        upsampler=upsampler,
        upscaler=upscaler,
        finetuned=finetuned,
        chunks=chunks,
    )


def generate_unit(settings: GenerationSettings, store: Store, plan: GenerationPlan, index: int, device: str = "auto") -> UnitReport:
    """Sample one chunk and store its shard. A shard that is there is not touched, and whatever is missing of it is made from what is there.

    Args:
        settings: those of the plan.
        store: of the plan.
        plan: from :func:`plan_generation`, whole or :meth:`~GenerationPlan.only` this unit.
        index: of the unit.
        device: torch device, or "auto".

    Raises:
        OutOfMemory: a batch does not fit the device; names the settings to lower.
        SettingsError: base or upsampler do not load.
    """
    started = time.perf_counter()
    artifact = _artifact(settings, store, plan.inputs)
    if artifact.ref != plan.ref:
        raise ValueError(f"settings lead to {artifact.ref}, the plan to {plan.ref}")
    if artifact.has(table_name(index)):
        return UnitReport(0, time.perf_counter() - started, _peak_mb(), settings.memory)
    count, tier = 0, settings.memory
    with tempfile.TemporaryDirectory(prefix="selfcascade-") as folder:
        path = Path(folder, tar_name(index))
        if artifact.has(tar_name(index)):
            artifact.download(tar_name(index), path)
        else:
            count, tier = _sample(settings, store, plan, index, device, path)
            if artifact.put(tar_name(index), path).sha256 != entry_of(tar_name(index), path).sha256:
                artifact.download(tar_name(index), path)  # another run was first: its bytes are the artifact's
        artifact.put(table_name(index), shard_table(path))
    return UnitReport(count, time.perf_counter() - started, _peak_mb(), tier)


def publish_generation(settings: GenerationSettings, store: Store, plan: GenerationPlan) -> ArtifactRef:
    """Commit the artifact once every unit is done.

    Raises:
        NotFound: a shard is missing; names it.
    """
    names = [name(index) for index in range(plan.units) for name in (tar_name, table_name)]
    specs = [spec for chunk in plan.chunks.values() for spec in chunk]
    counts = {"samples": len(specs), "prompts": len({spec.prompt_id for spec in specs}), "shards": plan.units, "method": settings.method}
    return _artifact(settings, store, plan.inputs).publish(counts=counts, objects=names)


def _artifact(settings: GenerationSettings, store: Store, inputs: dict[str, str]) -> Artifact:
    return Artifact.plan(store, "samples", settings.name, relevant(settings), inputs)


def _find_base(settings: GenerationSettings, store: Store) -> tuple[ResolvedBase, str]:
    if names_artifact(settings.base, "bases"):
        ref = resolve(store, settings.base, "bases").ref
        reference = f"bases/{ref.name}@{ref.version}"
        return resolve_base(reference, store), reference
    return resolve_base(settings.base, store), settings.base


def _find_upsampler(settings: GenerationSettings, store: Store) -> tuple[str, str]:
    """Reference and version of the upsampler."""
    if settings.upsampler is None:
        raise SettingsError("method 'tuned' needs an upsampler; set generation.upsampler (upsamplers/NAME, a folder or a hub id), or use method 'tuning-free'")
    from selfcascade.generation.models import upsampler_version

    reference = _fixed(settings.upsampler, "upsamplers", "upsampler", store)
    return reference, upsampler_version(reference, store)


def _find_upscaler(settings: GenerationSettings, store: Store) -> tuple[str, str]:
    """Reference and version of the latent upscaler."""
    if settings.upscaler is None:
        needs, other = ("method 'latent-sr'", "method 'lanczos'") if settings.method == "latent-sr" else ("cascade.upscale 'learned'", "'bilinear'")
        raise SettingsError(f"{needs} needs a latent upscaler; set generation.upscaler (upscalers/NAME, a folder or a hub id), or use {other}")
    from selfcascade.generation.models import upscaler_version

    reference = _fixed(settings.upscaler, "upscalers", "latent upscaler", store)
    return reference, upscaler_version(reference, store)


def _find_finetuned(settings: GenerationSettings, store: Store) -> tuple[str, str, str]:
    """Reference of the LoRA or the fine-tuned UNet, what the inputs call it, and its version."""
    from selfcascade.baselines.finetune import KINDS, NAMES
    from selfcascade.generation.models import ROLES, finetuned_version

    way = _way(settings)
    if settings.finetuned is None:
        raise SettingsError(
            f"method {way!r} needs a {NAMES[way]}; train one by `selfcascade adapt --set adaptation.trainable={way}` and set generation.finetuned "
            f"({KINDS[way]}/NAME or a folder)"
        )
    reference = settings.finetuned
    if names_artifact(reference, KINDS[way]):
        ref = resolve(store, reference, KINDS[way]).ref
        reference = f"{KINDS[way]}/{ref.name}@{ref.version}"
    return reference, ROLES[way], finetuned_version(way, reference, store)


def _way(settings: GenerationSettings) -> Way:
    return "full" if settings.method == "full" else "lora"


def _fixed(reference: str, kind: Kind, what: str, store: Store) -> str:
    """A reference as a worker finds it again: an artifact at its whole version, a folder or hub id as it is."""
    if names_artifact(reference, kind):
        ref = resolve(store, reference, kind).ref
        return f"{kind}/{ref.name}@{ref.version}"
    if not (Path(reference).is_dir() or HUB_ID.fullmatch(reference)):
        raise SettingsError(f"{what} {reference!r} is neither an artifact ({kind}/NAME), nor a folder, nor a hub id (owner/name)")
    return reference


def _check(settings: GenerationSettings, store: Store, base: ResolvedBase, upsampler: str | None, upscaler: str | None, finetuned: str | None) -> None:
    """Refuse before the first unit what the first unit would refuse."""
    from selfcascade.cascade.latent_upscaler import load_latent_upscaler
    from selfcascade.cascade.schedule import stage_sizes
    from selfcascade.cascade.upsampler import load_upsampler
    from selfcascade.generation.models import outline

    spec, known_as = outline(base)
    sizes = stage_sizes(settings.cascade.height, settings.cascade.width, native=spec.native, step=spec.step)
    _check_method(settings, base, spec)
    if upsampler is not None:
        phi = load_upsampler(upsampler, store)
        phi.check_fits(spec, known_as)
        phi.check_stages(len(sizes) - 1)
    if upscaler is not None:
        load_latent_upscaler(upscaler, store).check_fits(spec, known_as)
    if finetuned is not None:
        from selfcascade.baselines.finetune import find_finetune

        find_finetune(finetuned, _way(settings), store).check_base(known_as)


def check_method(settings: GenerationSettings, store: Store) -> None:
    """Refuse, before anything is made for it, a method that does not apply to the base or the size. Reads the base's configuration alone.

    Raises:
        SettingsError: names method, base and reason; or there is no such base.
    """
    from selfcascade.generation.models import outline

    if settings.method in _USED:
        base, _ = _find_base(settings, store)
        _check_method(settings, base, outline(base)[0])


def _check_method(settings: GenerationSettings, base: ResolvedBase, spec: BaseSpec) -> None:
    from selfcascade.baselines.registry import BASELINES

    reason = BASELINES[settings.method].refusal(spec, settings.cascade.height, settings.cascade.width, settings.baselines) if settings.method in _USED else None
    if reason is not None:
        raise SettingsError(f"method {settings.method!r} does not apply to base {base.name!r}: {reason}")


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
        finetuned=None if plan.finetuned is None else (_way(settings), plan.finetuned),
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
    made = samples(pipeline, plan.chunks[index], settings, store=store, base=plan.inputs["base"], on_tier=tiers.append)
    return write_shard(path, made, method=settings.method, settings=digest), tiers[-1]


def _peak_mb() -> float:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated() / 2**20)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)
