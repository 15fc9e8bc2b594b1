"""Parquet files of the hub as a source: the pictures, captions and splits that their rows hold, whatever the row groups."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfcascade.config import FolderSource, HuggingFaceSource
from selfcascade.curation import huggingface
from selfcascade.curation.curate import curate, plan_curation
from selfcascade.curation.reading import read_rows, read_samples
from selfcascade.curation.record import kind_of
from selfcascade.curation.tree import SourceChanged
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def settings(pictures, **changes):
    return pictures.settings(source=HuggingFaceSource(path=str(pictures.folder), **changes))


def write(pictures, name, images, *, group=3, column="image", declared=True, **columns):
    """As ``datasets.Dataset.to_parquet`` writes it: a struct of bytes and path, declared in the metadata of the schema."""
    features = {column: {"_type": "Image"}} | {key: {"dtype": "string", "_type": "Value"} for key in columns}
    table = pa.table({column: pa.array(images, IMAGE), **columns})
    if declared:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = pictures.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


def rows(pictures, count, first=0):
    return [{"bytes": pictures.encode(pictures.noise(seed=number)), "path": f"{number}.jpg"} for number in range(first, first + count)]


def rows_of(store, ref):
    return {row["key"]: row for _, table in read_rows(Artifact(store, ref)) for row in table.to_pylist()}


@pytest.mark.parametrize("group", [1, 4, 100])
def test_the_dataset_is_that_of_the_files(pictures, store, group):
    """Stored pixels equal those of a folder with the same files; row groups and shards need not agree."""
    write(pictures, "data/train-00000-of-00002.parquet", rows(pictures, 7), group=group, text=[f"thing {number}" for number in range(7)])
    write(pictures, "data/train-00001-of-00002.parquet", rows(pictures, 4, 7), group=group, text=[f"thing {number}" for number in range(7, 11)])
    ref = curate(settings(pictures).model_copy(update={"shard_inputs": 5}), store)
    found = list(read_samples(Artifact(store, ref)))
    assert [sample.key for sample in found] == [f"data-train-0000{part}-of-00002-{number:07d}" for part, count in ((0, 7), (1, 4)) for number in range(count)]
    assert [sample.caption for sample in found] == [f"thing {number}" for number in range(11)]
    assert {sample.split for sample in found} == {"train"}
    for number in range(11):
        pictures.put(f"beside/{number:02d}.png", pictures.encode(pictures.noise(seed=number)))
    beside = pictures.settings(name="folder", source=FolderSource(path=pictures.folder / "beside"))
    plain = list(read_samples(Artifact(store, curate(beside, store))))
    assert len(plain) == len(found)
    assert all(np.array_equal(one.image, other.image) for one, other in zip(plain, found, strict=True))


def test_only_the_columns_that_are_asked_for_are_read(pictures, store, monkeypatch):
    """A column of 5 MB that nobody wants stays where it is; pictures are read twice, for the listing and for the shard."""
    filler = [np.random.default_rng(number).bytes(200_000).hex() for number in range(12)]
    write(pictures, "train.parquet", rows(pictures, 12), group=4, text=["a thing"] * 12, other=filler)
    read = []
    original = huggingface._Ranges.readinto

    def counting(self, buffer):
        read.append(original(self, buffer))
        return read[-1]

    monkeypatch.setattr(huggingface._Ranges, "readinto", counting)
    assert len(rows_of(store, curate(settings(pictures), store))) == 12
    payload = sum(len(row["bytes"]) for row in rows(pictures, 12))
    assert 2 * payload < sum(read) < 0.4 * (pictures.folder / "train.parquet").stat().st_size


def test_a_prefix_is_read_like_a_folder(pictures, store):
    write(pictures, "validation-00000.parquet", rows(pictures, 3), text=["a thing"] * 3)
    local = curate(settings(pictures), store)
    store.put_new("piles/validation-00000.parquet", pictures.folder / "validation-00000.parquet")
    remote = settings(pictures).model_copy(update={"source": HuggingFaceSource(path=store.uri("piles"))})
    assert plan_curation(remote, store).ref == local
    other = remote.model_copy(update={"name": "remote"})
    found = list(read_samples(Artifact(store, curate(other, store))))
    assert [sample.split for sample in found] == ["tune"] * 3


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/validation-00000-of-00001.parquet", "tune"),
        ("test/0000.parquet", "test"),
        ("default/train/0000.parquet", "train"),
        ("partial-train/0000.parquet", None),
        ("things.parquet", None),
    ],
)
def test_splits_follow_the_names(pictures, store, name, split):
    write(pictures, name, rows(pictures, 2), text=["a thing"] * 2)
    source = huggingface.ParquetPictures(settings(pictures).source, store)
    assert {entry.split for entry in source.listing()} == {split}
    drawn = huggingface.ParquetPictures(settings(pictures, splits=False).source, store)
    assert {entry.split for entry in drawn.listing()} == {None}


def test_columns_by_name_and_what_is_carried(pictures, store):
    images = pa.array([row["bytes"] for row in rows(pictures, 2)], pa.binary())
    table = pa.table({"picture": images, "captions": [["first", "second"], ["", "two"]], "id": ["alpha", "beta gamma"], "score": [1.5, float("nan")]})
    pq.write_table(table, pictures.folder / "things.parquet")
    ref = curate(settings(pictures, image="picture", caption="captions", key="id", carry=("score",)), store)
    found = rows_of(store, ref)
    assert {key.rpartition("-")[0] or key: row["caption"] for key, row in found.items()} == {"alpha": "first", "beta-gamma": "two"}
    assert [json.loads(row["extra"]) for row in found.values()] == [{"score": 1.5}, {"score": None}]


def test_what_a_row_lacks_is_its_reason(pictures, store):
    images = [*rows(pictures, 2), None, {"bytes": None, "path": "/etc/hostname"}, {"bytes": b"no picture", "path": None}]
    write(pictures, "train.parquet", images, text=["a thing", None, "a", "a", "a"])
    found = rows_of(store, curate(settings(pictures), store))
    assert [row["reason"] and kind_of(row["reason"]) for row in found.values()] == [None, "no caption", "no picture", "no picture", "unreadable"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda pictures: None, "holds no parquet file"),
        (lambda pictures: (pictures.folder / "train.parquet").write_bytes(b"PAR1 nothing"), r"train.parquet is not a parquet file that can be read"),
        (lambda pictures: pq.write_table(pa.table({"text": ["a"]}), pictures.folder / "train.parquet"), r"declares no column of images; name it. It has text"),
    ],
)
def test_what_is_no_dataset_is_refused_by_name(pictures, store, make, message):
    make(pictures)
    with pytest.raises(SettingsError, match=message):
        curate(settings(pictures), store)


@pytest.mark.parametrize("field", ["image", "caption", "key", "carry"])
def test_a_column_that_is_not_there_is_named(pictures, store, field):
    write(pictures, "train.parquet", rows(pictures, 1), text=["a"])
    with pytest.raises(SettingsError, match=r"train.parquet lacks the column 'nowhere'; it has image, text"):
        curate(settings(pictures, **{field: ("nowhere",) if field == "carry" else "nowhere"}), store)


def test_a_file_that_changes_after_the_listing_is_refused(pictures, store):
    write(pictures, "train.parquet", rows(pictures, 3), text=["a thing"] * 3)
    source = huggingface.ParquetPictures(settings(pictures).source, store)
    entries = list(source.listing())
    write(pictures, "train.parquet", rows(pictures, 3, first=50), text=["a thing"] * 3)
    with pytest.raises(SourceChanged):
        source.picture(entries[1], settings(pictures))
    (pictures.folder / "train.parquet").unlink()
    with pytest.raises(SourceChanged):
        source.picture(entries[1], settings(pictures))
