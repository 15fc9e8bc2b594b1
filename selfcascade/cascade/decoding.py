"""From latents to pictures: one at a time, in fp32, in overlapping tiles where a picture is big."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from selfcascade.cascade.video import frames_of, stacked_as

TILE_ABOVE = 1024 * 1024
"""Pictures of more pixels are decoded in tiles: the memory of a whole pass grows with the area, that of a tile does not."""

_LOCK = Lock()


def decode(vae: AutoencoderKL, latents: Tensor, *, tile_above: int = TILE_ABOVE) -> Tensor:
    """Pictures of scaled latents, each decoded alone, so that a picture does not depend on its batch; the frames of a video likewise.

    Args:
        vae: the base's autoencoder. One that overflows in half precision (``force_upcast``) decodes in fp32 and is given back in its own precision.
        latents: (B, C, h, w), for video (B, C, F, h, w), scaled as the UNet sees them.
        tile_above: pixels of a picture above which it is decoded in tiles of the autoencoder's own training size, a quarter overlapping.

    Returns:
        (B, 3, H, W), for video (B, 3, F, H, W), fp32, about [-1, 1].
    """
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    tiled = latents.shape[-2] * latents.shape[-1] * pixels**2 > tile_above
    with prepared(vae, tiled=tiled):
        z = (latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(vae.dtype)
        pictures = torch.cat([vae.decode(latent, return_dict=False)[0].float() for latent in torch.split(frames_of(z), 1)])
    return stacked_as(latents, pictures)


@contextmanager
def prepared(vae: AutoencoderKL, *, tiled: bool) -> Iterator[None]:
    """The autoencoder as a pass needs it, and afterwards as it was found. Threads take turns, since diffusers keeps this state on the module.

    Args:
        vae: one that overflows in half precision (``force_upcast``) works in fp32 meanwhile.
        tiled: whether the pass goes in overlapping tiles; one that the user tiles stays tiled.
    """
    with _LOCK:
        dtype, tiling = vae.dtype, vae.use_tiling
        upcast = vae.config.force_upcast and dtype != torch.float32
        try:
            vae.use_tiling = tiling or tiled
            if upcast:
                vae.to(torch.float32)
            yield
        finally:
            vae.use_tiling = tiling
            if upcast:
                vae.to(dtype)
