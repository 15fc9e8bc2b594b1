"""The contact sheet shows every picture in its place and never lets text run over."""

import io

import numpy as np
import pytest
from PIL import Image

from selfcascade.generation.sheet import _wrap, contact_sheet


def flat(colour, height, width):
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3))


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_pictures_stand_in_their_row_and_column():
    """Rows are prompts, columns are methods: each centre has the colour that was put there, and a missing picture is grey."""
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), None]]
    columns = {f"method {c}": [None if colour is None else flat(colour, 16, 16) for colour in colours[c]] for c in range(2)}
    sheet = opened(contact_sheet(columns, ["first", "second"], cell=64))
    height, width, _ = sheet.shape
    for c in range(2):
        for r in range(2):
            y, x = height - (2 - r) * 70 + 32, width - (2 - c) * 70 + 32
            assert tuple(sheet[y, x]) == (colours[c][r] or (232, 232, 236))


def test_rectangles_keep_their_aspect():
    sheet = opened(contact_sheet({"m": [flat((0, 0, 0), 32, 64)]}, ["wide"], cell=64))
    black = (sheet[:, 70:] == 0).all(axis=2)  # right of the caption
    assert black.any(axis=1).sum() == pytest.approx(32, abs=1)


def test_equal_sheets_are_equal_bytes():
    columns = {"m": [flat((1, 2, 3), 20, 20)]}
    assert contact_sheet(columns, ["text"]) == contact_sheet(columns, ["text"])


@pytest.mark.parametrize("text", ["a red fox on a pale blue ground " * 20, "x" * 400, "日本語" * 60, "", "one", "a <b>\n\tc"])
def test_text_is_wrapped_and_cut(text):
    from PIL import ImageFont

    font = ImageFont.load_default(14)
    lines = _wrap(text, font, 100, 4)
    assert len(lines) <= 4
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).rstrip("…").replace(" ", "") == "".join(text.split())[: len("".join(lines).rstrip("…").replace(" ", ""))]


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match="column 'm' has 1 pictures for 2 captions"):
        contact_sheet({"m": [None]}, ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet({}, ["a"])
