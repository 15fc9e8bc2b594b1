"""Examples: small copies of some of the pictures that a shard leaves out, so that the page of the dataset shows what a threshold throws away."""

from __future__ import annotations

import hashlib
import heapq
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from selfcascade.config import FilterSettings
from selfcascade.curation.record import Rejected, kind_of

THUMBNAIL = 128
"""Longer side of a thumbnail, in pixels."""


class Examples:
    """Of each kind of reason the thumbnails whose keys' SHA-256 are the smallest: a sample that depends on the keys alone, in bounded memory."""

    def __init__(self, count: int) -> None:
        """Args: how many are kept of each kind."""
        self._count = count
        self._kinds: dict[str, list[tuple[bytes, str, bytes]]] = {}

    def offer(self, key: str, rejected: Rejected) -> None:
        """Keep the thumbnail of a rejected input, if it has one and is among the sample so far; only then it is made."""
        if not self._count or rejected.thumbnail is None:
            return
        chosen = self._kinds.setdefault(kind_of(rejected.reason), [])
        place = turned(key)
        if len(chosen) == self._count and place < chosen[0][0]:
            return
        made = rejected.thumbnail()
        if made is None:
            return
        heapq.heappush(chosen, (place, key, made))
        if len(chosen) > self._count:
            heapq.heappop(chosen)

    def thumbnails(self) -> dict[str, bytes]:
        """WebP by key."""
        return {key: made for chosen in self._kinds.values() for _, key, made in chosen}


def may_be_shown(reason: str, filters: FilterSettings) -> bool:
    """Whether a picture that is left out for ``reason`` may be an example.

    One that a scorer of the user's leaves out only where the scorer's settings say so: it may look for what nobody must keep.
    """
    return kind_of(reason) not in {scorer.name for scorer in filters.scorers if not scorer.examples}


def turned(key: str) -> bytes:
    """Sorts last where the SHA-256 of ``key`` sorts first: the first of a heap of these is the one to give up."""
    return bytes(255 - byte for byte in hashlib.sha256(key.encode()).digest())


def thumbnail(pixels: NDArray[np.uint8], side: int = THUMBNAIL) -> bytes:
    """A small copy of a picture, uint8 (H, W, 3), as WebP, whose longer side is at most ``side`` pixels."""
    small = Image.fromarray(pixels)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
