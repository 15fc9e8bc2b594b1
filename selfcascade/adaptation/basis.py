"""Fitting variant D's fixed subspace: the directions in which the base's features of training pivots vary most."""

from __future__ import annotations

import torch

from selfcascade.adaptation.cache import LatentCache
from selfcascade.adaptation.loss import draw_timesteps
from selfcascade.adaptation.objective import NoiseObjective
from selfcascade.cascade.basis import PrincipalDirections
from selfcascade.cascade.injection import pivot_features
from selfcascade.cascade.small_upsampler import BASIS


def fit_basis(objective: NoiseObjective, latents: LatentCache) -> None:
    """Give the upsampler that is about to train the basis that training keeps fixed. Once, before the first step: checkpoints hold it from then on.

    ``adaptation.basis_samples`` pictures of the train split are chosen by the run's seed, each with its caption and one timestep below K (or 0, if the
    pivot passes there). They pass one by one, so that the result does not depend on a batch.
    """
    settings, config = objective.settings, objective.trained.config
    dtype: torch.dtype = getattr(torch, settings.compute.dtype)
    generator = torch.Generator().manual_seed(settings.seed)
    keys = latents.keys("train")
    chosen = [keys[index] for index in torch.randperm(len(keys), generator=generator)[: settings.basis_samples]]
    drawn = draw_timesteps(len(chosen), below=objective.below, generator=generator)
    times = drawn if config.pivot_t == "current" else torch.zeros_like(drawn)
    found = [PrincipalDirections(channels) for channels in config.channels]
    with objective.held(), torch.autocast(objective.device.type, dtype, enabled=dtype != torch.float32):
        for key, t in zip(chosen, times, strict=True):
            sample = latents.batch([key]).to(objective.device)
            conditioning = sample.conditioning(settings.size)
            features = pivot_features(objective.unet, sample.pivot, t.to(objective.device), sample.text.text, inject=config.inject, **conditioning)
            for seen, feature in zip(found, features, strict=True):
                seen.add(feature)
    objective.trained.set_basis([seen.directions(BASIS) for seen in found])
