"""One stage of the cascade, from noise or from the pivot below to a clean latent (paper algorithm 2)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor

from selfcascade.cascade.guidance import branches, combine
from selfcascade.cascade.injection import Features, attached, pivot_features, unet_with_pivot
from selfcascade.cascade.noise import StageNoise
from selfcascade.cascade.pivot import UPSCALES, renoise_pivot
from selfcascade.cascade.schedule import remaining_timesteps
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.settings import SettingsError

OnStep = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Called after a step with the timestep, the latent and the text; returns latent and text to go on with."""


@dataclass(frozen=True)
class Recipe:
    """How the stages of one call are sampled."""

    steps: int
    """Denoising steps of a full pass."""
    start: float
    """K / T, where stages above the base enter."""
    guidance_scale: float
    eta: float
    """DDIM's."""
    upscale: Literal["bilinear", "bicubic"]
    t_min: int
    """The upsampler guides while t is above this."""
    strength: float
    """Factor on what the upsampler adds."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SettingsError(f"steps={self.steps} must be at least 1")
        if not 0 <= self.eta <= 1:
            raise SettingsError(f"eta={self.eta} must be in 0..1")
        if self.upscale not in UPSCALES:
            raise SettingsError(f"upscale={self.upscale!r} is not known; choose {' or '.join(UPSCALES)}")
        if self.t_min < 0:
            raise SettingsError(f"t_min={self.t_min} must not be negative")
        if not 0 <= self.strength <= 1:
            raise SettingsError(f"strength={self.strength} must be in 0..1")


def count_steps(scheduler: SchedulerMixin, recipe: Recipe) -> tuple[int, int]:
    """Denoising steps of the base stage, and of each later one. Refuses a ``start`` that leaves none, before any network runs."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(recipe.steps)
    return len(scheduler.timesteps), len(remaining_timesteps(scheduler, recipe.start))


def sample_stage(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    recipe: Recipe,
    *,
    noise: StageNoise,
    text: Tensor,
    conditioning: dict[str, Any],
    pivot: Tensor | None = None,
    upsampler: FeatureUpsampler | None = None,
    on_step: OnStep = lambda t, z, text: (z, text),
) -> Tensor:
    """Clean latent of one stage.

    The loop runs in fp32 whatever the UNet's precision is: latents, the scheduler's arithmetic and its noise.

    Args:
        unet: the frozen UNet.
        scheduler: a diffusers scheduler; the stage works on a copy, so that stages and threads do not see each other's state.
        recipe: how to sample.
        noise: of this stage; its shape is the stage's, (B, C, H, W).
        text: (B, L, D), or with guidance (2 B, L, D), the unconditional half first.
        conditioning: whatever else the UNet takes at this stage.
        pivot: clean latent of the stage below, (B, C, h, w); None at the base. It stays as it is from the first step to the last.
        upsampler: Phi; None is the tuning-free cascade.
        on_step: called after every step.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(recipe.steps, device=noise.entry.device)
    if pivot is None:
        z, timesteps = noise.entry * scheduler.init_noise_sigma, scheduler.timesteps
    else:
        size = (noise.entry.shape[-2], noise.entry.shape[-1])
        z, timesteps = renoise_pivot(pivot, size, scheduler, start=recipe.start, noise=noise.entry, upscale=UPSCALES[recipe.upscale])

    features: Features | None = None

    def predict(z_in: Tensor, t: Tensor) -> Tensor:
        nonlocal features
        if pivot is None or upsampler is None or recipe.strength == 0 or t <= recipe.t_min:
            return unet(z_in, t, encoder_hidden_states=text, return_dict=False, **conditioning)[0]
        phi = upsampler.config
        if features is None or phi.pivot_t == "current":  # at t = 0 the clean pivot has the same features at every step
            pivot_in = branches(pivot, recipe.guidance_scale).to(unet.dtype)
            features = pivot_features(unet, pivot_in, t if phi.pivot_t == "current" else 0, text, inject=phi.inject, **conditioning)
        return unet_with_pivot(unet, z_in, t, text, upsampler=upsampler, features=features, strength=recipe.strength, **conditioning)

    extras = _step_arguments(scheduler, recipe.eta, noise)
    with nullcontext() if upsampler is None else attached(unet):
        for t in timesteps:
            z_in = branches(scheduler.scale_model_input(z, t), recipe.guidance_scale).to(unet.dtype)
            prediction = combine(predict(z_in, t).float(), recipe.guidance_scale)
            z = scheduler.step(prediction, t, z, **extras, return_dict=False)[0]
            z, text = on_step(t, z, text)
    return z


def _step_arguments(scheduler: SchedulerMixin, eta: float, noise: StageNoise) -> dict[str, Any]:
    """Of eta and the samples' generators, those that the scheduler's step takes."""
    takes = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in {"eta": eta, "generator": noise.generators}.items() if name in takes}
