"""The methods that are compared: what each makes of the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from selfcascade.baselines import direct
from selfcascade.baselines.registry import BASELINES
from selfcascade.cascade.decoding import decode
from selfcascade.cascade.memory import TIERS
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.config import GenerationSettings, Method
from selfcascade.generation.models import load_x4
from selfcascade.generation.seeds import SampleSpec, sample_generator

Pictures = NDArray[np.uint8]
"""(B, H, W, 3)"""
Sampler = Callable[[SelfCascadePipeline, Sequence[SampleSpec], GenerationSettings, Tensor | None], Pictures]
"""Takes a pipeline, the samples of one batch, settings and the clean base latents of these samples, if the method builds on them."""

BUILDS_ON_BASE: frozenset[Method] = frozenset({"base", "lanczos", "latent-sr", "x4-upscaler", "tuning-free", "tuned"})
"""Methods whose first stage is the base's own picture: one pass of the base serves them all."""


def base_latents(pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], settings: GenerationSettings) -> Tensor:
    """Clean latents of the base stage, (B, C, h, w), fp32, scaled: what base, lanczos and both cascades start from."""
    sizes = pipeline.sizes(settings.cascade.height, settings.cascade.width)
    return _call(pipeline, specs, settings, sizes=sizes[:1])


def sample_base(pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], settings: GenerationSettings, bases: Tensor | None) -> Pictures:
    """The base's own picture at its native size."""
    return _decoded(pipeline, _given(bases), settings)


def sample_lanczos(pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], settings: GenerationSettings, bases: Tensor | None) -> Pictures:
    """The base's own picture, 8 bits a channel, enlarged to the target by Pillow's Lanczos filter."""
    size = (settings.cascade.width, settings.cascade.height)
    pictures = sample_base(pipeline, specs, settings, bases)
    return np.stack([np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)) for picture in pictures])


def sample_latent_sr(pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], settings: GenerationSettings, bases: Tensor | None) -> Pictures:
    """The base's own latent, enlarged by the latent upscaler and decoded."""
    cascade = settings.cascade
    call = {"base": _given(bases), "output_type": "latent", "return_dict": False}
    return _decoded(pipeline, BASELINES["latent-sr"].sample(pipeline, height=cascade.height, width=cascade.width, **call)[0], settings)


def sample_direct(pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], settings: GenerationSettings, bases: Tensor | None) -> Pictures:
    """The target size from noise in a single stage."""
    cascade = settings.cascade
    call = _arguments(specs, settings) | _tier(settings) | {"output_type": "latent", "return_dict": False}
    return _decoded(pipeline, direct.sample(pipeline, height=cascade.height, width=cascade.width, **call)[0], settings)


def sample_baseline(pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], settings: GenerationSettings, bases: Tensor | None) -> Pictures:
    """The target size from noise in a single stage, by the baseline of that name; eta is the baselines' own."""
    cascade, baseline = settings.cascade, BASELINES[settings.method]
    arguments = _arguments(specs, settings) | {"eta": settings.baselines.eta, "output_type": "latent", "return_dict": False}
    return _decoded(pipeline, baseline.sample(pipeline, height=cascade.height, width=cascade.width, settings=settings.baselines, **arguments)[0], settings)


def sample_finetuned(pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], settings: GenerationSettings, bases: Tensor | None) -> Pictures:
    """The target size from noise in a single stage, by a pipeline whose UNet was tuned there; eta is the baselines' own."""
    cascade, baseline = settings.cascade, BASELINES[settings.method]
    arguments = _arguments(specs, settings) | _tier(settings) | {"eta": settings.baselines.eta, "output_type": "latent", "return_dict": False}
    return _decoded(pipeline, baseline.sample(pipeline, height=cascade.height, width=cascade.width, settings=settings.baselines, **arguments)[0], settings)


def sample_x4(pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], settings: GenerationSettings, bases: Tensor | None) -> Pictures:
    """The base's own picture, enlarged by the x4 upscaler, which is loaded once a process."""
    cascade = settings.cascade
    upscaler = load_x4(settings.baselines.x4.model, dtype=settings.compute.dtype, device=str(pipeline._execution_device))
    given = {"settings": settings.baselines, "upscaler": upscaler, "base": _given(bases), "output_type": "pt", "return_dict": False}
    pictures = BASELINES["x4-upscaler"].sample(pipeline, height=cascade.height, width=cascade.width, **given, **_arguments(specs, settings))[0]
    return _bytes(pictures)


def sample_cascade(pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], settings: GenerationSettings, bases: Tensor | None) -> Pictures:
    """The stages above the base, tuned where the pipeline holds an upsampler."""
    cascade, pivot = settings.cascade, _given(bases)
    sizes = pipeline.sizes(cascade.height, cascade.width)
    if len(sizes) == 1:  # the target is the base's own size
        return _decoded(pipeline, pivot, settings)
    later = {name: getattr(cascade, name) for name in ("start", "upscale", "t_min", "strength", "later_steps", "guidance_interval", "pivot_every")}
    return _decoded(pipeline, _call(pipeline, specs, settings, sizes=sizes, pivot=pivot, **later), settings)


METHODS: Mapping[Method, Sampler] = MappingProxyType(
    {
        "base": sample_base,
        "lanczos": sample_lanczos,
        "latent-sr": sample_latent_sr,
        "x4-upscaler": sample_x4,
        "direct": sample_direct,
        "attention-scaling": sample_baseline,
        "scalecrafter": sample_baseline,
        "hidiffusion": sample_baseline,
        "lora": sample_finetuned,
        "full": sample_finetuned,
        "tuning-free": sample_cascade,
        "tuned": sample_cascade,
    }
)


def _call(pipeline: SelfCascadePipeline, specs: Sequence[SampleSpec], settings: GenerationSettings, **call: Any) -> Tensor:
    latents: Tensor = pipeline(**_arguments(specs, settings), **_tier(settings), **call, output_type="latent", return_dict=False)[0]
    return latents


def _arguments(specs: Sequence[SampleSpec], settings: GenerationSettings) -> dict[str, Any]:
    """What every call is told. A sample's generator is fresh, and gives a stage the same noise whether or not the stages below it are sampled again."""
    negatives = [spec.negative_prompt for spec in specs]
    return {
        "prompt": [spec.prompt for spec in specs],
        # For SDXL no negative prompt is not the empty one; a batch is all of one kind (sampling.batches_of).
        "negative_prompt": negatives if any(negatives) else None,
        "generator": [sample_generator(spec.seed) for spec in specs],
        "num_inference_steps": settings.cascade.steps,
        "guidance_scale": settings.cascade.guidance_scale,
        "eta": settings.cascade.eta,
    }


def _tier(settings: GenerationSettings) -> dict[str, Any]:
    """What a call is told of memory. Baselines that need both branches of guidance in one pass are not."""
    return {"joint_branches": TIERS[settings.memory].joint_branches}


def _decoded(pipeline: SelfCascadePipeline, latents: Tensor, settings: GenerationSettings) -> Pictures:
    """Pictures of latents: 8 bits a channel, rounded to nearest."""
    pictures = decode(pipeline.vae, latents.to(pipeline._execution_device), tile_above=TIERS[settings.memory].tile_above)
    return _bytes((pictures / 2 + 0.5).clamp(0, 1))


def _bytes(pictures: Tensor) -> Pictures:
    """Pictures of [0, 1], (B, 3, H, W)."""
    return pictures.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _given(bases: Tensor | None) -> Tensor:
    if bases is None:
        raise ValueError("this method builds on the base's latents; compute them by base_latents()")
    return bases
