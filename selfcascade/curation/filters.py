"""Filters: which pictures and captions are left out, and the reason that the table keeps."""

from __future__ import annotations

from PIL import Image, ImageStat

from selfcascade.config import FilterSettings
from selfcascade.curation.record import Rejected


def check_caption(caption: str | None, filters: FilterSettings) -> None:
    """Length of the caption in characters.

    Raises:
        Rejected: there is none, or it is too short or too long.
    """
    length = len(caption or "")
    if caption is None and filters.min_caption_chars:
        raise Rejected("no caption: none was found beside the picture or in the caption files")
    if length < filters.min_caption_chars:
        raise Rejected(f"caption too short: {length} characters, filters.min_caption_chars is {filters.min_caption_chars}")
    if length > filters.max_caption_chars:
        raise Rejected(f"caption too long: {length} characters, filters.max_caption_chars is {filters.max_caption_chars}")


def check_shape(width: int, height: int, filters: FilterSettings, *, size: int) -> None:
    """Sides and aspect, known from the header alone.

    Raises:
        Rejected: a side is below ``filters.min_side`` or below the target ``size`` (nothing is ever enlarged), or the picture is too narrow.
    """
    smallest, largest = sorted((width, height))
    if smallest < filters.min_side:
        raise Rejected(f"too small: {width}x{height}, filters.min_side is {filters.min_side}")
    if smallest < size:
        raise Rejected(f"smaller than the target: {width}x{height} for {size}x{size}")
    if largest > filters.max_aspect * smallest:
        raise Rejected(f"too narrow: {width}x{height} has aspect {largest / smallest:.2f}, filters.max_aspect is {filters.max_aspect:g}")


def check_content(image: Image.Image, filters: FilterSettings) -> None:
    """Whether an RGB picture shows anything.

    Raises:
        Rejected: no channel varies by ``filters.blank_std``.
    """
    deviation = max(ImageStat.Stat(image).stddev)
    if deviation < filters.blank_std:
        raise Rejected(f"blank: standard deviation {deviation:.2f}, filters.blank_std is {filters.blank_std:g}")
