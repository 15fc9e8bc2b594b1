from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from selfcascade.adaptation.loss import diffuse, draw_timesteps, last_timestep, min_snr_weights, noise_loss, stratified_timesteps, target_of
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


@given(count=st.integers(1, 40), below=st.integers(1, 1000), seed=st.integers(0, 2**31))
def test_a_stratified_batch_has_a_timestep_in_every_slice(count: int, below: int, seed: int) -> None:
    """Of ``count`` equal slices of [0, K), in some order; a timestep on the border of two belongs to both."""
    t = stratified_timesteps(count, below=below, generator=torch.Generator().manual_seed(seed)).sort().values.tolist()
    assert all(index * below // count <= timestep <= -(-(index + 1) * below // count) - 1 for index, timestep in enumerate(t))


def test_each_stratified_timestep_is_uniform() -> None:
    """Wherever in the batch it is: over 20,000 batches each tenth of [0, 700) is as frequent (chi-square with 9 degrees below its 99.9 % point)."""
    generator = torch.Generator().manual_seed(0)
    t = torch.stack([stratified_timesteps(8, below=700, generator=generator) for _ in range(20_000)])
    assert (t.min().item(), t.max().item(), t.dtype) == (0, 699, torch.int64)
    for place in (0, 3, 7):
        counts = torch.histc(t[:, place].float(), bins=10, min=0, max=700)
        assert ((counts - 2000).square() / 2000).sum() < 27.9


def test_strata_lower_the_variance_of_the_loss_and_leave_its_mean() -> None:
    """Of a loss that falls from noise to picture as real ones do: the mean over batches of 8 within 4 standard errors, its variance under a tenth."""
    generator = torch.Generator().manual_seed(0)
    curve = 1 - ABAR[:700].sqrt()
    means = {draw: torch.stack([curve[draw(8, below=700, generator=generator)].mean() for _ in range(4000)]) for draw in (draw_timesteps, stratified_timesteps)}
    for found in means.values():
        assert abs(found.mean() - curve.mean()) < 4 * found.std() / 4000**0.5
    assert means[stratified_timesteps].var() < 0.1 * means[draw_timesteps].var()


def test_min_snr_weights_are_those_of_the_paper() -> None:
    """At SNR 0.5, 5 and 50 with gamma 5; the noise has no weight above 1, the velocity none at an SNR of zero, where a schedule may end."""
    snr = torch.tensor([0.5, 5.0, 50.0, 0.0], dtype=torch.float64)
    abar, t = snr / (1 + snr), torch.arange(4)
    assert min_snr_weights(t, abar, gamma=5.0).tolist() == pytest.approx([1, 1, 0.1, 1])
    assert min_snr_weights(t, abar, gamma=5.0, prediction="v_prediction").tolist() == pytest.approx([0.5 / 1.5, 5 / 6, 5 / 51, 0])


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_means_the_same_to_every_prediction(gamma: float) -> None:
    """Whatever clean latent a UNet believes in, told as noise or as velocity it costs min(SNR, gamma) times its squared error."""
    latents, noise, t = (tensor.double() if tensor.is_floating_point() else tensor for tensor in drawn())
    abar = ABAR.double()
    believed = latents + 0.3 * torch.randn(latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    signal = abar[t].view(-1, 1, 1, 1)

    def as_noise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (z - signal.sqrt() * believed) / (1 - signal).sqrt()

    def as_velocity(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return signal.sqrt() * as_noise(z, t) - (1 - signal).sqrt() * believed

    snr = abar[t] / (1 - abar[t])
    expected = (snr.clamp_max(gamma) * (believed - latents).square().mean((1, 2, 3))).mean().item()
    common = {"noise": noise, "t": t, "alphas_cumprod": abar, "snr_gamma": gamma}
    assert noise_loss(as_noise, latents, prediction="epsilon", **common).item() == pytest.approx(expected, rel=1e-4)
    assert noise_loss(as_velocity, latents, prediction="v_prediction", **common).item() == pytest.approx(expected, rel=1e-4)


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
