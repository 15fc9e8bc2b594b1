"""Data whose best denoiser is known, x_0 ~ N(mu, s^2 I), as a UNet that the real stages call, and the reference that their results are held against.

On such data the score is linear, so every solver is a linear map: of what a stage starts from, of the noise that it adds, and of one. The reference writes
that map down without torch and without diffusers: a latent is the vector of its coefficients, in float64, and each solver is the formula of its paper on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import expm1, log

import models
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Generator, Tensor

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""Stable Diffusion's noise schedule."""

Vector = np.ndarray


def alphas_of(total: int = 1000) -> Vector:
    """abar_t of :data:`BETAS`, float64, (T,)."""
    return np.cumprod(1 - np.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, total, dtype=np.float64) ** 2)


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I), noised by the schedule with these abar_t; between two timesteps sigma is linear."""

    mean: float = 0.3
    std: float = 0.7
    alphas: Vector = field(default_factory=alphas_of)

    @cached_property
    def sigmas(self) -> Vector:
        """sqrt((1 - abar) / abar), (T,)."""
        return ((1 - self.alphas) / self.alphas) ** 0.5

    def sigma(self, t: float) -> float:
        return float(np.interp(t, np.arange(len(self.sigmas)), self.sigmas))

    def epsilon(self, t: float) -> tuple[float, float]:
        """Gain and offset of E[eps | z_t], affine in the variance-preserving z_t."""
        abar = 1 / (1 + self.sigma(t) ** 2)
        gain = (1 - abar) ** 0.5 / (abar * self.std**2 + 1 - abar)
        return gain, -gain * abar**0.5 * self.mean

    def consistent_epsilon(self, t: float, boundary: Boundary) -> tuple[float, float]:
        """The same of the noise for which a latent consistency model returns the end of the probability flow through z_t.

        The flow keeps the quantile: f(z, t) = mu + s / sqrt(s^2 + sigma^2) (z / sqrt(abar) - mu). LCM returns c_skip z + c_out x_0 with the x_0 of the
        predicted noise.
        """
        sigma = self.sigma(t)
        root = (1 + sigma**2) ** -0.5
        slope = self.std / (self.std**2 + sigma**2) ** 0.5
        skip, out = boundary(t)
        gain, offset = slope / root, self.mean * (1 - slope)
        return (1 - root * (gain - skip) / out) / (sigma * root), -root * offset / out / (sigma * root)


Boundary = Callable[[float], tuple[float, float]]


def lcm_boundary(t: float) -> tuple[float, float]:
    """c_skip and c_out of latent consistency models (arXiv 2310.04378, section 4.2): sigma_data = 0.5, time scaled by 10."""
    return 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5


CONFIG = models.unet("small").config


class GaussianUNet(UNet2DConditionModel):
    """A UNet that the cascade takes for one of its own, but its output is the best prediction for a Gaussian, whatever the text."""

    @classmethod
    def of(cls, gaussian: Gaussian, *, velocity: bool = False, consistent: bool = False) -> GaussianUNet:
        with torch.device("meta"):
            made = cls.from_config(CONFIG)
        made.to_empty(device="cpu")  # weights that are never read need no values
        made.gaussian, made.velocity, made.consistent = gaussian, velocity, consistent
        return made

    def forward(self, sample: Tensor, timestep: Tensor, *, encoder_hidden_states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        t = float(timestep)
        gain, offset = self.gaussian.consistent_epsilon(t, lcm_boundary) if self.consistent else self.gaussian.epsilon(t)
        z = sample.double()
        prediction = gain * z + offset
        if self.velocity:
            abar = 1 / (1 + self.gaussian.sigma(t) ** 2)
            prediction = (prediction - (1 - abar) ** 0.5 * z) / abar**0.5  # v = sqrt(abar) eps - sqrt(1 - abar) x_0
        return (prediction.to(sample.dtype),)


@dataclass(frozen=True)
class Walk:
    """A grid in float64, as the papers index it."""

    gaussian: Gaussian
    timesteps: Vector
    """That the model is told, (S,), descending."""
    sigmas: Vector
    """Noise over signal at those, and at the end, (S + 1,)."""
    velocity: bool = False
    """Whether the model predicts v. It matters where the timestep is rounded, since the solver converts by the sigma of its own."""
    consistent: bool = False

    def vp(self, i: int) -> tuple[float, float]:
        """sqrt(abar) and sqrt(1 - abar)."""
        return (1 + self.sigmas[i] ** 2) ** -0.5, self.sigmas[i] * (1 + self.sigmas[i] ** 2) ** -0.5

    def lam(self, i: int) -> float:
        """Half the log of the signal-to-noise ratio; infinite without noise."""
        return -log(self.sigmas[i]) if self.sigmas[i] else float("inf")

    def model(self, z: Vector, i: int) -> tuple[Vector, Vector]:
        """x_0 and eps that the model's prediction makes of a variance-preserving latent; coefficient 2 is the one of 1."""
        t = float(self.timesteps[i])
        gain, offset = self.gaussian.consistent_epsilon(t, lcm_boundary) if self.consistent else self.gaussian.epsilon(t)
        eps = gain * z + offset * np.eye(len(z))[2]
        signal, noise = self.vp(i)
        if not self.velocity:
            return (z - noise * eps) / signal, eps
        sigma = self.gaussian.sigma(t)
        velocity = (1 + sigma**2) ** 0.5 * eps - sigma * z
        return signal * z - noise * velocity, signal * velocity + noise * z

    def data(self, z: Vector, i: int) -> Vector:
        """x_0 alone."""
        return self.model(z, i)[0]

    def __len__(self) -> int:
        return len(self.timesteps)


Solve = Callable[[Vector, Walk], Vector]
"""From the coefficients of the latent that a stage starts from, variance-preserving, to those of the clean one; coefficient 3 + i is of the noise of step i."""


def ddim(eta: float) -> Solve:
    """Song et al. 2021 (arXiv 2010.02502), equations 12 and 16."""

    def solve(z: Vector, walk: Walk) -> Vector:
        for i in range(len(walk)):
            (signal, noise), (signal_, noise_) = walk.vp(i), walk.vp(i + 1)
            std = eta * noise_ / noise * (1 - signal**2 / signal_**2) ** 0.5
            x_0, eps = walk.model(z, i)
            z = signal_ * x_0 + max(noise_**2 - std**2, 0) ** 0.5 * eps + std * np.eye(len(z))[3 + i]
        return z

    return solve


def ddpm(z: Vector, walk: Walk) -> Vector:
    """Ho et al. 2020 (arXiv 2006.11239), equations 6 and 7: the posterior q(z_t-1 | z_t, x_0), with its own variance."""
    for i in range(len(walk)):
        (signal, noise), (signal_, noise_) = walk.vp(i), walk.vp(i + 1)
        alpha = signal**2 / signal_**2
        mean = signal_ * (1 - alpha) / noise**2 * walk.data(z, i) + alpha**0.5 * noise_**2 / noise**2 * z
        z = mean + (noise_**2 / noise**2 * (1 - alpha)) ** 0.5 * np.eye(len(z))[3 + i]
    return z


def euler(z: Vector, walk: Walk) -> Vector:
    """Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without the correction, in y = z / sqrt(abar)."""
    y = z / walk.vp(0)[0]
    for i in range(len(walk)):
        slope = (y - walk.data(y * walk.vp(i)[0], i)) / walk.sigmas[i]
        y = y + (walk.sigmas[i + 1] - walk.sigmas[i]) * slope
    return y * walk.vp(len(walk))[0]


def euler_ancestral(z: Vector, walk: Walk) -> Vector:
    """The same step down to less than the next level, the rest made up by noise, so that a latent that is y + sigma n stays one."""
    y = z / walk.vp(0)[0]
    for i in range(len(walk)):
        sigma, sigma_ = walk.sigmas[i], walk.sigmas[i + 1]
        up = (sigma_**2 * (sigma**2 - sigma_**2) / sigma**2) ** 0.5
        down = sigma_**2 / sigma
        slope = (y - walk.data(y * walk.vp(i)[0], i)) / sigma
        y = y + (down - sigma) * slope + up * np.eye(len(y))[3 + i]
    return y * walk.vp(len(walk))[0]


def dpm(*, order: int = 2, sde: bool = False) -> Solve:
    """Lu et al. 2022 (arXiv 2211.01095), algorithm 2 (2M), or its stochastic form, SDE-DPM-Solver++(2M) of the appendix.

    A step that has no other before it is of first order, and so is one onto the clean end, where h is infinite.
    """

    def solve(z: Vector, walk: Walk) -> Vector:
        before = None
        for i in range(len(walk)):
            (_, noise), (signal_, noise_) = walk.vp(i), walk.vp(i + 1)
            h = walk.lam(i + 1) - walk.lam(i)
            x_0 = walk.data(z, i)
            direction = x_0
            if order == 2 and before is not None and walk.sigmas[i + 1]:
                r = (walk.lam(i) - walk.lam(i - 1)) / h
                direction = (1 + 1 / (2 * r)) * x_0 - before / (2 * r)
            if sde:
                z = noise_ / noise * np.exp(-h) * z - signal_ * expm1(-2 * h) * direction + noise_ * (-expm1(-2 * h)) ** 0.5 * np.eye(len(z))[3 + i]
            else:
                z = noise_ / noise * z - signal_ * expm1(-h) * direction
            before = x_0
        return z

    return solve


def unipc(*, order: int = 2) -> Solve:
    """Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 to 8: data prediction, B(h) = e^-h - 1, predictor and corrector; at most second order."""

    def solve(z: Vector, walk: Walk) -> Vector:
        kept: list[Vector] = []
        last, last_order = z, 0
        for i in range(len(walk)):
            x_0 = walk.data(z, i)
            if i:
                z = corrected(last, walk, i, kept, x_0, last_order)
            kept.append(x_0)
            last, last_order = z, min(order, len(kept), len(walk) - i)
            (_, noise), (signal_, noise_) = walk.vp(i), walk.vp(i + 1)
            h = walk.lam(i + 1) - walk.lam(i)
            z = noise_ / noise * z - signal_ * expm1(-h) * x_0
            if last_order == 2:
                r = (walk.lam(i - 1) - walk.lam(i)) / h
                z = z - signal_ * expm1(-h) * (kept[-2] - x_0) / r / 2
        return z

    def corrected(z: Vector, walk: Walk, i: int, kept: list[Vector], x_0: Vector, order: int) -> Vector:
        """The step to i again, from the latent at i - 1, now that the model has seen i."""
        (_, noise), (signal_, noise_) = walk.vp(i - 1), walk.vp(i)
        h = walk.lam(i) - walk.lam(i - 1)
        differences, nodes = [x_0 - kept[-1]], [1.0]
        if order == 2:
            nodes.insert(0, (walk.lam(i - 2) - walk.lam(i - 1)) / h)
            differences.insert(0, (kept[-2] - kept[-1]) / nodes[0])
        phi_1 = expm1(-h) / -h
        phi_2 = (phi_1 - 1) / -h
        phi_3 = (phi_2 - 1 / 2) / -h
        b = np.array([phi_2, 2 * phi_3])[:order] * -h / expm1(-h)
        weights = np.array([0.5]) if order == 1 else np.linalg.solve(np.array([np.ones(2), nodes]), b)
        return noise_ / noise * z - signal_ * expm1(-h) * (kept[-1] + sum(w * d for w, d in zip(weights, differences, strict=True)))

    return solve


def lcm(z: Vector, walk: Walk) -> Vector:
    """Luo et al. 2023 (arXiv 2310.04378), multistep sampling: the consistency function, noised again to the next timestep."""
    for i in range(len(walk)):
        skip, out = lcm_boundary(float(walk.timesteps[i]))
        end = skip * z + out * walk.data(z, i)
        if i + 1 == len(walk):
            return end
        signal_, noise_ = walk.vp(i + 1)
        z = signal_ * end + noise_ * np.eye(len(z))[3 + i]
    return z


def unknown_gains(result: Tensor, *images: Tensor) -> Vector:
    """What an image was mixed from: the gains g of result = sum g_j images_j, of pixels as equations. Refuses one that is no such mixture."""
    system = np.stack([image.double().flatten().numpy() for image in images], 1)
    gains, *_ = np.linalg.lstsq(system, result.double().flatten().numpy(), rcond=None)
    np.testing.assert_allclose(system @ gains, result.double().flatten().numpy(), atol=3e-5)
    return gains


def step_noise(generator: Generator, shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """What a sample's generator is going to draw, without drawing it."""
    copy = Generator().set_state(generator.get_state())
    return [torch.randn(shape, generator=copy) for _ in range(steps)]
