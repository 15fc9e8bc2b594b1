"""Decoding: upright, sRGB, on white, cover and centre crop; every damaged kind has its reason, and no bytes at all crash it."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from selfcascade.config import CurationSettings
from selfcascade.curation import decoding
from selfcascade.curation.decoding import FORMATS, decode, open_picture
from selfcascade.curation.encoding import encode
from selfcascade.curation.record import Rejected, kind_of


def decoded(data: bytes, name: str | None = "a.png", *, max_pixels: int = 10**6, **changes: object) -> np.ndarray:
    """Pixels; in their own size unless a shape is given. Sizes of these tests are below those that settings allow."""
    settings = CurationSettings.model_construct(**({"shape": "original", "background": "white", "linear_light": False} | changes))
    return decode(data, open_picture(data, name, max_pixels=max_pixels), settings).pixels


def fit(pictures, image: Image.Image, size: int, shape: str = "square", **changes: object) -> np.ndarray:
    return decoded(pictures.encode(image), size=size, shape=shape, **changes)


@pytest.mark.parametrize("extension", sorted(FORMATS.keys() - {"svg"}))
def test_every_format_is_read(pictures, extension):
    smooth = pictures.noise(4, 4, seed=3).resize((48, 40), Image.Resampling.BICUBIC)
    found = decoded(pictures.encode(smooth, FORMATS[extension]), f"a.{extension.upper()}")
    assert found.shape == (40, 48, 3)
    assert np.abs(found.astype(int) - np.asarray(smooth)).mean() < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_plain_mode_becomes_rgb(pictures, mode):
    image = pictures.noise().convert(mode)
    found = decoded(pictures.encode(image))
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


def test_transparency_is_laid_on_the_background(pictures):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = (10, 20, 30, 255)
    pixels[0, 0] = (0, 0, 0, 128)
    found = decoded(pictures.encode(Image.fromarray(pixels)))
    assert found[1, 1].tolist() == [255, 255, 255]
    assert found[1, 6].tolist() == [10, 20, 30]
    assert found[0, 0].tolist() == [127, 127, 127]
    assert decoded(pictures.encode(Image.fromarray(pixels)), background="#102030")[1, 1].tolist() == [16, 32, 48]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    assert decoded(pictures.encode(palette, "GIF", transparency=1), "a.gif")[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(pictures, orientation):
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    image = pictures.noise()
    stored = image if undo is None else image.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(decoded(pictures.encode(stored, exif=exif)), np.asarray(image))


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
    assert decoded(pictures.encode(image, icc_profile=srgb))[0, 0].tolist() == [255, 0, 0]
    assert decoded(pictures.encode(image, icc_profile=bytes(swapped)))[0, 0].tolist() == [0, 255, 0]
    for broken in (b"no profile at all", lab):
        assert decoded(pictures.encode(image, icc_profile=broken))[0, 0].tolist() == [255, 0, 0]


@given(st.integers(12, 40), st.integers(1, 4), st.integers(0, 5), st.booleans())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_fit_is_cover_and_centre_crop(pictures, size, ratio, margin, tall):
    """Against Pillow's Lanczos in two steps, where the covering size is whole, away from the edges, where the two extend the picture differently.

    A picture of the target's side is copied, never resampled.
    """
    width, height = size * ratio + 2 * margin * ratio, size * ratio
    image = pictures.noise(6, 6, seed=width).resize((height, width) if tall else (width, height), Image.Resampling.BICUBIC)
    covered = image.resize((image.width // ratio, image.height // ratio), Image.Resampling.LANCZOS)
    left, top = (covered.width - size) // 2, (covered.height - size) // 2
    two_steps = np.asarray(covered.crop((left, top, left + size, top + size)))
    found = fit(pictures, image, size)
    assert np.abs(found.astype(int) - two_steps)[4:-4, 4:-4].max() <= 4
    if ratio == 1:
        assert np.array_equal(found, two_steps)


@pytest.mark.parametrize("size", [800, 256, 128, 60])
def test_a_jpeg_that_its_decoder_shrinks_is_the_picture(pictures, size):
    """Against the whole picture, decoded and resized by Pillow: the mean difference is below that of one re-encoding. Here 1024 pixels shrink by 1, 2, 4, 8."""
    image = pictures.noise(16, 12, seed=5).resize((1365, 1024), Image.Resampling.BICUBIC)
    data = pictures.encode(image, "JPEG", quality=95, subsampling=0)
    side = min(image.size)
    left = (image.width - side) // 2
    whole = Image.open(io.BytesIO(data)).convert("RGB").crop((left, 0, left + side, side)).resize((size, size), Image.Resampling.LANCZOS)
    found = decoded(data, "a.jpg", max_pixels=10**7, size=size, shape="square").astype(int)
    assert np.abs(found - np.asarray(whole)).mean() < 2


@pytest.mark.parametrize("factor", [2.05, 2.4, 2.65, 4.1, 5.5, 6.1])
def test_a_jpeg_that_its_decoder_shrinks_changes_less_than_by_being_stored_as_one(pictures, factor, monkeypatch):
    """At factors just above 2 and 4, and just above the least at which its decoder may shrink it; of a scene with as much fine detail as photographs have."""
    image = detailed(1024)
    data = pictures.encode(image, "JPEG", quality=95, subsampling=0)
    size = round(1024 / factor)
    found = decoded(data, "a.jpg", max_pixels=10**7, size=size, shape="square").astype(int)
    monkeypatch.setattr(decoding, "SHRINK_GAPS", {})
    whole = decoded(data, "a.jpg", max_pixels=10**7, size=size, shape="square")
    again = np.asarray(Image.open(io.BytesIO(pictures.encode(Image.fromarray(whole), "JPEG", quality=95, subsampling=0)))).astype(int)
    assert np.square(found - whole).mean() < np.square(again - whole).mean()


@cache
def detailed(side: int) -> Image.Image:
    """A scene whose amplitudes fall with the inverse of the frequency, as those of photographs do."""
    random = np.random.default_rng(8)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    spectrum = np.fft.rfft2(random.standard_normal((side, side, 3)), axes=(0, 1)) / np.maximum(frequency, 1 / side)[..., None]
    scene = np.fft.irfft2(spectrum, (side, side), axes=(0, 1))
    return Image.fromarray(np.uint8(np.clip(128 + 40 * scene / scene.std(), 0, 255)))


def test_linear_light_keeps_the_light_of_fine_stripes(pictures):
    """Black and white lines of a pixel become the grey of half the light, 188, and not of half the code, 128."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    image = Image.fromarray(stripes)
    assert abs(fit(pictures, image, 16)[8, 8, 0].astype(int) - 128) <= 2
    assert abs(fit(pictures, image, 16, linear_light=True)[8, 8, 0].astype(int) - 188) <= 2


@pytest.mark.parametrize(("width", "height"), [(9, 8), (8, 13), (8, 8)])
def test_fit_copies_pixels_when_the_side_is_the_target(pictures, width, height):
    image = pictures.noise(width, height)
    left, top = (width - 8) // 2, (height - 8) // 2
    assert np.array_equal(fit(pictures, image, 8), image.crop((left, top, left + 8, top + 8)))


@pytest.mark.parametrize("encoding", ["png", "webp", "jpeg"])
def test_no_metadata_reaches_the_result(pictures, encoding):
    exif = Image.Exif()
    exif[315] = "somebody"
    data = pictures.encode(pictures.noise(), exif=exif, dpi=(300, 300), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    again = encode(decoded(data, size=32, shape="square"), encoding)[0]
    for chunk in (b"eXIf", b"iCCP", b"tEXt", b"EXIF", b"ICCP", b"XMP ", b"Exif"):
        assert chunk not in again
    with Image.open(io.BytesIO(again)) as found:
        assert not found.getexif()
        assert not {"icc_profile", "exif", "comment", "xmp"} & set(found.info)


def test_a_bomb_is_refused_before_it_is_decoded(pictures):
    with pytest.raises(Rejected, match=r"too many pixels: 12000x12000, filters\.max_pixels is 1000000"):
        open_picture(pictures.png_header(12_000, 12_000), "a.png", max_pixels=10**6)
    with pytest.raises(Rejected, match="too many pixels"):
        open_picture(pictures.png_header(60_000, 60_000), "a.png", max_pixels=10**8)


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_damaged_bytes_give_a_picture_or_a_reason_and_nothing_else(pictures, data):
    """Flip, cut and stuff real files of every format: the outcome is RGB pixels or one of the known reasons."""
    kind = data.draw(st.sampled_from(sorted(set(FORMATS.values()) - {"AVIF", "SVG"})))
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
        found = decoded(bytes(content), f"a.{kind.lower()}", max_pixels=10**5)
        assert found.dtype == np.uint8
        assert found.shape[2:] == (3,)
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
    kept = fit(pictures, image, size, "keep")
    assert min(kept.shape[:2]) == size
    assert all(abs(side - size * whole / min(image.size)) <= 0.5 for side, whole in zip(kept.shape[1::-1], image.size, strict=True))
    if size == min(image.size):
        assert np.array_equal(kept, image)
    if width == height:
        assert np.array_equal(kept, fit(pictures, image, size))
