"""The slot between the stages: what each of the four upscalers is, and that the cascade takes the one that it is told."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_autoencoder import LinearAutoencoder
from PIL import Image
from test_cascade_pipeline import PROMPTS, generators, quiet
from test_latent_upscaler import growths, normal, randomised
from torch.nn.functional import avg_pool2d, interpolate

from selfcascade import SelfCascadePipeline
from selfcascade.cascade.decoding import decode
from selfcascade.cascade.encoding import encode_pictures
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.cascade.noise import draw_noise
from selfcascade.cascade.pivot import UPSCALES, renoise_pivot
from selfcascade.cascade.upscaling import NAMES, through_pixels, upscale_of
from selfcascade.config import CascadeSettings
from selfcascade.settings import SettingsError


@pytest.fixture(scope="module")
def learned() -> SelfCascadePipeline:
    """A tiny cascade with a latent upscaler that is not bilinear."""
    return quiet(SelfCascadePipeline.from_pipe(models.base("small"), latent_upscaler=randomised(LatentUpscaler(4, width=8, blocks=2))))


@given(growth=growths(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_through_a_linear_autoencoder_the_pixels_have_a_closed_form(growth, seed):
    """Means over 8 x 8 of Pillow's own bicubic resize of the picture of 8 x 8 blocks, scale and shift undone and done again, whatever the size."""
    small, size = growth
    vae = LinearAutoencoder()
    latent = 0.5 * (normal(1, 3, *small, seed=seed).clamp(-2, 2) / 4 - vae.config.shift_factor)
    picture = (latent[0] / 0.5 + vae.config.shift_factor).repeat_interleave(8, 1).repeat_interleave(8, 2)
    resized = [Image.fromarray(plane.numpy(), mode="F").resize((8 * size[1], 8 * size[0]), Image.Resampling.BICUBIC) for plane in picture]
    expected = 0.5 * (avg_pool2d(torch.from_numpy(np.stack([np.array(plane) for plane in resized]))[None], 8) - vae.config.shift_factor)
    torch.testing.assert_close(through_pixels(vae)(latent, size), expected, atol=1e-5, rtol=0)


@given(growth=growths(), colour=st.floats(-1, 1))
@settings(max_examples=25, deadline=None)
def test_through_pixels_a_constant_picture_stays_constant(growth, colour):
    small, size = growth
    latent = torch.full((1, 3, *small), 0.5 * (colour - 0.25))
    torch.testing.assert_close(through_pixels(LinearAutoencoder())(latent, size), torch.full((1, 3, *size), 0.5 * (colour - 0.25)), atol=1e-5, rtol=0)


def test_what_no_picture_can_hold_is_held_to_its_range():
    """Beyond white beside black: white before the resize, so that the edge is no steeper than a picture's, and after it, where the cubic swings over."""
    colours = torch.tensor([3.0, 3.0, -1.0, -1.0]).expand(1, 3, 4, 4)
    row = colours[0, 0, 0].clamp(-1, 1).repeat_interleave(8)[None].numpy()
    resized = np.array(Image.fromarray(row, mode="F").resize((64, 1), Image.Resampling.BICUBIC))
    assert resized.max() > 1.01
    expected = avg_pool2d(torch.from_numpy(resized).clamp(-1, 1)[None], (1, 8))
    found = through_pixels(LinearAutoencoder())(0.5 * (colours - 0.25), (8, 8))
    torch.testing.assert_close(found, (0.5 * (expected - 0.25)).expand(1, 3, 8, 8), atol=1e-5, rtol=0)


def test_through_pixels_a_real_autoencoder_is_its_own_two_passes():
    """Decode, cubic resize, mode of the posterior; the same bits twice, and for a sample whatever its batch."""
    vae, latents = models.vae(), normal(4, 4, 4, 6)
    upscale = through_pixels(vae)
    together = upscale(latents, (8, 10))
    pictures = interpolate(decode(vae, latents).clamp(-1, 1), (64, 80), mode="bicubic", antialias=True).clamp(-1, 1)
    assert torch.equal(together, encode_pictures(vae, pictures))
    assert torch.equal(together, upscale(latents, (8, 10)))
    assert torch.equal(together, torch.cat([upscale(latent, (8, 10)) for latent in latents.split(1)]))


def test_big_pictures_pass_in_tiles_and_a_half_precision_autoencoder_in_fp32():
    """Tiles where the area asks for them, on the way out and on the way in; precision and tiling are as they were afterwards."""
    vae = models.vae().to(torch.bfloat16)
    seen: list[tuple[str, torch.dtype, int]] = []
    handles = [
        getattr(vae, part).register_forward_hook(lambda module, args, out, part=part: seen.append((part, out.dtype, args[0].shape[-1])))
        for part in ("decoder", "encoder")
    ]
    latent = normal(1, 4, 12, 12)
    through_pixels(vae, tile_above=128 * 128)(latent, (24, 24))
    assert {(part, dtype) for part, dtype, _ in seen} == {("decoder", torch.float32), ("encoder", torch.float32)}
    assert {side for part, _, side in seen if part == "decoder"} == {12}
    assert max(side for part, _, side in seen if part == "encoder") == 64
    for handle in handles:
        handle.remove()
    assert (vae.dtype, vae.use_tiling) == (torch.bfloat16, False)


def by_hand(name: str, pipeline: SelfCascadePipeline):
    """Each upscaler, put together anew."""
    return {
        "bilinear": lambda z, size: interpolate(z, size, mode="bilinear"),
        "bicubic": lambda z, size: interpolate(z, size, mode="bicubic"),
        "pixel": lambda z, size: encode_pictures(
            pipeline.vae,
            interpolate(decode(pipeline.vae, z).clamp(-1, 1), (8 * size[0], 8 * size[1]), mode="bicubic", antialias=True).clamp(-1, 1),
        ),
        "learned": lambda z, size: pipeline.latent_upscaler(z, size),
    }[name]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_cascade_with_each_upscaler_is_its_stages_by_hand(learned, name):
    """From 64 over 128x128 to 160x224: enlarge, noise to K, and a plain loop over the stock UNet and scheduler; bit for bit."""
    sizes = ((64, 64), (128, 128), (160, 224))
    call = {"num_inference_steps": 5, "guidance_scale": 1.0, "output_type": "latent"}
    found = learned(PROMPTS[0], sizes=sizes, generator=generators(3), upscale=name, start=0.6, **call).images
    latent_sizes = tuple((height // 8, width // 8) for height, width in sizes)
    noise = draw_noise(generators(3), 4, latent_sizes, torch.device("cpu"))
    z = learned(PROMPTS[0], sizes=sizes[:1], generator=generators(3), **call).images
    tokens = learned.tokenizer(PROMPTS[0], padding="max_length", max_length=12, return_tensors="pt").input_ids
    text = learned.text_encoder(tokens)[0]
    for stage in (1, 2):
        scheduler = type(learned.scheduler).from_config(learned.scheduler.config)
        scheduler.set_timesteps(5)
        z, timesteps = renoise_pivot(z, latent_sizes[stage], scheduler, start=0.6, noise=noise[stage].entry, upscale=by_hand(name, learned))
        for t in timesteps:
            z = scheduler.step(learned.unet(z, t, text).sample, t, z).prev_sample
    torch.testing.assert_close(found, z, atol=1e-5, rtol=1e-5)


def test_the_four_are_four(learned):
    latent = normal(1, 4, 8, 8)
    made = [upscale_of(name, vae=learned.vae, learned=learned.latent_upscaler)(latent, (16, 16)) for name in NAMES]
    assert all(not torch.allclose(one, other, atol=1e-3) for index, one in enumerate(made) for other in made[:index])


@pytest.mark.parametrize("name", NAMES)
def test_with_each_upscaler_a_sample_does_not_depend_on_its_batch(learned, name):
    call = {"num_inference_steps": 2, "output_type": "latent", "upscale": name}
    together = learned(PROMPTS, 128, 128, generator=generators(*range(4)), **call).images
    alone = learned(PROMPTS[2], 128, 128, generator=generators(2), **call).images
    torch.testing.assert_close(together[2:3], alone, atol=1e-4, rtol=1e-4)


def test_a_fresh_latent_upscaler_is_the_papers_cascade(learned):
    """Bit for bit."""
    fresh = quiet(SelfCascadePipeline.from_pipe(learned, latent_upscaler=LatentUpscaler(4, width=8, blocks=1)))
    call = {"num_inference_steps": 3, "output_type": "latent"}
    pictures = [fresh(PROMPTS[0], 128, 192, generator=generators(0), upscale=name, **call).images for name in ("learned", "bilinear")]
    assert torch.equal(*pictures)


def test_what_is_missing_is_said_before_any_network_runs(learned, monkeypatch):
    """An upscaler that is not known, and a learned one that the pipeline has not got."""
    without = quiet(SelfCascadePipeline.from_pipe(learned, latent_upscaler=None))
    without.register_modules(latent_upscaler=None)
    for network in (learned.text_encoder, learned.unet, learned.vae.decoder):
        monkeypatch.setattr(network, "forward", lambda *_, **__: pytest.fail("a network ran"))
    with pytest.raises(SettingsError, match=r"^upscale='learned' needs a latent upscaler; give latent_upscaler= .*, or choose bilinear$"):
        without("a cat", 128, 128, upscale="learned")
    with pytest.raises(SettingsError, match=r"^upscale='lanczos' is not known; choose bilinear, bicubic, pixel or learned$"):
        learned("a cat", 128, 128, upscale="lanczos")
    with pytest.raises(SettingsError, match=r"^upscale='pixel' needs the autoencoder"):
        upscale_of("pixel")
    with pytest.raises(SettingsError, match=r"^upscale='nearest' is not known; choose bilinear, bicubic, pixel or learned$"):
        upscale_of("nearest")


def test_a_latent_upscaler_of_another_base_is_refused_by_the_pipeline():
    with pytest.raises(SettingsError, match="latent upscaler was made for latents of 16 channels"):
        SelfCascadePipeline.from_pipe(models.base("small"), latent_upscaler=LatentUpscaler(16, width=4, blocks=1))


def test_a_saved_cascade_keeps_its_latent_upscaler(learned, tmp_path):
    """In fp32, as a component of its own, whatever the precision of the rest; and a folder of it alone is taken by both ways to a pipeline."""
    learned.save_pretrained(tmp_path / "all")
    learned.latent_upscaler.save_pretrained(tmp_path / "own")
    models.saved_base(tmp_path / "base")
    again = SelfCascadePipeline.from_pretrained(str(tmp_path / "all"), torch_dtype=torch.bfloat16)
    given = SelfCascadePipeline.from_pretrained(str(tmp_path / "base"), latent_upscaler=tmp_path / "own", torch_dtype=torch.bfloat16)
    taken = SelfCascadePipeline.from_pipe(models.base("small"), latent_upscaler=str(tmp_path / "own"))
    carried = SelfCascadePipeline.from_pipe(learned)
    latent = normal(1, 4, 4, 4)
    for pipeline in (again, given, taken, carried):
        assert pipeline.latent_upscaler.dtype == torch.float32
        assert torch.equal(pipeline.latent_upscaler(latent, (8, 8)), learned.latent_upscaler(latent, (8, 8)))
    assert again.unet.dtype == torch.bfloat16


def test_settings_and_slot_know_the_same_names():
    assert [CascadeSettings(upscale=name).upscale for name in NAMES] == list(NAMES)
    assert set(UPSCALES) < set(NAMES)
    with pytest.raises(ValueError, match="upscale"):
        CascadeSettings(upscale="lanczos")
