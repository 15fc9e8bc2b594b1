"""Scores: what is measured of every picture that could be decoded, whether or not a filter looks at it.

All but the perceptual hash and the watermark are sums of whole numbers and come out the same on every machine. They describe the picture as it is stored, which
is what training sees.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from selfcascade.config import ScorerSettings
from selfcascade.curation.watermark import tiling
from selfcascade.settings import SettingsError

SCHEMA = pa.schema(
    [
        ("bytes_per_pixel", pa.float32()),
        ("deviation", pa.float32()),
        ("sharpness", pa.float32()),
        ("entropy", pa.float32()),
        ("border", pa.float32()),
        ("phash", pa.string()),
        ("watermark", pa.float32()),
    ]
)
"""Columns of a shard's table: bytes of the file over pixels of the source; standard deviation of the channel that varies most; variance of the Laplacian of
the luma; entropy of its histogram in bits; the largest share of height or width that even bars along the edges take; 64-bit perceptual hash in hex; how far
a tiled mark stands out (:mod:`selfcascade.curation.watermark`)."""

EVEN = 8
"""Levels of luma within which a bar is even: JPEG leaves a little noise."""

BLOCK = 32
"""Rows that are looked at together: what is made of them stays in the processor's cache."""

Scores = dict[str, float | str]


def scores_of(pixels: NDArray[np.uint8], *, bytes_per_pixel: float, caption: str | None = None, scorers: tuple[ScorerSettings, ...] = ()) -> Scores:
    """Every score of one picture.

    Args:
        pixels: the stored picture, uint8 (H, W, 3), sRGB.
        bytes_per_pixel: of the source.
        caption: for the scorers.
        scorers: further scores, by functions of the user.

    Raises:
        SettingsError: a scorer cannot be found or gives no number; names it.
    """
    luma = luma_of(pixels)
    scores: Scores = {
        "bytes_per_pixel": round(bytes_per_pixel, 4),
        "deviation": round(deviation(pixels), 3),
        "sharpness": round(sharpness(luma), 2),
        "entropy": round(entropy(luma), 3),
        "border": round(border(luma), 4),
        "phash": perceptual_hash(luma),
        "watermark": round(tiling(luma), 1),
    }
    for scorer in scorers:
        scores[scorer.name] = _called(scorer, pixels, caption)
    return scores


def luma_of(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Luma of BT.601, uint8 (H, W), as Pillow rounds it in whole numbers."""
    return np.asarray(Image.fromarray(pixels).convert("L"))


def deviation(pixels: NDArray[np.uint8]) -> float:
    """Standard deviation of the channel that varies most, in 8-bit levels."""
    count = pixels.shape[0] * pixels.shape[1]
    histograms = np.array(Image.fromarray(pixels).histogram(), np.int64).reshape(3, 256)
    levels = np.arange(256)
    sums, squares = histograms @ levels, histograms @ levels**2
    spread = max(count * int(square) - int(total) ** 2 for total, square in zip(sums, squares, strict=True))
    return float(math.sqrt(spread) / count)


def sharpness(luma: NDArray[np.uint8]) -> float:
    """Variance of the four-neighbour Laplacian over the inner pixels: low where nothing has an edge."""
    if min(luma.shape) < 3:
        return 0.0
    height, width = luma.shape
    squares = 0
    for top in range(0, height - 2, BLOCK):
        rows = luma[top : top + BLOCK + 2].astype(np.int16)
        laplacian = rows[:-2, 1:-1] + rows[2:, 1:-1]
        laplacian += rows[1:-1, :-2]
        laplacian += rows[1:-1, 2:]
        laplacian -= 4 * rows[1:-1, 1:-1]
        wide = laplacian.astype(np.float64)
        squares += int(np.einsum("ij,ij", wide, wide))  # of whole numbers below 2^53, exact in whatever order
    # Inside the picture each pixel is added four times and taken away four times: the edges are left.
    edges = luma[[0, 1, -2, -1], 1:-1].sum(1, dtype=np.int64) + luma[1:-1, [0, 1, -2, -1]].sum(0, dtype=np.int64)
    total = int(edges[0] - edges[1] - edges[2] + edges[3])
    count = (height - 2) * (width - 2)
    return float((count * squares - total**2) / count**2)


def entropy(luma: NDArray[np.uint8]) -> float:
    """Entropy of the histogram, bits a pixel: 0 for an even picture, at most 8."""
    counts = np.array(Image.fromarray(luma).histogram())
    shares = counts[counts > 0] / luma.size
    return float(max(0.0, -(shares * np.log2(shares)).sum()))


def border(luma: NDArray[np.uint8]) -> float:
    """The larger share of height or width that even bars at the two edges take together; a picture that is even as a whole has 1."""
    return float(max(_bars(luma) / luma.shape[0], _bars(luma.T) / luma.shape[1]))


def perceptual_hash(luma: NDArray[np.uint8]) -> str:
    """64 bits, in hex: which of the lowest 8x8 frequencies of the picture at 32x32 are above their median (imagehash's ``phash``)."""
    small = Image.fromarray(luma).resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return str(imagehash.phash(small))


def _bars(luma: NDArray[np.uint8]) -> int:
    """Rows at the top and at the bottom that have one tone with the edge, each on its own."""
    lowest, highest = luma.min(1).astype(np.int16), luma.max(1).astype(np.int16)
    rows = len(lowest)

    def depth(low: NDArray[np.int16], high: NDArray[np.int16]) -> int:
        uneven = np.flatnonzero(np.maximum.accumulate(high) - np.minimum.accumulate(low) > EVEN)
        return int(uneven[0]) if len(uneven) else rows

    return min(rows, depth(lowest, highest) + depth(lowest[::-1], highest[::-1]))


def _called(scorer: ScorerSettings, pixels: NDArray[np.uint8], caption: str | None) -> float:
    try:
        return float(_function(scorer.call)(pixels, caption))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"filters.scorers: {scorer.call} gave no number ({error}); it takes pixels and caption and returns one") from None


@lru_cache
def _function(call: str) -> Callable[..., Any]:
    module, _, name = call.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"filters.scorers: {call} cannot be imported ({error}); give package.module:function") from None
    if not callable(found):
        raise SettingsError(f"filters.scorers: {call} is no function")
    return found  # type: ignore[no-any-return]
