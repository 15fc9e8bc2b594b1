"""Decoding: from the bytes of one file to an upright RGB picture on white, or to the reason why not."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from selfcascade.config import Shape
from selfcascade.curation.record import Rejected

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
"""Format by extension. Formats that run programs or interpreters (EPS, PDF, SVG) are left out on purpose."""

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"}
_SRGB = ImageCms.createProfile("sRGB")


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
            image = Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values())))
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode: EXIF orientation applied, the embedded profile converted to sRGB where it can be, transparency laid on white.

    Raises:
        Rejected: the file ends before the picture does, or its pixels are damaged.
    """
    with _reasons("damaged: the pixels cannot be decoded"):
        image.load()
        image = ImageOps.exif_transpose(image)
        profile = image.info.get("icc_profile")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            opaque = _to_srgb(image.convert("RGB"), profile)
            opaque.putalpha(image.getchannel("A"))
            return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
        return _to_srgb(image if image.mode == "L" and profile else image.convert("RGB"), profile).convert("RGB")


def fit(image: Image.Image, size: int, shape: Shape = "square") -> Image.Image:
    """``image`` with a shorter side of ``size`` pixels (Lanczos), resampled once: its centre square, or all of it.

    The picture must be at least as large. The result has no metadata, so that none reaches the shard.
    """
    side = min(image.size)
    width, height = (side, side) if shape == "square" else image.size
    left, top = (image.width - width) // 2, (image.height - height) // 2
    target = (round(width * size / side), round(height * size / side))
    fitted = image.resize(target, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    fitted.info.clear()
    return fitted


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if (embedded.profile.profile_description or "").startswith("sRGB"):
            return image
        converted = ImageCms.profileToProfile(image, embedded, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image  # a broken profile, or one for another colour space: the numbers are taken for sRGB, as browsers do
    return image if converted is None else converted


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
