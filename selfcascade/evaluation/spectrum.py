"""How sharp pictures are: the power of their luma by spatial frequency, beside that of real pictures."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BINS = 32
"""Rings of equal width from 0 to half a cycle a pixel; what lies beyond, in the corners, belongs to no ring."""
DETAIL = BINS // 2
"""First ring of what counts as detail: a quarter of a cycle a pixel, which a picture of half the side cannot hold."""

RULE = (
    "power of the luma (Rec. 601) under a Hann window, summed over rings of spatial frequency; detail is that from 0.25 to 0.5 cycles a pixel, "
    "mean over pictures, over the real pictures' mean at the same size"
)


def spectrum(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Power in each ring, (BINS,), of a picture, (H, W, 3), in squared levels: together the variance of the windowed luma, without the corners."""
    height, width = picture.shape[:2]
    luma = picture.astype(np.float64) @ (0.299, 0.587, 0.114)
    window, rings, twice = _plan(height, width)
    # The mean is taken out under the window, or the window's own spectrum would fill the lowest rings.
    windowed = (luma - (luma * window).sum() / window.sum()) * window
    half = np.fft.rfft2(windowed)
    power = (half.real**2 + half.imag**2) * (twice / (height * width * (window**2).sum()))
    return np.bincount(rings.ravel(), power.ravel(), minlength=BINS + 1)[:BINS].astype(np.float32)


def detail(spectra: NDArray[np.float32]) -> NDArray[np.float64]:
    """Power of what counts as detail, (n,), from spectra, (n, BINS)."""
    found: NDArray[np.float64] = spectra[:, DETAIL:].astype(np.float64).sum(axis=1)
    return found


@lru_cache(maxsize=4)
def _plan(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Window, (height, width); number of the ring of each frequency that is not the mirror of another, (height, width // 2 + 1); how often it counts."""
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    twice = np.full(width // 2 + 1, 2.0)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    return window, np.minimum((frequency * 2 * BINS).astype(np.int64), BINS), twice
