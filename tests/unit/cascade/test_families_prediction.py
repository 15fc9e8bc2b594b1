"""Bases that predict velocity: one step is the one of the noise that the velocity stands for, in closed form, at the base and above it."""

from __future__ import annotations

import models
import pytest
import torch
from diffusers import DDIMScheduler
from test_upsampler import randomised

from selfcascade import SelfCascadePipeline
from selfcascade.cascade.denoiser import Denoiser
from selfcascade.cascade.guidance import Guidance
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.generation.models import load_pipeline
from selfcascade.settings import SettingsError

STEPS = 10


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def stock():
    pipeline = models.base("sd21v")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def tuned(stock) -> SelfCascadePipeline:
    pipeline = SelfCascadePipeline.from_pipe(stock)
    phi = randomised(FeatureUpsampler.for_base(pipeline.spec, variant="C"))
    pipeline = SelfCascadePipeline.from_pipe(stock, upsampler=phi)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trace(pipeline, **call) -> tuple[list[torch.Tensor], list[int]]:
    """The latent after every step, and the timestep that it was made at."""
    latents, times = [], []

    def keep(pipe, step, t, tensors):
        latents.append(tensors["latents"].clone())
        times.append(int(t))
        return {}

    pipeline("a red cat", num_inference_steps=STEPS, guidance_scale=3.0, generator=generator(), output_type="latent", callback_on_step_end=keep, **call)
    return latents, times


@torch.no_grad()
def guided(stock, z: torch.Tensor, t: int, pivot: torch.Tensor | None, phi) -> torch.Tensor:
    """The prediction at a latent, (1, C, H, W)."""
    text, negative = stock.encode_prompt("a red cat", "cpu", 1, True)
    phi = None if pivot is None else phi
    denoise = Denoiser(stock.unet, text=torch.cat([negative, text]), conditioning={}, guidance=Guidance(3.0), pivot=pivot, upsampler=phi)
    return denoise(z, torch.tensor(t))


def test_a_step_of_the_velocity_is_the_step_of_its_noise(stock, tuned):
    """With ``x = sqrt(a) z - sqrt(1 - a) v`` and ``e = sqrt(a) v + sqrt(1 - a) z``, DDIM's next latent is ``sqrt(a') x + sqrt(1 - a') e``, for every step of
    both stages; read as noise, the same output would lead elsewhere."""
    latents, times = trace(tuned, height=128, width=128)
    stage = next(n for n in range(1, len(times)) if latents[n].shape != latents[n - 1].shape)
    assert times[0] > times[stage - 1] < times[stage]
    alphas = stock.scheduler.alphas_cumprod.double()
    for n in [1, stage - 1, stage + 1, len(times) - 2]:
        z, t = latents[n - 1].double(), times[n]
        v = guided(stock, latents[n - 1], t, latents[stage - 1] if n > stage else None, tuned.upsampler).double()
        a, below = alphas[t], alphas[t - 100] if t > 100 else alphas[0]
        clean, noise = a.sqrt() * z - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * z
        expected = below.sqrt() * clean + (1 - below).sqrt() * noise
        torch.testing.assert_close(latents[n].double(), expected, atol=1e-4, rtol=1e-4)
        as_noise = below.sqrt() * (z - (1 - a).sqrt() * v) / a.sqrt() + (1 - below).sqrt() * v
        assert (as_noise - expected).abs().mean() > 0.01 or t < 100  # the last step goes almost nowhere


def test_the_base_stage_is_the_stock_pipeline_bit_for_bit(stock, tuned):
    call = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 7.5, "output_type": "latent"}
    expected = stock("a red cat", generator=generator(), **call).images
    assert torch.equal(tuned("a red cat", generator=generator(), **call).images, expected)


def test_bulk_generation_samples_what_the_base_predicts(tmp_path):
    """The DDIM that runs put in place of a base's own scheduler keeps its prediction."""
    for kind, prediction in (("sd21v", "v_prediction"), ("sd21", "epsilon")):
        folder = models.saved_base(tmp_path / kind, kind)
        pipeline = load_pipeline(str(folder), device="cpu")
        assert pipeline.spec.prediction == pipeline.scheduler.config.prediction_type == prediction


def test_a_base_with_a_scheduler_of_another_prediction_is_refused(stock):
    with pytest.raises(SettingsError, match="has prediction_type='sample'; the cascade needs epsilon or v_prediction"):
        SelfCascadePipeline.from_pipe(stock, scheduler=DDIMScheduler(prediction_type="sample"))
