"""Full fine-tuning: every weight of the UNet trained at the target size, which is then sampled directly (the paper's rows Full-FT; method 9.3)."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from diffusers import ImagePipelineOutput, ModelMixin

from selfcascade.baselines import direct
from selfcascade.baselines.baseline import Baseline, applies
from selfcascade.baselines.finetune import Finetune, find_finetune
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.config import BaselineSettings
from selfcascade.settings import SettingsError


def adapted(unet: ModelMixin, found: Finetune) -> ModelMixin:
    """The fine-tuned UNet, on the device and in the precision of the base's; frozen.

    Args:
        unet: of the base; it stays as it is.
        found: by :func:`~.finetune.find_finetune`: a UNet as diffusers saves it, safetensors only.

    Raises:
        SettingsError: it does not load, or is no UNet of this base's shape; one line.
    """
    try:
        kind = type(unet).load_config(found.folder).get("_class_name")
        if kind != type(unet).__name__:
            raise ValueError(f"it is a {kind}, but the base has a {type(unet).__name__}")
        own: ModelMixin = type(unet).from_pretrained(found.folder, dtype=unet.dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(f"fine-tuned UNet {found.reference!r} does not load: {' '.join(str(error).split())[:300]}") from None
    if spec_of(own) != spec_of(unet):
        raise SettingsError(
            f"fine-tuned UNet {found.reference!r} has the shape of another base than the pipeline's; choose one that was trained from this base"
        )
    return own.to(unet.device).eval().requires_grad_(False)


def sample(
    pipeline: SelfCascadePipeline,
    prompt: str | list[str] | None = None,
    *,
    height: int,
    width: int,
    settings: BaselineSettings = BaselineSettings(),
    unet: ModelMixin | str | PathLike[str] | None = None,
    **call: Any,
) -> ImagePipelineOutput:
    """Pictures of that size in a single stage, by the fine-tuned UNet, arguments as in :mod:`~.baseline`.

    ``unet`` is the module, or a folder or artifact of it, which is then loaded for this call. Without it the pipeline's own is the fine-tuned one already.

    Raises:
        SettingsError: the UNet is not found, or was trained from another base; or as the pipeline's call.
    """
    if unet is not None and not isinstance(unet, torch.nn.Module):
        found = find_finetune(str(unet), "full")
        found.check_base(pipeline.config.base)
        unet = adapted(pipeline.unet, found)
    if unet is not None:
        pipeline = pipeline.from_pipe(pipeline, unet=unet)
    return direct.sample(pipeline, prompt, height=height, width=width, **{"eta": settings.eta} | call)


FULL = Baseline("full", "the target size from noise by a UNet that was fine-tuned there", applies, sample)
