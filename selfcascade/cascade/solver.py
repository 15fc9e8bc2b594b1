"""The diffusers schedulers that the cascade can enter in the middle, as solvers of a stage: which ones, the grid they walk, and a step of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Generator, Tensor

from selfcascade.settings import SettingsError

SOLVERS: Mapping[str, type[SchedulerMixin]] = MappingProxyType(
    {
        "ddim": DDIMScheduler,
        "euler": EulerDiscreteScheduler,
        "euler-ancestral": EulerAncestralDiscreteScheduler,
        "dpm++": DPMSolverMultistepScheduler,
        "unipc": UniPCMultistepScheduler,
        "lcm": LCMScheduler,
    }
)
"""What is proved on data whose score is known. Each counts its steps from where it is told to begin, or has no state at all."""


def solver_on(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """The solver of that name, a key of :data:`SOLVERS`, on the noise schedule, prediction and spacing of a base's own scheduler."""
    kind = SOLVERS[name]
    extra = {"clip_sample": False} if name in ("ddim", "lcm") else {}
    made: SchedulerMixin = kind.from_config(scheduler.config, **extra)
    return made


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that cannot start in the middle of its grid, or that nothing is known of.

    PNDM, which Stable Diffusion's own repositories name, takes its first step twice, on a grid that repeats its second timestep for that. The rest of that grid
    repeats none: begun there, every step is taken at the wrong timestep, and noise is left at the end.

    Raises:
        SettingsError: names the scheduler and those that are accepted.
    """
    name = type(scheduler).__name__
    if not isinstance(scheduler, tuple(SOLVERS.values())):
        raise SettingsError(f"scheduler {name} is not known to start in the middle of its grid; use {', '.join(kind.__name__ for kind in SOLVERS.values())}")
    predictor = getattr(scheduler, "solver_p", None)
    if predictor is not None:
        raise SettingsError(f"{name} with solver_p={type(predictor).__name__} is not told where it begins; leave solver_p out")
    if isinstance(scheduler, UniPCMultistepScheduler) and scheduler.config.solver_order > 1 and _ends_at_zero_in_high_order(scheduler):
        raise SettingsError(
            f"{name} with lower_order_final=False divides by zero at its last step; set lower_order_final=True or final_sigmas_type='sigma_min'"
        )


def solver_of(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler that a base was saved with where the cascade knows it, else DDIM, the paper's sampler, on the same noise schedule and grid."""
    return scheduler if isinstance(scheduler, tuple(SOLVERS.values())) else solver_on(scheduler, "ddim")


def prepare(scheduler: SchedulerMixin, steps: int, *, device: torch.device | None = None) -> SchedulerMixin:
    """A copy of a scheduler with the grid of a full pass, clean of what earlier passes left.

    Args:
        scheduler: of the pipeline; it is left alone, so that stages and threads do not see each other's state.
        steps: denoising steps of a full pass.
        device: of the timesteps.

    Raises:
        SettingsError: the scheduler cannot start in the middle (:func:`check_scheduler`), or there is no such grid: too many steps, timesteps that the base
            does not know, or noise levels that are not those of the timesteps.
    """
    check_scheduler(scheduler)
    scheduler = copy.deepcopy(scheduler)
    name, total = type(scheduler).__name__, scheduler.config.num_train_timesteps
    most = scheduler.config.get("original_inference_steps", total)  # LCM picks its steps out of those that it was distilled at
    if not 1 <= steps <= most:
        raise SettingsError(f"steps={steps} must be in 1..{most}: {name} picks its timesteps out of {most}")
    scheduler.set_timesteps(steps, device=device)
    _drop_timesteps_below_zero(scheduler)
    if scheduler.timesteps.max() > total - 1:
        raise SettingsError(f"steps={steps} make {name} begin at t={scheduler.timesteps.max():g}, above the base's last, {total - 1}; take fewer steps")
    levels = getattr(scheduler, "sigmas", scheduler.timesteps)[: len(scheduler.timesteps)]
    if len(levels) > 1 and (levels.diff() >= 0).any():
        raise SettingsError(f"steps={steps} are more than {name} can tell apart with timestep_spacing={scheduler.config.timestep_spacing!r}; take fewer steps")
    if hasattr(scheduler, "sigmas") and not _levels_are_those_of_the_timesteps(scheduler):
        raise SettingsError(
            f"the noise levels of {name} are not those of its timesteps, so that K has no place on its grid; use its discrete timesteps, linear interpolation"
            " and no flow or sigma_max settings"
        )
    return scheduler


def step(scheduler: SchedulerMixin, prediction: Tensor, t: Tensor, z: Tensor, *, eta: float = 0.0, generators: Sequence[Generator] | None = None) -> Tensor:
    """The latent at the next timestep of the grid.

    Args:
        scheduler: of :func:`prepare`.
        prediction: noise or velocity, (B, C, H, W), fp32.
        t: the timestep, a scalar out of ``scheduler.timesteps``.
        z: noisy latent in the scheduler's own parametrisation, (B, C, H, W), fp32.
        eta: DDIM's; others know none.
        generators: one a sample, of the noise that a stochastic solver adds.
    """
    if isinstance(scheduler, DDIMScheduler):
        # DDIM goes down by T // num_inference_steps, which is the grid's stride only where that is even: with linspace, and with trailing where the steps do
        # not divide T, it would land beside the next timestep. So that quotient is made the stride to it. Below the last is -1, the final alpha.
        following = scheduler.timesteps[scheduler.timesteps < t]
        stride = int(t) - (int(following[0]) if len(following) else -1)
        scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, stride)
    extras = {"eta": eta, "generator": None if generators is None else list(generators)}
    stepped: Tensor = scheduler.step(
        prediction, t, z, **{name: value for name, value in extras.items() if name in _arguments(type(scheduler).step)}, return_dict=False
    )[0]
    return stepped


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _ends_at_zero_in_high_order(scheduler: SchedulerMixin) -> bool:
    return scheduler.config.final_sigmas_type == "zero" and not scheduler.config.lower_order_final


def _drop_timesteps_below_zero(scheduler: SchedulerMixin) -> None:
    """Trailing grids of 61, 103 and other steps get a timestep too many from the rounding of ``arange``; it is -1, which DDIM would look up as the last."""
    kept = int((scheduler.timesteps >= 0).sum())
    if kept < len(scheduler.timesteps):
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:kept], scheduler.sigmas[-1:]])
        scheduler.timesteps = scheduler.timesteps[:kept]
        scheduler.num_inference_steps = kept


def _levels_are_those_of_the_timesteps(scheduler: SchedulerMixin) -> bool:
    """Whether each sigma lies between those of the timesteps beside its own, which some grids round."""
    timesteps, sigmas = scheduler.timesteps.cpu().double(), scheduler.sigmas.cpu().double()
    if len(sigmas) != len(timesteps) + 1:
        return False
    alphas = scheduler.alphas_cumprod.cpu().double()
    table = torch.cat([torch.zeros(1), ((1 - alphas) / alphas) ** 0.5, torch.full((1,), torch.inf)])  # of t = -1, 0, ..., T - 1, T
    table[-1] = table[-2] * 1.001
    lowest, highest = table[timesteps.floor().long()], table[timesteps.ceil().long() + 2]
    return bool(((lowest <= sigmas[:-1]) & (sigmas[:-1] <= highest)).all())
