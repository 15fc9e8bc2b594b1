"""How many separate things a picture shows: connected foreground on a plain background. Repetition shows as a count above the base's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 24
"""A pixel is foreground where a channel differs from the background by more than this, of 255."""

SMALLEST_SHARE = 0.002
"""Components below this share of the picture are dust and not counted."""

RULE = (
    f"8-connected components of pixels that differ by more than {TOLERANCE} of 255 in a channel from the background (median of the picture's border), "
    f"at the base's size (at most 128 px), of at least {SMALLEST_SHARE:.1%} of the picture; meant for pictures on plain backgrounds"
)


def background(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Colour of the background, (3,): the median of the outermost pixels, so that an object may touch less than half of the border."""
    border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    return np.asarray(np.median(border, axis=0), dtype=np.float64)


def foreground(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Mask, (h, w), of what is not background in a picture, (h, w, 3)."""
    gaps = np.abs(picture.astype(np.float64) - background(picture))
    return np.asarray((gaps > TOLERANCE).any(axis=2))


def count_objects(picture: NDArray[np.uint8]) -> int:
    """Components of the foreground of a picture, (h, w, 3), that are large enough to be seen."""
    mask = foreground(picture)
    return sum(area >= SMALLEST_SHARE * mask.size for area in component_areas(mask))


def component_areas(mask: NDArray[np.bool_]) -> list[int]:
    """Areas in pixels of the 8-connected components of a mask, (h, w), by union of the runs of neighbouring rows."""
    parent: list[int] = []
    area: list[int] = []

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above: list[tuple[int, int, int]] = []
    for row in mask:
        edges = np.flatnonzero(np.diff(row.astype(np.int8), prepend=0, append=0)).tolist()
        current = []
        first = 0
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            label = len(parent)
            parent.append(label)
            area.append(stop - start)
            # Diagonal neighbours touch: runs [start, stop) and [left, right) meet if they overlap after growing by one pixel.
            while first < len(above) and above[first][1] < start:
                first += 1
            for left, _, other in above[first:]:
                if left > stop:
                    break
                one, two = root(label), root(other)
                if one != two:
                    parent[two] = one
                    area[one] += area[two]
            current.append((start, stop, label))
        above = current
    return [area[run] for run in range(len(parent)) if parent[run] == run]
