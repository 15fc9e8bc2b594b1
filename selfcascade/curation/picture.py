"""A picture: from the bytes of an input to what a shard keeps of it."""

from __future__ import annotations

import hashlib

from selfcascade.config import CurationSettings
from selfcascade.curation import filters
from selfcascade.curation.decoding import fit, open_picture, to_rgb
from selfcascade.curation.record import Picture


def picture_of(data: bytes, name: str | None, settings: CurationSettings) -> Picture:
    """Check, decode and fit.

    Args:
        data: the file.
        name: what its extension promises must be so; None: the content alone says what it is.
        settings: the target and the filters.

    Raises:
        Rejected: it is left out, for this reason.
    """
    image = open_picture(data, name, max_pixels=settings.filters.max_pixels)
    filters.check_shape(*image.size, settings.filters, size=settings.size)
    upright = to_rgb(image)
    return Picture(fit(upright, settings.size, settings.shape), upright.width, upright.height, hashlib.sha256(data).hexdigest())
