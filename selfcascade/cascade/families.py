"""Families of bases: where their features are tapped, how they are conditioned, which sizes they take. Nothing else tells them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import AutoencoderKL, UNet2DConditionModel

from selfcascade.settings import SettingsError

Inject = Literal["skip", "main"]

BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
"""Down blocks whose skips are known: one after each residual block (and its attention), one after the down-sampler."""


@dataclass(frozen=True)
class Tap:
    """One feature map of the UNet's encoder: read from the pivot's pass, added to in the pass of the bigger latent (method: N = 4 of them)."""

    module: str
    """Name of the block inside the UNet, such as ``down_blocks.0``."""
    skip: int | None
    """Index among the skips that the block returns, or None for the block's output, that is the main path."""
    channels: int
    """Channels of the feature map."""


@dataclass(frozen=True)
class Family:
    """What bases of one kind share."""

    name: str
    levels: int
    """Down blocks of the UNet; with fewer than four, the mid block gives the fourth feature map."""
    size_ids: bool = False
    """SDXL's added conditions: pooled text of a second encoder, and the picture's size and crop."""


FAMILIES = (Family("sd", levels=4), Family("small", levels=3), Family("sdxl", levels=3, size_ids=True))


@dataclass(frozen=True)
class BaseSpec:
    """What the cascade must know of one base, read from its networks and checked against them."""

    family: Family
    skip_taps: tuple[Tap, ...]
    main_taps: tuple[Tap, ...]
    latent_channels: int
    pixels: int
    """Pixels a latent element, per side: 8 for an f8 autoencoder."""
    latent_step: int
    """Latent sides are multiples of this, so that every level of the UNet halves them evenly."""
    native: tuple[int, int]
    """Height and width in pixels that the base was trained at."""
    time_width: int
    """Width of the UNet's time embedding."""
    norm_groups: int
    """Groups of the UNet's group normalisation."""

    @property
    def step(self) -> int:
        """Sides of pictures, in pixels, are multiples of this."""
        return self.pixels * self.latent_step

    def taps(self, inject: Inject) -> tuple[Tap, ...]:
        """The four tap points of ``inject``, from shallow to deep."""
        return self.skip_taps if inject == "skip" else self.main_taps

    def channels(self, inject: Inject) -> tuple[int, ...]:
        """Channels at the tap points of ``inject``."""
        return tuple(tap.channels for tap in self.taps(inject))


def spec_of(unet: UNet2DConditionModel, vae: AutoencoderKL | None = None) -> BaseSpec:
    """The spec of a base.

    Args:
        unet: the base's UNet, compiled or not.
        vae: its autoencoder; without one, 8 pixels a latent element are assumed.

    Raises:
        SettingsError: the networks are of no known family; the message lists what was found.
    """
    config: Mapping[str, Any] = getattr(unet, "config", {})
    blocks = list(getattr(unet, "down_blocks", ()))
    kinds = [type(block).__name__ for block in blocks]
    found = f"{type(unet).__name__} with down blocks {', '.join(kinds) or 'missing'}"
    size_ids = config.get("addition_embed_type") == "text_time"
    family = next((family for family in FAMILIES if (family.levels, family.size_ids) == (len(blocks), size_ids)), None)
    if family is None or getattr(unet, "mid_block", None) is None or not set(kinds) <= set(BLOCKS):
        raise SettingsError(
            f"this base is a {found}; the cascade needs a UNet2DConditionModel of 3 or 4 levels with a mid block: SD 1.5, SD 2.1, SDXL or a small base"
        )
    widths = [block.resnets[-1].out_channels for block in blocks]
    if widths != list(config["block_out_channels"]):
        raise SettingsError(f"this base has features of {widths} channels, but its configuration says {list(config['block_out_channels'])}; reload it")

    last_skips = [Tap(f"down_blocks.{level}", len(block.resnets) - 1, widths[level]) for level, block in enumerate(blocks)]
    outputs = [Tap(f"down_blocks.{level}", None, widths[level]) for level in range(3)]
    mid = Tap("mid_block", None, widths[-1])
    pixels = 8 if vae is None else 2 ** (len(vae.config["block_out_channels"]) - 1)
    sample = config["sample_size"]
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return BaseSpec(
        family=family,
        skip_taps=tuple(last_skips if family.levels == 4 else [*last_skips, mid]),
        main_taps=(*outputs, mid),
        latent_channels=config["in_channels"],
        pixels=pixels,
        latent_step=2 ** (family.levels - 1),
        native=(height * pixels, width * pixels),
        time_width=unet.time_embedding.linear_2.out_features,
        norm_groups=config["norm_num_groups"],
    )
