"""Decoding: from the bytes of one file to upright RGB pixels of the target size, or to the reason why not.

Pillow reads the header, and refuses; libvips decodes and resizes, in one pass over the file and with the picture never in memory as a whole.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError

from selfcascade.config import CurationSettings
from selfcascade.curation import filters, vector
from selfcascade.curation.record import Rejected
from selfcascade.curation.vips import pyvips

FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "tiff": "TIFF",
    "avif": "AVIF",
}
"""Format by extension. Formats that run programs or interpreters (EPS, PDF) are left out on purpose."""

try:
    import pillow_heif
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener()
    FORMATS |= {"heic": "HEIF", "heif": "HEIF"}

PILLOW = tuple(sorted(set(FORMATS.values())))
"""What Pillow may take a file for."""
if vector.AVAILABLE:
    FORMATS["svg"] = "SVG"
_BY_PILLOW = frozenset({"BMP", "HEIF"})
"""What this libvips has no loader for."""
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"}
SHRINK_GAPS = {8: 2.0, 4: 1.5, 2: 1.3}
"""Least factor that is left for the filter where its decoder shrinks a JPEG by 8, 4 or 2: from there on this changes photographs less than storing them as
JPEG of quality 95 does. ``tests/bench/shrinking.py`` measures it."""


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """Pixels, and the size of what they were made from."""

    pixels: NDArray[np.uint8]
    """(H, W, 3), sRGB."""
    width: int
    height: int
    """Pixels of the source, upright."""


def format_of_name(name: str) -> str | None:
    """Format that the extension of ``name`` promises; None when it is not a picture's."""
    _, dot, extension = name.rpartition("/")[2].rpartition(".")
    return FORMATS.get(extension.lower()) if dot else None


def open_picture(data: bytes, name: str | None, *, max_pixels: int) -> Image.Image:
    """Read the header of ``data`` and refuse what must not be decoded. No pixel is decoded yet. Without a ``name`` nothing is promised.

    Raises:
        Rejected: empty, unreadable, too many pixels, mislabelled, animated, CMYK, 16-bit, or another mode that has no plain way to RGB.
    """
    if not data:
        raise Rejected("empty: the file has 0 bytes")
    with _reasons("unreadable: not a picture of a known format, or its header is damaged"):
        try:
            image = Image.open(io.BytesIO(data), formats=PILLOW)
        except UnidentifiedImageError:
            raise Rejected("unreadable: not a picture of a known format, or its header is damaged") from None
    width, height = image.size
    if width * height > max_pixels:
        raise Rejected(f"too many pixels: {width}x{height}, filters.max_pixels is {max_pixels}")
    found = "JPEG" if image.format == "MPO" else image.format
    if name is not None and (promised := format_of_name(name)) != found:
        raise Rejected(f"mislabelled: the name promises {promised}, the file holds {found}")
    with _reasons("unreadable: the header is damaged"):
        # A camera's MPO holds further views behind the picture; it is no animation.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise Rejected("animated: the file holds more than one frame or page")
        if image.mode == "CMYK":
            raise Rejected("CMYK: convert the picture to RGB")
        bits = _bits(image, data)
    if bits > 8:
        raise Rejected("16-bit: samples are deeper than 8 bits; convert the picture")
    if image.mode not in _MODES:
        raise Rejected(f"colour mode: {image.mode} has no plain way to RGB; convert the picture")
    return image


def decode(data: bytes, image: Image.Image, settings: CurationSettings) -> Decoded:
    """Decode and fit: EXIF orientation applied, the embedded profile converted to sRGB where it can be, transparency laid on the background, Lanczos.

    Args:
        data: the file.
        image: its header, as :func:`open_picture` gives it; at least as large as the target.
        settings: size, shape, background and light.

    Raises:
        Rejected: the file ends before the picture does, or its pixels are damaged.
    """
    try:
        opened = _opened(data, image, settings)
        orientation = opened.get("orientation") if opened.get_typeof("orientation") else 1
        width, height = reversed(image.size) if orientation >= 5 else image.size
        fitted = _fitted(opened, image, settings).autorot()
        return Decoded(cast(NDArray[np.uint8], fitted.numpy()), width, height)
    except pyvips.Error:
        with _reasons("damaged: the pixels cannot be decoded"):
            image.load()  # it tells a file that ends early from one that is damaged
        raise Rejected("damaged: the pixels cannot be decoded") from None


def draw(data: bytes, settings: CurationSettings) -> Decoded:
    """Draw an SVG at the target size, cropped like any picture: none is too small. In shape ``original`` it is drawn at the size that it names.

    Raises:
        Rejected: it must not be drawn or cannot be, is too narrow, or would have too many pixels.
    """
    drawing = vector.read_drawing(data)
    filters.check_aspect(round(drawing.width), round(drawing.height), settings.filters)
    scale = 1.0 if settings.shape == "original" else settings.size / min(drawing.width, drawing.height)
    width, height = max(1, round(scale * drawing.width)), max(1, round(scale * drawing.height))
    if width * height > settings.filters.max_pixels:
        raise Rejected(f"too many pixels: {width}x{height}, filters.max_pixels is {settings.filters.max_pixels}")
    # The shorter side is given; the other follows from the drawing's own shape.
    side = {"width": width} if drawing.width < drawing.height else {"height": height}
    pixels = vector.draw(drawing.text, **side, background=settings.background)
    high, wide = pixels.shape[:2]
    if settings.shape == "square":
        top, left = (high - settings.size) // 2, (wide - settings.size) // 2
        pixels = np.ascontiguousarray(pixels[top : top + settings.size, left : left + settings.size])
    return Decoded(pixels, wide, high)


def _opened(data: bytes, image: Image.Image, settings: CurationSettings) -> Any:
    """The file as libvips' image, which decodes as it is asked for rows."""
    if image.format in _BY_PILLOW:
        with _reasons("damaged: the pixels cannot be decoded"):
            return pyvips.Image.new_from_array(np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")))
    options: dict[str, Any] = {"access": "sequential", "fail_on": "error"}
    if image.format in ("JPEG", "MPO") and settings.shape != "original":
        options["shrink"] = next((shrink for shrink, gap in SHRINK_GAPS.items() if min(image.size) >= gap * settings.size * shrink), 1)
    return pyvips.Image.new_from_buffer(data, "", **options)


def _fitted(opened: Any, image: Image.Image, settings: CurationSettings) -> Any:
    """Three bytes a pixel, cropped and resized, not yet upright."""
    profile = image.info.get("icc_profile")
    if opened.bands < 3:
        opened = opened.colourspace("srgb")
    if opened.hasalpha():
        opened = _to_srgb(opened, profile).flatten(background=ImageColor.getrgb(settings.background)[:3])
        profile = None
    width, height = opened.width, opened.height
    if settings.shape == "square":
        width = height = min(width, height)
        opened = opened.crop((opened.width - width) // 2, (opened.height - height) // 2, width, height)
    wide, high = _target(image, settings)
    if (wide, high) != (width, height):
        if settings.linear_light:
            opened = opened.colourspace("scrgb")
        opened = opened.resize(wide / width, vscale=high / height, kernel="lanczos3")
        if settings.linear_light:
            opened = opened.colourspace("srgb")
    return _to_srgb(opened, profile).cast("uchar").copy_memory()


def _target(image: Image.Image, settings: CurationSettings) -> tuple[int, int]:
    """Width and height before any turn, from the sizes of the file: a decoder that shrinks rounds them."""
    if settings.shape == "original":
        return image.size
    if settings.shape == "square":
        return settings.size, settings.size
    width, height = (round(side * settings.size / min(image.size)) for side in image.size)
    return width, height


def _to_srgb(image: Any, profile: bytes | None) -> Any:
    if not profile:
        return image
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if (embedded.profile.profile_description or "").startswith("sRGB") or embedded.profile.xcolor_space.strip() != "RGB":
            return image
        return image.icc_transform("srgb", embedded=True, intent="relative").copy_memory()
    except (ImageCms.PyCMSError, pyvips.Error, OSError, ValueError):
        return image  # a broken profile, or one for another colour space: the numbers are taken for sRGB, as browsers do


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits of the deepest sample. Pillow drops the lower byte of 16-bit colour without a word, so the headers are asked."""
    if image.format == "PNG":
        return data[24]  # IHDR: width and height, then the bit depth
    if image.format == "TIFF":
        return int(max(getattr(image, "tag_v2", {}).get(258, (1,))))  # BitsPerSample
    return 16 if image.mode.startswith(("I", "F")) else 8


@contextmanager
def _reasons(otherwise: str) -> Iterator[None]:
    """Turn whatever a decoder raises on damaged bytes into a reason. Decoders raise nearly anything; only a lack of memory is not the file's fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Rejected, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Rejected("too many pixels: the header claims more than the decoder ever opens") from None
    except Exception as error:
        if "truncated" in str(error).lower():
            raise Rejected("truncated: the file ends before the picture does") from None
        raise Rejected(otherwise) from None
