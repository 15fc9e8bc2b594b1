from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from selfcascade.adaptation.loss import diffuse, draw_timesteps, last_timestep, noise_loss, target_of
from selfcascade.settings import SettingsError

SCHEDULER = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ABAR = SCHEDULER.alphas_cumprod


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0, 321, 681])


def test_diffusion_is_the_schedulers_own() -> None:
    """z_t equals diffusers' add_noise bit for bit; at t = 681 the coefficients are 0.3076 and 0.9515."""
    latents, noise, t = drawn()
    assert torch.equal(diffuse(latents, noise, t, ABAR), SCHEDULER.add_noise(latents, noise, t))
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert diffuse(one, zero, torch.tensor([681]), ABAR).item() == pytest.approx(0.3076, abs=5e-5)
    assert diffuse(zero, one, torch.tensor([681]), ABAR).item() == pytest.approx(0.9515, abs=5e-5)


def test_loss_is_zero_for_who_knows_the_noise_and_one_for_silence() -> None:
    """Equation 9: predicting the noise costs 0, predicting nothing costs its variance, about 1."""
    latents, noise, t = drawn()
    assert noise_loss(lambda z, t: noise, latents, noise=noise, t=t, alphas_cumprod=ABAR).item() == 0
    assert noise_loss(lambda z, t: torch.zeros_like(z), latents, noise=noise, t=t, alphas_cumprod=ABAR).item() == pytest.approx(noise.square().mean().item())


def test_velocity_target_is_the_schedulers_own() -> None:
    """A base that predicts velocity is trained on velocity."""
    latents, noise, t = drawn()
    torch.testing.assert_close(target_of(latents, noise, t, ABAR, "v_prediction"), SCHEDULER.get_velocity(latents, noise, t))


def test_timesteps_are_uniform_below_k() -> None:
    """t covers 0 .. K - 1 and nothing else, each a tenth of the range equally often (chi-square with 9 degrees below its 99.9 % point)."""
    below = last_timestep(0.7, 1000)
    assert below == 700
    t = draw_timesteps(70_000, below=below, generator=torch.Generator().manual_seed(0))
    assert (t.min().item(), t.max().item(), t.dtype) == (0, 699, torch.int64)
    counts = torch.histc(t.float(), bins=10, min=0, max=700)
    assert ((counts - 7000).square() / 7000).sum() < 27.9


def test_k_of_no_timestep_is_refused() -> None:
    with pytest.raises(SettingsError, match="leaves no timestep"):
        last_timestep(0.0004, 1000)


def test_frames_of_a_video_share_their_samples_timestep() -> None:
    latents, noise = torch.randn(3, 4, 2, 5, 5), torch.randn(3, 4, 2, 5, 5)
    t = torch.tensor([1, 500, 999])
    alphas = DDIMScheduler().alphas_cumprod
    noisy, velocity = diffuse(latents, noise, t, alphas), target_of(latents, noise, t, alphas, "v_prediction")
    for frame in range(2):
        assert torch.equal(noisy[:, :, frame], diffuse(latents[:, :, frame], noise[:, :, frame], t, alphas))
        assert torch.equal(velocity[:, :, frame], target_of(latents[:, :, frame], noise[:, :, frame], t, alphas, "v_prediction"))
