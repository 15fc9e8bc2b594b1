"""Settings of a run that takes seconds, and latents of it without a store."""

from __future__ import annotations

from pathlib import Path

import models
import torch

from selfcascade.adaptation.cache import EMPTY, LatentCache
from selfcascade.adaptation.objective import LatentObjective, NoiseObjective, Objective
from selfcascade.adaptation.tensorfile import TensorFile, written_tensor_file
from selfcascade.adaptation.trainer import Trainer
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.config import AdaptationSettings, ComputeSettings, UpsamplerSettings

SIDE = 128


def tiny_settings(folder: Path | str, **changes: object) -> AdaptationSettings:
    """Settings of a run of six steps, changed by ``changes``."""
    defaults: dict[str, object] = {
        "name": "tiny",
        "dataset": "datasets/pictures",
        "base": str(folder),
        "size": SIDE,
        "upsampler": UpsamplerSettings(),
        "steps": 6,
        "batch": 4,
        "lr": 1e-2,
        "warmup": 2,
        "ema": 0.9,
        "previews": 0,
        "checkpoint_steps": 2,
        "preview_steps": 4,
        "log_steps": 1,
        "compute": ComputeSettings(threads=1),
    }
    return AdaptationSettings(**(defaults | changes))


def synthetic_latents(*, train: int = 8, tune: int = 2, side: int = 16, seed: int = 0) -> LatentCache:
    """A cache of random latents for the tiny base, without a store."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{EMPTY}/text": torch.zeros(12, models.TEXT)}
    samples = {}
    for index in range(train + tune):
        key = f"s{index:02d}"
        target = torch.randn(4, side, side, generator=generator)
        tensors[f"{key}/target"] = target
        tensors[f"{key}/pivot"] = torch.nn.functional.avg_pool2d(target, 2)
        tensors[f"{key}/text"] = torch.randn(12, models.TEXT, generator=generator)
        samples[key] = {"caption": f"caption {index}", "split": "train" if index < train else "tune"}
    with written_tensor_file(tensors, {"recipe": "r", "shard": "s", "samples": samples}) as path:
        file = TensorFile(path, name="synthetic")
    return LatentCache([file], digest="0" * 64)


def tiny_trainer(latents: LatentCache, settings: AdaptationSettings) -> Trainer:
    """A trainer on the networks of the tiny base, at step 0."""
    pipeline, device = models.base(), torch.device("cpu")
    spec = spec_of(pipeline.unet, pipeline.vae)
    torch.manual_seed(settings.seed)
    objective: Objective
    if settings.trainable == "latent-upscaler":
        upscaler = LatentUpscaler.for_base(spec, width=settings.upscaler.width, blocks=settings.upscaler.blocks)
        objective = LatentObjective(upscaler, settings=settings, device=device)
    else:
        objective = NoiseObjective(
            pipeline.unet,
            FeatureUpsampler.for_base(spec, **settings.upsampler.model_dump()),
            alphas_cumprod=pipeline.scheduler.alphas_cumprod,
            prediction=pipeline.scheduler.config.prediction_type,
            latents=latents,
            settings=settings,
            device=device,
        )
    return Trainer(objective, latents=latents, settings=settings, device=device)
