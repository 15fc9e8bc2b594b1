"""The resizes that evaluation knows, one for all numbers of a report, so that no two of them differ by a resampling filter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

RULES = {
    "clean": "bicubic (a = -0.5), antialiased, in float32, clamped to 0..255, not rounded, aspect not kept",
    "tensorflow": "bilinear as in TensorFlow 1, not antialiased, in float32, not rounded, aspect not kept",
    "bilinear": "bilinear, antialiased, in float32, not rounded, aspect not kept",
}
"""What :func:`resize` does by each name, as the protocol states it: Pillow's bicubic on float channels, which clean-fid calls the clean resize and which is
ours; torch-fidelity's and the first FID's; torchmetrics' since 1.8."""


def resize(pictures: Tensor, size: tuple[int, int], rule: str = "clean") -> Tensor:
    """Pictures at another size.

    A naive resize (no antialiasing, or rounding to 8 bits in between) moves the Fréchet distance of a set to itself by several units
    (Parmar et al., "On aliased resizing and surprising subtleties in GAN evaluation", 2022).

    Args:
        pictures: (N, 3, H, W), uint8, or float in 0..255.
        size: height and width of the result.
        rule: one of :data:`RULES`.

    Returns:
        (N, 3, *size), float32 in 0..255; the same numbers where the size is already right.
    """
    pictures = pictures.to(torch.float32)
    if tuple(pictures.shape[-2:]) == tuple(size):
        return pictures
    if rule == "tensorflow":
        return _along(_along(pictures, size[1], 3), size[0], 2)
    if rule == "bilinear":
        return interpolate(pictures, size=size, mode="bilinear", align_corners=False, antialias=True)
    return interpolate(pictures, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)


def _along(pictures: Tensor, size: int, dimension: int) -> Tensor:
    """Pixel ``i`` of the result lies at ``i * old / size`` of the old, between two pixels: TensorFlow 1 took the corners of pixels for their middles."""
    old = pictures.shape[dimension]
    place = torch.arange(size, device=pictures.device, dtype=torch.float32) * torch.tensor(old / size, dtype=torch.float32)
    low = place.long().clamp_max(old - 1)
    one, next_one = pictures.index_select(dimension, low), pictures.index_select(dimension, (low + 1).clamp_max(old - 1))
    share = (place - low).view([-1 if number == dimension else 1 for number in range(4)])
    return one + (next_one - one) * share
