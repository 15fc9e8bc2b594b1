"""What bad input gets: a ValueError of one line that names the value and what would be accepted, before any network runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler
from PIL import Image
from test_cascade_pipeline import PROMPTS, generators, quiet
from test_coexistence import controlnet_for, edges, stock_base, with_image_prompts

from selfcascade import SelfCascadePipeline
from selfcascade.baselines import attention_scaling, direct, latent_sr, scalecrafter
from selfcascade.cascade.control import Control
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.upsampler import FeatureUpsampler, load_upsampler
from selfcascade.cascade.upsampler_set import UpsamplerSet
from selfcascade.config import BaselineSettings
from selfcascade.settings import SettingsError


class Silent:
    """The networks of a pipeline, none of which may run."""

    def __init__(self, pipeline: SelfCascadePipeline):
        self.pipeline, self.ran = pipeline, []
        self.handles = [
            module.register_forward_pre_hook(lambda module, args: self.ran.append(type(module).__name__))
            for part in pipeline.components.values()
            if isinstance(part, torch.nn.Module)
            for module in part.modules()
        ]

    def refuses(self, message: str, *, sample=None, **call) -> None:
        """The call raises a SettingsError, which is a ValueError, of one line with that message, and nothing has run."""
        self.ran.clear()
        complete = {"prompt": PROMPTS[:2], "height": 128, "width": 128, "num_inference_steps": 4, "output_type": "latent"} | call
        with pytest.raises(SettingsError) as refusal:
            (sample or SelfCascadePipeline.__call__)(self.pipeline, **complete)
        assert_one_line(refusal.value, message)
        assert not self.ran


def assert_one_line(error: BaseException, message: str) -> None:
    assert isinstance(error, ValueError)
    assert re.search(message, str(error)), str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 500


@pytest.fixture(scope="module")
def silent() -> Iterator[Silent]:
    yield from watching("small")


@pytest.fixture(scope="module")
def silent_xl() -> Iterator[Silent]:
    yield from watching("sdxl")


def watching(kind: models.Kind) -> Iterator[Silent]:
    watched = Silent(quiet(SelfCascadePipeline.from_pipe(stock_base(kind))))
    yield watched
    for handle in watched.handles:
        handle.remove()


Z8, Z16 = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 16, 16)

BAD = [
    # sizes
    ({"height": 100}, r"size 100x128 .* multiples of 32 pixels .* such as 96x128"),
    ({"width": 129}, r"size 128x129 .* multiples of 32 pixels"),
    ({"height": -128}, r"size -128x128 .* multiples of 32"),
    ({"height": 128.0}, r"height=128.0 must be a whole number of pixels"),
    ({"width": "128"}, r"width='128' must be a whole number of pixels"),
    ({"height": 32, "width": 32}, r"size 32x32 is smaller than the base's own 64x64"),
    ({"sizes": [(128, 128), (64, 64)]}, "no stage may be smaller"),
    ({"sizes": []}, "at least one stage"),
    ({"sizes": [(64, 64), (128, 120)]}, "size 128x120 .* multiples of 32"),
    ({"sizes": [64, 128]}, r"sizes holds 64; give pairs of height and width"),
    ({"num_frames": 4}, "num_frames=4 is for a text-to-video base"),
    # K, steps, strengths
    ({"start": 0.0}, r"start=0.0 must be above 0 and at most 1"),
    ({"start": -0.7}, r"start=-0.7 must be above 0"),
    ({"start": 1.001}, r"start=1.001 .* at most 1"),
    ({"start": 700}, r"start=700 .* at most 1: it is K / T"),
    ({"start": math.nan}, r"start=nan must be above 0"),
    ({"start": 0.0001}, r"start=0.0001 leaves no timestep of 4 steps"),
    ({"strength": -0.1}, r"strength=-0.1 must be in 0\.\.1"),
    ({"strength": 1.1}, r"strength=1.1 must be in 0\.\.1"),
    ({"strength": math.nan}, r"strength=nan must be in 0\.\.1"),
    ({"num_inference_steps": 0}, "steps=0 must be at least 1"),
    ({"num_inference_steps": 1001}, r"steps=1001 must be in 1\.\.1000"),
    ({"num_inference_steps": 12.5}, "steps=12.5 must be a whole number"),
    ({"later_steps": 0}, "later_steps=0 must be at least 1"),
    ({"pivot_every": 0}, "pivot_every=0 must be at least 1"),
    ({"t_min": -1}, "t_min=-1 must not be negative"),
    ({"eta": 1.5}, r"eta=1.5 must be in 0\.\.1"),
    ({"guidance_scale": math.nan}, "guidance_scale=nan must be a number"),
    ({"guidance_interval": (0.8, 0.1)}, r"guidance_interval=\[0.8, 0.1\] must be two shares"),
    ({"guidance_interval": 0.5}, "guidance_interval=0.5 must be two shares"),
    ({"upscale": "nearest"}, "upscale='nearest' is not known; choose bilinear, bicubic, pixel or learned"),
    ({"upscale": "learned"}, "needs a latent upscaler"),
    # counts
    ({"prompt": []}, "at least one prompt"),
    ({"prompt": None}, "at least one prompt"),
    ({"prompt": 7}, "prompt=7 is no text; give a text or a list of texts"),
    ({"prompt": ["a cat", None]}, "prompt holds None; give a text or a list of texts"),
    ({"negative_prompt": ["a", 3]}, "negative_prompt holds 3; give a text"),
    ({"negative_prompt": ["a"] * 3}, "3 negative prompts for 2 prompts; give one for all or one each"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be a whole number, at least 1"),
    ({"num_images_per_prompt": 1.5}, "num_images_per_prompt=1.5 must be a whole number, at least 1"),
    ({"generator": generators(0)}, "1 generators for 2 samples; give one for all or one each"),
    ({"generator": generators(0, 1), "num_images_per_prompt": 2}, "2 generators for 4 samples"),
    ({"generator": generators(0, 1, 2)}, "3 generators for 2 samples"),
    ({"generator": 3407}, "generator is a int; give a torch.Generator, or a list of one a sample"),
    ({"generator": [0, 1]}, "generator is a int; give a torch.Generator"),
    ({"output_type": "jpg"}, "output_type='jpg' is not known; choose pil, np, pt or latent"),
    # tensors
    ({"latents": Z16}, r"latents has shape .* needs \(2, 4, 8, 8\)"),
    ({"pivot": torch.zeros(2, 4, 12, 12)}, "pivot has latent size 12x12, but the stages below the target have 8x8"),
    ({"pivot": Z16}, "pivot has latent size 16x16, but the stages below the target have 8x8"),
    ({"pivot": Z8[:1]}, r"pivot has shape \(1, 4, 8, 8\), but this call needs \(2, 4, 8, 8\)"),
    ({"pivot": Z8, "image": edges()}, "pivot or an image to start from, not both"),
    ({"pivot": "base.png"}, "pivot is a str; give a tensor"),
    ({"image": edges(), "height": 64, "width": 64}, "image starts the stage above it"),
    ({"image": "photo.png"}, "image"),
    ({"image": [edges()] * 3}, "3 images for 2 samples; give one for all or one each"),
    ({"prompt": None, "prompt_embeds": torch.zeros(2, 12, 7)}, r"prompt_embeds has shape \(2, 12, 7\), but this call needs \(2, tokens, 32\)"),
    ({"prompt_embeds": torch.zeros(2, 12, 32)}, "at least one prompt, either as prompt or as prompt_embeds"),
    ({"negative_prompt_embeds": torch.zeros(1, 12, 32)}, r"negative_prompt_embeds has shape .* needs \(2, tokens, 32\)"),
    ({"negative_prompt": "blurry", "negative_prompt_embeds": torch.zeros(2, 12, 32)}, "negative_prompt or negative_prompt_embeds, not both"),
    # callbacks, image prompts, control
    ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["noise_pred"]}, "noise_pred.*choose of latents, prompt_embeds"),
    ({"callback_on_step_end": "print"}, "callback_on_step_end is a str; give a function"),
    ({"ip_adapter_image_embeds": [torch.zeros(2, 1, 24)]}, "1 embeddings, but this UNet has 0 IP-Adapters"),
    ({"residuals": {"mid_block_additional_residual": Z8}}, "residuals is a dict; .* give a Control"),
    ({"cross_attention_kwargs": 0.5}, r"cross_attention_kwargs=0.5 must be a dictionary, such as \{'scale': 0.5\}"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[f"{'+'.join(call)}-{index}" for index, (call, _) in enumerate(BAD)])
def test_a_bad_call_is_refused_in_one_line_before_any_network_runs(silent, call, message):
    silent.refuses(message, **call)


XL = torch.zeros(2, 12, 2 * models.TEXT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": None, "prompt_embeds": XL}, "SDXL needs prompt_embeds and pooled_prompt_embeds together"),
        ({"negative_prompt_embeds": XL}, "SDXL needs negative_prompt_embeds and negative_pooled_prompt_embeds together"),
    ],
)
def test_half_of_sdxls_text_is_refused(silent_xl, call, message):
    silent_xl.refuses(message, **call)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (PNDMScheduler(), "PNDMScheduler is not known to start in the middle of its grid; use DDIMScheduler, EulerDiscreteScheduler"),
        (HeunDiscreteScheduler(), "HeunDiscreteScheduler is not known to start in the middle"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "noise levels of DPMSolverMultistepScheduler are not those of its timesteps"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_scheduler_that_cannot_start_in_the_middle_is_refused(silent, scheduler, message):
    """Also where the base alone is asked for, so that what samples at the base samples above it."""
    before = silent.pipeline.scheduler
    silent.pipeline.scheduler = scheduler
    try:
        silent.refuses(message)
        silent.refuses(message, height=64, width=64)
    finally:
        silent.pipeline.scheduler = before


def test_image_prompts_and_control_that_do_not_fit_are_refused():
    stock = stock_base("small")
    with_image_prompts(stock, 2)
    watched = Silent(quiet(SelfCascadePipeline.from_pipe(stock)))
    watched.refuses("0 embeddings, but this UNet has 2 IP-Adapters; give one each")
    watched.refuses("1 embeddings, but this UNet has 2", ip_adapter_image_embeds=[torch.zeros(2, 1, 24)])
    watched.refuses(r"shape \(3, 1, 24\), but this call needs 2 or 4 in its batch", ip_adapter_image_embeds=[torch.zeros(2, 1, 24), torch.zeros(3, 1, 24)])
    embeds = [torch.zeros(2, 1, 24)] * 2
    watched.refuses("3 pictures for 2 samples", residuals=Control(controlnet_for(models.unet("small")), [edges()] * 3), ip_adapter_image_embeds=embeds)
    other = Control(controlnet_for(models.unet("sd21")), edges())
    watched.refuses(
        r"made for a UNet with block_out_channels=\(32, 48, 64, 64\), but this one has \(32, 48, 64\)", residuals=other, ip_adapter_image_embeds=embeds
    )
    with pytest.raises(SettingsError, match="scale=-1 must not be negative"):
        Control(controlnet_for(models.unet("small")), edges(), scale=-1)


# ---- upsamplers ----


def upsampler_for(kind: models.Kind, **options) -> FeatureUpsampler:
    return FeatureUpsampler.for_base(spec_of(models.unet(kind)), variant="C", **options)


def others() -> dict[str, tuple[object, str]]:
    wide = upsampler_for("small").config | {"channels": (64, 96, 128, 128), "groups": (4, 4, 4, 4)}
    return {
        "family": (upsampler_for("sd21"), "made for a base of family 'sd', but this one is of family 'small'; choose another"),
        "base": (
            upsampler_for("small", base="yours@" + "0" * 64),
            "trained for base 'yours@0{12}' but the pipeline holds 'mine@1{12}'; retrain it or pass --base yours",
        ),
        "channels": (
            FeatureUpsampler(**{name: value for name, value in wide.items() if not name.startswith("_")}),
            r"skip features of \(64, 96, 128, 128\) channels and time width 128, but the base has \(32, 48, 64, 64\) and 128",
        ),
        "set": (UpsamplerSet.holding({1: upsampler_for("sd21")}), "made for a base of family 'sd'"),
        "no stage": ({0: upsampler_for("small")}, "given by the number of their stage, from 1, not by '0'"),
        "another stage": ({2: upsampler_for("small", stage=1)}, "trained for stage 1 but is given for stage 2; put it there"),
        "no upsampler": (7, "upsampler is a int; give an upsampler"),
        "nowhere": ("upsampler/that/is/not/there", "upsampler 'upsampler/that/is/not/there' does not load"),
    }


@pytest.mark.parametrize("case", list(others()))
def test_an_upsampler_of_something_else_is_refused_when_it_is_given(case):
    upsampler, message = others()[case]
    with pytest.raises(SettingsError) as refusal:
        SelfCascadePipeline.from_pipe(stock_base("small"), upsampler=upsampler, base="mine@" + "1" * 64)
    assert_one_line(refusal.value, message)


@pytest.mark.parametrize(
    ("upsampler", "message"),
    [
        (upsampler_for("small", stage=2, size=(256, 256)), r"trained for stage 2 \(256x256 pixels\) but this cascade has stage 1 alone; choose"),
        (UpsamplerSet.holding({2: upsampler_for("small", stage=2), 3: upsampler_for("small")}), "for stage 2, 3 but this cascade has 1 above the base"),
    ],
    ids=["one", "set"],
)
def test_an_upsampler_of_another_stage_is_refused_by_the_call(upsampler, message):
    Silent(quiet(SelfCascadePipeline.from_pipe(stock_base("small"), upsampler=upsampler))).refuses(message)


def saved(folder: Path) -> Path:
    upsampler_for("small").save_pretrained(folder)
    return folder


def pickled(folder: Path) -> Path:
    upsampler_for("small").save_pretrained(folder, safe_serialization=False)
    return folder


def disguised(folder: Path) -> Path:
    """A pickle under the name of safetensors."""
    (weights,) = pickled(folder).glob("*.bin")
    weights.rename(folder / "diffusion_pytorch_model.safetensors")
    return folder


def truncated(folder: Path) -> Path:
    weights = saved(folder) / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def of_another_shape(folder: Path) -> Path:
    config = saved(folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"variant": "A"}))
    return folder


def damaged(folder: Path) -> Path:
    (saved(folder) / "config.json").write_text("{")
    return folder


def of_a_latent_upscaler(folder: Path) -> Path:
    models.vae().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (pickled, r"has pickled weights \(diffusion_pytorch_model.bin\), which may run code when they are read; save it as safetensors"),
        (disguised, "does not load"),
        (truncated, "does not load"),
        (of_another_shape, "does not load"),
        (damaged, "does not load"),
        (of_a_latent_upscaler, "is a AutoencoderKL; choose what"),
        (lambda folder: folder, "does not load"),
    ],
    ids=["pickled", "disguised", "truncated", "of another shape", "damaged", "autoencoder", "missing"],
)
def test_an_upsampler_folder_that_cannot_be_trusted_is_refused(tmp_path, monkeypatch, made, message):
    """Nothing is ever unpickled: the unpickler would fail the test."""
    folder = made(tmp_path / "phi")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("something was unpickled"))
    for load in (load_upsampler, lambda where: SelfCascadePipeline.from_pipe(stock_base("small"), upsampler=where)):
        with pytest.raises(SettingsError) as refusal:
            load(str(folder))
        assert_one_line(refusal.value, message)


@pytest.mark.parametrize("part", ["upsampler", "unet", "vae"])
def test_a_saved_pipeline_with_a_pickled_part_is_refused(tmp_path, monkeypatch, part):
    pipeline = SelfCascadePipeline.from_pipe(stock_base("small"), upsampler=upsampler_for("small"))
    pipeline.save_pretrained(tmp_path)
    (weights,) = (tmp_path / part).glob("*.safetensors")
    weights.unlink()
    getattr(pipeline, part).save_pretrained(tmp_path / part, safe_serialization=False)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("something was unpickled"))
    with pytest.raises(SettingsError) as refusal:
        SelfCascadePipeline.from_pretrained(tmp_path)
    assert_one_line(refusal.value, r"does not load: .*safetensors")


# ---- baselines ----


@pytest.mark.parametrize(
    ("sample", "call", "message"),
    [
        (direct.sample, {"height": 100}, "size 100x128 .* multiples of 32"),
        (direct.sample, {"prompt": []}, "at least one prompt"),
        (attention_scaling.sample, {"width": 100}, "size 128x100 .* multiples of 32"),
        (attention_scaling.sample, {"generator": generators(0)}, "1 generators for 2 samples"),
        (scalecrafter.sample, {"height": 100}, "100"),
        (latent_sr.sample, {}, "needs a latent upscaler"),
    ],
)
def test_baselines_refuse_as_the_cascade_does(silent, sample, call, message):
    silent.refuses(message, sample=lambda pipeline, **complete: sample(pipeline, settings=BaselineSettings(), **complete), **call)


def test_numbers_of_numpy_are_numbers():
    """Sizes and counts that come out of arrays are accepted."""
    pipeline = quiet(SelfCascadePipeline.from_pipe(stock_base("small")))
    side, one = np.int64(128), np.int64(1)
    out = pipeline("a cat", side, side, num_inference_steps=one, num_images_per_prompt=one, start=np.float32(0.7), output_type="latent").images
    assert out.shape == (1, 4, 16, 16)
    assert isinstance(pipeline("a cat", 64, 64, num_inference_steps=1).images[0], Image.Image)
