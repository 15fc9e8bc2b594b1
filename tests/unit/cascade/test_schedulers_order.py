"""Order of the deterministic solvers: how fast a stage comes near the exact probability flow of Gaussian data as its steps double."""

from __future__ import annotations

from itertools import pairwise
from math import log2
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler
from gaussian import Gaussian, GaussianUNet
from torch import Generator

from selfcascade.cascade.noise import StageNoise
from selfcascade.cascade.pivot import bilinear
from selfcascade.cascade.sampling import Recipe, sample_stage

PREDICTIONS = ("epsilon", "v_prediction")
TOTAL = 961
SIGMAS = np.geomspace(0.05, 20, TOTAL)
ALPHAS = 1 / (1 + SIGMAS**2)
BETAS = 1 - ALPHAS / np.concatenate([[1.0], ALPHAS[:-1]])
"""A schedule whose half log-SNR is linear in t, 1/960 of log(400) a timestep, so that every grid that divides 960 has steps of one size h."""


def distance(kind: type[SchedulerMixin], steps: int, prediction: str, **settings: Any) -> float:
    """Largest distance of a stage's result from the flow's, y_e = mu + sqrt((s^2 + sigma_e^2) / (s^2 + sigma_K^2)) (y_K - mu) in y = z / sqrt(abar)."""
    multistep = kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
    ends = {"set_alpha_to_one": False, "clip_sample": False} if kind is DDIMScheduler else {"final_sigmas_type": "sigma_min"}
    scheduler = kind(num_train_timesteps=TOTAL, trained_betas=BETAS.tolist(), timestep_spacing="linspace", prediction_type=prediction, **(ends | settings))
    alphas = scheduler.alphas_cumprod.double().numpy()
    data = Gaussian(alphas=alphas)
    pivot, entry = (torch.randn(1, 4, side, side, generator=Generator().manual_seed(side)) for side in (4, 8))
    recipe = Recipe(steps if multistep else steps + 1, start=720 / TOTAL, guidance_scale=1, eta=0, upscale="bilinear", t_min=0, strength=1)
    result = sample_stage(
        GaussianUNet.of(data, velocity=prediction == "v_prediction"),
        scheduler,
        recipe,
        noise=StageNoise(entry, [Generator()]),
        text=torch.zeros(1, 1, 1),
        conditioning={},
        pivot=pivot,
    )
    y = bilinear(pivot, (8, 8)).double() + data.sigma(720) * entry.double()
    slope = ((data.std**2 + data.sigma(0) ** 2) / (data.std**2 + data.sigma(720) ** 2)) ** 0.5
    end = data.mean + slope * (y - data.mean)
    return float((result.double() / (1 if kind is EulerDiscreteScheduler else alphas[0] ** 0.5) - end).abs().max())


def slopes(kind: type[SchedulerMixin], prediction: str, **settings: Any) -> list[float]:
    """Binary logarithms of what the distance falls by as the steps double, in the range that fp32 latents can tell."""
    return [log2(coarse / fine) for coarse, fine in pairwise(distance(kind, steps, prediction, **settings) for steps in (24, 48, 96))]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_ddim_and_euler_are_of_first_order(kind, prediction):
    assert slopes(kind, prediction) == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_2m_is_of_second_order(prediction):
    assert slopes(DPMSolverMultistepScheduler, prediction) == pytest.approx([2, 2], abs=0.1)
    assert slopes(DPMSolverMultistepScheduler, prediction, solver_order=1) == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_unipc_is_of_second_order_and_its_corrector_of_third(prediction):
    """Zhao et al. 2023, theorem 3.1: UniP-p is of order p, UniPC-p of p + 1."""
    assert slopes(UniPCMultistepScheduler, prediction, disable_corrector=list(range(TOTAL))) == pytest.approx([2, 2], abs=0.15)
    assert slopes(UniPCMultistepScheduler, prediction, lower_order_final=False) == pytest.approx([3, 3], abs=0.1)
