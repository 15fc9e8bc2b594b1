"""What a training step minimises, and which network it changes: the noise loss of a guided or a tuned UNet, or the latent upscaler's distance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from selfcascade.adaptation.cache import Batch, LatentCache, moved
from selfcascade.adaptation.frozen_convolution import keep_no_inputs
from selfcascade.adaptation.latent_noise import LatentNoise
from selfcascade.adaptation.loss import draw_timesteps, last_timestep, noise_loss, stratified_timesteps
from selfcascade.baselines.lora import Lora
from selfcascade.cascade.families import Prediction
from selfcascade.cascade.injection import attached, unet_with_pivot
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.cascade.upsampler import SMALL, FeatureUpsampler
from selfcascade.config import AdaptationSettings

Trained: TypeAlias = FeatureUpsampler | LatentUpscaler | Lora | UNet2DConditionModel
"""What adaptation trains: a network of its own beside a base that stays as it is, or, last, a UNet that starts as the base's."""

Draws: TypeAlias = tuple[Tensor, ...]
"""What a step draws, on the CPU: tensors with a row for each of its samples, so that they are cut where the samples are."""

Network = TypeVar("Network", bound=nn.Module)


class Objective(Protocol):
    """One loss on cached samples.

    A step draws once, for all of its samples; the loss then takes them in parts, here or elsewhere, and does not depend on how they were cut.
    """

    weight_decay: float
    """AdamW's."""

    @property
    def trained(self) -> Trained:
        """The network that has gradients; the only one."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """Every draw of a step, in a fixed order.

        Args:
            shape: of its target latents, (B, C, H, W).
            generator: CPU generator of the run.
        """

    def loss(self, batch: Batch, *draws: Tensor) -> Tensor:
        """Mean loss of some samples of a step, a float32 scalar with a graph.

        Args:
            batch: cached samples, on the CPU.
            draws: of the same samples, in the order of :meth:`draw`.
        """

    def held(self) -> AbstractContextManager[object]:
        """What a run of many steps should hold open around them."""


class _Denoising(ABC, Generic[Network]):
    """A UNet's error in the noise, or velocity, of the target latent; the classes below say how the UNet passes."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        trained: Network,
        *,
        alphas_cumprod: Tensor,
        prediction: Prediction,
        latents: LatentCache,
        settings: AdaptationSettings,
        device: torch.device,
    ) -> None:
        """Train ``trained``.

        Args:
            unet: what predicts.
            trained: the network that has gradients.
            alphas_cumprod: abar of the base's schedule, (T,).
            prediction: what the base predicts: epsilon or v_prediction.
            latents: give the embedding of the empty caption.
            settings: of the run.
            device: where the networks run.
        """
        self.settings, self.device = settings, device
        self.latent_noise = LatentNoise.of(settings)
        self.unet = unet.to(device)
        self.trained = trained
        self.weight_decay = settings.weight_decay
        self.empty = latents.empty()
        self.alphas_cumprod = alphas_cumprod.to(device=device, dtype=torch.float32)
        self.prediction = prediction
        self.below = len(alphas_cumprod)
        keep_no_inputs(self.unet)
        if settings.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """Timesteps under ``below``, noise, which captions are dropped, and the noise of latents, in this order."""
        timesteps = stratified_timesteps if self.settings.timesteps == "stratified" else draw_timesteps
        t = timesteps(shape[0], below=self.below, generator=generator)
        noise = torch.randn(shape, generator=generator)
        dropped = torch.rand(shape[0], generator=generator) < self.settings.caption_dropout
        return t, noise, dropped, *self.latent_noise.draw(shape, generator)

    def loss(self, batch: Batch, *draws: Tensor) -> Tensor:
        """The UNet's error, weighted by ``settings.snr_gamma``."""
        settings, device = self.settings, self.device
        t, noise, dropped, *of_latents = draws
        batch = self.latent_noise.on(batch, tuple(of_latents)).without_captions(dropped, self.empty).to(device)
        conditioning = batch.conditioning(settings.size)
        return noise_loss(
            lambda z, t: self.predicted(z, t, batch, conditioning),
            batch.target,
            noise=moved(noise, device),
            t=moved(t, device),
            alphas_cumprod=self.alphas_cumprod,
            prediction=self.prediction,
            snr_gamma=settings.snr_gamma,
        )

    @abstractmethod
    def predicted(self, z: Tensor, t: Tensor, batch: Batch, conditioning: dict[str, Any]) -> Tensor:
        """The UNet's output for noisy latents z, (B, C, H, W), of a batch at t, (B,)."""


class NoiseObjective(_Denoising[FeatureUpsampler]):
    """Equation 9: the frozen UNet's error in the noise of the target latent, at timesteps below K, when the pivot's features guide it."""

    def __init__(self, unet: UNet2DConditionModel, trained: FeatureUpsampler, *, settings: AdaptationSettings, **base: Any) -> None:
        """Train Φ beside the base's UNet, which is frozen and kept in the precision of ``settings.compute``."""
        frozen = unet.to(dtype=getattr(torch, settings.compute.dtype)).eval().requires_grad_(False)
        super().__init__(frozen, trained, settings=settings, **base)
        # A few thousand shared scalars are no weights that decay would keep small: it would only pull them back to where they start.
        self.weight_decay = 0.0 if settings.upsampler.variant in SMALL else settings.weight_decay
        self.below = last_timestep(settings.start, len(self.alphas_cumprod))
        if settings.gradient_checkpointing:
            trained.enable_gradient_checkpointing()

    def predicted(self, z: Tensor, t: Tensor, batch: Batch, conditioning: dict[str, Any]) -> Tensor:
        """Guided by the batch's pivots."""
        return unet_with_pivot(self.unet, z, t, batch.text.text, pivot=batch.pivot, upsampler=self.trained, **conditioning)

    def held(self) -> AbstractContextManager[object]:
        """The UNet's hooks, which a step would otherwise attach and detach."""
        return attached(self.unet)


class FinetuneObjective(_Denoising[Lora | UNet2DConditionModel]):
    """The base's own loss at the target size: a UNet's error in the noise, or velocity, of the target latent at timesteps over all of T (method 9.3).

    The UNet is the base's with a LoRA inside, or is trained itself. Whether it is in training or evaluation mode does not matter: bases have no dropout.
    The pivot has no part in it.
    """

    def predicted(self, z: Tensor, t: Tensor, batch: Batch, conditioning: dict[str, Any]) -> Tensor:
        """As the UNet is called anywhere."""
        prediction: Tensor = self.unet(z, t, encoder_hidden_states=batch.text.text, return_dict=False, **conditioning)[0]
        return prediction

    def held(self) -> AbstractContextManager[object]:
        """Nothing."""
        return nullcontext()


class LatentObjective:
    """Distance between the target latent E(x) and what the latent upscaler makes of the pivot latent E(Downsample(x)).

    ``l2`` leads to the conditional mean, the best start of a later stage (see :mod:`selfcascade.cascade.latent_upscaler`); ``l1`` to the conditional
    median, which is a little sharper where the upscaler stands alone.
    """

    def __init__(self, upscaler: LatentUpscaler, *, settings: AdaptationSettings, device: torch.device) -> None:
        """Train ``upscaler`` on ``device``."""
        self.trained = upscaler
        self.weight_decay = settings.weight_decay
        self.device = device
        self.latent_noise = LatentNoise.of(settings)
        self.distance = F.mse_loss if settings.upscaler.loss == "l2" else F.l1_loss

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Draws:
        """The noise of latents: nothing unless the settings ask for it."""
        return self.latent_noise.draw(shape, generator)

    def loss(self, batch: Batch, *draws: Tensor) -> Tensor:
        """Mean over batch, channels and positions."""
        batch = self.latent_noise.on(batch, draws)
        target, pivot = moved(batch.target, self.device), moved(batch.pivot, self.device)
        grown = self.trained(pivot, (target.shape[-2], target.shape[-1]))
        return self.distance(grown.float(), target)

    def held(self) -> AbstractContextManager[object]:
        """Nothing."""
        return nullcontext()
