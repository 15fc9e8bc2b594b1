"""The one resize that evaluation uses, so that no two numbers differ by a resampling filter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

RULE = "bicubic (a = -0.5), antialiased, in float32, clamped to 0..255, not rounded, aspect not kept"
"""What :func:`resize` does, as the protocol states it. It is Pillow's bicubic on float channels, which clean-fid calls the clean resize."""


def resize(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures at another size.

    A naive resize (no antialiasing, or rounding to 8 bits in between) moves the Fréchet distance of a set to itself by several units
    (Parmar et al., "On aliased resizing and surprising subtleties in GAN evaluation", 2022).

    Args:
        pictures: (N, 3, H, W), uint8, or float in 0..255.
        size: height and width of the result.

    Returns:
        (N, 3, *size), float32 in 0..255; the same numbers where the size is already right.
    """
    pictures = pictures.to(torch.float32)
    if tuple(pictures.shape[-2:]) == tuple(size):
        return pictures
    return interpolate(pictures, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
