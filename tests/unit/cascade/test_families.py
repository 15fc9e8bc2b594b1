"""Families: the tap points are those of the paper's bases, and what is no such base is refused in one line."""

from __future__ import annotations

import models
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from selfcascade.cascade.families import Tap, spec_of
from selfcascade.settings import SettingsError

SD21 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def on_meta(config: dict) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize(("config", "parameters", "skips", "last"), [(SD21, 865_910_724, (2, 5, 8, 11), None), (SDXL, 2_567_463_684, (2, 5, 8), "mid_block")])
def test_the_real_bases_are_tapped_where_the_method_says(config, parameters, skips, last):
    """At full width, on the meta device: the last skip of each level by its index among all skips (method 7.1), and the mid block where there are three."""
    unet = on_meta(config)
    spec = spec_of(unet)
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    assert spec.channels("skip") == spec.channels("main") == (320, 640, 1280, 1280)
    assert spec.time_width == 1280
    assert spec.norm_groups == 32

    offset, indices = 1, []  # the first skip is conv_in's
    for level, block in enumerate(unet.down_blocks):
        indices += [offset + tap.skip for tap in spec.skip_taps if tap.module == f"down_blocks.{level}"]
        offset += len(block.resnets) + len(block.downsamplers or ())
    assert tuple(indices) == skips
    assert [tap.module for tap in spec.skip_taps[len(skips) :]] == ([last] if last else [])
    assert [tap.module for tap in spec.main_taps] == ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block"]
    assert all(tap.skip is None for tap in spec.main_taps)


@pytest.mark.parametrize(("kind", "step"), [("small", 32), ("sd21", 64), ("sdxl", 32)])
def test_a_spec_knows_size_and_step_of_its_base(kind, step):
    spec = spec_of(models.unet(kind), models.vae())
    assert spec.native == (64, 64)
    assert spec.step == step
    assert spec.pixels == 8
    assert len(spec.taps("skip")) == len(spec.taps("main")) == 4
    assert spec.skip_taps[0] == Tap("down_blocks.0", 0 if kind == "small" else 1, 32)


def test_a_transformer_is_refused_in_one_line():
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8
    )
    with pytest.raises(SettingsError, match=r"is a SD3Transformer2DModel with .*needs a UNet2DConditionModel") as error:
        spec_of(transformer)
    assert "\n" not in str(error.value)


def test_a_unet_of_two_levels_is_refused_with_what_was_found():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    with pytest.raises(SettingsError, match="DownBlock2D, CrossAttnDownBlock2D"):
        spec_of(unet)


def test_a_network_that_contradicts_its_configuration_is_refused():
    unet = models.unet("small")
    unet.register_to_config(block_out_channels=(32, 48, 96))
    with pytest.raises(SettingsError, match=r"features of \[32, 48, 64\] channels"):
        spec_of(unet)
