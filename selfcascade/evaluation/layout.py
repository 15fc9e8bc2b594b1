"""Does a large picture keep the composition of the base's own picture of its prompt? What whole-image KID hardly sees on plain pictures."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from selfcascade.evaluation.resize import resize

LARGEST_SIDE = 128
"""Longer side, in pixels, of the small pictures that layout and objects are read from; smaller where the base itself is smaller."""

RULE = (
    "root mean square difference, in units of the full range, between the picture shrunk to the base's size (at most 128 px) and the base's own picture of "
    "that prompt; mean over prompts"
)
"""The layout distance as the protocol states it."""


def analysis_size(base: tuple[int, int]) -> tuple[int, int]:
    """Height and width at which layout and objects are read, from the height and width of the base's pictures."""
    factor = min(1.0, LARGEST_SIDE / max(base))
    return max(1, round(base[0] * factor)), max(1, round(base[1] * factor))


def shrink(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture, (H, W, 3), at the analysis size, rounded to bytes."""
    if picture.shape[:2] == size:
        return picture
    small = resize(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None], size)[0]
    return small.round().to(torch.uint8).permute(1, 2, 0).numpy()


def layout_distances(pictures: NDArray[np.uint8], base: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Distance of every small picture from the base's small picture of the same prompt, (N,), from 0 (the same) to 1 (black against white).

    It is 0 by construction for an enlarged base, and chance level for a picture that was sampled from other noise: it tells whether a method *keeps* the
    base's composition, not whether the picture is good.

    Args:
        pictures: (N, h, w, 3).
        base: (N, h, w, 3).
    """
    if pictures.shape != base.shape:
        raise ValueError(f"pictures of shape {pictures.shape} cannot be compared with base pictures of shape {base.shape}")
    gaps = (pictures.astype(np.float64) - base.astype(np.float64)) / 255
    return np.asarray(np.sqrt((gaps**2).mean(axis=(1, 2, 3))))
