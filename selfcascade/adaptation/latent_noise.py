"""Noise on the latents that a step trains on: the autoencoder's own, drawn anew each time, and some on pivots, which at sampling are no real pictures'."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from selfcascade.adaptation.cache import Batch
from selfcascade.config import AdaptationSettings


@dataclass(frozen=True)
class LatentNoise:
    """What is drawn for the latents of a step, beside its timesteps and the noise of the diffusion."""

    posterior: bool
    """Whether latents are drawn from the autoencoder's posterior, N(mean, std²), instead of being its mean."""
    share: float
    """Probability that a sample's pivot is noised."""
    std: float
    """Standard deviation of that noise, in scaled latents, which have about 1."""

    @classmethod
    def of(cls, settings: AdaptationSettings) -> Self:
        """As a run has it."""
        return cls(settings.posterior == "sample", settings.noisy_pivots, settings.pivot_noise)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Every draw of a step, a row for each sample; none where nothing is noised, so that the draws of other runs stay what they were.

        Args:
            shape: of its target latents, (B, C, H, W).
            generator: CPU generator of the run.
        """
        half = (*shape[:2], shape[2] // 2, shape[3] // 2)
        drawn: tuple[Tensor, ...] = ()
        if self.posterior:
            drawn += (torch.randn(shape, generator=generator), torch.randn(half, generator=generator))
        if self.share:
            drawn += (torch.rand(shape[0], generator=generator) < self.share, torch.randn(half, generator=generator))
        return drawn

    def on(self, batch: Batch, drawn: tuple[Tensor, ...]) -> Batch:
        """``batch``, on the CPU, with the draws of its samples applied."""
        if self.posterior:
            assert batch.target_std is not None
            assert batch.pivot_std is not None
            target, pivot, *drawn_last = drawn
            drawn = tuple(drawn_last)
            batch = replace(batch, target=batch.target + batch.target_std * target, pivot=batch.pivot + batch.pivot_std * pivot)
        if self.share:
            chosen, noise = drawn
            batch = replace(batch, pivot=batch.pivot + self.std * chosen[:, None, None, None] * noise)
        return batch
