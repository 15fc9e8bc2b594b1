"""The stage against a real S3 server: every input accounted for, equal bytes however it is run, resumed where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset

from selfcascade.config import FilterSettings, FolderSource, S3Source, StoreSettings, TwemojiSource
from selfcascade.curation import curate as stage
from selfcascade.curation.curate import curate, curate_unit, plan_curation, publish_curation, stage_listing
from selfcascade.curation.reading import read_samples, read_table
from selfcascade.curation.record import kind_of
from selfcascade.settings import SettingsError
from selfcascade.storage import ArtifactRef, IntegrityError, NotFound, Store, resolve
from selfcascade.storage.purge import plan_purge, purge


@pytest.fixture
def other_store(store_settings: StoreSettings):
    with Store.open(store_settings.model_copy(update={"prefix": store_settings.prefix + "-other"})) as opened:
        yield opened


def objects(store: Store, ref: ArtifactRef) -> dict[str, str]:
    """SHA-256 of every object of a dataset, its manifest among them."""
    return {info.key: hashlib.sha256(store.read(info.key)).hexdigest() for info in store.list(ref.prefix + "/")}


def rows(store: Store) -> dict[str, dict]:
    return {row["key"]: row for row in read_table(resolve(store, "datasets/things")).to_pylist()}


def test_every_bad_input_has_a_row_with_its_reason(pictures, store):
    """Also keys of files that differ by extension alone, which take a suffix."""
    expected = pictures.put_bad_ones()
    pictures.put_good_ones()
    pictures.put("zz/copy.png", (pictures.folder / "good/002.png").read_bytes(), "a copy")
    ref = curate(pictures.settings(), store)
    found = rows(store)
    assert len(found) == len(expected) + 7
    by_source = {row["source"]: row for row in found.values()}
    for name, kind in expected.items():
        row = next(row for source, row in by_source.items() if source == name or source.rpartition(".")[0] == name)
        assert not row["kept"]
        assert kind_of(row["reason"]) == kind, row
    assert by_source["encoding.png"]["reason"] == "caption encoding: encoding.txt is not UTF-8"
    assert found["zz-copy"]["reason"] == "duplicate of good-002"
    kept = [row for row in found.values() if row["kept"]]
    assert [row["key"] for row in kept] == [f"good-{number:03d}" for number in range(6)]
    assert kept[1]["sha256"] == hashlib.sha256((pictures.folder / "good/001.png").read_bytes()).hexdigest()
    assert (kept[1]["width"], kept[1]["height"]) == (41, 36)
    counts = resolve(store, str(ref)).manifest().counts
    assert (counts["inputs"], counts["kept"], counts["rejected"]) == (len(found), 6, len(found) - 6)
    assert counts["train"] + counts["tune"] + counts["test"] == 6
    assert counts["rejected: 16-bit"] == 3
    assert sum(number for name, number in counts.items() if name.startswith("rejected: ")) == counts["rejected"]


def test_bytes_are_equal_for_one_worker_two_workers_and_another_folder(pictures, store, other_store, tmp_path):
    """The version too: neither the path of the folder nor the order in which it is listed belongs to it."""
    pictures.put_bad_ones()
    pictures.put_good_ones(10)
    first = curate(pictures.settings(), store, workers=1)
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in sorted(pictures.folder.rglob("*"), reverse=True):
        if not path.is_dir() or path.is_symlink():
            target = copy / path.relative_to(pictures.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target, follow_symlinks=False)
    second = curate(pictures.settings(source=FolderSource(path=copy)), other_store, workers=2)
    assert first.version == second.version
    assert objects(store, first) == objects(other_store, second)
    assert len(objects(store, first)) == 5 * 3 + 1


def test_a_second_run_does_nothing(pictures, store, monkeypatch):
    pictures.put_good_ones()
    ref = curate(pictures.settings(), store)
    before = {info.key: (info.etag, info.modified) for info in store.list("")}
    monkeypatch.setattr(stage, "curate_unit", None)
    assert curate(pictures.settings(), store) == ref
    assert {info.key: (info.etag, info.modified) for info in store.list("")} == before
    assert plan_curation(pictures.settings(), store).published


def test_planning_writes_nothing(pictures, store):
    pictures.put_good_ones(20)
    before = {info.key for info in store.list("")}
    plan = plan_curation(pictures.settings(), store)
    assert {info.key for info in store.list("")} == before
    assert (plan.units, plan.inputs, plan.todo, plan.done, plan.published) == (3, 20, (0, 1, 2), (), False)
    assert plan.bytes_planned == 20 * int(32 * 32 * 1.3)


@pytest.mark.parametrize("missing", ["_stats.json", ".parquet", ".tar"])
def test_a_run_resumes_where_objects_are_missing(pictures, store, other_store, missing):
    """Killed between two objects of a unit: what is there is adopted, what is missing is made, and nothing differs."""
    pictures.put_bad_ones()
    pictures.put_good_ones()
    settings = pictures.settings()
    curate(settings, other_store)
    plan = plan_curation(settings, store)
    for index in plan.todo:
        curate_unit(settings, store, plan, index)
    order = [".tar", ".parquet", "_stats.json"]
    lost = [f"{plan.ref.prefix}/00001{kind}" for kind in order[order.index(missing) :]]
    store.delete(lost)
    again = plan_curation(settings, store)
    assert again.todo == (1,)
    with pytest.raises(NotFound, match=r"shard 1 of datasets/things.* is not done"):
        publish_curation(settings, store, plan)
    ref = curate(settings, store)
    assert objects(store, ref) == objects(other_store, ref)


def test_a_finished_unit_is_left_alone_and_returns_its_counts(pictures, store, monkeypatch):
    pictures.put_good_ones()
    settings = pictures.settings()
    plan = plan_curation(settings, store)
    counts = curate_unit(settings, store, plan, 0)
    assert counts["kept"] == 6
    monkeypatch.setattr(stage, "open_source", None)
    assert curate_unit(settings, store, plan, 0) == counts


def test_units_need_no_listing_once_it_is_staged_and_stage_it_when_it_is_gone(pictures, store, monkeypatch):
    pictures.put_good_ones(20)
    settings = pictures.settings()
    plan = plan_curation(settings, store)
    stage_listing(settings, store, plan)
    stage._listed.clear()
    calls = []
    original = stage.open_source

    class Counting:
        def __init__(self, source):
            self.source, self.label, self.picture = source, source.label, source.picture

        def listing(self):
            calls.append(1)
            return self.source.listing()

    monkeypatch.setattr(stage, "open_source", lambda *arguments: Counting(original(*arguments)))
    curate_unit(settings, store, plan, 0)
    assert calls == []
    store.put_cache(f"cache/listings/{plan.ref.version}/00001.jsonl", b"torn")
    curate_unit(settings, store, plan, 1)
    assert calls == [1]
    store.delete([f"cache/listings/{plan.ref.version}/00002.jsonl"])
    assert curate_unit(settings, store, plan, 2)["kept"] == 4
    publish_curation(settings, store, plan)
    assert list(store.list("cache/listings/")) == []


def test_a_source_that_changes_meanwhile_stops_the_run(pictures, store):
    pictures.put_good_ones()
    settings = pictures.settings()
    plan = plan_curation(settings, store)
    stage_listing(settings, store, plan)
    pictures.put("good/003.png", pictures.encode(pictures.noise(seed=1234)))
    with pytest.raises(SettingsError, match=r"good/003\.png changed after it was listed"):
        curate_unit(settings, store, plan, 0)
    (pictures.folder / "good/003.png").unlink()
    with pytest.raises(SettingsError, match=r"good/003\.png changed after it was listed"):
        curate_unit(settings, store, plan, 0)
    store.delete([f"cache/listings/{plan.ref.version}/00000.jsonl"])
    stage._listed.clear()
    with pytest.raises(SettingsError, match="changed after it was listed"):
        curate_unit(settings, store, plan, 0)


def test_the_table_follows_a_tar_of_another_decoder(pictures, store, monkeypatch):
    """A tar that is there with other bytes is adopted: its pictures are described, and what it lacks is rejected."""
    pictures.put_good_ones(4)
    settings = pictures.settings()
    plan = plan_curation(settings, store)
    keep = stage._keep
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_keep", lambda *arguments: list(keep(*arguments))[1:])
        with pytest.raises(KeyError):  # it dies before the table
            curate_unit(settings, store, plan, 0)
    counts = curate_unit(settings, store, plan, 0)
    assert (counts["kept"], counts["rejected: not in the stored shard"]) == (3, 1)


def test_no_survivor_is_an_error_that_says_why(pictures, store):
    expected = pictures.put_bad_ones()
    complaint = rf"no picture of .*pictures survives: 3 x 16-bit, 3 x animated, .* \(of {len(expected)}\); change curation\.size"
    with pytest.raises(SettingsError, match=complaint) as caught:
        curate(pictures.settings(), store)
    assert "\n" not in str(caught.value)
    with pytest.raises(NotFound):
        resolve(store, "datasets/things")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda folder: folder / "missing", r"source\.path: .*missing does not exist"),
        (lambda folder: (folder / "file", (folder / "file").write_text("x"))[0], r"source\.path: .*file is not a folder"),
        (lambda folder: folder, r"holds no pictures; looked for \.png"),
    ],
)
def test_a_missing_or_empty_folder_is_one_clear_line(pictures, store, make, complaint):
    with pytest.raises(SettingsError, match=complaint):
        plan_curation(pictures.settings(source=FolderSource(path=make(pictures.folder))), store)


def test_an_unreadable_folder_is_named_and_an_unreadable_file_is_a_row(pictures, store, monkeypatch):
    """Root may read everything, so for root the system's refusal is played."""
    pictures.put_good_ones(3)
    locked = pictures.folder / "good/001.png"
    locked.chmod(0)
    if os.geteuid() == 0:
        opened = Path.open

        def refuse(path, *arguments, **options):
            if path == locked:
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", refuse)
    curate(pictures.settings(), store)
    assert rows(store)["good-001"]["reason"] == "unreadable: the file cannot be opened"
    folder = pictures.folder / "good"
    folder.chmod(0)
    if os.geteuid() == 0:
        scan = os.scandir

        def refuse_scan(path):
            if str(path) == str(folder):
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse_scan)
    try:
        with pytest.raises(SettingsError, match=r"source\.path: .*good cannot be listed \(Permission denied\)"):
            plan_curation(pictures.settings(), store)
    finally:
        folder.chmod(0o755)


def test_samples_come_in_key_order_by_split_and_as_webdataset_sees_them(pictures, store, tmp_path):
    pictures.put_good_ones(20)
    curate(pictures.settings(tune=0.3, test=0.3), store)
    artifact = resolve(store, "datasets/things")
    everything = list(read_samples(artifact))
    assert [sample.key for sample in everything] == [f"good-{number:03d}" for number in range(20)]
    assert {sample.image.shape for sample in everything} == {(32, 32, 3)}
    assert everything[7].caption == "thing 7"
    parts = [[sample.key for sample in read_samples(artifact, split)] for split in ("train", "tune", "test")]
    assert all(parts)
    assert sorted(key for part in parts for key in part) == [sample.key for sample in everything]
    urls = []
    for index in range(3):
        artifact.download(f"{index:05d}.tar", tmp_path / f"{index:05d}.tar")
        urls.append(f"file:{tmp_path / f'{index:05d}.tar'}")
    for ours, theirs in zip(everything, webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"), strict=True):
        assert (ours.key, ours.caption, ours.split) == (theirs["__key__"], theirs["txt"], theirs["json"]["split"])
        assert np.array_equal(ours.image, theirs["png"])


def test_a_flipped_byte_is_refused_by_name(pictures, store):
    pictures.put_good_ones()
    ref = curate(pictures.settings(), store)
    for name, read in (("00000.tar", read_samples), ("00000.parquet", read_table)):
        data = bytearray(store.read(f"{ref.prefix}/{name}"))
        data[len(data) // 2] ^= 1
        store.overwrite(f"{ref.prefix}/{name}", bytes(data))
        with pytest.raises(IntegrityError, match=name):
            list(read(resolve(store, str(ref))))


def test_a_prefix_is_curated_like_a_folder(pictures, store):
    """Same keys, captions and pictures; the hashes of the listing are ETags, so the version is its own."""
    expected = pictures.put_bad_ones()
    pictures.put_good_ones()
    pictures.put("zz/copy.png", (pictures.folder / "good/002.png").read_bytes(), "a copy")
    curate(pictures.settings(name="from-folder"), store)
    for path in pictures.folder.rglob("*"):
        if path.is_file():
            store.put_cache(f"cache/raw/{path.relative_to(pictures.folder).as_posix()}", path.read_bytes())
    curate(pictures.settings(name="from-prefix", source=S3Source(uri=store.uri("cache/raw"))), store)
    folder, prefix = (list(read_samples(resolve(store, f"datasets/{name}"))) for name in ("from-folder", "from-prefix"))
    assert len(folder) == 6
    for one, other in zip(folder, prefix, strict=True):
        assert (one.key, one.caption, one.split) == (other.key, other.caption, other.split)
        assert np.array_equal(one.image, other.image)
    reasons = [
        {row["key"]: row["reason"] for row in read_table(resolve(store, f"datasets/{name}")).to_pylist() if row["key"] != "dangling"}
        for name in ("from-folder", "from-prefix")
    ]
    assert reasons[0] == reasons[1]
    assert len(reasons[0]) == len(expected) + 7 - 1


def test_an_object_that_changes_meanwhile_stops_the_run_and_a_missing_bucket_is_named(pictures, store):
    store.put_cache("cache/raw/a.png", pictures.encode(pictures.noise()))
    store.put_cache("cache/raw/a.txt", b"a thing")
    settings = pictures.settings(source=S3Source(uri=store.uri("cache/raw")))
    plan = plan_curation(settings, store)
    stage_listing(settings, store, plan)
    store.put_cache("cache/raw/a.png", pictures.encode(pictures.noise(seed=5)))
    with pytest.raises(SettingsError, match=r"cache/raw/a\.png changed after it was listed"):
        curate_unit(settings, store, plan, 0)
    with pytest.raises(SettingsError, match=r"source\.uri: s3://no-such-bucket/x cannot be listed \(NoSuchBucket\)"):
        plan_curation(pictures.settings(source=S3Source(uri="s3://no-such-bucket/x")), store)


def test_emoji_are_curated_at_any_size(pictures, store):
    for size in (32, 64):
        settings = pictures.settings(name=f"emoji-{size}", size=size, source=TwemojiSource(limit=4, backgrounds=("white", "navy")), filters=FilterSettings())
        curate(settings, store)
    small, large = (list(read_samples(resolve(store, f"datasets/emoji-{size}"))) for size in (32, 64))
    assert [sample.key for sample in small] == [sample.key for sample in large]
    assert len(small) == 8
    for one, other in zip(small, large, strict=True):
        assert one.split == other.split
        assert np.abs(other.image.reshape(32, 2, 32, 2, 3).mean((1, 3)) - one.image).mean() < 3


def test_bytes_hold_no_host_no_clock_and_no_path(pictures, store):
    pictures.put_good_ones()
    ref = curate(pictures.settings(), store)
    everything = b"".join(store.read(info.key) for info in store.list(ref.prefix))
    for trace in (str(pictures.folder), os.uname().nodename, str(Path.home())):
        assert trace.encode() not in everything
    assert json.loads(store.read(f"{ref.prefix}/00000_stats.json"))["kept"] == 6


def test_a_picture_removed_on_request_does_not_come_back(pictures, store):
    """The same command makes a new version without it, without a copy of it under another name, and without its caption; the old version's shards lost it."""
    pictures.put_good_ones()
    pictures.put("zz/copy.png", (pictures.folder / "good/002.png").read_bytes(), "a copy")
    before = curate(pictures.settings(), store)
    purge(store, plan_purge(store, ["good-002"]), reason="asked for by the author")
    after = curate(pictures.settings(), store)
    assert after.version != before.version
    assert {sample.key for sample in read_samples(resolve(store, str(before)))} == {sample.key for sample in read_samples(resolve(store, str(after)))}
    found = rows(store)
    assert {key: (row["kept"], row["reason"], row["caption"]) for key, row in found.items() if not row["kept"]} == dict.fromkeys(
        ("good-002", "zz-copy"), (False, "removed on request", None)
    )
    assert curate(pictures.settings(), store) == after


def test_pictures_keep_their_shape_where_it_is_asked_for(pictures, store):
    """Under another address."""
    sizes = [(40, 40), (64, 32), (33, 50)]
    for number, (width, height) in enumerate(sizes):
        pictures.put(f"{number}.png", pictures.encode(pictures.noise(width, height, seed=number)))
    squares = pictures.settings(size=32)
    kept = squares.model_copy(update={"shape": "keep"})
    assert kept.digest() != squares.digest()
    found = [sample.image.shape for sample in read_samples(resolve(store, str(curate(kept, store))))]
    assert found == [(32, 32, 3), (32, 64, 3), (48, 32, 3)]
    assert {sample.image.shape for sample in read_samples(resolve(store, str(curate(squares, store))))} == {(32, 32, 3)}
