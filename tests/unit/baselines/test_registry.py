"""One table of baselines, and every entry is a method of generation."""

from __future__ import annotations

from typing import get_args

import models
import pytest
import torch
from test_lora import trained_on

from selfcascade import SelfCascadePipeline
from selfcascade.baselines.registry import BASELINES
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.config import BaselineSettings, Method, X4Settings
from selfcascade.generation.methods import METHODS


def test_every_baseline_is_a_method_of_its_name():
    assert all(name == baseline.name and name in get_args(Method) for name, baseline in BASELINES.items())
    assert set(METHODS) == set(get_args(Method))


def test_every_baseline_says_where_it_applies():
    spec = spec_of(models.unet("small"))
    reasons = {name: baseline.refusal(spec, 128, 128, BaselineSettings()) for name, baseline in BASELINES.items()}
    assert {name for name, reason in reasons.items() if reason} == {"hidiffusion"}
    assert all(baseline.summary and "\n" not in baseline.summary for baseline in BASELINES.values())


@pytest.mark.parametrize("name", ["direct", "attention-scaling", "scalecrafter", "latent-sr", "x4-upscaler", "lora", "full"])
def test_every_baseline_has_the_same_face(name, tmp_path):
    """``sample(pipeline, prompt, height, width, settings, **call)`` gives a picture of that size; the same seed gives the same one."""
    pipeline = SelfCascadePipeline.from_pipe(models.base("small"), latent_upscaler=LatentUpscaler(4, width=4, blocks=1))
    pipeline.set_progress_bar_config(disable=True)
    extra = {"upscaler": models.x4_upscaler()} if name == "x4-upscaler" else {"adapter": tmp_path} if name == "lora" else {}
    if name == "lora":
        trained_on(pipeline.unet).save_pretrained(tmp_path)
    call = {"height": 128, "width": 192, "settings": BaselineSettings(x4=X4Settings(steps=2)), "num_inference_steps": 2, **extra}
    first, again = (BASELINES[name].sample(pipeline, "a red cat", generator=torch.Generator().manual_seed(0), output_type="pt", **call) for _ in range(2))
    assert first.images.shape == (1, 3, 128, 192)
    assert torch.equal(first.images, again.images)
