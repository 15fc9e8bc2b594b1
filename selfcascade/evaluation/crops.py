"""Native-scale crops for the patch metrics: the same seeded positions on both sides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from selfcascade.settings import SettingsError, digest_of


def crop_corners(rank: int, *, size: tuple[int, int], side: int, count: int, seed: int) -> NDArray[np.int64]:
    """Upper left corners, (count, 2), of the crops of the picture with this rank.

    The rank is the picture's place in its set, ordered by key. It, and not the picture, fixes the corners: the first real picture is cut where the first
    generated one is, and every method is cut in the same places.

    Args:
        rank: place of the picture, from 0.
        size: height and width of the picture.
        side: side of a crop in pixels.
        count: crops a picture.
        seed: the evaluation's seed.

    Raises:
        SettingsError: a crop does not fit into the picture.
    """
    height, width = size
    if side > min(size):
        raise SettingsError(f"evaluation.crop is {side} px but the pictures have {height} x {width} px; lower it")
    generator = np.random.Generator(np.random.PCG64(int(digest_of(["crop", seed, rank])[:16], 16)))
    return np.stack([generator.integers(0, height - side + 1, count), generator.integers(0, width - side + 1, count)], axis=1)


def cut(picture: NDArray[np.uint8], corners: NDArray[np.int64], side: int) -> NDArray[np.uint8]:
    """The crops, (count, side, side, 3), of a picture, (H, W, 3)."""
    return np.stack([picture[top : top + side, left : left + side] for top, left in corners])


def crop_rule(*, side: int, count: int, seed: int) -> str:
    """The rule as the protocol states it."""
    where = f"uniform corners from seed {seed} and the picture's rank, the same for real and generated"
    return f"{count} of {side} x {side} px a picture, cut at native scale, {where}, then resized to the network's input like a picture"
