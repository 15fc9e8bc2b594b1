"""A picture: from the bytes of an input to what a shard keeps of it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from selfcascade.config import CurationSettings
from selfcascade.curation import filters
from selfcascade.curation.decoding import decode, draw, format_of_name, open_picture
from selfcascade.curation.encoding import encode
from selfcascade.curation.examples import THUMBNAIL, may_be_shown, thumbnail
from selfcascade.curation.record import Picture, Rejected
from selfcascade.curation.scores import scores_of
from selfcascade.curation.vector import AVAILABLE, is_svg


def picture_of(data: bytes, name: str | None, settings: CurationSettings, caption: str | None = None) -> Picture:
    """Check, decode, fit, score and encode.

    Args:
        data: the file.
        name: what its extension promises must be so; None: the content alone says what it is.
        settings: the target and the filters.
        caption: for scorers of the user's.

    Raises:
        Rejected: it is left out, for this reason.
    """
    if AVAILABLE and is_svg(data):
        return _drawn(data, name, settings, caption)
    image = open_picture(data, name, max_pixels=settings.filters.max_pixels)
    width, height = image.size
    try:
        filters.check_shape(width, height, settings.filters, size=settings.size)
    except Rejected as rejected:
        raise Rejected(rejected.reason, thumbnail=lambda: _thumbnail(data, image, settings), width=width, height=height) from None
    try:
        decoded = decode(data, image, settings)
    except Rejected as rejected:
        raise Rejected(rejected.reason, width=width, height=height) from None
    source = {"width": decoded.width, "height": decoded.height, "sha256": hashlib.sha256(data).hexdigest()}
    return scored(decoded.pixels, settings, caption, bytes_per_pixel=len(data) / (width * height), **source)


def _thumbnail(data: bytes, image: Image.Image, settings: CurationSettings) -> bytes | None:
    """A small copy of a picture that was refused for its shape; none where it is damaged as well."""
    try:
        return thumbnail(decode(data, image, settings.model_copy(update={"shape": "keep", "size": min(THUMBNAIL, *image.size)})).pixels)
    except Rejected:
        return None


def _drawn(data: bytes, name: str | None, settings: CurationSettings, caption: str | None) -> Picture:
    if name is not None and (promised := format_of_name(name)) != "SVG":
        raise Rejected(f"mislabelled: the name promises {promised}, the file holds SVG")
    decoded = draw(data, settings)
    source = {"width": decoded.width, "height": decoded.height, "sha256": hashlib.sha256(data).hexdigest()}
    return scored(decoded.pixels, settings, caption, bytes_per_pixel=len(data) / (decoded.width * decoded.height), **source)


def scored(pixels: NDArray[np.uint8], settings: CurationSettings, caption: str | None, *, bytes_per_pixel: float, **source: Any) -> Picture:
    """The picture that is stored of fitted ``pixels``, uint8 (H, W, 3); it is encoded only if its scores pass.

    Raises:
        Rejected: a score is out of bounds; carries all of them.
    """
    scores = scores_of(pixels, bytes_per_pixel=bytes_per_pixel, caption=caption, scorers=settings.filters.scorers)
    try:
        filters.check_scores(scores, settings.filters)
    except Rejected as rejected:
        small = (lambda: thumbnail(pixels)) if may_be_shown(rejected.reason, settings.filters) else None
        raise Rejected(rejected.reason, thumbnail=small, scores=scores, **source) from None
    return Picture(*encode(pixels, settings.encoding, settings.quality), scores=scores, **source)
