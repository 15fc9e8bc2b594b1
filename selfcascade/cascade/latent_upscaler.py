"""The learned inter-stage upscaler: a small network that turns the latent of a picture into the latent of the same picture at up to twice the size.

Interpolation averages latents, and an average of latents is not the latent of a picture: it leaves the manifold that the autoencoder decodes well, more so
with every stage (LSRNA, arXiv 2503.18446). What the next stage wants is E(x) at its own size, and E(x) and E(Downsample(x)) are both known in training, so
the network regresses one from the other. Regression gives a mean, not a sample: it does not invent detail, and inside the cascade it should not, because a
stage that starts at ``z_K = sqrt(abar_K) f + sqrt(1 - abar_K) eps`` departs from the true ``z_K`` by a Kullback-Leibler divergence of
``abar_K |f - z|^2 / 2 (1 - abar_K)``, whose least value over f is at the conditional mean of z; the denoiser draws the detail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, silu

from selfcascade.bases import fetch_artifact, names_artifact
from selfcascade.cascade.families import BaseSpec, refuse_other_base
from selfcascade.cascade.pivot import bilinear
from selfcascade.cascade.schedule import Size
from selfcascade.settings import SettingsError

if TYPE_CHECKING:
    from selfcascade.storage import Store

GROWTH = 2
"""Factor a side that the network is trained for."""


class ConvolutionBlock(nn.Module):
    """``u + conv(silu(conv(u)))``. No normalisation: a latent element sees its neighbourhood alone, whatever the size and the batch."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, u: Tensor) -> Tensor:
        """(B, W, h, w) to the same shape."""
        return u + self.conv2(silu(self.conv1(u)))


class LatentUpscaler(ModelMixin, ConfigMixin):
    """Bilinear enlargement and a learned residual on the twofold grid, which any other size takes resized.

    The residual is zero before it is trained: a fresh one is the bilinear upscaler bit for bit. Where the latent grows by another factor than two, the
    residual is resized to that, bilinearly and whole: measured on the shipped base's autoencoder at 1.06 to 1.75 times the side, that is nearer to E(x)
    than a residual that fades with the growth or is antialiased, and takes 26 % to 40 % off bilinear's error. A latent that does not grow is left as it
    is. Saved and loaded as a diffusers folder, safetensors only.

    Args:
        latent_channels: of the base.
        width: channels inside.
        blocks: residual blocks, all at the small size.
        base: ``name@version`` of the base whose autoencoder made the latents.
        size: height and width in pixels of the pictures that it was trained on.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 4, width: int = 64, blocks: int = 8, base: str | None = None, size: tuple[int, int] | None = None):
        super().__init__()
        self.enter = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.body = nn.Sequential(*(ConvolutionBlock(width) for _ in range(blocks)))
        self.leave = nn.Conv2d(width, GROWTH**2 * latent_channels, 3, padding=1)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def for_base(cls, spec: BaseSpec, *, width: int, blocks: int, base: str | None = None, size: tuple[int, int] | None = None) -> LatentUpscaler:
        """A fresh upscaler that fits a base. Its initial weights come from torch's default generator."""
        return cls(latent_channels=spec.latent_channels, width=width, blocks=blocks, base=base, size=size)

    def forward(self, latent: Tensor, size: Size) -> Tensor:
        """The latent at another size.

        Args:
            latent: clean and scaled, (B, C, h, w), of any dtype; the network computes in its own.
            size: height and width of the result, none smaller than the latent's. Trained is twice; beyond that the residual is enlarged.

        Returns:
            (B, C, *size), in the latent's dtype.
        """
        if tuple(size) == tuple(latent.shape[-2:]):
            return latent
        residual = self.residual(latent.to(self.dtype)).to(latent.dtype)
        return bilinear(latent, size) + bilinear(residual, size)

    def residual(self, latent: Tensor) -> Tensor:
        """What a trained network adds to the bilinear enlargement by two, (B, C, h, w) to (B, C, 2 h, 2 w)."""
        return pixel_shuffle(self.leave(self.body(self.enter(latent))), GROWTH)

    def check_fits(self, spec: BaseSpec, base: str | None) -> None:
        """Refuse a base that the upscaler was not made for.

        Args:
            spec: of the base that the pipeline holds.
            base: ``name@version`` of it, where that is known.

        Raises:
            SettingsError: another base, another channel count; names both and the way out.
        """
        name = f"latent upscaler {self.config.get('_name_or_path') or ''}".strip()
        refuse_other_base(name, self.config.base, base)
        if self.config.latent_channels != spec.latent_channels:
            raise SettingsError(
                f"{name} was made for latents of {self.config.latent_channels} channels, but those of the base have {spec.latent_channels}; "
                "choose a latent upscaler of this base"
            )


def load_latent_upscaler(reference: str, store: Store | None = None, *, dtype: torch.dtype = torch.float32) -> LatentUpscaler:
    """A latent upscaler from a folder, a hub id (``owner/name``), or an artifact (``upscalers/name``, ``upscalers/name@version``, ``s3://...``).

    Args:
        reference: which; safetensors only.
        store: where artifacts are looked up; unset: that of an ``s3://`` URI, else that of the default settings, is opened for it.
        dtype: of its weights.

    Raises:
        SettingsError: it is not found, or does not load, or is something else; one line.
    """
    location = str(fetch_artifact(reference, "upscalers", store)[0]) if names_artifact(reference, "upscalers") else reference
    try:
        kind = LatentUpscaler.load_config(location).get("_class_name")
        if kind != LatentUpscaler.__name__:
            raise ValueError(f"it is a {kind}, not a {LatentUpscaler.__name__}")
        upscaler: LatentUpscaler = LatentUpscaler.from_pretrained(location, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise SettingsError(f"latent upscaler {reference!r} does not load: {' '.join(str(error).split())[:300]}") from None
    upscaler.register_to_config(_name_or_path=reference)  # what messages call it: the user's words, not a cache folder
    return upscaler
