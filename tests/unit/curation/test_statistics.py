"""Statistics of a dataset and its page: every row is counted once, and text from outside stays text."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selfcascade.config import FilterSettings
from selfcascade.curation.curate import curate
from selfcascade.curation.page import bars, render_page
from selfcascade.curation.reading import read_table
from selfcascade.curation.record import kind_of
from selfcascade.curation.statistics import EXAMPLES, Histogram, statistics_of
from selfcascade.storage import Artifact
from selfcascade.storage.purge import plan_purge, purge


@pytest.fixture
def artifact(pictures, store):
    """Forty inputs in several shards: small ones, narrow ones, a caption full of markup."""
    for number in range(36):
        pictures.put(f"{number:02d}.png", pictures.encode(pictures.noise(40 + number, 36 + number % 3, seed=number)), f"thing {'x' * number}")
    pictures.put("markup.png", pictures.encode(pictures.noise(seed=50)), '<script>alert("x")</script> & more')
    for number in range(7):
        pictures.put(f"small-{number}.png", pictures.encode(pictures.noise(20, 20, seed=number)))
    pictures.put("<b>bad.png", b"no picture")
    return Artifact(store, curate(pictures.settings(filters=FilterSettings(min_side=24, max_aspect=1.8)), store))


def test_every_row_is_counted_once(artifact):
    found = statistics_of(artifact)
    rows = read_table(artifact).to_pylist()
    assert (found.inputs, found.kept) == (len(rows), sum(row["kept"] for row in rows))
    assert found.splits == Counter(row["split"] for row in rows if row["kept"])
    assert found.reasons == Counter(kind_of(row["reason"]) for row in rows if not row["kept"])
    assert list(found.reasons.values()) == sorted(found.reasons.values(), reverse=True)
    assert all(len(found.examples[kind]) == min(count, EXAMPLES) for kind, count in found.reasons.items())
    by_title = {histogram.title: histogram for histogram in found.histograms}
    assert by_title["sharpness"].total == sum(row["sharpness"] is not None for row in rows)
    sides = by_title["shorter side of the source, pixels"]
    assert sides.kept.sum() == found.kept
    assert sides.total == sum(row["width"] is not None for row in rows)


@pytest.mark.parametrize("count", [0, 1, 10, 1000])
def test_the_sample_is_of_the_smallest_digests_in_key_order(artifact, count):
    rows = [row for row in read_table(artifact).to_pylist() if row["kept"]]
    expected = sorted(rows, key=lambda row: hashlib.sha256(row["key"].encode()).digest())[:count]
    found = statistics_of(artifact, pictures=count).pictures
    assert [each.key for each in found] == sorted(row["key"] for row in expected)
    captions = {row["key"]: row["caption"] for row in rows}
    for each in found:
        assert each.caption == captions[each.key]
        with Image.open(io.BytesIO(each.webp)) as image:
            assert max(image.size) <= 128


def test_a_thumbnail_shows_the_picture_of_its_key(artifact, pictures):
    for each in statistics_of(artifact, pictures=1000).pictures:
        if each.key.isdigit():
            number = int(each.key)
            side = 36 + number % 3
            whole = pictures.noise(40 + number, side, seed=number)
            left = (whole.width - side) // 2
            expected = np.asarray(whole.crop((left, 0, left + side, side)).resize((32, 32), Image.Resampling.LANCZOS), float)
            with Image.open(io.BytesIO(each.webp)) as image:
                shown = np.asarray(image.convert("RGB"), float)
            assert np.corrcoef(shown.ravel(), expected.ravel())[0, 1] > 0.4, each.key  # noise, in a lossy thumbnail; of another picture it is 0


def test_a_picture_that_was_removed_on_request_is_on_no_page(artifact, store):
    """The pictures after it in its tar, which moved, are shown as before."""
    before = {each.key: each.webp for each in statistics_of(artifact, pictures=1000).pictures}
    purge(store, plan_purge(store, ["03"]), reason="asked for")
    found = statistics_of(Artifact(store, artifact.ref), pictures=1000)
    assert {each.key: each.webp for each in found.pictures} == {key: webp for key, webp in before.items() if key != "03"}
    assert found.kept == len(before) - 1


def test_the_page_is_one_file_and_shows_text_as_text(artifact):
    page = render_page(statistics_of(artifact))
    assert page == render_page(statistics_of(artifact))
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in page
    assert "<b>bad" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    found = statistics_of(artifact)
    assert page.count("<img") == found.kept + sum(example.webp is not None for examples in found.examples.values() for example in examples)


@given(st.lists(st.tuples(st.floats(-10, 500) | st.just(float("nan")), st.booleans()), max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_histogram_counts_what_has_a_value_and_its_outer_bins_are_open(rows):
    histogram = Histogram("h", np.linspace(0, 100, 11))
    values, kept = np.array([row[0] for row in rows], float), np.array([row[1] for row in rows], bool)
    for part in (slice(None, 20), slice(20, None)):
        histogram.add(values[part], kept[part])
    known = ~np.isnan(values)
    expected = np.histogram(np.clip(values[known & kept], 0, 99.999), histogram.edges)[0]
    assert histogram.kept.tolist() == expected.tolist()
    assert histogram.total == known.sum()
    drawn = bars(histogram)
    assert drawn.count("<rect") == 20
    assert "nan" not in drawn
