"""SDXL: two encoders, what an empty prompt becomes, ids of the stage's size, and an autoencoder that half precision would overflow."""

from __future__ import annotations

import models
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from selfcascade import SelfCascadePipeline
from selfcascade.cascade.conditioning import encode
from selfcascade.cascade.upsampler import FeatureUpsampler


def stock(*, zeros: bool = True) -> StableDiffusionXLPipeline:
    pipeline = models.base("sdxl")
    pipeline = StableDiffusionXLPipeline(**pipeline.components, force_zeros_for_empty_prompt=zeros)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cascade(pipeline, **components) -> SelfCascadePipeline:
    ours = SelfCascadePipeline.from_pipe(pipeline, **components)
    ours.set_progress_bar_config(disable=True)
    return ours


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("negative", [None, "", "blurry"])
@torch.no_grad()
def test_text_is_encoded_as_the_stock_pipeline_does(zeros, negative):
    """Both encoders side by side, the pooled text of the second; where no negative prompt is given, zeros, if the base says so."""
    theirs = stock(zeros=zeros)
    ours = cascade(theirs)
    text, negative_text, pooled, negative_pooled = theirs.encode_prompt(
        "a cat", num_images_per_prompt=2, do_classifier_free_guidance=True, negative_prompt=negative
    )
    conditioning = encode(ours, ours.spec.family, prompt=["a cat"], negative_prompt=None if negative is None else [negative], per_prompt=2, guided=True)
    assert torch.equal(conditioning.text, torch.cat([negative_text, text]))
    assert torch.equal(conditioning.pooled, torch.cat([negative_pooled, pooled]))
    assert text.shape[-1] == 2 * models.TEXT
    assert conditioning.text[:2].any() == (not zeros or negative is not None)
    assert conditioning.pooled[:2].any() == (not zeros or negative is not None)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_base_stage_is_the_stock_pipeline_bit_for_bit_either_way(zeros):
    theirs = stock(zeros=zeros)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "latent"}
    expected = theirs("a cat", generator=torch.Generator().manual_seed(0), **call).images
    assert torch.equal(cascade(theirs)("a cat", generator=torch.Generator().manual_seed(0), **call).images, expected)


@pytest.mark.parametrize("guided", [True, False])
@torch.no_grad()
def test_size_ids_are_the_stages_own_for_every_row(guided):
    """Original and target size of the stage, uncropped (method 6), beside the pooled text, in the text's precision."""
    ours = cascade(stock())
    conditioning = encode(ours, ours.spec.family, prompt=["a cat", "red dog"], negative_prompt=None, per_prompt=1, guided=guided)
    for size in ((64, 96), (128, 192)):
        extra = conditioning.of_stage(size)["added_cond_kwargs"]
        assert extra["time_ids"].tolist() == [[*size, 0, 0, *size]] * (4 if guided else 2)
        assert extra["text_embeds"] is conditioning.pooled
        assert extra["time_ids"].dtype == conditioning.text.dtype


def test_every_pass_of_a_stage_gets_the_ids_of_that_stage():
    """The pivot's passes too: they see the stage that they guide, not the one that the pivot came from."""
    pipeline = stock()
    phi = FeatureUpsampler.for_base(cascade(pipeline).spec, variant="C")
    ours, seen = cascade(pipeline, upsampler=phi), []
    handle = ours.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].shape[-1], kwargs["added_cond_kwargs"]["time_ids"].unique().tolist())), with_kwargs=True
    )
    ours("a cat", 256, 256, num_inference_steps=2, output_type="latent")
    handle.remove()
    assert seen == [(8, [0, 64])] * 2 + [(8, [0, 128]), (16, [0, 128])] * 2 + [(16, [0, 256]), (32, [0, 256])] * 2


@pytest.mark.parametrize("upcast", [True, False], ids=["overflows", "fixed"])
def test_half_precision_stays_where_it_is_safe(upcast):
    """UNet and texts in fp16; latents, scheduler and what is handed on in fp32; the autoencoder in fp32 where it says that it overflows, else in fp16. After
    the call it is as it was."""
    pipeline = stock().to(torch.float16)
    pipeline.vae.register_to_config(force_upcast=upcast)
    phi = FeatureUpsampler.for_base(cascade(pipeline).spec, variant="C").to(torch.float16)
    ours = cascade(pipeline, upsampler=phi)
    entered, decoded, handed_on = set(), [], []
    handles = [
        ours.unet.register_forward_pre_hook(
            lambda _, args, kwargs: entered.update(
                [args[0].dtype, kwargs["encoder_hidden_states"].dtype, *(x.dtype for x in kwargs["added_cond_kwargs"].values())]
            ),
            with_kwargs=True,
        ),
        ours.vae.decoder.register_forward_hook(lambda _, args, out: decoded.append(out.dtype)),
    ]
    out = ours(
        "a cat",
        128,
        128,
        num_inference_steps=2,
        output_type="pt",
        callback_on_step_end=lambda pipe, step, t, tensors: handed_on.append(tensors["latents"].dtype) or {},
    )
    for handle in handles:
        handle.remove()
    assert entered == {torch.float16}
    assert set(handed_on) == {torch.float32}
    assert decoded == [torch.float32 if upcast else torch.float16]
    assert out.images.dtype == torch.float32
    assert out.images.isfinite().all()
    assert {component.dtype for component in (ours.unet, ours.vae, ours.text_encoder, ours.text_encoder_2)} == {torch.float16}


def test_a_base_loaded_in_half_precision_has_its_autoencoder_in_full(tmp_path):
    models.saved_base(tmp_path, "sdxl")
    ours = SelfCascadePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert (ours.unet.dtype, ours.text_encoder.dtype, ours.text_encoder_2.dtype, ours.vae.dtype) == (*[torch.float16] * 3, torch.float32)
    assert ours.config.force_zeros_for_empty_prompt
