"""Scores: closed-form answers on pictures whose scores are known, and the filters that look at them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from selfcascade.config import FilterSettings, ScorerSettings
from selfcascade.curation import filters
from selfcascade.curation.curate import curate
from selfcascade.curation.reading import read_table
from selfcascade.curation.record import Rejected, kind_of
from selfcascade.curation.scores import border, deviation, entropy, luma_of, scores_of, sharpness
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact


def noise(height=32, width=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey(rows):
    return np.repeat(np.asarray(rows, np.uint8)[..., None], 3, axis=-1)


@given(st.integers(1, 100), st.integers(1, 30), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_sums_of_whole_numbers_equal_the_usual_formulas(height, width, seed):
    picture = noise(height, width, seed)
    luma = luma_of(picture)
    assert deviation(picture) == pytest.approx(picture.reshape(-1, 3).astype(np.float64).std(0).max(), abs=1e-9)
    assert np.abs(luma - picture.astype(np.float64) @ [0.299, 0.587, 0.114]).max() <= 0.51
    if min(height, width) >= 3:
        wide = luma.astype(np.float64)
        laplacian = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:] - 4 * wide[1:-1, 1:-1]
        assert sharpness(luma) == pytest.approx(laplacian.var(), rel=1e-9, abs=1e-9)
    shares = np.bincount(luma.ravel()) / luma.size
    assert entropy(luma) == pytest.approx(-sum(share * np.log2(share) for share in shares if share), abs=1e-9)


def test_entropy_counts_bits():
    assert entropy(np.full((8, 8), 7, np.uint8)) == 0
    assert entropy(np.arange(256, dtype=np.uint8).reshape(16, 16)) == pytest.approx(8)
    assert entropy(np.tile(np.array([[0, 9], [3, 200]], np.uint8), (4, 4))) == pytest.approx(2)


@pytest.mark.parametrize(("top", "bottom", "left", "right"), [(0, 0, 0, 0), (5, 0, 0, 0), (4, 6, 0, 0), (0, 0, 3, 9), (2, 2, 1, 1)])
def test_bars_along_the_edges_are_measured(top, bottom, left, right):
    picture = luma_of(noise())
    framed = np.pad(picture, ((top, bottom), (left, right)))
    assert border(framed) == pytest.approx(max((top + bottom) / framed.shape[0], (left + right) / framed.shape[1]))


def test_bars_of_two_tones_count_and_a_gradient_does_not():
    picture = np.vstack([np.full((6, 48), 20), luma_of(noise()), np.full((6, 48), 240)]).astype(np.uint8)
    assert border(picture) == pytest.approx(12 / 44)
    assert border(np.full((9, 9), 3, np.uint8)) == 1
    sky = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[:, None], 64, axis=1)
    assert border(sky) < 0.1


def test_a_blur_lowers_the_sharpness_and_a_near_duplicate_keeps_its_hash():
    image = Image.fromarray(noise(48, 64)).resize((256, 192), Image.Resampling.BICUBIC)
    sharp, blurred = (scores_of(np.asarray(each), bytes_per_pixel=1.0) for each in (image, image.filter(ImageFilter.GaussianBlur(3))))
    assert float(blurred["sharpness"]) < float(sharp["sharpness"]) / 4
    smaller = scores_of(np.asarray(image.resize((128, 96))), bytes_per_pixel=1.0)
    other = scores_of(noise(192, 256), bytes_per_pixel=1.0)
    assert distance(sharp, smaller) <= 4 < 15 < distance(sharp, other)


def distance(one, two):
    return bin(int(one["phash"], 16) ^ int(two["phash"], 16)).count("1")


SMOOTH = np.repeat(np.linspace(20, 220, 48)[None, :, None], 40, axis=0).repeat(3, axis=2).astype(np.uint8)
STRIPES = grey(np.repeat([[0] * 24 + [255] * 24], 40, axis=0))
ODD = [
    ("squeezed", {"min_bytes_per_pixel": 1}, SMOOTH, "a thing"),
    ("blurred", {"min_sharpness": 1000}, SMOOTH, "a thing"),
    ("flat", {"min_entropy": 3}, STRIPES, "a thing"),
    ("framed", {"max_border": 0.1}, np.pad(noise(40, 40), ((8, 8), (0, 0), (0, 0))), "a thing"),
    ("mine", {"scorers": ({"name": "mine", "call": "test_scores:redness", "max": 0.6},)}, noise(40, 48) // 2 + 127, "a thing"),
    ("too small", {"min_area": 1000}, noise(30, 33), "a thing"),
    ("blocked word", {"blocked_words": ("WATERMARK",)}, noise(40, 48), "a thing with a watermark"),
    ("language", {"languages": ("en",)}, noise(40, 48), "kissa istuu ikkunalla ja katsoo ulos pihalle"),
]


def redness(pixels, caption):
    assert "thing" in caption
    return pixels[..., 0].mean() / 255


@pytest.mark.parametrize(("kind", "bounds", "odd", "caption"), ODD)
def test_every_filter_rejects_the_odd_one_by_its_name(pictures, store, kind, bounds, odd, caption, monkeypatch):
    """And alone; rows of pictures that were decoded have every score, whether or not one rejected them."""
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    for number in range(4):
        pictures.put(f"good/{number}.png", pictures.encode(pictures.noise(40 + number, 36, seed=number)), f"one of the things that people see, number {number}")
    pictures.put("odd.png", pictures.encode(Image.fromarray(odd)), caption)
    ref = curate(pictures.settings(filters=FilterSettings(min_side=24, **bounds), size=24, shape="keep"), store)
    rows = read_table(Artifact(store, ref)).to_pylist()
    assert [(row["key"], kind_of(row["reason"])) for row in rows if not row["kept"]] == [("odd", kind)]
    decoded = [row for row in rows if row["kept"] or kind not in ("too small", "blocked word", "language")]
    assert all(row[name] is not None for row in decoded for name in ("bytes_per_pixel", "deviation", "sharpness", "entropy", "border", "phash"))
    assert all(row["width"] for row in decoded)


def test_a_caption_that_many_inputs_have_is_boilerplate(pictures, store):
    """Whatever its case; counted over the whole listing, not over a shard."""
    for number in range(12):
        caption = ("Buy now" if number % 2 else "buy NOW") if number < 9 else f"thing {number}"
        pictures.put(f"{number:02d}.png", pictures.encode(pictures.noise(seed=number)), caption)
    ref = curate(pictures.settings(filters=FilterSettings(min_side=24, max_caption_copies=8), shard_inputs=4), store)
    rows = read_table(Artifact(store, ref)).to_pylist()
    assert [row["kept"] for row in rows] == [False] * 9 + [True] * 3
    assert rows[0]["reason"] == "boilerplate: 9 inputs have this caption, filters.max_caption_copies is 8"


def test_a_scorer_that_cannot_be_called_is_one_clear_line():
    for call, complaint in [("no.such:thing", "cannot be imported"), ("math:tau", "is no function"), ("builtins:len", "gave no number")]:
        with pytest.raises(SettingsError, match=complaint):
            scores_of(noise(), bytes_per_pixel=1.0, caption="x", scorers=(ScorerSettings(name="mine", call=call),))


def test_a_missing_score_is_not_looked_at():
    filters.check_scores({}, FilterSettings(min_sharpness=5))
    with pytest.raises(Rejected, match=r"blurred: sharpness 4, filters\.min_sharpness is 5"):
        filters.check_scores({"sharpness": 4.0}, FilterSettings(min_sharpness=5))


@pytest.mark.parametrize(("caption", "blocked"), [("a Watermark here", True), ("watermarked", False), ("x (watermark)", True), ("no mark", False)])
def test_blocked_words_are_whole_words(caption, blocked):
    settings = FilterSettings(blocked_words=("watermark", "c++"))
    if blocked:
        with pytest.raises(Rejected, match="blocked word"):
            filters.check_caption(caption, settings)
    else:
        filters.check_caption(caption, settings)
