"""The trainer at step 0: what its settings train, with initial weights, and against what."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from selfcascade.adaptation.cache import LatentCache
from selfcascade.adaptation.objective import FinetuneObjective, LatentObjective, NoiseObjective
from selfcascade.adaptation.ranks import ALONE, Ranks
from selfcascade.adaptation.requirements import stage_of
from selfcascade.adaptation.sharding import shard
from selfcascade.adaptation.trainer import Trainer
from selfcascade.baselines.lora import Lora, shared
from selfcascade.bases import ResolvedBase
from selfcascade.cascade.compilation import compile_blocks
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.config import AdaptationSettings


def trainer_of(
    settings: AdaptationSettings, pipeline: SelfCascadePipeline, latents: LatentCache, base: ResolvedBase, device: torch.device, ranks: Ranks = ALONE
) -> Trainer:
    """A trainer at step 0. Initial weights come from the run's seed and leave torch's own generator as it was.

    Args:
        settings: of the run.
        pipeline: holds the networks of the base, which stay as they are, in the precision of ``settings.compute``.
        latents: cached latents and text embeddings.
        base: where the pipeline comes from.
        device: where the networks run.
        ranks: who trains it.

    Raises:
        SettingsError: the size is none of this base's, or LoRA is to be trained and peft is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        objective = _objective(settings, pipeline, latents, base, device, ranks)
        if settings.compiled and not isinstance(objective, LatentObjective):
            compile_blocks(objective.unet)
        return Trainer(objective, latents=latents, settings=settings, device=device, ranks=ranks)


def _objective(
    settings: AdaptationSettings, pipeline: SelfCascadePipeline, latents: LatentCache, base: ResolvedBase, device: torch.device, ranks: Ranks
) -> NoiseObjective | FinetuneObjective | LatentObjective:
    spec, size = spec_of(pipeline.unet, pipeline.vae), (settings.size, settings.size)
    scheduler = pipeline.scheduler
    noise = {"alphas_cumprod": scheduler.alphas_cumprod, "prediction": scheduler.config.prediction_type, "latents": latents}
    match settings.trainable:
        case "upsampler":
            phi = FeatureUpsampler.for_base(spec, **settings.upsampler.model_dump(), base=str(base), size=size, stage=stage_of(settings, base))
            return NoiseObjective(pipeline.unet, phi, **noise, settings=settings, device=device)
        case "latent-upscaler":
            upscaler = LatentUpscaler.for_base(spec, **settings.upscaler.model_dump(include={"width", "blocks"}), base=str(base), size=size)
            return LatentObjective(upscaler, settings=settings, device=device)
        case "lora":
            unet = shared(pipeline.unet)
            lora = Lora.on(unet, settings.rank, base=str(base), size=size)
            return FinetuneObjective(unet, lora, **noise, settings=settings, device=device)
        case "full":
            # Read again: the pipeline's UNet may be in a lower precision, and it is what the previews compare with.
            unet = UNet2DConditionModel.from_pretrained(base.location, subfolder="unet", dtype=torch.float32, use_safetensors=True, local_files_only=True)
            if settings.sharded and ranks.count > 1:
                shard(unet, ranks, device=device, dtype=getattr(torch, settings.compute.dtype))
            return FinetuneObjective(unet, unet, **noise, settings=settings, device=device)
