"""Families: the tap points are those of the paper's bases, and what is no such base is refused in one line that says what was found."""

from __future__ import annotations

import models
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)

from selfcascade.cascade.families import FAMILIES, PREDICTIONS, Tap, spec_of
from selfcascade.cascade.published import PUBLISHED, published_unet
from selfcascade.settings import SettingsError

SKIPS = {"sd": (2, 5, 8, 11), "sdxl": (2, 5, 8), "video": (2, 5, 8, 11)}
"""Method 7.1, by index among all skips of the UNet."""
SHAPES = {"sd-1.5": ("sd", 512), "sd-2.1-base": ("sd", 512), "sd-2.1": ("sd", 768), "sdxl": ("sdxl", 1024), "text-to-video": ("video", 256)}


def on_meta(build, *args, **config):
    with torch.device("meta"):
        return build(*args, **config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_real_bases_are_tapped_where_the_method_says(name):
    """At full width, on the meta device: the last skip of each level by its index among all skips (method 7.1), and the mid block where there are three."""
    unet = on_meta(published_unet, name)
    spec = spec_of(unet)
    family, native = SHAPES[name]
    skips = SKIPS[family]
    assert spec.family.name == family
    assert spec.native == (native, native)
    assert sum(parameter.numel() for parameter in unet.parameters()) == PUBLISHED[name].parameters
    assert spec.channels("skip") == spec.channels("main") == (320, 640, 1280, 1280)
    assert (spec.latent_channels, spec.time_width, spec.norm_groups) == (4, 1280, 32)
    assert spec.step == (32 if family == "sdxl" else 64)

    offset, indices = 1, []  # the first skip is conv_in's
    for level, block in enumerate(unet.down_blocks):
        indices += [offset + tap.skip for tap in spec.skip_taps if tap.module == f"down_blocks.{level}"]
        offset += len(block.resnets) + len(block.downsamplers or ())
    assert tuple(indices) == skips
    assert [tap.module for tap in spec.skip_taps[len(skips) :]] == (["mid_block"] if len(skips) == 3 else [])
    assert [tap.module for tap in spec.main_taps] == ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block"]
    assert all(tap.skip is None for tap in spec.main_taps)


def test_every_family_but_the_small_one_is_published():
    """And the small one is the shipped base's, which other tests run."""
    assert {family.name for family in FAMILIES} == {family for family, _ in SHAPES.values()} | {"small"}


@pytest.mark.parametrize(("kind", "step"), [("small", 32), ("sd21", 64), ("sdxl", 32), ("video", 64)])
def test_a_spec_knows_size_and_step_of_its_base(kind, step):
    spec = spec_of(models.unet(kind), models.vae())
    assert spec.native == (64, 64)
    assert spec.step == step
    assert spec.pixels == 8
    assert len(spec.taps("skip")) == len(spec.taps("main")) == 4
    assert spec.skip_taps[0] == Tap("down_blocks.0", 0 if kind == "small" else 1, 32)


def test_a_latent_has_frames_where_the_base_makes_videos():
    pictures, videos = spec_of(models.unet("small")), spec_of(models.unet("video"))
    assert pictures.latent_shape((128, 64)) == (4, 16, 8)
    assert videos.latent_shape((128, 64)) == (4, 16, 16, 8)
    assert videos.latent_shape((128, 64), frames=5) == (4, 5, 16, 8)
    with pytest.raises(SettingsError, match=r"num_frames=5 is for a text-to-video base; this one, of family 'small', makes pictures"):
        pictures.latent_shape((128, 64), frames=5)
    with pytest.raises(SettingsError, match="num_frames=0 must be at least 1"):
        videos.latent_shape((128, 64), frames=0)


# ---- what the base predicts ----


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_the_scheduler_says_what_the_base_predicts(scheduler, prediction):
    assert spec_of(models.unet("sd21"), models.vae(), scheduler(prediction_type=prediction)).prediction == prediction


@pytest.mark.parametrize(
    ("scheduler", "found"),
    [
        (DDIMScheduler(prediction_type="sample"), "DDIMScheduler has prediction_type='sample'"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "prediction_type='flow_prediction'"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler has prediction_type=None"),
    ],
    ids=["sample", "flow", "none"],
)
def test_a_scheduler_of_another_prediction_is_refused(scheduler, found):
    with pytest.raises(SettingsError, match=f"{found}; the cascade needs epsilon or v_prediction") as error:
        spec_of(models.unet("sd21"), models.vae(), scheduler)
    assert "\n" not in str(error.value)


# ---- what is no base ----


def changed(name: str, **config):
    """A published UNet, on the meta device, with something else about it."""
    return on_meta(PUBLISHED[name].network, **{**PUBLISHED[name].unet, **config})


def refiner():
    return changed(
        "sdxl",
        block_out_channels=(384, 768, 1536, 1536),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(6, 12, 24, 24),
        transformer_layers_per_block=4,
        cross_attention_dim=1280,
        projection_class_embeddings_input_dim=2560,
    )


def kandinsky():
    return changed(
        "sd-1.5",
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type="image",
        encoder_hid_dim=1280,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=768,
        attention_head_dim=64,
        out_channels=8,
        resnet_time_scale_shift="scale_shift",
    )


STRANGERS = {
    "two levels": (
        lambda: changed("sd-1.5", block_out_channels=(320, 640), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
        r"UNet2DConditionModel with down blocks DownBlock2D, CrossAttnDownBlock2D, mid block UNetMidBlock2DCrossAttn;",
    ),
    "inpainting": (lambda: changed("sd-1.5", in_channels=9), r"CrossAttnDownBlock2D, DownBlock2D, mid block UNetMidBlock2DCrossAttn, 9 channels in and 4 out;"),
    "x4 upscaler": (lambda: on_meta(UNet2DConditionModel, **models.X4_UNET), r"7 channels in and 4 out, num_class_embeds=1000;"),
    "unclip": (
        lambda: changed("sd-2.1", class_embed_type="projection", projection_class_embeddings_input_dim=2048),
        r"class_embed_type='projection'",
    ),
    "distilled": (lambda: changed("sd-1.5", time_cond_proj_dim=256), r"time_cond_proj_dim=256"),
    "kolors": (lambda: changed("sdxl", encoder_hid_dim=4096, encoder_hid_dim_type="text_proj"), r"encoder_hid_dim_type='text_proj'"),
    "refiner": (refiner, r"down blocks DownBlock2D, CrossAttnDownBlock2D, CrossAttnDownBlock2D, DownBlock2D, mid block UNetMidBlock2DCrossAttn;"),
    "kandinsky": (kandinsky, r"ResnetDownsampleBlock2D, .*mid block UNetMidBlock2DSimpleCrossAttn, 4 channels in and 8 out, addition_embed_type='image'"),
    "no mid block": (lambda: changed("sd-1.5", mid_block_type=None), r"mid block missing;"),
    "no mid block, three levels": (lambda: changed("sdxl", mid_block_type=None), r"CrossAttnDownBlock2D, mid block missing;"),
    "no size": (lambda: changed("text-to-video", sample_size=None), r"UNet3DConditionModel .* mid block UNetMidBlock3DCrossAttn, no sample_size;"),
    "animatediff": (
        lambda: on_meta(UNetMotionModel, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
                        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_num_attention_heads=2, num_attention_heads=2),
        r"UNetMotionModel with down blocks CrossAttnDownBlockMotion, DownBlockMotion",
    ),
    "stable video diffusion": (
        lambda: on_meta(UNetSpatioTemporalConditionModel),
        r"UNetSpatioTemporalConditionModel with down blocks CrossAttnDownBlockSpatioTemporal",
    ),
    "sd3": (
        lambda: on_meta(SD3Transformer2DModel, sample_size=8, num_layers=1, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8,
                        caption_projection_dim=8, pooled_projection_dim=8),
        r"SD3Transformer2DModel with down blocks missing, mid block missing;",
    ),
    "flux": (
        lambda: on_meta(FluxTransformer2DModel, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 4, 8)),
        r"FluxTransformer2DModel with down blocks missing, mid block missing",
    ),
    "dit": (
        lambda: on_meta(DiTTransformer2DModel, num_layers=1, attention_head_dim=4, num_attention_heads=2),
        r"DiTTransformer2DModel with down blocks missing, mid block missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "found"), STRANGERS.values(), ids=STRANGERS.keys())
def test_what_is_no_base_is_refused_in_one_line(build, found):
    """The line says what was found and what would be accepted."""
    with pytest.raises(SettingsError, match=rf"^this base is a .*{found}.*the cascade needs a UNet2DConditionModel of 4 levels \(SD 1.5.*UNet3DC") as error:
        spec_of(build())
    assert "\n" not in str(error.value)


def test_an_image_prompt_adapter_does_not_make_a_base_strange():
    """What diffusers writes into the configuration when an IP-Adapter is loaded."""
    unet = models.unet("sd21")
    plain = spec_of(unet)
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    assert spec_of(unet) == plain


def test_blocks_of_a_class_derived_from_diffusers_are_known():
    """As peers do that give a block's class another forward."""
    unet = models.unet("sd21")
    plain = spec_of(unet)
    for block in unet.down_blocks:
        block.__class__ = type("Derived", (type(block),), {})
    assert spec_of(unet) == plain


def test_a_network_that_contradicts_its_configuration_is_refused():
    unet = models.unet("small")
    unet.register_to_config(block_out_channels=(32, 48, 96))
    with pytest.raises(SettingsError, match=r"features of \[32, 48, 64\] channels and a mid block of 64, but its configuration says \[32, 48, 96\]"):
        spec_of(unet)


def test_channels_of_a_replaced_layer_are_seen():
    """An inpainting layer put into a base whose configuration was not told."""
    unet = models.unet("small")
    unet.conv_in = torch.nn.Conv2d(9, 32, 3, padding=1)
    with pytest.raises(SettingsError, match="9 channels in and 4 out"):
        spec_of(unet)


def test_an_autoencoder_of_other_latents_is_refused():
    vae = models.vae()
    vae.register_to_config(latent_channels=16)
    with pytest.raises(SettingsError, match="UNet takes latents of 4 channels, but its autoencoder makes 16"):
        spec_of(models.unet("small"), vae)
