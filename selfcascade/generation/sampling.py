"""Bulk sampling: a lazy stream of small records, which a store, a metric or a loop of the user's may consume alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from selfcascade.cascade.compilation import failed_to_compile, is_compiled
from selfcascade.cascade.memory import next_tier
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.config import GenerationSettings, Memory
from selfcascade.generation.latents import cached_latents, latents_key
from selfcascade.generation.methods import BUILDS_ON_BASE, METHODS, Pictures, base_latents
from selfcascade.generation.models import OutOfMemory, is_memory, release
from selfcascade.generation.samples import Sample
from selfcascade.generation.seeds import SampleSpec
from selfcascade.settings import SettingsError
from selfcascade.storage import Store

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def samples(
    pipeline: SelfCascadePipeline,
    specs: Sequence[SampleSpec],
    settings: GenerationSettings,
    *,
    store: Store | None = None,
    base: str | None = None,
    on_tier: Callable[[Memory], None] = lambda memory: None,
) -> Iterator[Sample]:
    """Sample ``specs`` by ``settings.method``, batch after batch, in their order; nothing runs before the first one is asked for.

    A sample's bytes depend on its spec and, through the order in which kernels sum, on the batch it is in: equal specs give equal bytes, and another batch
    size gives the same picture to float tolerance.

    Args:
        pipeline: cascade of ``settings.base``, with an upsampler for method "tuned".
        specs: of one chunk.
        settings: method, cascade and batch.
        store: where the base latents of the chunk are cached; without one they are computed and forgotten.
        base: ``name@version`` of the base, with a store: latents of another version are other latents.
        on_tier: told the memory tier that a batch was sampled in.

    Raises:
        OutOfMemory: a batch does not fit, nor the memory tier below; names the settings to lower.
        SettingsError: method "tuned" without an upsampler, a size that the base cannot make, or ``compiled`` where nothing compiles.
    """
    if settings.method == "tuned" and pipeline.upsampler is None:
        raise SettingsError("method 'tuned' needs an upsampler; set generation.upsampler, or use method 'tuning-free'")
    if settings.method == "tuning-free" and pipeline.upsampler is not None:
        raise SettingsError("method 'tuning-free' is given a pipeline with an upsampler; load it without, or use method 'tuned'")
    if store is not None and base is None:
        raise ValueError("with a store, samples() needs the version of the base: it is in the key of the cached latents")
    return _samples(pipeline, specs, settings, store, base or "", on_tier)


def _samples(
    pipeline: SelfCascadePipeline,
    specs: Sequence[SampleSpec],
    settings: GenerationSettings,
    store: Store | None,
    base: str,
    on_tier: Callable[[Memory], None],
) -> Iterator[Sample]:
    release(pipeline, settings.memory)
    sampler, builds_on_base = METHODS[settings.method], settings.method in BUILDS_ON_BASE
    batches = list(batches_of(specs, settings.batch))
    cached = _cached_bases(pipeline, specs, batches, settings, store, base) if builds_on_base and store is not None else None
    done = 0
    for batch in batches:
        bases = cached[done : done + len(batch)] if cached is not None else None

        def sample(settings: GenerationSettings, batch: Sequence[SampleSpec] = batch, bases: Tensor | None = bases) -> Pictures:
            if bases is None and builds_on_base:
                bases = base_latents(pipeline, batch, settings)
            return sampler(pipeline, batch, settings, bases)

        settings, pictures = fitting(pipeline, settings, sample)
        on_tier(settings.memory)
        for spec, picture in zip(batch, pictures, strict=True):
            yield Sample(spec=spec, image=picture)
        done += len(batch)


def fitting(pipeline: SelfCascadePipeline, settings: GenerationSettings, run: Callable[[GenerationSettings], Result]) -> tuple[GenerationSettings, Result]:
    """What ``run`` makes of the settings, or of the memory tier below theirs where it runs out of memory: one tier down, once.

    The batch is not made smaller by itself; a tier changes the sums of a picture in the last bits, and its tiles from 512 px on. A warning says so.

    Returns:
        The settings that fitted, for what comes next, and the result.

    Raises:
        OutOfMemory: neither fits; names the settings to lower.
    """
    try:
        with _inference(settings):
            return settings, run(settings)
    except OutOfMemory as error:
        lower = next_tier(settings.memory, accelerated=pipeline._execution_device.type != "cpu")
        if lower is None:
            raise
        log.warning("%s; going on with generation.memory=%s", str(error).partition(";")[0], lower)
    release(pipeline, lower)
    leaner = settings.model_copy(update={"memory": lower})
    with _inference(leaner):
        return leaner, run(leaner)


def batches_of(specs: Sequence[SampleSpec], size: int) -> Iterator[Sequence[SampleSpec]]:
    """Runs of at most ``size`` samples in their order, all with or all without a negative prompt: SDXL tells none from an empty one."""
    for _, group in groupby(specs, key=lambda spec: bool(spec.negative_prompt)):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _cached_bases(
    pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], batches: Sequence[Sequence[SampleSpec]], settings: GenerationSettings, store: Store, base: str
) -> Tensor:
    def compute() -> Tensor:
        return fitting(pipeline, settings, lambda fit: torch.cat([base_latents(pipeline, batch, fit).cpu() for batch in batches]))[1]

    unet, device = pipeline.unet, pipeline._execution_device
    key = latents_key(specs, settings, base=base, dtype=unet.dtype, compiled=is_compiled(unet), device=device)
    return cached_latents(store, key, compute)


@contextmanager
def _inference(settings: GenerationSettings) -> Iterator[None]:
    """No autograd, and one line where memory runs out or blocks do not compile."""
    try:
        with torch.inference_mode():
            yield
    except (RuntimeError, MemoryError) as error:
        if settings.compiled and failed_to_compile(error):
            reason = " ".join(str(error).partition("\n\n")[0].split())[:200]
            raise SettingsError(
                f"the blocks of the UNet do not compile here: {reason}; install a C++ compiler (on a CPU), or set generation.compiled to false"
            ) from error
        if not is_memory(error):
            raise
        cascade = settings.cascade
        raise OutOfMemory(
            f"out of memory while sampling {settings.batch} pictures of {cascade.height}x{cascade.width} at once by method {settings.method!r}; lower"
            f" generation.batch (now {settings.batch}), generation.cascade.height and width, or set generation.memory to lean or generation.compute.dtype to"
            " bfloat16"
        ) from error
