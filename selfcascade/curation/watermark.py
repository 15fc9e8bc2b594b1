"""Tiled marks: what is laid over a whole picture again and again, text or logo, seen as a lattice in the autocorrelation of its fine detail.

Stock agencies tile a half-transparent mark over a preview. Each copy is faint beside the picture, but all are alike to the pixel, so the picture correlates
with itself shifted by the tile, and by the tile's other side. Content that repeats does so with perspective, light and wear, mostly along one line, and far
less sharply.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

SIDE = 384
"""Pixels of the square that is looked at, the centre of the picture; the shorter side of a larger picture is shrunk to it."""
SMALLEST = 64
"""Pixels of the shorter side below which nothing can be said."""
CLIP = 3
"""Multiples of the median detail above which an edge counts no more: a mark is everywhere, an edge of the content is not."""
NEIGHBOURS = 7
"""Frequencies to each side among which the spectrum is evened out; a lattice is a comb much finer than that."""
SPAN = (1 / 20, 1 / 2)
"""Shortest and longest shift that is looked at, in sides of the square: shorter ones are texture, longer ones do not repeat."""
APART = 1 / 40
"""Distance from the line of the first shift, in sides of the square, from which on a second one counts as another direction."""


def tiling(luma: NDArray[np.uint8]) -> float:
    """How far the second of two independent shifts at which the detail repeats stands out of all shifts, in their standard deviations.

    A picture without a lattice has 1 to 3, a tiled mark that an eye can see easily 5 to 40. The spectrum is whitened by its own neighbourhood first, so
    that neither edges nor texture count but only what repeats; its two axes are left out, where straight edges and the blocks of JPEG lie.

    Args:
        luma: of the stored picture, uint8 (H, W).

    Returns:
        The height of the peak, at least 0; 0 for pictures below :data:`SMALLEST` pixels.
    """
    square = _square(luma)
    side = len(square)
    if side < SMALLEST:
        return 0.0
    detail = np.asarray(square, np.int16) - np.asarray(Image.fromarray(square).filter(ImageFilter.BoxBlur(2)), np.int16)
    most = CLIP * max(float(np.median(np.abs(detail[::4]))), 1.0)
    taper = np.sin(np.pi * (np.arange(side) + 0.5) / side)
    spectrum = np.fft.rfft2(np.clip(detail, -most, most) * taper[:, None] * taper)
    power = spectrum.real**2 + spectrum.imag**2
    # One level of noise, so that the rounding of an even sky is not blown up.
    amplitude = np.sqrt(power / (_level(power) + side * side / 4))
    amplitude[[0, 1, -1]] = 0
    amplitude[:, :2] = 0
    alike = np.fft.irfft2(amplitude, (side, side))[: side // 2 + 1]
    rows, columns, shifts = _shifts(side)
    values = alike[rows, columns]
    centre = np.median(values[::8])
    spread = max(1.4826 * float(np.median(np.abs(values[::8] - centre))), 1 / side)
    first = shifts[int(np.argmax(values))]
    across = np.abs(shifts @ np.array([first[1], -first[0]])) > APART * side * float(np.hypot(*first))
    height = float(values[across].max())
    return max(0.0, height / spread)


def _square(luma: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The centre of the picture, uint8 (S, S) with S at most :data:`SIDE`."""
    image = Image.fromarray(luma)
    shorter = min(image.size)
    side = min(shorter, SIDE)
    left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
    return np.asarray(image.resize((side, side), Image.Resampling.BOX, box=(left, top, left + shorter, top + shorter)))


def _level(power: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the neighbourhood of each frequency; (S, S // 2 + 1) as numpy lays out the spectrum of a real picture."""
    width = 2 * NEIGHBOURS + 1
    # Beyond the halves that are there lies their mirror image, upside down, whose level is the same.
    wide = np.pad(np.pad(power, ((NEIGHBOURS, NEIGHBOURS), (0, 0)), "wrap"), ((0, 0), (NEIGHBOURS, NEIGHBOURS)), "reflect")
    for axis in (0, 1):
        sums = np.cumsum(np.insert(wide, 0, 0, axis), axis)
        wide = np.take(sums, range(width, sums.shape[axis]), axis) - np.take(sums, range(sums.shape[axis] - width), axis)
    return np.asarray(np.maximum(wide, 0) / width**2)


@lru_cache(maxsize=4)
def _shifts(side: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Rows and columns of the upper half of the autocorrelation that are looked at, (N,), and the shifts down and right that they stand for, (N, 2)."""
    down, right = np.mgrid[0 : side // 2 + 1, 0:side]
    right = np.where(right < (side + 1) // 2, right, right - side)
    length = np.hypot(down, right)
    rows, columns = np.nonzero((length >= SPAN[0] * side) & (length <= SPAN[1] * side) & ((down > 0) | (right > 0)))
    return rows, columns, np.stack([down[rows, columns], right[rows, columns]], 1).astype(np.float64)
