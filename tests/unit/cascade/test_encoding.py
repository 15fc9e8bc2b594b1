"""A user's own picture as the first pivot."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from PIL import Image
from test_cascade_pipeline import PROMPTS, generators, quiet

from selfcascade import SelfCascadePipeline
from selfcascade.cascade.encoding import as_pillow, encode_pictures, fitted
from selfcascade.settings import SettingsError


@pytest.fixture(scope="module")
def small() -> SelfCascadePipeline:
    return quiet(SelfCascadePipeline.from_pipe(models.base("small")))


def picture(height: int = 64, width: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def run(pipeline: SelfCascadePipeline, prompt=PROMPTS[0], size=128, *, seeds=(0,), **call) -> torch.Tensor:
    return pipeline(prompt, size, size, num_inference_steps=4, generator=generators(*seeds), output_type="latent", **call).images


def test_an_image_is_the_pivot_of_its_own_latents(small):
    pivot = encode_pictures(small.vae, fitted([picture()], (64, 64)))
    assert torch.equal(run(small, image=picture()), run(small, pivot=pivot))


def test_the_biggest_stage_that_the_image_fills_is_left_out(small):
    """To 256 px the stages are 64, 128, 256: a picture of 130 px stands for the second, one of 100 for the first."""
    for side, stage in ((130, 128), (100, 64), (40, 64)):
        pivot = encode_pictures(small.vae, fitted([picture(side, side)], (stage, stage)))
        assert torch.equal(run(small, size=256, image=picture(side, side)), run(small, size=256, pivot=pivot)), side


def test_scaled_latents_decode_to_the_picture_of_the_mode(small):
    """Scaling is undone exactly by the way out: the autoencoder's own round trip."""
    from selfcascade.cascade.decoding import decode

    pictures = fitted([picture()], (64, 64))
    with torch.no_grad():
        own = small.vae.decode(small.vae.encode(pictures).latent_dist.mode()).sample
    torch.testing.assert_close(decode(small.vae, encode_pictures(small.vae, pictures)), own, atol=1e-5, rtol=1e-5)


def test_pictures_in_every_form_are_the_same():
    array = np.asarray(picture(16, 24))
    forms = [picture(16, 24), array, array[None], array.astype(np.float32) / 255, torch.from_numpy(array.astype(np.float32) / 255).permute(2, 0, 1)]
    for form in [*forms, forms]:
        for found in as_pillow(form):
            assert np.array_equal(np.asarray(found), array)
    assert len(as_pillow(forms)) == len(forms)


def test_a_picture_covers_its_stage_and_is_cropped_at_the_centre():
    wide = Image.fromarray(np.tile(np.repeat(np.array([0, 255, 0], np.uint8), 64)[None, :, None], (64, 1, 3)))
    assert fitted([wide], (64, 64)).unique().tolist() == [1.0]


def test_one_image_serves_all_samples_and_a_batch_is_each_alone(small):
    together = run(small, PROMPTS[:2], seeds=(1, 2), image=[picture(), picture(seed=1)])
    for index in range(2):
        alone = run(small, PROMPTS[index], seeds=(index + 1,), image=picture(seed=index))
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=1e-4)
    shared = run(small, PROMPTS[:2], seeds=(1, 2), image=picture())
    torch.testing.assert_close(shared[0], together[0], atol=1e-4, rtol=1e-4)


def test_a_tiled_way_in_leaves_the_autoencoder_as_it_was(small):
    """In tiles of the autoencoder's own size, where the picture is above the limit; on a plain picture tiling cannot be told from the whole, seams apart."""
    plain = torch.full((1, 3, 192, 192), 0.25)
    whole, tiled = encode_pictures(small.vae, plain), encode_pictures(small.vae, plain, tile_above=0)
    assert whole.shape == tiled.shape == (1, 4, 24, 24)
    assert not torch.equal(whole, tiled)
    torch.testing.assert_close(tiled.mean((-1, -2)), whole.mean((-1, -2)), atol=0.05, rtol=0.2)
    assert not small.vae.use_tiling


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"image": "fox.png"}, "image is a str; give a Pillow picture"),
        ({"image": np.zeros((8, 8))}, r"image is a ndarray of shape \(8, 8\)"),
        ({"image": []}, "empty list"),
        ({"image": [picture()] * 3}, "3 images for 1 samples"),
        ({"image": picture(), "pivot": torch.zeros(1, 4, 8, 8)}, "not both"),
        ({"image": picture(), "size": 64}, "has the base stage alone"),
        ({"guidance_interval": (0.5, 0.5)}, "0 <= low < high <= 1"),
        ({"later_steps": 0}, "later_steps=0 must be at least 1"),
        ({"pivot_every": 0}, "pivot_every=0 must be at least 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_start_is_refused_in_one_line(small, call, message):
    with pytest.raises(SettingsError, match=message) as raised:
        run(small, **call)
    assert "\n" not in str(raised.value)
