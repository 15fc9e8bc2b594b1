"""Families of bases: where their features are tapped, how they are conditioned, which sizes they take. Nothing else tells them apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, UNet2DConditionModel, UNet3DConditionModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from diffusers.models.unets.unet_3d_blocks import CrossAttnDownBlock3D, DownBlock3D

from selfcascade.cascade.schedule import Size
from selfcascade.settings import SettingsError

Inject = Literal["skip", "main"]
Prediction = Literal["epsilon", "v_prediction"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction")

BLOCKS: Mapping[type[ModelMixin], tuple[type[Any], ...]] = MappingProxyType(
    {UNet2DConditionModel: (DownBlock2D, CrossAttnDownBlock2D), UNet3DConditionModel: (DownBlock3D, CrossAttnDownBlock3D)}
)
"""Down blocks whose skips are known: one after each residual block (and its attention), one after the down-sampler."""

CONDITIONS: Mapping[str, tuple[str | None, ...]] = MappingProxyType(
    {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None, "ip_image_proj"),
        "time_cond_proj_dim": (None,),
    }
)
"""What a UNet's configuration may say of conditions besides text and time: SDXL's, and the image prompts that a user's IP-Adapter adds."""

ACCEPTED = (
    "a UNet2DConditionModel of 4 levels (SD 1.5, SD 2.1), of 3 with text_time conditions (SDXL) or without (a small base), or a UNet3DConditionModel of 4 "
    f"(text-to-video), of {', '.join(kind.__name__ for kinds in BLOCKS.values() for kind in kinds)} and a mid block, with as many latent channels out as in"
)
"""For those whose base is not accepted."""


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
    network: type[ModelMixin] = UNet2DConditionModel
    size_ids: bool = False
    """SDXL's added conditions: pooled text of a second encoder, and the picture's size and crop."""
    frames: int | None = None
    """Frames of a video where a call does not say; None: the base makes pictures."""


FAMILIES = (
    Family("sd", levels=4),
    Family("small", levels=3),
    Family("sdxl", levels=3, size_ids=True),
    Family("video", levels=4, network=UNet3DConditionModel, frames=16),
)


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
    prediction: Prediction = "epsilon"
    """What the UNet predicts: noise or velocity. Its scheduler says so; from the UNet alone it cannot be told."""

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

    def latent_shape(self, size: Size, frames: int | None = None) -> tuple[int, ...]:
        """Shape of one sample's latent: (C, h, w), of a video (C, F, h, w).

        Args:
            size: height and width in pixels.
            frames: of a video; unset, the family's own.

        Raises:
            SettingsError: frames are asked of a base that makes pictures, or fewer than one.
        """
        height, width = size[0] // self.pixels, size[1] // self.pixels
        if self.family.frames is None:
            if frames is not None:
                raise SettingsError(f"num_frames={frames} is for a text-to-video base; this one, of family {self.family.name!r}, makes pictures: leave it out")
            return (self.latent_channels, height, width)
        frames = self.family.frames if frames is None else frames
        if frames < 1:
            raise SettingsError(f"num_frames={frames} must be at least 1")
        return (self.latent_channels, frames, height, width)


def spec_of(unet: ModelMixin, vae: AutoencoderKL | None = None, scheduler: SchedulerMixin | None = None) -> BaseSpec:
    """The spec of a base.

    Args:
        unet: the base's UNet, compiled or not.
        vae: its autoencoder; without one, 8 pixels a latent element are assumed.
        scheduler: says what the UNet predicts; without one, noise is assumed.

    Raises:
        SettingsError: the networks are of no known family, or do not belong together; one line that lists what was found and what is accepted.
    """
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile wraps
    family = _family_of(unet)
    config, blocks = unet.config, list(unet.down_blocks)
    widths = [block.resnets[-1].out_channels for block in blocks]
    if widths != list(config["block_out_channels"]) or unet.mid_block.resnets[-1].out_channels != widths[-1]:
        raise SettingsError(
            f"this base has features of {widths} channels and a mid block of {unet.mid_block.resnets[-1].out_channels}, "
            f"but its configuration says {list(config['block_out_channels'])}; reload it"
        )
    if vae is not None and vae.config["latent_channels"] != config["in_channels"]:
        raise SettingsError(
            f"this base's UNet takes latents of {config['in_channels']} channels, but its autoencoder makes {vae.config['latent_channels']}; "
            "load the two from one base"
        )

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
        prediction="epsilon" if scheduler is None else _prediction_of(scheduler),
    )


def _family_of(unet: ModelMixin) -> Family:
    config: Mapping[str, Any] = getattr(unet, "config", {})
    blocks = list(getattr(unet, "down_blocks", ()))
    shape = (len(blocks), config.get("addition_embed_type") == "text_time")
    for family in FAMILIES:
        fits = isinstance(unet, family.network) and shape == (family.levels, family.size_ids) and unet.mid_block is not None
        known = all(isinstance(block, BLOCKS[family.network]) for block in blocks)  # subclasses too: peers swap a block's class for one of their own
        if fits and known and not any(_strange(unet, config)):
            return family
    kinds = ", ".join(type(block).__name__ for block in blocks)
    strange = "".join(f", {what}" for what in _strange(unet, config))
    raise SettingsError(
        f"this base is a {type(unet).__name__} with down blocks {kinds or 'missing'}, "
        f"mid block {type(getattr(unet, 'mid_block', None)).__name__.replace('NoneType', 'missing')}{strange}; the cascade needs {ACCEPTED}"
    )


def _strange(unet: ModelMixin, config: Mapping[str, Any]) -> Iterator[str]:
    """What no base of the families has: inpainting's and upscalers' channels beside the latent's, other conditions, no size of its own."""
    if hasattr(unet, "conv_in") and hasattr(unet, "conv_out"):
        into, out = unet.conv_in.weight.shape[1], unet.conv_out.weight.shape[0]
        if not into == out == config.get("in_channels"):
            yield f"{into} channels in and {out} out"
    for name, accepted in CONDITIONS.items():
        if config.get(name) not in accepted:
            yield f"{name}={config[name]!r}"
    if config.get("sample_size") is None:
        yield "no sample_size"


def _prediction_of(scheduler: SchedulerMixin) -> Prediction:
    found = scheduler.config.get("prediction_type")
    for prediction in PREDICTIONS:
        if found == prediction:
            return prediction
    raise SettingsError(
        f"scheduler {type(scheduler).__name__} has prediction_type={found!r}; the cascade needs {' or '.join(PREDICTIONS)}, whichever the base was trained for"
    )


def refuse_other_base(name: str, made_for: str | None, held: str | None) -> None:
    """Refuse what was trained for another base than the one that a pipeline holds. Nothing is said where one of the two is not known.

    Args:
        name: what is refused, as the message calls it.
        made_for: ``name@version`` of the base that it was trained for.
        held: ``name@version`` of the base that the pipeline holds.

    Raises:
        SettingsError: names both, and the way out.
    """
    if made_for is not None and held is not None and made_for != held:
        raise SettingsError(
            f"{name} was trained for base '{_short(made_for)}' but the pipeline holds '{_short(held)}'; retrain it or pass --base {made_for.partition('@')[0]}"
        )


def _short(base: str) -> str:
    name, _, version = base.partition("@")
    return f"{name}@{version[:12]}" if version else name
