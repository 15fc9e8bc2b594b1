"""What a training step minimises, and which network it changes: the noise loss of a guided or a tuned UNet, or the latent upscaler's distance."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from selfcascade.adaptation.cache import Batch, LatentCache, moved
from selfcascade.adaptation.loss import draw_timesteps, last_timestep, noise_loss
from selfcascade.baselines.lora import Lora
from selfcascade.cascade.conditioning import Conditioning
from selfcascade.cascade.families import Prediction
from selfcascade.cascade.injection import attached, unet_with_pivot
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.cascade.upsampler import SMALL, FeatureUpsampler
from selfcascade.config import AdaptationSettings

Trained: TypeAlias = FeatureUpsampler | LatentUpscaler | Lora | UNet2DConditionModel
"""What adaptation trains: a network of its own beside a base that stays as it is, or, last, a UNet that starts as the base's."""


class Objective(Protocol):
    """One loss on cached samples."""

    weight_decay: float
    """AdamW's."""

    @property
    def trained(self) -> Trained:
        """The network that has gradients; the only one."""

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Loss of one batch, a float32 scalar with a graph.

        Args:
            batch: cached samples, on the CPU.
            generator: CPU generator of every draw of the step, in a fixed order.
        """

    def held(self) -> AbstractContextManager[object]:
        """What a run of many steps should hold open around them."""


class NoiseObjective:
    """Equation 9: the frozen UNet's error in the noise of the target latent, at timesteps below K, when the pivot's features guide it."""

    def __init__(
        self,
        unet: nn.Module,
        upsampler: FeatureUpsampler,
        *,
        alphas_cumprod: Tensor,
        prediction: Prediction,
        latents: LatentCache,
        settings: AdaptationSettings,
        device: torch.device,
    ) -> None:
        """Train ``upsampler``.

        Args:
            unet: the base's UNet; it is frozen and kept in the precision of ``settings.compute``.
            upsampler: Φ.
            alphas_cumprod: abar of the base's schedule, (T,).
            prediction: what the base predicts: epsilon or v_prediction.
            latents: give the embedding of the empty caption.
            settings: of the run.
            device: where the networks run.
        """
        self.settings, self.device = settings, device
        self.unet = unet.to(device=device, dtype=getattr(torch, settings.compute.dtype)).eval().requires_grad_(False)
        self.trained = upsampler
        # A few thousand shared scalars are no weights that decay would keep small: it would only pull them back to where they start.
        self.weight_decay = 0.0 if settings.upsampler.variant in SMALL else settings.weight_decay
        self.empty = latents.empty()
        self.alphas_cumprod = alphas_cumprod.to(device=device, dtype=torch.float32)
        self.prediction = prediction
        self.below = last_timestep(settings.start, len(alphas_cumprod))

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Draws timesteps, noise and which captions are dropped, in this order."""
        batch, t, noise = _drawn(batch, generator, below=self.below, empty=self.empty, settings=self.settings, device=self.device)
        conditioning = batch.text.of_stage((self.settings.size, self.settings.size))

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            return unet_with_pivot(self.unet, z, t, batch.text.text, pivot=batch.pivot, upsampler=self.trained, **conditioning)

        return noise_loss(denoise, batch.target, noise=noise, t=t, alphas_cumprod=self.alphas_cumprod, prediction=self.prediction)

    def held(self) -> AbstractContextManager[object]:
        """The UNet's hooks, which a step would otherwise attach and detach."""
        return attached(self.unet)


class FinetuneObjective:
    """The base's own loss at the target size: a UNet's error in the noise, or velocity, of the target latent at timesteps over all of T (method 9.3).

    The pivot has no part in it.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        trained: Lora | UNet2DConditionModel,
        *,
        alphas_cumprod: Tensor,
        prediction: Prediction,
        latents: LatentCache,
        settings: AdaptationSettings,
        device: torch.device,
    ) -> None:
        """Train ``trained``.

        Args:
            unet: what predicts: the base's UNet with ``trained`` inside, or ``trained`` itself. Whether it is in training or evaluation mode does not matter:
                bases have no dropout.
            trained: a LoRA, or the UNet itself.
            alphas_cumprod: abar of the base's schedule, (T,).
            prediction: what the base predicts: epsilon or v_prediction.
            latents: give the embedding of the empty caption.
            settings: of the run.
            device: where the networks run.
        """
        self.settings, self.device = settings, device
        self.unet = unet.to(device)
        self.trained = trained
        self.weight_decay = settings.weight_decay
        self.empty = latents.empty()
        self.alphas_cumprod = alphas_cumprod.to(device=device, dtype=torch.float32)
        self.prediction = prediction

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Draws timesteps, noise and which captions are dropped, in this order."""
        timesteps = len(self.alphas_cumprod)
        batch, t, noise = _drawn(batch, generator, below=timesteps, empty=self.empty, settings=self.settings, device=self.device)
        conditioning = batch.text.of_stage((self.settings.size, self.settings.size))

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            prediction: Tensor = self.unet(z, t, encoder_hidden_states=batch.text.text, return_dict=False, **conditioning)[0]
            return prediction

        return noise_loss(denoise, batch.target, noise=noise, t=t, alphas_cumprod=self.alphas_cumprod, prediction=self.prediction)

    def held(self) -> AbstractContextManager[object]:
        """Nothing."""
        return nullcontext()


class LatentObjective:
    """Distance between the target latent E(x) and what the latent upscaler makes of the pivot latent E(Downsample(x)). Nothing is drawn.

    ``l2`` leads to the conditional mean, the best start of a later stage (see :mod:`selfcascade.cascade.latent_upscaler`); ``l1`` to the conditional
    median, which is a little sharper where the upscaler stands alone.
    """

    def __init__(self, upscaler: LatentUpscaler, *, settings: AdaptationSettings, device: torch.device) -> None:
        """Train ``upscaler`` on ``device``."""
        self.trained = upscaler
        self.weight_decay = settings.weight_decay
        self.device = device
        self.distance = F.mse_loss if settings.upscaler.loss == "l2" else F.l1_loss

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean over batch, channels and positions."""
        target, pivot = moved(batch.target, self.device), moved(batch.pivot, self.device)
        grown = self.trained(pivot, (target.shape[-2], target.shape[-1]))
        return self.distance(grown.float(), target)

    def held(self) -> AbstractContextManager[object]:
        """Nothing."""
        return nullcontext()


def _drawn(
    batch: Batch, generator: torch.Generator, *, below: int, empty: Conditioning, settings: AdaptationSettings, device: torch.device
) -> tuple[Batch, Tensor, Tensor]:
    """The batch with some captions dropped, its timesteps under ``below`` and its noise, on the device; the draws come in a fixed order."""
    t = draw_timesteps(settings.batch, below=below, generator=generator)
    noise = torch.randn(batch.target.shape, generator=generator)
    dropped = torch.rand(settings.batch, generator=generator) < settings.caption_dropout
    return batch.without_captions(dropped, empty).to(device), moved(t, device), moved(noise, device)
