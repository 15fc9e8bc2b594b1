"""Every solver on data whose score is linear: the real pipeline equals the recurrence of the solver's paper, stage by stage, and the closed form beyond it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import gaussian
import models
import numpy as np
import pytest
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
from gaussian import BETAS, Gaussian, GaussianUNet, Solve, Walk
from torch import Generator, Tensor

from selfcascade import SelfCascadePipeline
from selfcascade.cascade.noise import StageNoise, draw_noise
from selfcascade.cascade.pivot import bilinear

DATA = Gaussian()
SIZES = ((64, 64), (128, 128))
LATENTS = ((8, 8), (16, 16))
PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class Case:
    kind: type[SchedulerMixin]
    solve: Solve
    settings: dict[str, Any] = field(default_factory=dict)
    eta: float = 0.0
    stochastic: bool = False
    steps: int = 50

    def scheduler(self, spacing: str = "leading", prediction: str = "epsilon", **settings: Any) -> SchedulerMixin:
        return self.kind(**BETAS, steps_offset=1, timestep_spacing=spacing, prediction_type=prediction, **self.settings, **settings)

    def grid(self, spacing: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and sigmas in float64: Lin et al. 2023 (arXiv 2305.08891), table 2; multistep solvers leave the clean end to the last step."""
        multistep = self.kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
        if self.kind is LCMScheduler:  # out of the 50 that it was distilled at: 19, 39, ..., 999
            timesteps = np.array([999 - 20 * (50 * i // steps) for i in range(steps)], float)
        elif spacing == "leading":
            timesteps = 1 + np.arange(steps)[::-1] * (1000 // steps) if not multistep else 1 + np.arange(1, steps + 1)[::-1] * (1000 // (steps + 1))
        elif spacing == "trailing":
            timesteps = np.round([1000 - i * 1000 / steps for i in range(steps)]) - 1
        else:
            timesteps = np.linspace(999, 0, steps + 1)[:-1] if multistep else np.linspace(999, 0, steps)
            timesteps = timesteps if "Euler" in self.kind.__name__ else np.round(timesteps)
        end = DATA.sigma(0) if self.kind is DDIMScheduler else 0.0
        return np.asarray(timesteps, float), np.array([*map(DATA.sigma, timesteps), end])

    def walk(self, spacing: str, *, latest: float = 1000, consistent: bool = False) -> Walk:
        timesteps, sigmas = self.grid(spacing, self.steps)
        first = int((timesteps > latest).sum())
        return Walk(DATA, timesteps[first:], sigmas[first:], consistent=consistent)

    def noised(self, sigma: float, spacing: str) -> float:
        """Gain of the noise that a base stage starts from: pure noise of the variance that the solver's grid begins at."""
        return sigma * (1 + sigma**2) ** -0.5 if "Euler" in self.kind.__name__ and spacing != "leading" else 1.0


CLEAR = {"clip_sample": False, "set_alpha_to_one": False}
CASES = {
    "ddim": Case(DDIMScheduler, gaussian.ddim(0), CLEAR),
    "ddim-eta-1": Case(DDIMScheduler, gaussian.ddim(1), CLEAR, eta=1.0, stochastic=True),
    "ddim-eta-1-as-ddpm": Case(DDIMScheduler, gaussian.ddpm, CLEAR, eta=1.0, stochastic=True),
    "euler": Case(EulerDiscreteScheduler, gaussian.euler),
    "euler-ancestral": Case(EulerAncestralDiscreteScheduler, gaussian.euler_ancestral, stochastic=True),
    "dpm++-2m": Case(DPMSolverMultistepScheduler, gaussian.dpm()),
    "dpm++-2m-sde": Case(DPMSolverMultistepScheduler, gaussian.dpm(sde=True), {"algorithm_type": "sde-dpmsolver++"}, stochastic=True),
    "dpm++-1": Case(DPMSolverMultistepScheduler, gaussian.dpm(order=1), {"solver_order": 1}),
    "unipc": Case(UniPCMultistepScheduler, gaussian.unipc()),
    "lcm-4": Case(LCMScheduler, gaussian.lcm, stochastic=True, steps=4),
    "lcm-50": Case(LCMScheduler, gaussian.lcm, stochastic=True),
}
STOCHASTIC = [name for name, case in CASES.items() if case.stochastic]
DISTINCT = [(name, spacing) for name, case in CASES.items() for spacing in (SPACINGS if case.kind is not LCMScheduler else ("leading",))]


BASE = models.base("small")
UNETS = {prediction: GaussianUNet.of(DATA, velocity=prediction == "v_prediction") for prediction in PREDICTIONS}


def pipeline(scheduler: SchedulerMixin, unet: GaussianUNet | None = None) -> SelfCascadePipeline:
    """A whole cascade whose UNet is the Gaussian's."""
    return SelfCascadePipeline.from_pipe(BASE, unet=unet or UNETS[scheduler.config.prediction_type], scheduler=scheduler)


def sample(pipe: SelfCascadePipeline, case: Case, *, seeds: tuple[int, ...] = (0,), stages: int = 2, **call: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 1.0, "eta": case.eta, "num_inference_steps": case.steps, "start": 0.7} | call
    return pipe(["a cat"] * len(seeds), sizes=SIZES[:stages], output_type="latent", generator=[Generator().manual_seed(seed) for seed in seeds], **call).images


def noises(seed: int = 0) -> list[StageNoise]:
    return draw_noise([Generator().manual_seed(seed)], 4, LATENTS, torch.device("cpu"))


def measured(result: Tensor, pivot: Tensor, noise: StageNoise, steps: int, *, stochastic: bool) -> np.ndarray:
    """Gains of the pivot, of the entry noise, of one, and of every step's noise, in a result of the real pipeline."""
    drawn = gaussian.step_noise(noise.generators[0], tuple(result.shape), steps) if stochastic else []
    gains = gaussian.unknown_gains(result, pivot, noise.entry, torch.ones_like(result), *drawn)
    return np.concatenate([gains, np.zeros(3 + steps - len(gains))])


def mean_and_variance(gains: np.ndarray, pivot: float) -> np.ndarray:
    """Of a pixel whose pivot is known."""
    return np.array([gains[0] * pivot + gains[2], gains[1] ** 2 + (gains[3:] ** 2).sum()])


def assert_follows(gains: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(gains, expected, atol=5e-6)
    np.testing.assert_allclose(mean_and_variance(gains, DATA.mean), mean_and_variance(expected, DATA.mean), rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("name", "spacing"), DISTINCT)
def test_both_stages_follow_the_recurrence_of_the_solvers_paper(name, spacing, prediction):
    """Mean and variance of either stage to 1e-5, and the gain of every noise that went in: of the entry at 5e-6, of each step's."""
    case = CASES[name]
    pipe = pipeline(case.scheduler(spacing, prediction))
    base = sample(pipe, case, stages=1)
    entered = sample(pipe, case, pivot=base)
    (noise, later_noise), walk, later = noises(), case.walk(spacing), case.walk(spacing, latest=700)

    start = case.noised(walk.sigmas[0], spacing) * np.eye(3 + len(walk))[1]
    no_pivot = torch.zeros_like(base)
    assert_follows(measured(base, no_pivot, noise, len(walk), stochastic=case.stochastic), case.solve(start, walk))

    signal, spread = later.vp(0)
    unit = np.eye(3 + len(later))
    gains = measured(entered, bilinear(base, LATENTS[1]), later_noise, len(later), stochastic=case.stochastic)
    assert_follows(gains, case.solve(signal * unit[0] + spread * unit[1], later))


@pytest.mark.parametrize("name", CASES)
def test_the_whole_cascade_is_its_stages(name):
    """At K = 700 of 50 steps, or of LCM's 4: bit for bit what the second stage makes of the first one's latent, whichever noise that one had drawn."""
    case = CASES[name]
    pipe = pipeline(case.scheduler())
    assert torch.equal(sample(pipe, case), sample(pipe, case, pivot=sample(pipe, case, stages=1)))


@pytest.mark.parametrize("name", CASES)
def test_a_sample_is_the_same_in_a_batch_of_four(name):
    """Bit for bit, through both stages: the noise of a step is the sample's own."""
    case = CASES[name]
    pipe = pipeline(case.scheduler())
    steps = min(case.steps, 10)
    together = sample(pipe, case, seeds=(3, 1, 4, 2), num_inference_steps=steps)
    for place, seed in enumerate((3, 1, 4, 2)):
        assert torch.equal(together[place], sample(pipe, case, seeds=(seed,), num_inference_steps=steps)[0])
    assert together.diff(dim=0).abs().amax(dim=(1, 2, 3)).min() > 0.1


def karras(first: float, last: float, steps: int) -> np.ndarray:
    """Karras et al. 2022, equation 5, rho = 7."""
    return (first ** (1 / 7) + np.arange(steps) / (steps - 1) * (last ** (1 / 7) - first ** (1 / 7))) ** 7


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["euler", "dpm++-2m", "dpm++-2m-sde", "unipc"])
def test_karras_sigmas_are_entered_at_their_own_levels(name, prediction):
    """The levels are those of the formula, between two timesteps; the model is told the timestep, which multistep solvers round and so repeat near the end."""
    case, steps = CASES[name], 40
    timesteps, _ = case.grid("leading", steps)
    ends = (timesteps[0], timesteps[-1]) if name == "euler" else (999, 0)
    sigmas = karras(DATA.sigma(ends[0]), DATA.sigma(ends[1]), steps)
    told = np.interp(np.log(sigmas), np.log(DATA.sigmas), np.arange(1000))
    told = told if name == "euler" else np.round(told)
    first = int((told > 700).sum())
    walk = Walk(DATA, told[first:], np.append(sigmas[first:], 0.0), velocity=prediction == "v_prediction")

    pivot = torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(7))
    result = sample(pipeline(case.scheduler(prediction=prediction, use_karras_sigmas=True)), case, pivot=pivot, num_inference_steps=steps)
    gains = measured(result, bilinear(pivot, LATENTS[1]), noises()[1], len(walk), stochastic=case.stochastic)
    signal, spread = walk.vp(0)
    unit = np.eye(3 + len(walk))
    assert_follows(gains, case.solve(signal * unit[0] + spread * unit[1], walk))


@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("euler", 0.0), ("ddim-eta-1", 1.0), ("euler-ancestral", 0.0)])
def test_a_stage_tends_to_the_closed_form_of_its_pivot(name, eta):
    """Of z_K = sqrt(abar_K) up(z_0) + sqrt(1 - abar_K) eps. With V = s^2 + sigma^2, and sigma_1 the last level, from which all step to the posterior mean, the
    mean is mu + g (up(z_0) - mu) and the variance g^2 sigma_K^2 + v:

    along the flow, g = s^2 / sqrt(V_1 V_K) and v = 0; ancestral, g = s^2 / V_K and v = (s^2 / V_1)^2 (V_1 - V_1^2 / V_K). Twice the steps, half the distance.
    """
    case = CASES[name]
    distances = []
    pivot = torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(7))
    settings = {"set_alpha_to_one": True} if case.kind is DDIMScheduler else {}
    for steps in (125, 250, 500):
        scheduler = case.kind(**BETAS, steps_offset=1, timestep_spacing="leading", **(case.settings | settings))
        result = sample(pipeline(scheduler), case, pivot=pivot, num_inference_steps=steps, eta=eta)
        entered = [t for t in case.grid("leading", steps)[0] if t <= 700]
        gains = measured(result, bilinear(pivot, LATENTS[1]), noises()[1], len(entered), stochastic=case.stochastic)
        last, first, clean = DATA.sigma(1) ** 2, DATA.sigma(entered[0]) ** 2, DATA.std**2
        if case.stochastic:
            slope = clean / (clean + first)
            added = (clean / (clean + last)) ** 2 * ((clean + last) - (clean + last) ** 2 / (clean + first))
        else:
            slope, added = clean / ((clean + last) * (clean + first)) ** 0.5, 0.0
        expected = np.array([slope, DATA.mean * (1 - slope), slope**2 * first + added])
        distances.append(np.abs(np.array([gains[0], gains[2], gains[1] ** 2 + (gains[3:] ** 2).sum()]) - expected).max())
    assert distances[-1] < 1e-2
    assert all(1.75 < coarse / fine < 2.25 for coarse, fine in pairwise(distances))


@pytest.mark.parametrize("steps", [2, 4, 8, 50])
def test_lcm_with_the_gaussians_consistency_function_gives_the_gaussian(steps):
    """f(z, t) ends the probability flow at mu + s / sqrt(s^2 + sigma^2) (y - mu). Hence a pivot out of the data comes out as data, exactly: N(mu, s^2) at any
    number of steps; and of a given pivot the mean is pulled to mu by each step's slope."""
    case = Case(LCMScheduler, gaussian.lcm, stochastic=True, steps=steps)
    unet = GaussianUNet.of(DATA, consistent=True)
    pivot = torch.randn(1, 4, 8, 8, generator=Generator().manual_seed(7))
    walk = case.walk("leading", latest=700, consistent=True)
    result = sample(pipeline(case.scheduler(), unet), case, pivot=pivot)
    gains = measured(result, bilinear(pivot, LATENTS[1]), noises()[1], len(walk), stochastic=True)
    slopes = DATA.std / (DATA.std**2 + walk.sigmas[:-1] ** 2) ** 0.5
    assert gains[0] == pytest.approx(slopes.prod(), abs=5e-6)
    assert gains[0] * DATA.mean + gains[2] == pytest.approx(DATA.mean, rel=1e-5)
    assert gains[0] ** 2 * DATA.std**2 + gains[1] ** 2 + (gains[3:] ** 2).sum() == pytest.approx(DATA.std**2, rel=1e-5)


@pytest.mark.parametrize("name", ["ddim", "euler-ancestral", "dpm++-2m-sde", "unipc", "lcm-4"])
def test_samples_have_the_mean_and_variance_of_the_recurrence(name):
    """The whole cascade, counted: away from the border a bilinear pivot's pixel keeps (5 / 8)^2 of the base's variance."""
    case, samples = CASES[name], 96
    pictures = sample(pipeline(case.scheduler()), case, seeds=tuple(range(samples)))[..., 1:-1, 1:-1]
    walk, later = case.walk("leading"), case.walk("leading", latest=700)
    base = case.solve(case.noised(walk.sigmas[0], "leading") * np.eye(3 + len(walk))[1], walk)
    signal, spread = later.vp(0)
    unit = np.eye(3 + len(later))
    gains = case.solve(signal * unit[0] + spread * unit[1], later)
    variance = gains[0] ** 2 * (25 / 64) * (base[1] ** 2 + (base[3:] ** 2).sum()) + gains[1] ** 2 + (gains[3:] ** 2).sum()
    assert pictures.mean().item() == pytest.approx(gains[0] * base[2] + gains[2], abs=0.02)
    assert pictures.var().item() == pytest.approx(variance, rel=0.03)
