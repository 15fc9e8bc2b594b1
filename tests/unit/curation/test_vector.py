"""SVG as a source: drawn at the target size, like the raster pictures beside it; what depends on this machine is never drawn."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selfcascade.config import CurationSettings, FilterSettings
from selfcascade.curation.curate import curate
from selfcascade.curation.picture import picture_of
from selfcascade.curation.reading import read_samples, read_table
from selfcascade.curation.record import Rejected, kind_of
from selfcascade.curation.vector import draw, is_svg, read_drawing
from selfcascade.storage import Artifact

NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def svg(body: str = '<rect width="100%" height="100%" fill="#102030"/><circle cx="10" cy="10" r="8" fill="red"/>', size: str = 'viewBox="0 0 40 20"') -> bytes:
    return f"<svg {NAMESPACES} {size}>{body}</svg>".encode()


def halves(width: int, height: int) -> bytes:
    """Left half red, right half blue."""
    left, right = (f'<rect x="{x}" width="{width / 2}" height="{height}" fill="{colour}"/>' for x, colour in ((0, "red"), (width / 2, "blue")))
    return svg(left + right, f'viewBox="0 0 {width} {height}"')


def pixels(data: bytes, **changes: object) -> np.ndarray:
    made = picture_of(data, "a.svg", CurationSettings(**{"size": 64, "filters": FilterSettings(max_aspect=4, blank_std=0, min_side=1)} | changes))
    with Image.open(io.BytesIO(made.data)) as image:
        return np.asarray(image.convert("RGB"))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(["square", "keep", "original"]))
def test_it_has_the_size_that_was_asked_for(width, height, shape):
    """Square: cropped at the middle; keep: the shorter side; original: the one it names."""
    if max(width, height) > 4 * min(width, height):
        with pytest.raises(Rejected, match="too narrow"):
            pixels(halves(width, height), shape=shape)
        return
    found = pixels(halves(width, height), shape=shape)
    high, wide = found.shape[:2]
    if shape == "square":
        assert (high, wide) == (64, 64)
        assert found[32, 2, 0] > 200 > 50 > found[32, 2, 2]
        assert found[32, 61, 2] > 200 > 50 > found[32, 61, 0]
    elif shape == "keep":
        assert min(high, wide) == 64
        assert abs(max(high, wide) - 64 * max(width, height) / min(width, height)) <= 1
    else:
        assert (wide, high) == (width, height)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ('width="30" height="15"', (30, 15)),
        ('width="30px" height="15px" viewBox="0 0 2 2"', (30, 15)),
        ('width="1in" height="72pt"', (96, 96)),
        ('width="50%" height="50%" viewBox="0 0 8 4"', (8, 4)),
        ('viewBox="-3,-3 12 24"', (12, 24)),
        ('width="24" viewBox="0 0 12 6"', (24, 12)),
        ('height="24" viewBox="0 0 12 6"', (48, 24)),
        ('width="2.54cm" height="25.4mm"', (96, 96)),
    ],
)
def test_the_size_of_a_drawing(size, expected):
    drawing = read_drawing(svg(size=size))
    assert (drawing.width, drawing.height) == pytest.approx(expected)
    made = draw(drawing.text, width=3 * round(expected[0]))
    assert made.shape[1::-1] == pytest.approx([3 * side for side in expected], abs=1)  # resvg sees the same shape


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ('<image width="9" height="9" xlink:href="/etc/hostname.png"/>', "reference"),
        ('<image width="9" height="9" href="../picture.png"/>', "reference"),
        ('<image width="9" height="9" href=" file:///tmp/a.png"/>', "reference"),
        ('<image width="9" height="9" href="https://example.org/a.png"/>', "reference"),
        ('<image width="9" height="9" href="DATA:image/svg+xml;base64,PHN2Zy8+"/>', "reference"),
        ('<use href="other.svg#part"/>', "reference"),
        ('<filter id="f"><feImage href="a.png"/></filter>', "reference"),
        ("<text x='1' y='9'>words</text>", "text"),
        ("<text><tspan>words</tspan></text>", "text"),
        ("<g>", "unreadable"),
    ],
)
def test_what_depends_on_this_machine_is_not_drawn(body, kind):
    with pytest.raises(Rejected) as caught:
        pixels(svg(body))
    assert kind_of(caught.value.reason) == kind


def test_a_picture_of_this_machine_is_not_in_the_dataset(tmp_path, pictures, store):
    """What resvg would draw of a file beside it is what the check is there for."""
    Image.fromarray(np.full((8, 8, 3), (1, 200, 1), np.uint8)).save(tmp_path / "secret.png")
    leaking = svg(f'<image width="40" height="20" href="{tmp_path}/secret.png"/>')
    assert (draw(leaking.decode(), width=40) == (1, 200, 1)).all(axis=-1).any()
    pictures.put("leak.svg", leaking)
    pictures.put("fine.svg", svg())
    artifact = Artifact(store, curate(pictures.settings(), store))
    rows = {row["key"]: row for row in read_table(artifact).to_pylist()}
    assert kind_of(rows["leak"]["reason"]) == "reference"
    assert rows["fine"]["kept"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "b">]>' + svg("&a;"), "unreadable"),
        (svg().decode().encode("utf-16"), "unreadable"),
        (b"<html><!-- <svg --></html>", "unreadable"),
        (svg(size=""), "size"),
        (svg(size='viewBox="0 0 0 10"'), "size"),
        (svg(size='width="1e200" height="1e200"'), "size"),
        (svg(size='viewBox="0 0 900 20"'), "too narrow"),
        (svg(size='width="90000" height="90000"'), "too many pixels"),
    ],
)
def test_what_is_no_drawing_has_its_reason(data, kind):
    with pytest.raises(Rejected) as caught:
        pixels(data, shape="original")
    assert kind_of(caught.value.reason) == kind


def test_a_raster_picture_within_is_drawn_and_what_is_clear_shows_the_background(pictures):
    import base64

    inner = base64.b64encode(pictures.encode(Image.new("RGB", (4, 4), (9, 90, 200)))).decode()
    found = pixels(svg(f'<image width="20" height="20" href="data:image/png;base64,{inner}"/>'), shape="keep", background="yellow")
    assert tuple(found[32, 20]) == (9, 90, 200)
    assert tuple(found[32, 100]) == (255, 255, 0)


@pytest.mark.parametrize(("name", "data"), [("a.png", svg()), ("a.svg", None)])
def test_a_wrong_name_is_told(pictures, name, data):
    with pytest.raises(Rejected, match="mislabelled: the name promises"):
        picture_of(data or pictures.encode(pictures.noise()), name, CurationSettings(size=64))


def test_the_name_may_be_missing_and_comments_may_come_first():
    data = b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- " + b"licence " * 2000 + b"-->\n" + svg()
    assert is_svg(data)
    assert picture_of(data, None, CurationSettings(size=64)).width == 128
    assert not is_svg(b"plain <svg>")
    assert not is_svg(b"")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode), st.integers(0, 400))
def test_no_bytes_at_all_crash_it(noise, place):
    data = svg()
    data = data[:place] + noise + data[place:]
    with contextlib.suppress(Rejected):
        assert pixels(data).shape == (64, 64, 3)


def test_drawings_and_photographs_go_into_one_dataset_and_a_drawing_is_never_too_small(pictures, store):
    pictures.put("icon.svg", svg(size='viewBox="0 0 20 20"'), "an icon")
    pictures.put("photo.png", pictures.encode(pictures.noise(seed=1)), "noise")
    artifact = Artifact(store, curate(pictures.settings(), store))
    assert {sample.key: (sample.caption, sample.image.shape) for sample in read_samples(artifact)} == {
        "icon": ("an icon", (32, 32, 3)),
        "photo": ("noise", (32, 32, 3)),
    }
