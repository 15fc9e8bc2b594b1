"""Pivot replacement against equation 6, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch.nn.functional import avg_pool2d

from selfcascade.cascade.pivot import UPSCALES, bilinear, renoise_pivot

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading", "steps_offset": 1}


def scheduler(kind: type = DDIMScheduler):
    made = kind(**NOISE)
    made.set_timesteps(50)
    return made


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("size", [(128, 128), (256, 256), (512, 512), (96, 160)])
def test_a_stage_starts_from_equation_6(size):
    """sqrt(abar) up(z_0) + sqrt(1 - abar) eps at t = 681, where the coefficients are 0.3076 and 0.9515 (checks 1 and 3)."""
    pivot, noise = normal(2, 4, size[0] // 2, size[1] // 2), normal(2, 4, *size)
    z, timesteps = renoise_pivot(pivot, size, scheduler(), start=0.7, noise=noise)
    assert timesteps[0] == 681
    assert z.shape == (2, 4, *size)
    torch.testing.assert_close(z, 0.3076 * bilinear(pivot, size) + 0.9515 * noise, atol=3e-4, rtol=0)


def plane(height: int, width: int) -> torch.Tensor:
    """A tilted plane in coordinates of pixel centres, so that it is the same plane at every size."""
    y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
    return (2 * y[:, None] - 3 * x[None, :])[None, None]


@pytest.mark.parametrize(("small", "big"), [((8, 8), (16, 16)), ((8, 12), (12, 24))])
def test_a_plane_enlarged_bilinearly_is_the_plane(small, big):
    """Away from the border; aligned corners would tilt it and nearest neighbours would make steps."""
    inside = (..., slice(big[0] // 4, -(big[0] // 4)), slice(big[1] // 4, -(big[1] // 4)))
    torch.testing.assert_close(bilinear(plane(*small), big)[inside], plane(*big)[inside], atol=1e-6, rtol=0)


@pytest.mark.parametrize("upscale", UPSCALES.values(), ids=UPSCALES)
def test_enlarging_keeps_pixel_centres_in_place(upscale):
    """The four pixels that come of one have its value as their mean, on a plane away from the border; with aligned corners they would not."""
    means = avg_pool2d(upscale(plane(8, 8), (16, 16)), 2)
    torch.testing.assert_close(means[..., 2:-2, 2:-2], plane(8, 8)[..., 2:-2, 2:-2], atol=1e-6, rtol=0)


def test_every_scheduler_gets_the_same_signal_to_noise_in_its_own_parametrisation():
    """Euler's latent, scaled as the model sees it, is DDIM's: x_0 + sigma eps over sqrt(sigma^2 + 1)."""
    pivot, noise = normal(1, 4, 8, 8), normal(1, 4, 16, 16)
    euler = scheduler(EulerDiscreteScheduler)
    ours, timesteps = renoise_pivot(pivot, (16, 16), euler, start=0.7, noise=noise)
    expected, grid = renoise_pivot(pivot, (16, 16), scheduler(), start=0.7, noise=noise)
    assert timesteps.tolist() == grid.tolist()
    torch.testing.assert_close(euler.scale_model_input(ours, timesteps[0]), expected, atol=1e-5, rtol=1e-5)


def test_a_pivot_that_is_bigger_than_the_stage_is_refused():
    with pytest.raises(ValueError, match="latent size 4x8 is smaller than the pivot, 8x8"):
        renoise_pivot(normal(1, 4, 8, 8), (4, 8), scheduler(), start=0.7, noise=normal(1, 4, 4, 8))
