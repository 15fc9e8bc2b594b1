"""Tiny bases with random weights, in the shapes of the real ones: whole diffusers pipelines, built in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from diffusers.models.resnet import TemporalConvLayer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from selfcascade.cascade.published import PUBLISHED

Module = TypeVar("Module", bound=torch.nn.Module)
Kind = Literal["small", "sd21", "sdxl", "sd21v", "video"]
KINDS: tuple[Kind, ...] = ("small", "sd21", "sdxl")
"""Three levels and one layer, as the shipped base; four levels and linear projections, as SD 2.1; three levels, two encoders and size ids, as SDXL.
Beside these, sd21v is an SD 2.1 that predicts velocity, and video a text-to-video base of four levels."""

NATIVE = 64
"""Native side in pixels of every tiny base: a latent of 8."""
WORDS = ("<bos>", "<eos>", "<pad>", "<unk>", "a", "red", "blue", "green", "two", "cat", "dog", "apple", "house", "on", "sun", "blurry")
TEXT = 32


X4_UNET = {
    "sample_size": 128,
    "in_channels": 7,
    "out_channels": 4,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "num_class_embeds": 1000,
    "only_cross_attention": (True, True, True, False),
    "use_linear_projection": True,
}
"""Configuration of the x4 upscaler's UNet."""


NARROWER = 8
"""Widths of a narrow published UNet are this many times smaller."""
WIDTHS = ("block_out_channels", "cross_attention_dim", "norm_num_groups", "addition_time_embed_dim", "projection_class_embeddings_input_dim")


def unet(kind: Kind, *, seed: int = 0) -> UNet2DConditionModel | UNet3DConditionModel:
    """The denoiser alone: channels are small, the topology is the real one's."""
    if kind == "video":
        return _video_unet(
            {"sample_size": NATIVE // 8, "block_out_channels": (32, 48, 48, 48), "norm_num_groups": 16, "attention_head_dim": 16, "cross_attention_dim": TEXT},
            seed,
        )
    if kind == "sd21v":
        return unet("sd21", seed=seed)
    down = {"small": "DCC", "sd21": "CCCD", "sdxl": "DCC"}[kind]
    extra = {
        "small": {"layers_per_block": 1},
        "sd21": {"use_linear_projection": True},
        "sdxl": {
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + TEXT,
        },
    }[kind]
    names = {"D": ("DownBlock2D", "UpBlock2D"), "C": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")}
    return _seeded(
        lambda: UNet2DConditionModel(
            sample_size=NATIVE // 8,
            block_out_channels=(32, 48, 64, 64)[: len(down)],
            down_block_types=tuple(names[block][0] for block in down),
            up_block_types=tuple(names[block][1] for block in reversed(down)),
            norm_num_groups=16,
            attention_head_dim=4,
            cross_attention_dim=2 * TEXT if kind == "sdxl" else TEXT,
            **extra,
        ),
        seed,
    )


def narrow(name: str, *, seed: int = 0) -> UNet2DConditionModel | UNet3DConditionModel:
    """A published UNet in its real configuration, all widths divided by 8: depth, blocks, heads, layers a level and channels a norm group are the real ones."""
    config = dict(PUBLISHED[name].unet)
    heads = ("attention_head_dim",) if PUBLISHED[name].network is UNet3DConditionModel else ()  # there it is a head's width, elsewhere the number of heads
    for key in (*WIDTHS, *heads):
        if key in config:
            config[key] = tuple(width // NARROWER for width in config[key]) if isinstance(config[key], tuple) else config[key] // NARROWER
    return _video_unet(config, seed) if heads else _seeded(lambda: UNet2DConditionModel(**config), seed)


def _video_unet(config: dict, seed: int) -> UNet3DConditionModel:
    def build() -> UNet3DConditionModel:
        network = UNet3DConditionModel(**config)
        for layer in network.modules():
            if isinstance(layer, TemporalConvLayer):  # zero at first, so that an untrained video would not know its neighbouring frames
                torch.nn.init.normal_(layer.conv4[-1].weight, std=0.2)
        return network

    return _seeded(build, seed)


def vae(*, seed: int = 0) -> AutoencoderKL:
    """An f8 autoencoder."""
    return _seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=NATIVE,
            scaling_factor=0.18215,
        ),
        seed,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, at most 12 of them."""
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", model_max_length=12)


def base(kind: Kind = "small", *, seed: int = 0) -> DiffusionPipeline:
    """A whole base in eval mode, as diffusers' own pipeline."""
    text = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=TEXT,
        intermediate_size=2 * TEXT,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
        projection_dim=TEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading", "steps_offset": 1}
    parts = {
        "vae": vae(seed=seed),
        "text_encoder": _seeded(lambda: CLIPTextModel(text), seed),
        "tokenizer": tokenizer(),
        "unet": unet(kind, seed=seed),
    }
    if kind == "sdxl":
        second = _seeded(lambda: CLIPTextModelWithProjection(text), seed + 1)
        return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer(), scheduler=EulerDiscreteScheduler(**noise))
    scheduler = DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction" if kind == "sd21v" else "epsilon")
    if kind == "video":
        return TextToVideoSDPipeline(**parts, scheduler=scheduler)
    return StableDiffusionPipeline(**parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def x4_upscaler(*, seed: int = 0) -> StableDiffusionUpscalePipeline:
    """Stable Diffusion's x4 upscaler in its real topology, narrow."""
    text = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=TEXT, intermediate_size=TEXT, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=12
    )
    small = X4_UNET | {"block_out_channels": (16, 32, 32, 32), "cross_attention_dim": TEXT, "attention_head_dim": 4, "norm_num_groups": 8}
    decoder = {"block_out_channels": (8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
    return StableDiffusionUpscalePipeline(
        vae=_seeded(lambda: AutoencoderKL(**decoder, layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.08333), seed),
        text_encoder=_seeded(lambda: CLIPTextModel(text), seed),
        tokenizer=tokenizer(),
        unet=_seeded(lambda: UNet2DConditionModel(**small), seed),
        low_res_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=DDIMScheduler(**noise, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )


def saved_base(folder: Path, kind: Kind = "small", *, seed: int = 0) -> Path:
    """The folder, with :func:`base` saved in it."""
    base(kind, seed=seed).save_pretrained(folder)
    return folder


def _seeded(build: Callable[[], Module], seed: int) -> Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()
