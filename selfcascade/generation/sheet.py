"""Contact sheet: the same prompts side by side for several methods, for reports, previews and the eye."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 6
_INK, _PAPER, _MISSING = (28, 28, 30), (255, 255, 255), (232, 232, 236)
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(columns: Mapping[str, Sequence[NDArray[np.uint8] | None]], captions: Sequence[str], *, cell: int = 192, font_size: int = 14) -> bytes:
    """PNG with a row for each caption and a column for each method.

    Args:
        columns: heading to pictures, (H, W, 3) each, in the order of ``captions``; ``None`` leaves a grey cell.
        captions: text at the left of each row, wrapped and, where it is too long for the row, cut with an ellipsis.
        cell: largest side of a picture in pixels. Pictures are fitted by Lanczos and keep their aspect; a native-size picture is enlarged to be compared.
        font_size: height of the text in pixels.

    Raises:
        ValueError: no column, no caption, or a column with another number of pictures than captions.
    """
    if not columns or not captions:
        raise ValueError("a contact sheet needs at least one column and one caption")
    for heading, pictures in columns.items():
        if len(pictures) != len(captions):
            raise ValueError(f"column {heading!r} has {len(pictures)} pictures for {len(captions)} captions")
    font = ImageFont.load_default(font_size)
    line = font_size + 4
    pitch = cell + _MARGIN
    headings = [_wrap(heading, font, cell, 2) for heading in columns]
    top = line * max(len(lines) for lines in headings) + 2 * _MARGIN
    left = cell + 2 * _MARGIN
    sheet = Image.new("RGB", (left + pitch * len(columns), top + pitch * len(captions)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, caption in enumerate(captions):
        _write(draw, (_MARGIN, top + pitch * row), _wrap(caption, font, cell, max(1, cell // line)), font, line)
    for column, (lines, pictures) in enumerate(zip(headings, columns.values(), strict=True)):
        x = left + pitch * column
        _write(draw, (x, _MARGIN), lines, font, line)
        for row, picture in enumerate(pictures):
            y = top + pitch * row
            if picture is None:
                draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=_MISSING)
            else:
                fitted = _fit(picture, cell)
                sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _fit(picture: NDArray[np.uint8], cell: int) -> Image.Image:
    image = Image.fromarray(picture)
    factor = cell / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], font: _Font, line: int) -> None:
    for number, text in enumerate(lines):
        draw.text((corner[0], corner[1] + number * line), text, fill=_INK, font=font)


def _wrap(text: str, font: _Font, width: int, most: int) -> list[str]:
    """At most ``most`` lines no wider than ``width``; words that are wider by themselves are broken."""
    lines: list[str] = []
    current = ""
    for word in text.split():
        candidate = f"{current} {word}" if current else word
        if font.getlength(candidate) <= width:
            current = candidate
            continue
        if current:
            lines.append(current)
        while font.getlength(word) > width and len(word) > 1:
            fits = max(1, next(end for end in range(1, len(word) + 1) if font.getlength(word[:end]) > width) - 1)
            lines.append(word[:fits])
            word = word[fits:]
        current = word
    if current:
        lines.append(current)
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return lines
