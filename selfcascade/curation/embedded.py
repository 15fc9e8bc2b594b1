"""Captions inside picture files: XMP, IPTC and EXIF, as agencies, museums and cameras write them, and the titles of drawings."""

from __future__ import annotations

import io
import warnings
from typing import Any

from PIL import Image, ImageFile, IptcImagePlugin
from PIL.ExifTags import Base

from selfcascade.curation.captions import Caption, caption_of
from selfcascade.curation.decoding import PILLOW
from selfcascade.curation.vector import is_svg, title_of

CAPTION_OF_IPTC = (2, 120)


def embedded_caption(data: bytes, name: str) -> Caption:
    """What the file says of itself: XMP ``dc:description``, else IPTC caption, else EXIF ImageDescription; an SVG its title.

    A damaged file says nothing; it is rejected later.

    Args:
        data: the file.
        name: how messages name it.
    """
    if is_svg(data):
        return caption_of(title_of(data), f"the metadata of {name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=PILLOW) as image:
                found = next((text for text in (_xmp(image), _iptc(image), _exif(image)) if text), None)
    except Exception:
        return Caption()
    return caption_of(found, f"the metadata of {name}")


def _xmp(image: Image.Image) -> str | None:
    """The first language of ``dc:description``."""
    try:
        node: Any = image.getxmp()
    except Exception:
        return None
    for name in ("xmpmeta", "RDF", "Description", "description", "Alt", "li"):
        while isinstance(node, list):
            node = next((each for each in node if isinstance(each, dict) and name in each), node[0] if node else None)
        node = node.get(name) if isinstance(node, dict) else None
    if isinstance(node, list):
        node = node[0] if node else None
    text = node.get("text") if isinstance(node, dict) else node
    return text if isinstance(text, str) and text.strip() else None


def _iptc(image: ImageFile.ImageFile) -> str | None:
    found = IptcImagePlugin.getiptcinfo(image) or {}
    text = found.get(CAPTION_OF_IPTC)
    if isinstance(text, list):
        text = text[0] if text else None
    # Without a declared character set IPTC is UTF-8 or, in old files, Latin-1.
    return _decoded(text) if isinstance(text, bytes) else None


def _exif(image: Image.Image) -> str | None:
    text = image.getexif().get(Base.ImageDescription)
    if isinstance(text, str):
        # Pillow takes the ASCII of the standard for Latin-1; nearly everybody writes UTF-8.
        text = text.encode("latin-1", "replace")
    return _decoded(text) if isinstance(text, bytes) else None


def _decoded(text: bytes) -> str | None:
    text = text.rstrip(b"\0")
    try:
        found = text.decode("utf-8")
    except UnicodeDecodeError:
        found = text.decode("latin-1")
    return found if found.strip() else None
