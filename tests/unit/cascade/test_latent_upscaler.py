"""The learned upscaler: bilinear until it is trained, any size, and only for the base that it was made for."""

from __future__ import annotations

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from selfcascade.cascade.families import spec_of
from selfcascade.cascade.latent_upscaler import LatentUpscaler, load_latent_upscaler
from selfcascade.cascade.pivot import bilinear
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.settings import SettingsError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(upscaler: LatentUpscaler, seed: int = 0) -> LatentUpscaler:
    """The same with weights that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in upscaler.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return upscaler.eval()


@st.composite
def growths(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of a latent, and of what it grows to: from its own size to twice that, each side by itself."""
    small = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    return small, (draw(st.integers(small[0], 2 * small[0])), draw(st.integers(small[1], 2 * small[1])))


@given(growth=growths(), channels=st.integers(1, 5), width=st.integers(4, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_fresh_upscaler_is_bilinear_bit_for_bit(growth, channels, width, seed):
    """Whatever the size, the shape and the initial weights."""
    small, size = growth
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        upscaler = LatentUpscaler(channels, width=width, blocks=2)
    latent = normal(2, channels, *small, seed=seed)
    assert torch.equal(upscaler(latent, size), bilinear(latent, size))


@given(growth=growths(), constant=st.floats(-2, 2))
@settings(max_examples=60, deadline=None)
def test_a_constant_residual_is_added_wherever_a_side_grows(growth, constant):
    """At every size, rectangles too; nothing where no side grows."""
    small, size = growth
    upscaler = LatentUpscaler(3, width=4, blocks=1)
    torch.nn.init.constant_(upscaler.leave.bias, constant)
    latent = normal(1, 3, *small)
    torch.testing.assert_close(upscaler(latent, size).detach(), bilinear(latent, size) + (size != small) * constant, atol=1e-5, rtol=1e-5)


def test_at_twice_the_size_each_pixel_of_the_four_has_its_own_residual():
    """Channel c, row i and column j of the four that come of one take output 4 c + 2 i + j."""
    upscaler = LatentUpscaler(2, width=4, blocks=1)
    with torch.no_grad():
        upscaler.leave.bias.copy_(torch.arange(8.0))
    latent = normal(1, 2, 3, 5)
    added = (upscaler(latent, (6, 10)) - bilinear(latent, (6, 10))).detach()
    for c in range(2):
        for i in range(2):
            for j in range(2):
                torch.testing.assert_close(added[:, c, i::2, j::2], torch.full((1, 3, 5), 4.0 * c + 2 * i + j), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [(12, 14), (9, 8), (15, 16), (20, 24)])
def test_at_another_factor_the_residual_of_the_twofold_grid_is_resized(size):
    """Below twice, on one side only, and beyond."""
    upscaler, latent = randomised(LatentUpscaler(4, width=8, blocks=2)), normal(1, 4, 8, 8)
    resized = interpolate(upscaler.residual(latent), size, mode="bilinear")
    torch.testing.assert_close(upscaler(latent, size), interpolate(latent, size, mode="bilinear") + resized)


@torch.no_grad()
def test_a_latent_that_does_not_grow_is_left_as_it_is():
    upscaler, latent = randomised(LatentUpscaler(4, width=8, blocks=2)), normal(1, 4, 8, 6)
    assert torch.equal(upscaler(latent, (8, 6)), latent)


@torch.no_grad()
def test_a_latent_does_not_depend_on_its_batch():
    upscaler, latents = randomised(LatentUpscaler(4, width=8, blocks=2)), normal(4, 4, 6, 10)
    for size in ((12, 20), (9, 17)):
        together = upscaler(latents, size)
        alone = torch.cat([upscaler(latents[n : n + 1], size) for n in range(4)])
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_what_is_far_away_changes_nothing():
    """Two blocks see 6 elements to each side: beyond them another latent gives the same bits, so a picture's corner knows nothing of its size."""
    upscaler, latent = randomised(LatentUpscaler(4, width=8, blocks=2)), normal(1, 4, 8, 24)
    other = latent.clone()
    other[..., 14:] = normal(1, 4, 8, 10, seed=1)
    first, second = upscaler(latent, (16, 48)), upscaler(other, (16, 48))
    assert torch.equal(first[..., : 2 * 7], second[..., : 2 * 7])
    assert not torch.equal(first[..., : 2 * 9], second[..., : 2 * 9])


def test_half_precision_computes_in_its_own_and_returns_the_latents():
    upscaler = randomised(LatentUpscaler(4, width=8, blocks=1)).to(torch.bfloat16)
    latent = normal(1, 4, 4, 4)
    with torch.no_grad():
        assert upscaler(latent, (8, 8)).dtype == torch.float32
        torch.testing.assert_close(upscaler(latent, (8, 8)), upscaler.float()(latent, (8, 8)), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("width", "blocks", "numbers"), [(64, 8, 602_448), (32, 6, 116_784)])
def test_parameters_are_counted_by_the_formula(width, blocks, numbers):
    """(9 C + 1) W + 18 W^2 B + 2 W B + 36 C W + 4 C with C = 4."""
    count = sum(parameter.numel() for parameter in LatentUpscaler(4, width=width, blocks=blocks).parameters())
    assert count == (9 * 4 + 1) * width + blocks * (18 * width**2 + 2 * width) + 36 * 4 * width + 16 == numbers


def test_saved_and_loaded_it_is_the_same(tmp_path):
    upscaler = randomised(LatentUpscaler(4, width=8, blocks=2, base="tiny@1234", size=(128, 128)))
    upscaler.save_pretrained(tmp_path)
    loaded = load_latent_upscaler(str(tmp_path))
    assert torch.equal(loaded(normal(1, 4, 4, 4), (8, 8)), upscaler(normal(1, 4, 4, 4), (8, 8)))
    assert (loaded.config.base, tuple(loaded.config.size)) == ("tiny@1234", (128, 128))


def test_only_its_own_folders_load(tmp_path):
    """Pickled weights, a feature upsampler and nothing at all are refused in one line."""
    pickled, other = tmp_path / "pickled", tmp_path / "other"
    LatentUpscaler(4, width=4, blocks=1).save_pretrained(pickled, safe_serialization=False)
    pipeline = models.base()
    FeatureUpsampler.for_base(spec_of(pipeline.unet, pipeline.vae), variant="C").save_pretrained(other)
    for folder, told in ((pickled, "safetensors"), (other, "it is a FeatureUpsampler, not a LatentUpscaler"), (tmp_path / "none", "none")):
        with pytest.raises(SettingsError, match=told) as error:
            load_latent_upscaler(str(folder))
        assert str(error.value).startswith(f"latent upscaler '{folder}' does not load: ")
        assert "\n" not in str(error.value)


def test_another_base_is_refused():
    pipeline = models.base()
    spec = spec_of(pipeline.unet, pipeline.vae)
    upscaler = LatentUpscaler.for_base(spec, width=4, blocks=1, base="tiny@" + "a" * 64)
    upscaler.check_fits(spec, "tiny@" + "a" * 64)
    upscaler.check_fits(spec, None)
    with pytest.raises(
        SettingsError, match=r"^latent upscaler was trained for base 'tiny@a{12}' but the pipeline holds 'tiny@b{12}'; retrain it or pass --base tiny$"
    ):
        upscaler.check_fits(spec, "tiny@" + "b" * 64)
    with pytest.raises(SettingsError, match=r"made for latents of 16 channels, but those of the base have 4; choose a latent upscaler of this base"):
        LatentUpscaler(16, width=4, blocks=1).check_fits(spec, None)
