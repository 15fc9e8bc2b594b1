"""Increments: what is curated a piece at a time is what is curated at once, and what did not change is neither read, decoded nor copied."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfcascade.config import FilterSettings
from selfcascade.curation import increment, sources
from selfcascade.curation.curate import curate, curate_unit, plan_curation, publish_curation, stage_listing
from selfcascade.curation.reading import read_rows, read_samples
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact
from selfcascade.storage.collect import collect, plan_collection
from selfcascade.storage.purge import plan_purge, purge

ACTIONS = ("put", "change", "caption", "remove", "small")


def grow(pictures, count, first=0, **words):
    for number in range(first, first + count):
        pictures.put(f"{number:03d}.png", pictures.encode(pictures.noise(seed=number)), words.get("caption", f"thing {number}"))


def more(pictures, **changes):
    return pictures.settings(increment=True, **changes)


def content(store, ref):
    """What a reader is given, by key; and all rows."""
    artifact = Artifact(store, ref)
    samples = {sample.key: (sample.caption, sample.split, sample.image.tobytes()) for sample in read_samples(artifact)}
    return samples, Counter((row["key"], row["kept"], row["reason"]) for _, table in read_rows(artifact) for row in table.to_pylist())


def sources_of(store, ref):
    """Version that holds each object of a dataset."""
    manifest = Artifact(store, ref).manifest()
    return {entry.key: (entry.source or ref.prefix).rpartition("/")[2] for entry in manifest.objects}


@pytest.fixture
def decoded(monkeypatch):
    """Sources of the pictures that were read to be decoded."""
    seen = []
    original = sources.FileSource.picture

    def counting(self, entry, configuration):
        seen.append(entry.source)
        return original(self, entry, configuration)

    monkeypatch.setattr(sources.FileSource, "picture", counting)
    return seen


def test_new_inputs_get_new_shards_and_nothing_else_is_touched(pictures, store, decoded):
    grow(pictures, 10)
    first = curate(pictures.settings(), store)
    grow(pictures, 5, first=10)
    decoded.clear()
    second = curate(more(pictures), store)
    assert sorted(decoded) == [f"{number:03d}.png" for number in range(10, 15)]
    held = sources_of(store, second)
    assert {name: version for name, version in held.items() if name[:5] in ("00000", "00001")} == sources_of(store, first)
    assert {version for name, version in held.items() if name.startswith("00002")} == {second.version}
    at_once = curate(pictures.settings(name="whole"), store)
    assert content(store, second) == content(store, at_once)
    counts = Artifact(store, second).manifest().counts
    assert counts == Artifact(store, at_once).manifest().counts


def test_nothing_new_is_the_version_that_is_there(pictures, store):
    grow(pictures, 10)
    first = curate(more(pictures), store)  # there is nothing to go on from
    assert first == curate(pictures.settings(), store)
    plan = plan_curation(more(pictures), store)
    assert plan.published
    assert plan.ref == first
    assert curate(more(pictures), store) == first


def test_what_changed_is_made_anew_in_its_place_and_its_neighbours_are_not_decoded(pictures, store, decoded):
    grow(pictures, 16)
    pictures.put("003.gif", pictures.encode(pictures.noise(20, 20)), "too small")
    curate(pictures.settings(), store)
    pictures.put("002.png", pictures.encode(pictures.noise(seed=900)), "another thing")
    pictures.put("012.png", pictures.encode(pictures.noise(seed=12)), "another caption")
    (pictures.folder / "005.png").unlink()
    decoded.clear()
    second = curate(more(pictures), store)
    assert sorted(decoded) == ["002.png", "012.png"]
    assert content(store, second) == content(store, curate(pictures.settings(name="whole"), store))
    held = sources_of(store, second)
    assert [held[f"{number:05d}.tar"] == second.version for number in range(3)] == [True, True, False]


def test_a_new_copy_gives_way_to_what_was_there(pictures, store):
    grow(pictures, 3, first=5)
    curate(pictures.settings(), store)
    pictures.put("000.png", pictures.encode(pictures.noise(seed=5)), "a copy")
    second = curate(more(pictures), store)
    rows = {row["key"]: row for _, table in read_rows(Artifact(store, second)) for row in table.to_pylist()}
    assert rows["000"]["reason"] == "duplicate of 005"
    assert rows["005"]["kept"]
    assert sources_of(store, second)["00000.tar"] != second.version
    at_once = {row["key"]: row for _, table in read_rows(Artifact(store, curate(pictures.settings(name="whole"), store))) for row in table.to_pylist()}
    assert at_once["005"]["reason"] == "duplicate of 000"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["put", "change", "caption", "remove", "small"])), min_size=1, max_size=6),
        min_size=2,
        max_size=4,
    )
)
def test_a_piece_at_a_time_is_all_at_once(pictures, store, steps):
    """Whatever is added, changed and removed between the versions; contents are all different, so no duplicate has to choose."""
    for path in pictures.folder.iterdir():
        path.unlink()
    name = f"pieces-{abs(hash(str(steps))) % 10**9}"
    counter = 0
    pictures.put("a-fixed-one.png", pictures.encode(pictures.noise(seed=7)), "fixed")
    for step in steps:
        for number, action in step:
            counter += 1
            path = pictures.folder / f"{number:03d}.png"
            if action == "remove":
                path.unlink(missing_ok=True)
            elif action == "caption" and path.exists():
                path.with_suffix(".txt").write_text(f"said otherwise {counter}")
            else:
                side = 20 if action == "small" else 40
                pictures.put(path.name, pictures.encode(pictures.noise(side, side, seed=1000 + counter)), f"thing {counter}")
        latest = curate(more(pictures, name=name, shard_inputs=3), store)
    assert content(store, latest) == content(store, curate(pictures.settings(name=f"{name}-whole", shard_inputs=3), store))


@pytest.mark.parametrize("workers", [1, 3])
def test_interrupted_equals_uninterrupted_whatever_the_workers(pictures, store, workers):
    grow(pictures, 20)
    curate(pictures.settings(), store)
    curate(pictures.settings(name="other"), store)
    grow(pictures, 9, first=20)
    pictures.put("004.png", pictures.encode(pictures.noise(seed=900)), "another thing")
    expected = curate(more(pictures, name="other"), store)
    plan = plan_curation(more(pictures), store)
    stage_listing(more(pictures), store, plan)
    curate_unit(more(pictures), store, plan, plan.todo[0])
    again = plan_curation(more(pictures), store)
    assert again.ref == plan.ref
    assert again.todo == plan.todo[1:]
    assert again.inputs_left < plan.inputs_left
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda index: curate_unit(more(pictures), store, again, index), reversed(again.todo)))
    found = publish_curation(more(pictures), store, again)
    entries, others = ({entry.key: entry.sha256 for entry in Artifact(store, ref).manifest().objects} for ref in (found, expected))
    assert entries == others


def test_a_failed_download_is_tried_again_and_what_arrived_is_not(pictures, store, monkeypatch):
    """The reason of a network's failure is worth another try, that of a file is not."""
    failing = {"004.png", "011.png"}
    original = sources.FileSource.picture
    asked = []

    def passing(self, entry, configuration):
        asked.append(entry.source)
        if entry.source in failing:
            raise increment.Rejected("download: status 503 (4 tries)" if entry.source == "004.png" else "download: status 404")
        return original(self, entry, configuration)

    monkeypatch.setattr(sources.FileSource, "picture", passing)
    grow(pictures, 16)
    curate(pictures.settings(), store)
    asked.clear()
    failing.clear()
    second = curate(more(pictures), store)
    assert asked == ["004.png"]
    samples, _ = content(store, second)
    assert "004" in samples
    assert "011" not in samples
    assert curate(more(pictures), store) == second


def test_other_settings_are_no_increment(pictures, store):
    grow(pictures, 4)
    curate(pictures.settings(), store)
    with pytest.raises(SettingsError, match=r"was made with another curation.filters; leave increment out"):
        curate(more(pictures, filters=FilterSettings(min_side=25)), store)


def test_a_removal_request_reaches_every_version_and_the_next(pictures, store):
    grow(pictures, 10)
    first = curate(pictures.settings(), store)
    grow(pictures, 4, first=10)
    second = curate(more(pictures), store)
    purge(store, plan_purge(store, ["003"]), reason="asked for")
    for ref in (first, second):
        assert "003" not in content(store, ref)[0]
    third = curate(more(pictures), store)
    samples, rows = content(store, third)
    assert "003" not in samples
    assert ("003", False, "removed on request") in rows
    assert len(samples) == 13


def test_garbage_collection_leaves_what_is_shared(pictures, store):
    grow(pictures, 10)
    curate(pictures.settings(), store)
    grow(pictures, 4, first=10)
    second = curate(more(pictures), store)
    before = content(store, second)
    collect(store, plan_collection(store, grace=timedelta(0), cache=True), grace=timedelta(0), cache=True)
    assert content(store, second) == before


def test_planning_and_staging_read_each_table_once(pictures, store, monkeypatch):
    """However often it is asked where a key was, and whether a shard stays."""
    grow(pictures, 20)
    curate(more(pictures, shard_inputs=4), store)
    read = Counter()
    whole = increment.read_table_of

    def counting(artifact, tar, *columns):
        read[tar] += 1
        return whole(artifact, tar, *columns)

    monkeypatch.setattr(increment, "read_table_of", counting)
    grow(pictures, 3, first=20)
    pictures.put("001.png", pictures.encode(pictures.noise(seed=99)))
    asked = more(pictures, shard_inputs=4)
    plan = plan_curation(asked, store)
    stage_listing(asked, store, plan)
    assert plan.todo == (0, 5)
    assert read == {f"{number:05d}.tar": 1 for number in range(5)}
