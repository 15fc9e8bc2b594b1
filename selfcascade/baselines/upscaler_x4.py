"""The base's own picture, enlarged by Stable Diffusion's x4 upscaler (the paper's SD+SR row)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ImagePipelineOutput, StableDiffusionUpscalePipeline
from torch import Tensor
from torch.nn import functional as F

from selfcascade.baselines.baseline import Baseline
from selfcascade.bases import ResolvedBase, resolve_base
from selfcascade.cascade.decoding import decode
from selfcascade.cascade.families import BaseSpec
from selfcascade.cascade.noise import draw_noise
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.cascade.schedule import stage_sizes
from selfcascade.config import BaselineSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store

FACTOR = 4


def resolve_upscaler(model: str, store: Store | None = None) -> ResolvedBase:
    """Find an upscaler: a folder, or a hub id.

    Raises:
        SettingsError: nothing of that name, or something else than an x4 upscaler; one line.
    """
    try:
        found = resolve_base(model, store)
    except SettingsError as error:
        raise SettingsError(f"x4 upscaler: {error}") from None
    kind = StableDiffusionUpscalePipeline.load_config(found.location).get("_class_name")
    if kind != StableDiffusionUpscalePipeline.__name__:
        raise SettingsError(f"x4 upscaler {model!r} is a {kind}; baselines.x4.model needs a StableDiffusionUpscalePipeline")
    return found


def load_upscaler(found: ResolvedBase, dtype: torch.dtype = torch.float32) -> StableDiffusionUpscalePipeline:
    """The upscaler as diffusers' own pipeline, from safetensors only, without a safety checker; its autoencoder in fp32.

    Raises:
        SettingsError: the folder is not whole; names it.
    """
    try:
        return StableDiffusionUpscalePipeline.from_pretrained(
            found.location,
            dtype={"default": dtype, "vae": torch.float32},
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
        )
    except (OSError, ValueError) as error:
        raise SettingsError(f"x4 upscaler {found.name!r} does not load from {found.location}: {' '.join(str(error).split())[:300]}") from None


def sample(
    pipeline: SelfCascadePipeline,
    prompt: str | list[str],
    *,
    height: int,
    width: int,
    settings: BaselineSettings = BaselineSettings(),
    upscaler: StableDiffusionUpscalePipeline | None = None,
    base: Tensor | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    **call: Any,
) -> ImagePipelineOutput | tuple[Any]:
    """Pictures of that size: the base's own, four times the side by the upscaler, and down to the target where that is less (antialiased bicubic).

    The upscaler's noise continues each sample's generator where the base stage leaves it, whether the base is sampled here or given.

    Arguments as in :mod:`~.baseline`, of which ``prompt`` is needed, ``call`` is for the base's stage, and ``settings`` hold the upscaler's steps, guidance and
    noise level, and where it is; and

    * ``upscaler``: diffusers' own pipeline, in place of the settings'; its scheduler is used as it is, one call at a time.
    * ``base``: clean scaled latents of the base's picture, (B, C, h, w), where they are known.

    Raises:
        SettingsError: the target is more than four times the base, the upscaler is not there, or the output is none of "pil", "np" and "pt", as there is no
            latent of such a picture; or as the pipeline's call.
    """
    spec, sizes = pipeline.spec, pipeline.sizes(height, width)
    reason = refusal(spec, height, width, settings)
    if reason is not None:
        raise SettingsError(f"x4-upscaler does not apply: {reason}")
    if output_type not in ("pil", "np", "pt"):
        raise SettingsError(f"output_type={output_type!r} is not known to x4-upscaler; choose pil, np or pt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    prompts = [each for each in prompts for _ in range(call.get("num_images_per_prompt", 1))]
    if upscaler is None:
        upscaler = load_upscaler(resolve_upscaler(settings.x4.model), pipeline.unet.dtype).to(pipeline.unet.device)
    generator = call.get("generator")
    if base is None:
        base = pipeline(prompt, sizes=sizes[:1], output_type="latent", return_dict=False, **call)[0]
    else:
        generators = generator if isinstance(generator, list) else [generator] * len(prompts)
        draw_noise(generators, spec.latent_channels, ((base.shape[-2], base.shape[-1]),), base.device)
    with torch.no_grad():
        negative = call.get("negative_prompt")
        latents = upscaler(
            prompts,
            (decode(pipeline.vae, base.to(pipeline.vae.device)) / 2 + 0.5).clamp(0, 1),
            num_inference_steps=settings.x4.steps,
            guidance_scale=settings.x4.guidance_scale,
            noise_level=settings.x4.noise_level,
            negative_prompt=[negative] * len(prompts) if isinstance(negative, str) else negative,
            generator=generator,
            output_type="latent",
            return_dict=False,
        )[0]
        pictures = decode(upscaler.vae, latents)
        if pictures.shape[-2:] != (height, width):
            pictures = F.interpolate(pictures, size=(height, width), mode="bicubic", antialias=True)
    images = pipeline.image_processor.postprocess(pictures, output_type=output_type)
    return ImagePipelineOutput(images=images) if return_dict else (images,)


def refusal(spec: BaseSpec, height: int, width: int, settings: BaselineSettings) -> str | None:
    """Why one pass of the upscaler does not reach that size, or None."""
    base = stage_sizes(height, width, native=spec.native, step=spec.step)[0]
    if height <= FACTOR * base[0] and width <= FACTOR * base[1]:
        return None
    return f"{height}x{width} is more than four times the base's {base[0]}x{base[1]} a side"


X4_UPSCALER = Baseline("x4-upscaler", "the base's own picture, enlarged by Stable Diffusion's x4 upscaler", refusal, sample)
