"""Encoding: from pixels to the file that a shard stores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from selfcascade.config import Encoding
from selfcascade.curation.vips import pyvips

EXTENSIONS: dict[Encoding, str] = {"png": "png", "webp": "webp", "jpeg": "jpg"}
"""Extension of the member of a shard."""

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
"""Pillow's name of the format behind each extension that a shard may hold."""

COMPRESSION = 4
"""Of zlib. Beside the usual 6: a third to two thirds of the time on pictures full of detail, and files up to 4 % larger."""


def encode(pixels: NDArray[np.uint8], encoding: Encoding, quality: int = 95) -> tuple[bytes, str]:
    """The file without metadata, and its extension: equal pixels give equal bytes.

    Args:
        pixels: uint8 (H, W, 3), sRGB.
        encoding: png loses nothing; jpeg and webp keep their colour at half the resolution below a quality of 90.
        quality: of jpeg and webp, 1 to 100.
    """
    image = pyvips.Image.new_from_array(np.ascontiguousarray(pixels))
    if encoding == "png":
        data = image.pngsave_buffer(compression=COMPRESSION, keep="none")
    elif encoding == "webp":
        data = image.webpsave_buffer(Q=quality, effort=2, keep="none")
    else:
        data = image.jpegsave_buffer(Q=quality, keep="none")
    return bytes(data), EXTENSIONS[encoding]
