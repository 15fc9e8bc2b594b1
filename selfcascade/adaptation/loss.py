"""The training objective: noise regression at timesteps below K (paper equation 9)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from selfcascade.cascade.families import Prediction
from selfcascade.settings import SettingsError


def last_timestep(start: float, timesteps: int) -> int:
    """K, the number of timesteps that are trained: ``start`` is K / T, ``timesteps`` is T (paper: 700 of 1000).

    Raises:
        SettingsError: ``start`` leaves no timestep.
    """
    last = round(start * timesteps)
    if last < 1:
        raise SettingsError(f"adaptation.start={start} leaves no timestep of {timesteps} to train on; raise it")
    return last


def draw_timesteps(count: int, *, below: int, generator: torch.Generator) -> Tensor:
    """``count`` timesteps, (count,) int64, uniform over 0 .. ``below`` - 1: the same 0-based index as in sampling."""
    return torch.randint(0, below, (count,), generator=generator)


def diffuse(latents: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """``z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps`` (paper equation 2).

    Args:
        latents: clean latents z_0, (B, C, H, W), scaled.
        noise: standard normal, same shape.
        t: timesteps, (B,) int64.
        alphas_cumprod: abar, (T,) float32, on the device of ``latents``.
    """
    signal = alphas_cumprod[t].view(-1, *[1] * (latents.ndim - 1))
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def target_of(latents: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor, prediction: Prediction) -> Tensor:
    """What the UNet should predict: the noise, or for bases of that kind the velocity ``sqrt(abar_t) eps - sqrt(1 - abar_t) z_0``."""
    if prediction == "epsilon":
        return noise
    signal = alphas_cumprod[t].view(-1, *[1] * (latents.ndim - 1))
    return signal.sqrt() * noise - (1 - signal).sqrt() * latents


def noise_loss(
    denoise: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    *,
    noise: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
    prediction: Prediction = "epsilon",
) -> Tensor:
    """Equation 9: mean squared error between predicted and true noise, a float32 scalar.

    Args:
        denoise: the UNet with text and pivot bound: (z_t, t) to a prediction of the shape of z_t.
        latents: clean target latents, (B, C, H, W), for video (B, C, F, H, W) with one timestep for all frames, scaled.
        noise: standard normal, same shape; drawn by the caller, so that a run owns its randomness.
        t: timesteps, (B,) int64.
        alphas_cumprod: abar of the base's schedule, (T,) float32.
        prediction: what the base predicts.
    """
    predicted = denoise(diffuse(latents, noise, t, alphas_cumprod), t)
    return F.mse_loss(predicted.float(), target_of(latents, noise, t, alphas_cumprod, prediction))
