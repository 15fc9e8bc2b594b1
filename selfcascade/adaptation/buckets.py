"""Buckets: the sizes at which pictures of several aspect ratios are trained, all of about one area, and which of them a picture goes to."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from selfcascade.cascade.schedule import Size


def bucket_sizes(size: int, *, step: int, ratio: float) -> tuple[Size, ...]:
    """Heights and widths in pixels, from the tallest to the widest: the square first of each pair of sides is never exceeded in area.

    For every shorter side the longest other side with which the area is at most ``size * size``, so that no bucket needs more memory than the square, which
    is one of them.

    Args:
        size: side of the square in pixels, a multiple of ``step``.
        step: every side is a multiple of so many pixels.
        ratio: largest longer over shorter side, at least 1.
    """
    shorter = range(step, size + step, step)
    wide = {(short, size * size // short // step * step) for short in shorter}
    found = {pair for height, width in wide if width <= ratio * height for pair in ((height, width), (width, height))}
    return tuple(sorted(found, key=lambda pair: pair[1] / pair[0]))


def bucket_of(size: Size, buckets: Sequence[Size]) -> Size | None:
    """The bucket of the nearest aspect ratio, by the distance of logarithms, among those that a picture covers without being enlarged; None: it covers none.

    Of two at one distance it is the one that comes first.

    Args:
        size: height and width of the picture in pixels.
        buckets: heights and widths.
    """
    covered = [bucket for bucket in buckets if bucket[0] <= size[0] and bucket[1] <= size[1]]
    return min(covered, key=lambda bucket: abs(log(bucket[1] / bucket[0]) - log(size[1] / size[0])), default=None)
