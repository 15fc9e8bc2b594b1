"""A dataset as a source: selecting from what is stored gives what curating anew would give, and near duplicates go."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selfcascade.config import DatasetSource, FilterSettings
from selfcascade.curation import picture, stored
from selfcascade.curation.curate import curate, plan_curation
from selfcascade.curation.near import BITS, Hashed, masks, near_duplicates
from selfcascade.curation.reading import read_samples, read_table
from selfcascade.curation.record import kind_of
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, NotFound
from selfcascade.storage.purge import plan_purge, purge

STRICT = FilterSettings(min_side=24, min_sharpness=2000, max_caption_chars=50)


def put(pictures):
    """Twelve pictures, every third of them smooth, and two that are rejected whatever the filters."""
    for number in range(12):
        image = pictures.noise(3, 3, seed=number).resize((64, 48), Image.Resampling.BICUBIC) if number % 3 == 0 else pictures.noise(64, 48, seed=number)
        pictures.put(f"{number:02d}.png", pictures.encode(image), f"thing {number}")
    pictures.put("bad.png", b"")
    pictures.put("copy.png", pictures.encode(pictures.noise(64, 48, seed=1)))


def selected(source="datasets/things", **changes):
    """Changes of settings that select from a dataset."""
    return {"name": "chosen", "source": DatasetSource(dataset=source)} | changes


def contents(store, ref):
    artifact = Artifact(store, ref)
    return {entry.key: artifact.read(entry.key) for entry in artifact.manifest().objects}


@pytest.mark.parametrize("encoding", ["png", "jpeg", "webp"])
def test_other_thresholds_give_the_shards_of_curating_anew_without_decoding(pictures, store, encoding, monkeypatch):
    """The tars are equal byte for byte, and the tables but for what tells an input of that source again. No picture is decoded, encoded or scored."""
    put(pictures)
    curate(pictures.settings(encoding=encoding), store)
    anew = curate(pictures.settings(encoding=encoding, filters=STRICT, name="anew"), store)
    for module, name in ((stored, "decode"), (stored, "scored"), (picture, "encode"), (picture, "scores_of")):
        monkeypatch.setattr(module, name, None)
    chosen = curate(pictures.settings(**selected(encoding=encoding, filters=STRICT)), store)
    one, two = contents(store, anew), contents(store, chosen)
    assert {name: data for name, data in one.items() if name.endswith(".tar")} == {name: data for name, data in two.items() if name.endswith(".tar")}
    first, second = (read_table(Artifact(store, ref)).drop_columns("listed").to_pylist() for ref in (anew, chosen))
    assert first == second
    assert {kind_of(row["reason"]) for row in second if not row["kept"]} == {"blurred", "empty", "duplicate"}
    assert sum(row["kept"] for row in second) == 8


def test_the_listing_knows_the_pictures_and_a_selection_is_published_once(pictures, store):
    put(pictures)
    loose = curate(pictures.settings(), store)
    chosen = curate(pictures.settings(**selected(filters=STRICT)), store)
    assert plan_curation(pictures.settings(**selected(filters=STRICT)), store).published
    assert curate(pictures.settings(**selected(f"datasets/things@{loose.version}", filters=STRICT)), store) == chosen
    curate(pictures.settings(encoding="jpeg"), store)
    assert not plan_curation(pictures.settings(**selected(filters=STRICT)), store).published  # other bytes are stored of the same files


def test_a_smaller_size_is_made_of_the_stored_picture_and_a_larger_is_not(pictures, store):
    put(pictures)
    curate(pictures.settings(size=48, shape="keep"), store)
    smaller = {sample.key: sample.image for sample in read_samples(Artifact(store, curate(pictures.settings(**selected(size=24)), store)))}
    assert {image.shape for image in smaller.values()} == {(24, 24, 3)}
    anew = {sample.key: sample.image for sample in read_samples(Artifact(store, curate(pictures.settings(size=24, name="anew"), store)))}
    assert all(np.array_equal(smaller[key], image) for key, image in anew.items())  # 48 is the files' own side: nothing was resampled before
    with pytest.raises(SettingsError, match="12 x smaller than the target"):
        curate(pictures.settings(**selected(size=64)), store)


def test_workers_do_not_matter_and_neither_do_shards_of_another_length(pictures, store):
    put(pictures)
    curate(pictures.settings(shard_inputs=3), store)
    one = contents(store, curate(pictures.settings(**selected(shard_inputs=5)), store))
    Artifact(store, curate(pictures.settings(**selected(shard_inputs=4)), store))
    again = curate(pictures.settings(**selected(shard_inputs=5), tune=0.0), store, workers=2)
    assert {name: data for name, data in one.items() if name.endswith(".tar")} == {
        name: data for name, data in contents(store, again).items() if name.endswith(".tar")
    }


def test_what_is_removed_on_request_is_in_no_later_selection(pictures, store):
    put(pictures)
    curate(pictures.settings(), store)
    purge(store, plan_purge(store, ["01"]), reason="asked for")
    rows = {row["key"]: row for row in read_table(Artifact(store, curate(pictures.settings(**selected()), store))).to_pylist()}
    assert "01" not in rows or not rows["01"]["kept"]
    assert sum(row["kept"] for row in rows.values()) == 11


def test_a_missing_dataset_is_named(pictures, store):
    with pytest.raises(NotFound, match="nothing is published as datasets/nothing"):
        curate(pictures.settings(**selected("datasets/nothing")), store)


# Near duplicates


def test_near_duplicates_of_a_dataset_and_of_another_go_and_the_largest_stays(pictures, store):
    base = [pictures.noise(8, 8, seed=number).resize((96, 96), Image.Resampling.BICUBIC) for number in range(4)]
    for number, image in enumerate(base):
        pictures.put(f"{number}.png", pictures.encode(image), "a thing")
        pictures.put(f"{number}-small.png", pictures.encode(image.resize((48, 48))), "a thing")
        pictures.put(f"{number}-squeezed.jpg", pictures.encode(image, "JPEG", quality=40), "a thing")
    curate(pictures.settings(), store)
    near = {"dataset": "datasets/things", "near_distance": 6}
    rows = read_table(Artifact(store, curate(pictures.settings(name="chosen", source=DatasetSource(**near)), store))).to_pylist()
    kept = [row["key"] for row in rows if row["kept"]]
    # Two of each have the same size: the smaller key stays.
    assert kept == sorted(min(row["key"] for row in rows if row["key"].startswith(str(number)) and row["width"] == 96) for number in range(4))
    assert all(row["reason"].startswith("near duplicate: of ") for row in rows if not row["kept"])
    for path in pictures.folder.glob("[01]*"):
        path.unlink()
    others = curate(pictures.settings(name="others"), store)
    again = read_table(Artifact(store, curate(pictures.settings(name="new", source=DatasetSource(**near, near_to=("datasets/others",))), store))).to_pylist()
    assert sorted({row["key"][0] for row in again if row["kept"]}) == ["0", "1"]
    assert {f"of others@{others.version[:12]}/" in row["reason"] for row in again if row["key"][0] in "23"} == {True}


HASHES = st.lists(
    st.tuples(st.integers(0, 7), st.lists(st.integers(0, 63), max_size=9), st.integers(1, 3), st.booleans()),
    max_size=40,
)


def hashed(rows) -> list[Hashed]:
    roots = np.random.default_rng(0).integers(0, 2**64, 8, dtype=np.uint64).tolist()
    found = []
    for number, (root, flips, area, fixed) in enumerate(rows):
        value = roots[root]
        for bit in flips:
            value ^= 1 << bit
        found.append(Hashed(f"k{number:02d}", value, area, fixed))
    return found


def one_by_one(pictures: list[Hashed], distance: int) -> dict[str, tuple[str, int]]:
    """The definition: every picture against every survivor before it."""
    survivors: list[Hashed] = []
    gone = {}
    for each in sorted(pictures, key=lambda each: (not each.fixed, 0 if each.fixed else -each.area, each.key)):
        near = [(bits, other.key) for other in survivors if (bits := (each.phash ^ other.phash).bit_count()) <= distance]
        if near and not each.fixed:
            gone[each.key] = (near[0][1], near[0][0])
        else:
            survivors.append(each)
    return gone


@given(HASHES, st.integers(0, 16), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_index_finds_what_comparing_all_pairs_finds(rows, distance, random):
    """The same pictures are left out, whatever the order; each names a survivor that is as near as it says."""
    pictures = hashed(rows)
    expected = one_by_one(pictures, distance)
    shuffled = list(pictures)
    random.shuffle(shuffled)
    found = near_duplicates(shuffled, distance=distance)
    assert set(found) == set(expected)
    hashes = {each.key: each.phash for each in pictures}
    for key, (survivor, bits) in found.items():
        assert survivor not in found
        assert (hashes[key] ^ hashes[survivor]).bit_count() == bits <= distance


@pytest.mark.parametrize("distance", range(1, 17))
@pytest.mark.parametrize("count", [10, 10**5, 10**7])
def test_no_pair_within_the_distance_is_missed_by_the_passes(distance, count):
    """Whatever bits differ, some pass compares none of them; and passes compare so many that few others are looked at."""
    passes = list(masks(distance, count))
    random = np.random.default_rng(distance)
    for _ in range(50):
        differing = sum(1 << int(bit) for bit in random.choice(BITS, distance, replace=False))
        assert any(mask & differing == 0 for mask in passes)
    assert all(0 < mask < 2**64 for mask in passes)


def test_a_thousand_equal_pictures_are_one_row_of_the_index():
    pictures: Iterator[Hashed] = (Hashed(f"k{number:05d}", 7 if number % 2 else 7 ^ 3, 1) for number in range(20_000))
    found = near_duplicates(pictures, distance=4)
    assert len(found) == 19_999
    assert set(found.values()) == {("k00000", 0), ("k00000", 2)}


def test_a_dataset_without_hashes_says_so(pictures, store):
    put(pictures)
    ref = curate(pictures.settings(), store)
    artifact = Artifact(store, ref)
    old = Artifact.plan(store, "datasets", "old", pictures.settings(name="old"), {"source": "0" * 64})
    import pyarrow.parquet as pq

    for entry in artifact.manifest().objects:
        data = artifact.read(entry.key)
        if entry.key.endswith(".parquet"):
            sink = io.BytesIO()
            pq.write_table(pq.read_table(io.BytesIO(data)).drop_columns(["phash"]), sink)
            data = sink.getvalue()
        old.put(entry.key, data)
    old.publish(counts={})
    with pytest.raises(SettingsError, match="has no perceptual hashes"):
        curate(pictures.settings(name="new", source=DatasetSource(dataset="datasets/old", near_distance=3)), store)
