"""Filters: which pictures and captions are left out, and the reason that the table keeps."""

from __future__ import annotations

import re
from functools import lru_cache

from selfcascade.config import FilterSettings
from selfcascade.curation.record import Rejected
from selfcascade.curation.scores import Scores
from selfcascade.settings import SettingsError


def check_caption(caption: str | None, filters: FilterSettings) -> None:
    """Length in characters, blocked words and language of a caption.

    Raises:
        Rejected: there is none, or it is not what the filters want.
        SettingsError: languages are asked for and py3langid is not installed.
    """
    text = caption or ""
    length = len(text)
    if caption is None and filters.min_caption_chars:
        raise Rejected("no caption: none was found beside the picture or in the caption files")
    if length < filters.min_caption_chars:
        raise Rejected(f"caption too short: {length} characters, filters.min_caption_chars is {filters.min_caption_chars}")
    if length > filters.max_caption_chars:
        raise Rejected(f"caption too long: {length} characters, filters.max_caption_chars is {filters.max_caption_chars}")
    if filters.blocked_words and (found := _blocked(filters.blocked_words).search(text)):
        raise Rejected(f"blocked word: {found[0]!r} is in filters.blocked_words")
    if filters.languages and (language := _language(text)) not in filters.languages:
        raise Rejected(f"language: {language}, filters.languages is {', '.join(filters.languages)}")


def check_copies(copies: int, filters: FilterSettings) -> None:
    """How many inputs have the same caption.

    Raises:
        Rejected: more than ``filters.max_caption_copies``: a caption that so many share says nothing of any of them.
    """
    if filters.max_caption_copies is not None and copies > filters.max_caption_copies:
        raise Rejected(f"boilerplate: {copies} inputs have this caption, filters.max_caption_copies is {filters.max_caption_copies}")


def check_shape(width: int, height: int, filters: FilterSettings, *, size: int) -> None:
    """Sides, area and aspect, known from the header alone.

    Raises:
        Rejected: a side is below ``filters.min_side`` or below the target ``size`` (nothing is ever enlarged), or the picture is too small or too narrow.
    """
    smallest = min(width, height)
    if smallest < filters.min_side:
        raise Rejected(f"too small: {width}x{height}, filters.min_side is {filters.min_side}")
    if smallest < size:
        raise Rejected(f"smaller than the target: {width}x{height} for {size}x{size}")
    if width * height < filters.min_area:
        raise Rejected(f"too small: {width}x{height}, filters.min_area is {filters.min_area}")
    check_aspect(width, height, filters)


def check_aspect(width: int, height: int, filters: FilterSettings) -> None:
    """How much longer one side is than the other.

    Raises:
        Rejected: more than ``filters.max_aspect``.
    """
    smallest, largest = sorted((width, height))
    if largest > filters.max_aspect * smallest:
        raise Rejected(f"too narrow: {width}x{height} has aspect {largest / smallest:.2f}, filters.max_aspect is {filters.max_aspect:g}")


def check_scores(scores: Scores, filters: FilterSettings) -> None:
    """What was measured of the stored picture; scores that it lacks are not looked at.

    Raises:
        Rejected: one is out of its bounds.
    """
    bounds = [
        ("blank", "deviation", "standard deviation", "blank_std", filters.blank_std, None),
        ("squeezed", "bytes_per_pixel", "bytes a pixel", "min_bytes_per_pixel", filters.min_bytes_per_pixel, None),
        ("blurred", "sharpness", "sharpness", "min_sharpness", filters.min_sharpness, None),
        ("flat", "entropy", "entropy", "min_entropy", filters.min_entropy, None),
        ("framed", "border", "bars take a share of", "max_border", None, filters.max_border),
        ("watermarked", "watermark", "tiled mark", "max_watermark", None, filters.max_watermark),
        *((scorer.name, scorer.name, "score", f"scorers: {scorer.name}", scorer.min, scorer.max) for scorer in filters.scorers),
    ]
    for kind, column, words, setting, least, most in bounds:
        score = scores.get(column)
        if isinstance(score, str) or score is None:
            continue
        bound = least if least is not None and score < least else most if most is not None and score > most else None
        if bound is not None:
            raise Rejected(f"{kind}: {words} {score:.3g}, filters.{setting} is {bound:g}")


@lru_cache(maxsize=8)
def _blocked(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in words), re.IGNORECASE)


def _language(text: str) -> str:
    try:
        from py3langid import classify
    except ImportError:
        raise SettingsError("filters.languages needs the package py3langid, which is not installed; install selfcascade[language]") from None
    found: str = classify(text)[0]
    return found
