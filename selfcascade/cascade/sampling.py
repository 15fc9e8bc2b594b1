"""One stage of the cascade, from noise or from the pivot below to a clean latent (paper algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from numbers import Integral
from typing import Any, Literal

from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor

from selfcascade.cascade.denoiser import Denoiser, Residuals
from selfcascade.cascade.guidance import Guidance
from selfcascade.cascade.injection import attached
from selfcascade.cascade.noise import StageNoise
from selfcascade.cascade.pivot import Upscale, renoise_pivot
from selfcascade.cascade.schedule import remaining_timesteps
from selfcascade.cascade.solver import prepare, step
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.cascade.upscaling import NAMES, upscale_of
from selfcascade.config import Upscale as Name
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
    upscale: Name
    """How the pivot grows."""
    t_min: int
    """The upsampler guides while t is above this."""
    strength: float
    """Factor on what the upsampler adds."""
    later_steps: int | None = None
    """Denoising steps of a full pass in the stages above the base, of which they take those from K on; None is as many as the base's."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Shares of T between which guidance is on in the stages above the base."""
    joint_branches: bool = True
    """Whether the branches of guidance share a pass."""
    pivot_every: int = 1
    """Steps that the pivot's features of one timestep serve."""

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("later_steps", self.later_steps), ("pivot_every", self.pivot_every)):
            if not isinstance(value, Integral | None):
                raise SettingsError(f"{name}={value!r} must be a whole number")
            if value is not None and value < 1:
                raise SettingsError(f"{name}={value} must be at least 1")
        if not isfinite(self.guidance_scale):
            raise SettingsError(f"guidance_scale={self.guidance_scale} must be a number, such as 7.5; 1 and below is off")
        if not 0 <= self.eta <= 1:
            raise SettingsError(f"eta={self.eta} must be in 0..1")
        if self.upscale not in NAMES:
            raise SettingsError(f"upscale={self.upscale!r} is not known; choose {', '.join(NAMES[:-1])} or {NAMES[-1]}")
        if self.t_min < 0:
            raise SettingsError(f"t_min={self.t_min} must not be negative")
        if not 0 <= self.strength <= 1:
            raise SettingsError(f"strength={self.strength} must be in 0..1")
        self.guidance("later", timesteps=1000)

    def guidance(self, stage: Literal["base", "later"], *, timesteps: int) -> Guidance:
        """Classifier-free guidance of a stage over that many timesteps; the base is guided throughout."""
        return Guidance(self.guidance_scale, self.guidance_interval if stage == "later" else (0.0, 1.0), self.joint_branches, timesteps)

    def steps_of(self, stage: Literal["base", "later"]) -> int:
        """Denoising steps of a full pass."""
        return self.steps if stage == "base" or self.later_steps is None else self.later_steps


def count_steps(scheduler: SchedulerMixin, recipe: Recipe) -> tuple[int, int]:
    """Denoising steps of the base stage, and of each later one.

    Raises:
        SettingsError: the scheduler cannot start in the middle or has no such grid, or ``start`` leaves no step; no network has run by then.
    """
    base, later = (prepare(scheduler, recipe.steps_of(stage)) for stage in ("base", "later"))
    return len(base.timesteps), len(remaining_timesteps(later, recipe.start))


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
    upscale: Upscale | None = None,
    on_step: OnStep = lambda t, z, text: (z, text),
    residuals: Residuals | None = None,
) -> Tensor:
    """Clean latent of one stage.

    The loop runs in fp32 whatever the UNet's precision is: latents, the scheduler's arithmetic and its noise.

    Args:
        unet: the frozen UNet.
        scheduler: one of :data:`~.solver.SOLVERS`; the stage works on a copy, so that stages and threads do not see each other's state.
        recipe: how to sample.
        noise: of this stage; its shape is the stage's, (B, C, H, W).
        text: (B, L, D), or with guidance (2 B, L, D), the unconditional half first.
        conditioning: whatever else the UNet takes at this stage.
        pivot: clean latent of the stage below, (B, C, h, w); None at the base. It stays as it is from the first step to the last.
        upsampler: Phi; None is the tuning-free cascade.
        upscale: how the pivot grows, made of what ``recipe.upscale`` names and needs; None is that name where it needs nothing.
        on_step: called after every step.
        residuals: what a ControlNet adds, for every pass but the pivot's.
    """
    stage: Literal["base", "later"] = "base" if pivot is None else "later"
    scheduler = prepare(scheduler, recipe.steps_of(stage), device=noise.entry.device)
    if pivot is None:
        z, timesteps = noise.entry * scheduler.init_noise_sigma, scheduler.timesteps
    else:
        size = (noise.entry.shape[-2], noise.entry.shape[-1])
        z, timesteps = renoise_pivot(pivot, size, scheduler, start=recipe.start, noise=noise.entry, upscale=upscale or upscale_of(recipe.upscale))

    denoise = Denoiser(
        unet,
        text=text,
        conditioning=conditioning,
        guidance=recipe.guidance(stage, timesteps=scheduler.config.num_train_timesteps),
        pivot=pivot,
        upsampler=upsampler,
        t_min=recipe.t_min,
        strength=recipe.strength,
        pivot_every=recipe.pivot_every,
        residuals=residuals,
    )
    with nullcontext() if upsampler is None else attached(unet):
        for t in timesteps:
            prediction = denoise(scheduler.scale_model_input(z, t), t)
            z = step(scheduler, prediction, t, z, eta=recipe.eta, generators=noise.generators)
            z, text = on_step(t, z, denoise.text)
            denoise.replace_text(text)
    return z
