"""SVG: drawn by resvg at the size that is asked for. What would show another file, or needs fonts, is left out."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from dataclasses import dataclass
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
import numpy as np
from defusedxml import DefusedXmlException
from numpy.typing import NDArray
from PIL import Image, ImageColor

from selfcascade.curation.record import Rejected

AVAILABLE = importlib.util.find_spec("resvg_py") is not None
"""Whether SVG can be drawn here: the extra ``svg`` is installed."""
_HEAD = 2**16
"""Bytes in which the root element must begin, behind whatever comments."""
_UNITS = {"": 1.0, "px": 1.0, "pt": 96 / 72, "pc": 16.0, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0}
_LENGTH = re.compile(r"^\s*([+]?[0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawing that may be drawn."""

    text: str
    width: float
    height: float
    """CSS pixels."""


def is_svg(data: bytes) -> bool:
    """Whether ``data`` begins as an SVG does; what it goes on with is another matter."""
    head = data[:_HEAD].lstrip(b"\xef\xbb\xbf \t\r\n")
    return head.startswith(b"<") and b"<svg" in head


def title_of(data: bytes) -> str | None:
    """What an SVG is called: its ``title``, else ``dc:title`` of its metadata, else its ``desc``; None where it is damaged or says nothing."""
    try:
        root = defusedxml.ElementTree.fromstring(data)
    except (ParseError, DefusedXmlException, ValueError, RecursionError):
        return None
    titles = (root.findtext("{*}title"), root.findtext(".//{http://purl.org/dc/elements/1.1/}title"), root.findtext("{*}desc"))
    return next((text for text in titles if text and text.strip()), None)


def read_drawing(data: bytes) -> Drawing:
    """Parse ``data`` and refuse what must not be drawn.

    Raises:
        Rejected: it is no SVG in UTF-8, declares entities, shows another file, holds text, or has no size.
    """
    try:
        text = data.decode("utf-8-sig")
        root = defusedxml.ElementTree.fromstring(text.encode())
    except (UnicodeDecodeError, ParseError, DefusedXmlException, ValueError, RecursionError):
        raise Rejected("unreadable: no SVG in UTF-8, or one that declares entities") from None
    if _name(root.tag) != "svg":
        raise Rejected("unreadable: no SVG in UTF-8, or one that declares entities")
    for element in root.iter():
        _check(element)
    width, height = _size(root)
    return Drawing(text, width, height)


def draw(drawing: str, *, width: int | None = None, height: int | None = None, background: str = "white") -> NDArray[np.uint8]:
    """The drawing at a width or a height in pixels, the other following; at its own size without either. uint8 (H, W, 3), sRGB, over ``background``.

    The vector is drawn at its final size: edges are blended once, and a drawing at 128 and at 512 px is the same picture.

    Raises:
        Rejected: resvg cannot draw it.
    """
    import resvg_py

    try:
        png = resvg_py.svg_to_bytes(svg_string=drawing, width=width, height=height, dpi=96, skip_system_fonts=True)
    except ValueError as error:
        raise Rejected(f"damaged: the SVG cannot be drawn ({' '.join(str(error).split())[:80]})") from None
    with Image.open(io.BytesIO(bytes(png))) as image:
        layer = image.convert("RGBA")
    canvas = Image.new("RGBA", layer.size, ImageColor.getrgb(background)[:3])
    return np.array(Image.alpha_composite(canvas, layer).convert("RGB"))


def _check(element: Element) -> None:
    """Refuse an element whose drawing depends on this machine: on its files (resvg would open them) or its fonts."""
    name = _name(element.tag)
    if name == "text" and "".join(element.itertext()).strip():
        raise Rejected("text: fonts differ from machine to machine; convert the text of the SVG to paths")
    if name == "a":
        return
    for key, value in element.attrib.items():
        link = value.strip().lower()
        if _name(key) == "href" and not link.startswith("#") and (not link.startswith("data:") or link.startswith("data:image/svg")):
            raise Rejected("reference: the SVG shows another file, or an SVG within; embed it as a raster image")


def _size(root: Element) -> tuple[float, float]:
    """Width and height in CSS pixels, from the attributes of the root, else from its view box."""
    box = [float(number) for number in re.findall(r"[-+]?[0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?", root.get("viewBox", ""), re.IGNORECASE)]
    width, height = (_length(root.get(side, "")) for side in ("width", "height"))
    if len(box) == 4 and min(box[2:]) > 0:
        ratio = box[2] / box[3]
        width, height = width or (height * ratio if height else box[2]), height or (width / ratio if width else box[3])
    if not width or not height or not math.isfinite(width * height):
        raise Rejected("size: the SVG has neither a view box nor width and height")
    return width, height


def _length(text: str) -> float | None:
    """A length in CSS pixels; None for a share of what is around, and for nothing."""
    found = _LENGTH.match(text)
    if found is None or found[2].lower() not in _UNITS:
        return None
    return float(found[1]) * _UNITS[found[2].lower()] or None


def _name(tag: object) -> str:
    """Name of an element or attribute without its namespace; comments and processing instructions have none."""
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""
