"""Examples: a bounded sample of what a shard leaves out, the same whatever the workers and the order, and nothing of what must not be kept."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selfcascade.config import DatasetSource, FilterSettings
from selfcascade.curation.curate import curate
from selfcascade.curation.examples import THUMBNAIL, Examples
from selfcascade.curation.page import render_page
from selfcascade.curation.reading import read_rows
from selfcascade.curation.record import Rejected, kind_of
from selfcascade.curation.statistics import statistics_of
from selfcascade.storage import Artifact
from selfcascade.storage.purge import plan_purge, purge

SHARP = 2000
STRICT = FilterSettings(min_side=24, min_sharpness=SHARP, max_aspect=2, max_caption_chars=50)


@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from("abc"), st.booleans()), unique_by=lambda row: row[0], max_size=60), st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_the_smallest_digests_of_each_kind_are_kept_in_any_order(rows, count):
    def kept(some):
        examples = Examples(count)
        for number, kind, whole in some:
            examples.offer(f"k{number}", Rejected(f"{kind}: {number}", thumbnail=lambda number=number, whole=whole: b"%d" % number if whole else None))
        return examples.thumbnails()

    expected = {}
    for kind in "abc":
        keys = sorted((f"k{number}" for number, each, whole in rows if each == kind and whole), key=lambda key: hashlib.sha256(key.encode()).digest())
        expected |= {key: key[1:].encode() for key in keys[:count]}
    assert kept(rows) == kept(rows[::-1]) == expected


def put(pictures, blurred=9):
    """Sharp ones, blurred ones, and a few of which nothing can be shown."""
    for number in range(4):
        pictures.put(f"sharp-{number}.png", pictures.encode(pictures.noise(64, 48, seed=number)), f"thing {number}")
    for number in range(blurred):
        pictures.put(f"blurred-{number}.png", pictures.encode(smooth(pictures, number)), f"thing {number}")
    pictures.put("narrow.png", pictures.encode(pictures.noise(200, 50, seed=50)))
    pictures.put("small.png", pictures.encode(pictures.noise(20, 16, seed=51)))
    pictures.put("truncated.png", pictures.encode(pictures.noise(seed=52))[:900])
    pictures.put("copy.png", pictures.encode(pictures.noise(64, 48, seed=1)))
    pictures.put("uncaptioned.png", pictures.encode(pictures.noise(seed=53)), None)


def smooth(pictures, seed):
    return pictures.noise(3, 3, seed=seed + 100).resize((64, 48), Image.Resampling.BICUBIC)


def rows_of(store, ref):
    return {row["key"]: row for _, table in read_rows(Artifact(store, ref)) for row in table.to_pylist()}


def shown(store, ref):
    return {key: row["thumbnail"] for key, row in rows_of(store, ref).items() if row.get("thumbnail")}


def test_pictures_that_were_seen_are_kept_small_and_the_others_are_not(pictures, store):
    put(pictures)
    ref = curate(pictures.settings(filters=STRICT, shard_inputs=100, examples=4), store)
    found, rows = shown(store, ref), rows_of(store, ref)
    blurred = sorted((f"blurred-{number}" for number in range(9)), key=lambda key: hashlib.sha256(key.encode()).digest())
    assert set(found) == {*blurred[:4], "narrow", "small"}
    assert {kind_of(rows[key]["reason"]) for key in found} == {"blurred", "too narrow", "too small"}
    for key, side in (("narrow", (128, 32)), ("small", (20, 16)), (blurred[0], (32, 32))):
        with Image.open(io.BytesIO(found[key])) as image:
            assert (image.format, image.size) == ("WEBP", side), key
            assert max(image.size) <= THUMBNAIL
    whole = np.asarray(smooth(pictures, int(blurred[0][-1])).crop((8, 0, 56, 48)).resize((32, 32), Image.Resampling.LANCZOS), float)
    with Image.open(io.BytesIO(found[blurred[0]])) as image:
        assert np.abs(np.asarray(image.convert("RGB"), float) - whole).mean() < 8


def test_none_are_kept_where_none_are_asked_for(pictures, store):
    put(pictures)
    ref = curate(pictures.settings(filters=STRICT, examples=0), store)
    assert all("thumbnail" not in table.column_names for _, table in read_rows(Artifact(store, ref)))


def test_workers_do_not_matter_and_the_page_does_not_depend_on_the_length_of_shards(pictures, store):
    put(pictures)
    one = Artifact(store, curate(pictures.settings(filters=STRICT, shard_inputs=4), store))
    two = Artifact(store, curate(pictures.settings(filters=STRICT, shard_inputs=4, name="others"), store, workers=2))
    assert one.manifest().objects == two.manifest().objects
    three = Artifact(store, curate(pictures.settings(filters=STRICT, shard_inputs=100), store))
    first, second = statistics_of(one), statistics_of(three)
    assert first.examples == second.examples
    assert sum(example.webp is not None for example in first.examples["blurred"]) == 5
    page = render_page(first)
    assert page.count("<img") == first.kept + sum(example.webp is not None for chosen in first.examples.values() for example in chosen)
    assert "sharpness " in page


def test_a_rejected_picture_that_is_removed_on_request_is_nowhere(pictures, store):
    """Neither in the table nor in a dataset that is made later; the request names its key."""
    put(pictures, blurred=3)
    ref = curate(pictures.settings(filters=STRICT), store)
    gone = shown(store, ref)["blurred-1"]
    purge(store, plan_purge(store, ["blurred-1"]), reason="asked for")
    assert "blurred-1" not in rows_of(store, ref)
    assert all(gone not in store.read(info.key) for info in store.list("datasets/"))
    assert {example.key for example in statistics_of(Artifact(store, ref)).examples["blurred"]} == {"blurred-0", "blurred-2"}
    pictures.put("new.png", pictures.encode(pictures.noise(seed=77)))
    later = rows_of(store, curate(pictures.settings(filters=STRICT), store))
    assert (later["blurred-1"]["reason"], later["blurred-1"]["thumbnail"]) == ("removed on request", None)


@pytest.mark.parametrize("examples", [False, True])
def test_what_a_scorer_leaves_out_is_kept_only_where_its_settings_say_so(pictures, store, examples, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    for number in range(3):
        pictures.put(f"{number}.png", pictures.encode(Image.fromarray(np.asarray(pictures.noise(seed=number)) // (1 + number))), "a thing")
    scorers = ({"name": "bad", "call": "test_examples:brightness", "max": 100, "examples": examples},)
    filters = FilterSettings(min_side=24, scorers=scorers)
    first = curate(pictures.settings(filters=filters), store)
    assert set(shown(store, first)) == ({"0"} if examples else set())
    curate(pictures.settings(filters=FilterSettings(min_side=24, scorers=({**scorers[0], "max": None},)), name="loose"), store)
    chosen = curate(pictures.settings(filters=filters, name="chosen", source=DatasetSource(dataset="datasets/loose")), store)
    assert set(shown(store, chosen)) == set(shown(store, first))


def brightness(pixels, caption):
    return pixels.mean()


def test_a_selection_shows_what_it_leaves_out(pictures, store):
    put(pictures)
    curate(pictures.settings(filters=FilterSettings(min_side=24), shard_inputs=100), store)
    anew = curate(pictures.settings(filters=STRICT, shard_inputs=100, name="anew"), store)
    chosen = curate(pictures.settings(filters=STRICT, shard_inputs=100, name="chosen", source=DatasetSource(dataset="datasets/things")), store)
    blurred = {key: webp for key, webp in shown(store, chosen).items() if key.startswith("blurred")}
    assert blurred == {key: webp for key, webp in shown(store, anew).items() if key.startswith("blurred")}
    assert len(blurred) == 5


def test_an_increment_keeps_what_it_can_show(pictures, store):
    """Of a shard that is made anew for another input no picture is read again."""
    put(pictures, blurred=4)
    first = shown(store, curate(pictures.settings(filters=STRICT, shard_inputs=100), store))
    pictures.put("sharp-0.png", pictures.encode(pictures.noise(64, 48, seed=70)), "another thing")
    ref = curate(pictures.settings(filters=STRICT, shard_inputs=100, increment=True), store)
    assert len(first) == 6
    assert shown(store, ref) == first
    assert pq.read_schema(io.BytesIO(Artifact(store, ref).read("00000.parquet"))).names[-1] == "thumbnail"
