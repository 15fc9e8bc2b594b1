"""From pictures to latents: the way in for a user's own picture, one at a time, in overlapping tiles where a picture is big."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor

from selfcascade.cascade.decoding import TILE_ABOVE, prepared
from selfcascade.cascade.schedule import Size
from selfcascade.settings import SettingsError


def as_pillow(image: PipelineImageInput) -> list[Image.Image]:
    """Pictures as Pillow's, RGB.

    Args:
        image: one or a list, of Pillow's pictures, numpy arrays (H, W, 3) or (B, H, W, 3) in [0, 1] or 8 bits a channel, or tensors (3, H, W) or
            (B, 3, H, W) in [0, 1].

    Raises:
        SettingsError: something else, or no picture at all.
    """
    pictures: list[Image.Image] = []
    for item in image if isinstance(image, list | tuple) else [image]:
        if isinstance(item, Image.Image):
            pictures.append(item.convert("RGB"))
            continue
        array = item.detach().float().cpu().numpy() if isinstance(item, Tensor) else item
        array = array[None] if isinstance(array, np.ndarray) and array.ndim == 3 else array
        if isinstance(item, Tensor) and array.ndim == 4:
            array = array.transpose(0, 2, 3, 1)
        if not isinstance(array, np.ndarray) or array.ndim != 4 or array.shape[-1] != 3:
            shape = f" of shape {tuple(item.shape)}" if hasattr(item, "shape") else ""
            raise SettingsError(f"image is a {type(item).__name__}{shape}; give a Pillow picture, an array (H, W, 3), a tensor (3, H, W), or a list of them")
        pictures += VaeImageProcessor.numpy_to_pil(array / 255 if array.dtype == np.uint8 else array.clip(0, 1))
    if not pictures:
        raise SettingsError("image is an empty list; give at least one picture")
    return pictures


def fitted(pictures: list[Image.Image], size: Size) -> Tensor:
    """Pictures scaled by Lanczos so that they cover a height and width in pixels, then cropped at the centre: (B, 3, *size), fp32, [-1, 1]."""
    arrays = [np.asarray(ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS), dtype=np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def pivot_of(vae: AutoencoderKL, image: PipelineImageInput, sizes: Sequence[Size], *, batch: int, device: torch.device, tile_above: int) -> Tensor:
    """Scaled latents of a user's pictures at the biggest stage below the target that they fill, (B, C, h, w).

    Args:
        vae: the base's autoencoder.
        image: one picture for all samples, or one each.
        sizes: height and width in pixels of every stage.
        batch: B, the samples.
        device: where the autoencoder runs.
        tile_above: pixels of a picture above which it is encoded in tiles.

    Raises:
        SettingsError: there is no stage below the target, or another count of pictures.
    """
    if len(sizes) < 2:
        raise SettingsError(f"image starts the stage above it, but size {sizes[-1][0]}x{sizes[-1][1]} has the base stage alone; ask for a bigger picture")
    pictures = as_pillow(image)
    if len(pictures) not in (1, batch):
        raise SettingsError(f"{len(pictures)} images for {batch} samples; give one for all or one each")
    filled = [size for size in sizes[:-1] if all(picture.height >= size[0] and picture.width >= size[1] for picture in pictures)]
    size = filled[-1] if filled else sizes[0]
    return encode_pictures(vae, fitted(pictures, size).to(device), tile_above=tile_above).expand(batch, -1, -1, -1)


def encode_pictures(vae: AutoencoderKL, pictures: Tensor, *, tile_above: int = TILE_ABOVE) -> Tensor:
    """Scaled latents of pictures: the mode of the autoencoder's posterior, so nothing is drawn. Each is encoded alone and does not depend on its batch.

    Args:
        vae: the base's autoencoder. One that overflows in half precision (``force_upcast``) encodes in fp32 and is given back in its own precision.
        pictures: (B, 3, H, W), [-1, 1], on the device where the autoencoder runs, which is not the one that an offloaded one waits on.
        tile_above: pixels of a picture above which it is encoded in tiles.

    Returns:
        (B, C, h, w), fp32, scaled as the UNet sees them.
    """
    tiled = pictures.shape[-2] * pictures.shape[-1] > tile_above
    with torch.no_grad(), prepared(vae, tiled=tiled):
        pictures = pictures.to(vae.dtype)
        modes = torch.cat([vae.encode(picture).latent_dist.mode().float() for picture in torch.split(pictures, 1)])
    return (modes - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
