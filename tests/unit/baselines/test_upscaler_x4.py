"""SD + x4 upscaler: diffusers' own pipeline behind the base, on a narrow model of the real topology."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from selfcascade import SelfCascadePipeline
from selfcascade.baselines import upscaler_x4
from selfcascade.baselines.upscaler_x4 import load_upscaler, resolve_upscaler
from selfcascade.cascade.decoding import decode
from selfcascade.config import BaselineSettings, X4Settings
from selfcascade.settings import SettingsError

QUICK = BaselineSettings(x4=X4Settings(steps=2, guidance_scale=3.0))
BASE = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipeline() -> SelfCascadePipeline:
    made = SelfCascadePipeline.from_pipe(models.base("small"))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def upscaler():
    made = models.x4_upscaler()
    made.set_progress_bar_config(disable=True)
    return made


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_topology_is_the_real_one():
    """At full width it has the numbers of the published upscaler (method section 8)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**models.X4_UNET)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 473_398_020


@pytest.mark.parametrize("side", [128, 256])
def test_it_is_diffusers_pipeline_on_the_bases_picture(pipeline, upscaler, side):
    """Base, x4 upscaler and the way down to the target, by hand: the same bits. The upscaler's noise comes after the base's two draws."""
    found = upscaler_x4.sample(
        pipeline, "a red cat", height=side, width=side, settings=QUICK, upscaler=upscaler, generator=seeded(5), output_type="pt", **BASE
    ).images
    (generator,) = seeded(5)
    base = pipeline("a red cat", sizes=[(64, 64)], generator=[generator], output_type="latent", **BASE).images
    picture = (decode(pipeline.vae, base) / 2 + 0.5).clamp(0, 1)
    big = upscaler(
        ["a red cat"], picture, num_inference_steps=2, guidance_scale=3.0, noise_level=20, generator=[generator], output_type="latent", return_dict=False
    )
    expected = decode(upscaler.vae, big[0])
    assert expected.shape[-2:] == (256, 256)
    if side != 256:
        expected = F.interpolate(expected, size=(side, side), mode="bicubic", antialias=True)
    assert torch.equal(found, (expected / 2 + 0.5).clamp(0, 1))
    assert not torch.allclose(found, F.interpolate(picture, size=(side, side)), atol=0.05)


def test_a_known_base_is_as_good_as_a_sampled_one(pipeline, upscaler):
    """With fresh generators: what was drawn for the base is drawn again and thrown away."""
    call = {"height": 128, "width": 128, "settings": QUICK, "upscaler": upscaler, "output_type": "pt", "negative_prompt": "blurry"} | BASE
    whole = upscaler_x4.sample(pipeline, ["a red cat", "sun"], generator=seeded(1, 2), **call).images
    base = pipeline(["a red cat", "sun"], sizes=[(64, 64)], generator=seeded(1, 2), output_type="latent", negative_prompt="blurry", **BASE).images
    assert torch.equal(whole, upscaler_x4.sample(pipeline, ["a red cat", "sun"], generator=seeded(1, 2), base=base, **call).images)


def test_a_sample_of_a_batch_of_four_is_the_sample_alone(pipeline, upscaler):
    prompts = ["a red cat", "two blue dog", "a house", "sun"]
    call = {"height": 128, "width": 192, "settings": QUICK, "upscaler": upscaler, "output_type": "pt"} | BASE
    together = upscaler_x4.sample(pipeline, prompts, generator=seeded(0, 1, 2, 3), **call).images
    assert together.shape == (4, 3, 128, 192)
    for seed, prompt in enumerate(prompts):
        alone = upscaler_x4.sample(pipeline, prompt, generator=seeded(seed), **call).images
        torch.testing.assert_close(together[seed : seed + 1], alone, atol=1e-3, rtol=1e-3)
    twice = upscaler_x4.sample(pipeline, "a red cat", num_images_per_prompt=2, generator=seeded(0, 8), **call).images
    torch.testing.assert_close(twice[:1], together[:1], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(twice[0], twice[1], atol=0.01)


def test_pictures_come_as_pil_and_numpy_too(pipeline, upscaler):
    call = {"height": 128, "width": 128, "settings": QUICK, "upscaler": upscaler} | BASE
    (picture,) = upscaler_x4.sample(pipeline, "sun", generator=seeded(0), **call).images
    assert picture.size == (128, 128)
    (array,) = upscaler_x4.sample(pipeline, "sun", generator=seeded(0), output_type="np", return_dict=False, **call)[0]
    assert np.abs(np.asarray(picture) / 255 - array).max() < 0.003


def test_an_upscaler_is_loaded_from_a_folder_in_its_precision(upscaler, tmp_path):
    upscaler.save_pretrained(tmp_path / "x4")
    found = resolve_upscaler(str(tmp_path / "x4"))
    loaded = load_upscaler(found, torch.bfloat16)
    assert (loaded.unet.dtype, loaded.vae.dtype, loaded.safety_checker) == (torch.bfloat16, torch.float32, None)
    assert len(found.version) == 64


def test_what_cannot_be_is_one_line(pipeline, upscaler, tmp_path):
    with pytest.raises(SettingsError, match="x4-upscaler does not apply: 512x512 is more than four times the base's 64x64 a side"):
        upscaler_x4.sample(pipeline, "a cat", height=512, width=512, upscaler=upscaler)
    with pytest.raises(SettingsError, match="output_type='latent' is not known to x4-upscaler; choose pil, np or pt"):
        upscaler_x4.sample(pipeline, "a cat", height=128, width=128, upscaler=upscaler, output_type="latent")
    with pytest.raises(SettingsError, match=r"x4 upscaler: .*'no-such'.* is neither"):
        resolve_upscaler("no-such")
    models.saved_base(tmp_path / "base")
    with pytest.raises(SettingsError, match=r"is a StableDiffusionPipeline; baselines\.x4\.model needs a StableDiffusionUpscalePipeline"):
        resolve_upscaler(str(tmp_path / "base"))
