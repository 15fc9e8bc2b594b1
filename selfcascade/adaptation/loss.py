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


def stratified_timesteps(count: int, *, below: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of ``count`` equal slices of [0, ``below``), in random order, (count,) int64.

    Each by itself is uniform, as of :func:`draw_timesteps`, so the mean of the loss is the same; its variance over batches is lower.
    """
    slices = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return (slices * below / count).long().clamp_max(below - 1)


def min_snr_weights(t: Tensor, alphas_cumprod: Tensor, *, gamma: float, prediction: Prediction = "epsilon") -> Tensor:
    """Min-SNR weights of squared errors, (B,): the error in the clean latent would have ``min(SNR, gamma)`` (arXiv 2303.09556).

    The squared error in the noise is SNR times that one, in the velocity SNR + 1 times: what is left for them is ``min(SNR, gamma) / SNR`` and
    ``min(SNR, gamma) / (SNR + 1)``.

    Args:
        t: timesteps, (B,) int64.
        alphas_cumprod: abar, (T,); SNR is ``abar / (1 - abar)``.
        gamma: above it the SNR is cut (paper: 5).
        prediction: what the error is in.
    """
    snr = alphas_cumprod[t] / (1 - alphas_cumprod[t])
    if prediction == "epsilon":
        return (torch.full_like(snr, gamma) / snr).clamp_max(1)  # 1 where there is no signal left
    return snr.clamp_max(gamma) / (snr + 1)


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
    snr_gamma: float | None = None,
) -> Tensor:
    """Equation 9: mean squared error between predicted and true noise, a float32 scalar.

    Args:
        denoise: the UNet with text and pivot bound: (z_t, t) to a prediction of the shape of z_t.
        latents: clean target latents, (B, C, H, W), for video (B, C, F, H, W) with one timestep for all frames, scaled.
        noise: standard normal, same shape; drawn by the caller, so that a run owns its randomness.
        t: timesteps, (B,) int64.
        alphas_cumprod: abar of the base's schedule, (T,) float32.
        prediction: what the base predicts.
        snr_gamma: weight the samples by :func:`min_snr_weights`; unset: alike, as in the paper.
    """
    predicted = denoise(diffuse(latents, noise, t, alphas_cumprod), t).float()
    wanted = target_of(latents, noise, t, alphas_cumprod, prediction)
    if snr_gamma is None:
        return F.mse_loss(predicted, wanted)
    errors = (predicted - wanted).square().flatten(1).mean(1)
    return (errors * min_snr_weights(t, alphas_cumprod, gamma=snr_gamma, prediction=prediction)).mean()
