"""Tiled marks: a lattice of faint copies is seen, what repeats in one direction or stands once is not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw, ImageFont

from selfcascade.config import FilterSettings
from selfcascade.curation.curate import curate
from selfcascade.curation.reading import read_table
from selfcascade.curation.watermark import SMALLEST, tiling
from selfcascade.storage import Artifact


def scene(width=256, height=256, seed=0):
    """Noise of several grains, luma: edges and texture without a repeat."""
    random = np.random.default_rng(seed)
    total = np.full((height, width), 128.0)
    for grain, weight in ((4, 0.5), (16, 0.3), (64, 0.2), (256, 0.1)):
        rough = Image.fromarray(random.integers(0, 256, (grain, grain), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        total += weight * (np.asarray(rough, float) - 128)
    return np.uint8(np.clip(total, 0, 255))


def mark(width=256, height=256, step=(48, 60), turn=20.0):
    """A text at every step of a lattice, 0 to 1."""
    layer = Image.new("L", (2 * width, 2 * height), 0)
    for top in range(0, 2 * height, step[0]):
        for left in range(0, 2 * width, step[1]):
            ImageDraw.Draw(layer).text((left, top), "PROOF", fill=255, font=ImageFont.load_default(14))
    left, top = width // 2, height // 2
    return np.asarray(layer.rotate(turn, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height)), float) / 255


def laid(luma, share, tone=255):
    return np.uint8(luma * (1 - share) + tone * share + 0.5)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_scene_has_no_lattice(seed):
    assert tiling(scene(seed=seed)) < 4


@given(st.integers(0, 10_000), st.integers(32, 64), st.integers(52, 80), st.floats(-45, 45), st.sampled_from([0, 255]))
@settings(max_examples=25, deadline=None)
def test_a_faint_text_that_is_tiled_is_seen_whatever_its_steps_and_angle(seed, down, across, turn, tone):
    assert tiling(laid(scene(seed=seed), 0.4 * mark(step=(down, across), turn=turn), tone)) > 5


def test_the_score_grows_with_the_opacity():
    found = [tiling(laid(scene(), opacity * mark())) for opacity in (0, 0.05, 0.1, 0.3, 0.5)]
    assert found == sorted(found)
    assert found[-1] > 3 * found[0]


def test_what_stands_once_is_not_seen():
    """A corner mark, however bright: the docs say so."""
    share = np.zeros((256, 256))
    share[220:250, 150:250] = mark()[:30, :100]
    assert tiling(laid(scene(), share)) < 4


@pytest.mark.parametrize("turn", [0, 30, 90])
def test_what_repeats_in_one_direction_is_not_seen(turn):
    """Rails, blinds, corduroy."""
    rails = Image.fromarray(np.uint8(np.arange(512) % 40 < 6)[None].repeat(512, 0) * 255).rotate(turn, Image.Resampling.BICUBIC)
    assert tiling(laid(scene(), 0.5 * np.asarray(rails.crop((128, 128, 384, 384)), float) / 255)) < 4


def test_the_blocks_of_a_jpeg_are_not_seen(pictures):
    even = Image.fromarray(np.repeat(np.linspace(40, 200, 384)[None], 384, axis=0).astype(np.uint8))
    for quality in (10, 40, 80):
        data = pictures.encode(even, "JPEG", quality=quality)
        with Image.open(io.BytesIO(data)) as image:
            assert tiling(np.asarray(image)) < 4, quality


def test_a_lattice_of_a_single_level_is_not_seen():
    """Nobody sees it: the dither of a gradient is none."""
    grey = np.full((256, 256), 128, np.uint8)
    grey[::32, ::32] += 1
    assert tiling(grey) < 4


def test_only_the_centre_counts_and_large_pictures_are_shrunk():
    whole, share = scene(900, 600), mark(900, 600, step=(110, 160))
    assert tiling(laid(whole, 0.3 * share)) > 6
    share[:, 150:750] = 0
    assert tiling(laid(whole, 0.3 * share)) < 4


@given(arrays(np.uint8, st.tuples(st.integers(1, 90), st.integers(1, 90)), elements=st.integers(0, 255), fill=st.integers(0, 255)))
@settings(max_examples=60, deadline=None)
def test_any_picture_has_a_score(luma):
    found = tiling(luma)
    assert np.isfinite(found)
    assert found >= 0
    assert found == 0 or min(luma.shape) >= SMALLEST
    assert found == tiling(luma)


def put(pictures):
    """Two scenes, and a third under a tiled mark."""
    for number in range(3):
        luma = laid(scene(128, 128, number), 0.5 * mark(128, 128, step=(26, 40)) * (number == 2))
        pictures.put(f"{number}.png", pictures.encode(Image.fromarray(luma).convert("RGB")))


def rows_of(store, settings):
    return read_table(Artifact(store, curate(settings, store))).to_pylist()


def test_marked_pictures_are_left_out_where_it_is_asked_for(pictures, store):
    put(pictures)
    everything = {"size": 128, "filters": FilterSettings(min_side=24)}
    rows = rows_of(store, pictures.settings(**everything))
    assert [row["kept"] for row in rows] == [True] * 3
    assert rows[2]["watermark"] > 5 > max(rows[0]["watermark"], rows[1]["watermark"])
    rows = rows_of(store, pictures.settings(size=128, filters=FilterSettings(min_side=24, max_watermark=5)))
    assert [row["kept"] for row in rows] == [True, True, False]
    assert rows[2]["reason"] == f"watermarked: tiled mark {rows[2]['watermark']:.3g}, filters.max_watermark is 5"


def test_a_selection_from_a_dataset_without_the_score_makes_it(pictures, store, monkeypatch):
    """Of the stored picture, which stays as it is, byte for byte, lossy or not."""
    from selfcascade.curation import picture

    put(pictures)
    whole = picture.scores_of
    monkeypatch.setattr(picture, "scores_of", lambda *args, **options: {name: value for name, value in whole(*args, **options).items() if name != "watermark"})
    first = rows_of(store, pictures.settings(size=128, encoding="jpeg", quality=90))
    assert [row["watermark"] for row in first] == [None] * 3
    monkeypatch.undo()
    source = {"kind": "dataset", "dataset": "datasets/things"}
    bounds = FilterSettings(min_side=24, max_watermark=5)
    second = rows_of(store, pictures.settings(name="chosen", source=source, size=128, encoding="jpeg", quality=90, filters=bounds))
    assert [row["kept"] for row in second] == [True, True, False]
    assert [row["picture_sha256"] for row in second[:2]] == [row["picture_sha256"] for row in first[:2]]
