"""The base's own latent, enlarged by the latent upscaler and decoded: super-resolution of latents without any further diffusion (as LUA, arXiv 2511.10629)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from selfcascade.baselines.baseline import Baseline, applies
from selfcascade.cascade.decoding import TILE_ABOVE, decode
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.cascade.upscaling import upscale_of
from selfcascade.config import BaselineSettings
from selfcascade.settings import SettingsError


def sample(
    pipeline: SelfCascadePipeline,
    prompt: str | list[str] | None = None,
    *,
    height: int,
    width: int,
    settings: BaselineSettings | None = None,
    base: Tensor | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    tile_above: int = TILE_ABOVE,
    **call: Any,
) -> ImagePipelineOutput | tuple[Any]:
    """Pictures of that size: the base's latent, enlarged from stage to stage as the cascade's pivot would be, decoded at the end.

    Arguments as in :mod:`~.baseline`, of which ``call`` is for the base's stage and ``settings`` are not looked at, and

    * ``base``: clean scaled latents of the base's picture, (B, C, h, w), where they are known; ``prompt`` is of no use then.

    Raises:
        SettingsError: the pipeline has no latent upscaler, or the output is none of "pil", "np", "pt" and "latent"; or as the pipeline's call.
    """
    if pipeline.latent_upscaler is None:
        raise SettingsError("method 'latent-sr' needs a latent upscaler; set generation.upscaler (upscalers/NAME or a folder), or give latent_upscaler=")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise SettingsError(f"output_type={output_type!r} is not known; choose pil, np, pt or latent")
    sizes, pixels = pipeline.sizes(height, width), pipeline.spec.pixels
    if base is None:
        base = pipeline(prompt, sizes=sizes[:1], output_type="latent", return_dict=False, **call)[0]
    upscale = upscale_of("learned", learned=pipeline.latent_upscaler)
    z = base.to(pipeline.latent_upscaler.device)
    for stage in sizes[1:]:
        z = upscale(z, (stage[0] // pixels, stage[1] // pixels))
    with torch.no_grad():
        images = z if output_type == "latent" else pipeline.image_processor.postprocess(decode(pipeline.vae, z, tile_above=tile_above), output_type=output_type)
    return ImagePipelineOutput(images=images) if return_dict else (images,)


LATENT_SR = Baseline("latent-sr", "the base's own latent, enlarged by the latent upscaler and decoded", applies, sample)
