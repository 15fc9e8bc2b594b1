"""The inter-stage upscalers, one slot for four: bilinear (the paper's), bicubic (the released code's), through pixels, and learned."""

from __future__ import annotations

from typing import get_args

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import interpolate

from selfcascade.cascade.decoding import TILE_ABOVE, decode
from selfcascade.cascade.encoding import encode_pictures
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.cascade.pivot import UPSCALES, Upscale
from selfcascade.cascade.schedule import Size
from selfcascade.config import Upscale as Name
from selfcascade.settings import SettingsError

NAMES: tuple[str, ...] = get_args(Name)


def through_pixels(vae: AutoencoderKL, *, tile_above: int = TILE_ABOVE) -> Upscale:
    """Enlargement of the picture in place of the latent: decode, resize, encode.

    A picture survives interpolation where a latent leaves the manifold of the autoencoder; what it costs is a decode, an encode, and the little that both
    of them lose. The filter is Keys' cubic with a = -1/2, antialiased, as Pillow has it; decoded and resized values are held to the range of a picture. The
    posterior's mode is taken, so nothing is drawn, and pictures go one by one, so none depends on its batch.

    Args:
        vae: the base's autoencoder; one that overflows in half precision works in fp32 meanwhile.
        tile_above: pixels of a picture above which it is decoded, or encoded, in tiles.
    """

    def upscale(latent: Tensor, size: Size) -> Tensor:
        pixels = 2 ** (len(vae.config.block_out_channels) - 1)
        with torch.no_grad():
            pictures = decode(vae, latent, tile_above=tile_above).clamp(-1, 1)
            pictures = interpolate(pictures, (size[0] * pixels, size[1] * pixels), mode="bicubic", antialias=True).clamp(-1, 1)
            return encode_pictures(vae, pictures, tile_above=tile_above).to(latent.device, latent.dtype)

    return upscale


def upscale_of(name: str, *, vae: AutoencoderKL | None = None, learned: LatentUpscaler | None = None, tile_above: int = TILE_ABOVE) -> Upscale:
    """The upscaler of that name.

    Args:
        name: bilinear, bicubic, pixel or learned.
        vae: the base's autoencoder, which "pixel" needs.
        learned: the network that "learned" needs.
        tile_above: pixels of a picture above which "pixel" works in tiles.

    Raises:
        SettingsError: another name, or what it needs is not there.
    """
    if name in UPSCALES:
        return UPSCALES[name]
    if name == "pixel" and vae is not None:
        return through_pixels(vae, tile_above=tile_above)
    if name == "learned" and learned is not None:
        return torch.no_grad()(learned)
    if name == "learned":
        raise SettingsError("upscale='learned' needs a latent upscaler; give latent_upscaler= (a folder, upscalers/NAME or the module), or choose bilinear")
    if name == "pixel":
        raise SettingsError("upscale='pixel' needs the autoencoder of the base; give vae=, or choose bilinear")
    raise SettingsError(f"upscale={name!r} is not known; choose {', '.join(NAMES[:-1])} or {NAMES[-1]}")
