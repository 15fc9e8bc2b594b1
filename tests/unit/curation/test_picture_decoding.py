"""Decoding: upright, sRGB, on white, cover and centre crop; every damaged kind has its reason, and no bytes at all crash it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from selfcascade.curation.decoding import FORMATS, fit, open_picture, to_rgb
from selfcascade.curation.record import Rejected, kind_of


def decode(data: bytes, name: str = "a.png") -> np.ndarray:
    return np.asarray(to_rgb(open_picture(data, name, max_pixels=10**6)))


@pytest.mark.parametrize("extension", sorted(FORMATS))
def test_every_format_is_read(pictures, extension):
    smooth = pictures.noise(4, 4, seed=3).resize((48, 40), Image.Resampling.BICUBIC)
    found = decode(pictures.encode(smooth, FORMATS[extension]), f"a.{extension.upper()}")
    assert found.shape == (40, 48, 3)
    assert np.abs(found.astype(int) - np.asarray(smooth)).mean() < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_plain_mode_becomes_rgb(pictures, mode):
    image = pictures.noise().convert(mode)
    found = decode(pictures.encode(image))
    assert np.array_equal(found, np.asarray(image.convert("RGBA").convert("RGB")))


def test_transparency_is_laid_on_white(pictures):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (10, 20, 30, 255)
    pixels[0, 0] = (0, 0, 0, 128)
    found = decode(pictures.encode(Image.fromarray(pixels)))
    assert found[1, 1].tolist() == [255, 255, 255]
    assert found[1, 6].tolist() == [10, 20, 30]
    assert found[0, 0].tolist() == [127, 127, 127]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    assert decode(pictures.encode(palette, "GIF", transparency=1), "a.gif")[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(pictures, orientation):
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    image = pictures.noise()
    stored = image if undo is None else image.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(decode(pictures.encode(stored, exif=exif)), np.asarray(image))


def test_an_embedded_profile_is_converted_and_a_broken_one_ignored(pictures):
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = bytearray(srgb)
    red, green = swapped.index(b"rXYZ"), swapped.index(b"gXYZ")
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    name = swapped.find("sRGB".encode("utf-16-be"))
    while name >= 0:
        swapped[name : name + 8] = "test".encode("utf-16-be")
        name = swapped.find("sRGB".encode("utf-16-be"))
    assert decode(pictures.encode(image, icc_profile=srgb))[0, 0].tolist() == [255, 0, 0]
    assert decode(pictures.encode(image, icc_profile=bytes(swapped)))[0, 0].tolist() == [0, 255, 0]
    for broken in (b"no profile at all", lab):
        assert decode(pictures.encode(image, icc_profile=broken))[0, 0].tolist() == [255, 0, 0]


@given(st.integers(4, 12), st.integers(1, 4), st.integers(0, 5), st.booleans())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_fit_is_cover_and_centre_crop(pictures, size, ratio, margin, tall):
    """Against the two steps one by one, where the covering size is whole; a picture of the target's side is copied, never resampled."""
    width, height = size * ratio + 2 * margin * ratio, size * ratio
    # Smooth, since the two passes clip to 8 bits between them in an order that depends on the shape.
    image = pictures.noise(4, 4, seed=width).resize((height, width) if tall else (width, height), Image.Resampling.BICUBIC)
    covered = image.resize((image.width // ratio, image.height // ratio), Image.Resampling.LANCZOS)
    left, top = (covered.width - size) // 2, (covered.height - size) // 2
    two_steps = np.asarray(covered.crop((left, top, left + size, top + size)))
    assert np.abs(np.asarray(fit(image, size)).astype(int) - two_steps).max() <= 3
    if ratio == 1:
        assert np.array_equal(fit(image, size), two_steps)


@pytest.mark.parametrize(("width", "height"), [(9, 8), (8, 13), (8, 8)])
def test_fit_copies_pixels_when_the_side_is_the_target(pictures, width, height):
    image = pictures.noise(width, height)
    left, top = (width - 8) // 2, (height - 8) // 2
    assert np.array_equal(fit(image, 8), image.crop((left, top, left + 8, top + 8)))


def test_no_metadata_reaches_the_result(pictures):
    exif = Image.Exif()
    exif[315] = "somebody"
    data = pictures.encode(pictures.noise(), exif=exif, dpi=(300, 300), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    again = pictures.encode(fit(to_rgb(open_picture(data, "a.png", max_pixels=10**6)), 32))
    assert {again[position : position + 4] for position in range(len(again)) if again[position : position + 4] in (b"eXIf", b"iCCP", b"pHYs", b"tEXt")} == set()
    assert Image.open(io.BytesIO(again)).info == {}


def test_a_bomb_is_refused_before_it_is_decoded(pictures):
    with pytest.raises(Rejected, match=r"too many pixels: 12000x12000, filters\.max_pixels is 1000000"):
        open_picture(pictures.png_header(12_000, 12_000), "a.png", max_pixels=10**6)
    with pytest.raises(Rejected, match="too many pixels"):
        open_picture(pictures.png_header(60_000, 60_000), "a.png", max_pixels=10**8)


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_damaged_bytes_give_a_picture_or_a_reason_and_nothing_else(pictures, data):
    """Flip, cut and stuff real files of every format: the outcome is RGB pixels or one of the known reasons."""
    kind = data.draw(st.sampled_from(sorted(set(FORMATS.values()) - {"AVIF"})))
    content = bytearray(pictures.encode(pictures.noise(16, 12, seed=1), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        if not content:
            break
    if content and data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    reason = None
    try:
        assert to_rgb(open_picture(bytes(content), f"a.{kind.lower()}", max_pixels=10**5)).mode == "RGB"
    except Rejected as rejection:
        reason = kind_of(rejection.reason)
    assert reason is None or reason in KINDS


KINDS = {"empty", "unreadable", "too many pixels", "mislabelled", "animated", "CMYK", "16-bit", "colour mode", "truncated", "damaged"}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_kept_shape_is_the_whole_picture_with_its_shorter_side_at_the_target(pictures, width, height, size):
    """Each side within half a pixel of the exact one; what is at the target already is copied; a square is as the square that is cropped."""
    size = min(size, width, height)
    image = pictures.noise(width, height)
    kept = fit(image, size, "keep")
    assert min(kept.size) == size
    assert all(abs(side - size * whole / min(image.size)) <= 0.5 for side, whole in zip(kept.size, image.size, strict=True))
    if size == min(image.size):
        assert np.array_equal(kept, image)
    if width == height:
        assert np.array_equal(kept, fit(image, size))
