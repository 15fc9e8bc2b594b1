"""Tars as a source: what WebDataset and img2dataset write is curated like a folder, and nothing in a tar leads anywhere."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset

from selfcascade.config import WebDatasetSource
from selfcascade.curation.curate import curate, plan_curation
from selfcascade.curation.reading import read_samples, read_table
from selfcascade.curation.record import kind_of
from selfcascade.curation.tree import SourceChanged
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact


def add(tar, name, data, **changes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in changes.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def settings(pictures, **changes):
    return pictures.settings(source=WebDatasetSource(path=str(pictures.folder), **changes))


def write(pictures, name, count=4, first=0):
    """With webdataset's own writer: a picture, a text or a caption in JSON, and a class that nobody needs."""
    with webdataset.TarWriter(str(pictures.folder / name)) as writer:
        for number in range(first, first + count):
            caption = {"txt": f"thing {number}"} if number % 2 else {"json": {"caption": f"thing {number}", "license": "CC0"}}
            writer.write({"__key__": f"{number:04d}", "png": np.asarray(pictures.noise(40, 36, seed=number)), "cls": number} | caption)


def rows_of(store, ref):
    return {row["key"]: row for row in read_table(Artifact(store, ref)).to_pylist()}


def test_the_pictures_and_captions_of_tars_are_those_of_the_files(pictures, store):
    """The stored pixels equal those of a folder that holds the same files; where a tar lies or how it is called by the folder does not matter."""
    write(pictures, "a.tar")
    write(pictures, "b.tar", first=4)
    ref = curate(settings(pictures, carry=("license",)), store)
    samples = {sample.key: sample for sample in read_samples(Artifact(store, ref))}
    assert sorted(samples) == [f"{number:04d}" for number in range(8)]
    assert {key: sample.caption for key, sample in samples.items()} == {f"{number:04d}": f"thing {number}" for number in range(8)}
    for path in pictures.folder.glob("*.tar"):
        path.rename(path.with_suffix(".kept"))
    for number in range(8):
        pictures.put(f"{number:04d}.png", pictures.encode(pictures.noise(40, 36, seed=number)))
    folder = {sample.key: sample.image for sample in read_samples(Artifact(store, curate(pictures.settings(name="folder"), store)))}
    assert all(np.array_equal(folder[key], sample.image) for key, sample in samples.items())


def test_our_own_shards_are_such_tars(pictures, store, tmp_path):
    pictures.put_good_ones(5)
    artifact = Artifact(store, curate(pictures.settings(), store))
    (tmp_path / "shards").mkdir()
    artifact.download("00000.tar", tmp_path / "shards/00000.tar")
    again = curate(pictures.settings(name="again", source=WebDatasetSource(path=str(tmp_path / "shards"))), store)
    one, two = ({sample.key: sample for sample in read_samples(each)} for each in (artifact, Artifact(store, again)))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[key].image, two[key].image) and one[key].caption == two[key].caption for key in one)


def test_a_prefix_is_read_like_a_folder(pictures, store):
    write(pictures, "a.tar")
    local = curate(settings(pictures), store)
    store.put_new("piles/a.tar", pictures.folder / "a.tar")
    remote = settings(pictures).model_copy(update={"source": WebDatasetSource(path=store.uri("piles"))})
    assert plan_curation(remote, store).ref == local


def test_what_is_hostile_or_broken_in_a_tar_is_a_row_or_nothing(pictures, store):
    good = pictures.encode(pictures.noise(40, 36))
    with tarfile.open(pictures.folder / "hostile.tar", "w") as tar:
        add(tar, "../../etc/passwd.png", pictures.encode(pictures.noise(40, 36, seed=1)))
        add(tar, "../../etc/passwd.txt", b"up and out")
        add(tar, "/absolute/x.png", pictures.encode(pictures.noise(40, 36, seed=2)))
        add(tar, "/absolute/x.txt", b"a root")
        add(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/hostname")
        add(tar, "device.png", b"", type=tarfile.CHRTYPE)
        add(tar, "no-text.png", pictures.encode(pictures.noise(40, 36, seed=3)))
        add(tar, "latin.png", pictures.encode(pictures.noise(40, 36, seed=4)))
        add(tar, "latin.txt", "caf\u00e9".encode("latin-1"))
        add(tar, "deep.png", pictures.encode(pictures.noise(40, 36, seed=5)))
        add(tar, "deep.json", b"[" * 100_000)
        add(tar, "empty.png", b"")
        add(tar, "empty.txt", b"nothing")
        add(tar, "odd \u732b name.png", pictures.encode(pictures.noise(40, 36, seed=6)))
        add(tar, "odd \u732b name.txt", b"a cat")
        add(tar, "only-text.txt", b"no picture")
    with tarfile.open(pictures.folder / "squeezed.tar.gz", "w:gz") as tar:
        add(tar, "x.png", good)
    write(pictures, "whole.tar", first=10)
    data = (pictures.folder / "whole.tar").read_bytes()
    (pictures.folder / "whole.tar").write_bytes(data[: len(data) // 2])
    rows = rows_of(store, curate(settings(pictures), store))
    kept = {row["caption"] for row in rows.values() if row["kept"]}
    assert {"up and out", "a root", "a cat", "thing 10"} <= kept
    kinds = {kind_of(row["reason"]) for row in rows.values() if not row["kept"]}
    assert kinds == {"no caption", "caption encoding", "empty", "compressed", "damaged tar"}
    assert not any("link" in key or "device" in key or "only-text" in key for key in rows)


def test_one_key_in_two_tars_is_told_apart(pictures, store):
    write(pictures, "a.tar", count=2)
    write(pictures, "b.tar", count=2)
    rows = rows_of(store, curate(settings(pictures), store))
    assert len(rows) == 4
    assert sum(row["kept"] for row in rows.values()) == 2  # the pictures are the same


def test_a_tar_that_changes_meanwhile_stops_the_run_and_a_folder_without_one_is_named(pictures, store):
    write(pictures, "a.tar")
    plan = plan_curation(settings(pictures), store)
    data = bytearray((pictures.folder / "a.tar").read_bytes())
    data[data.index(b"IDAT") + 20] ^= 1
    (pictures.folder / "a.tar").write_bytes(bytes(data))
    from selfcascade.curation.curate import curate_unit

    with pytest.raises(SourceChanged, match="changed after it was listed"):
        curate_unit(settings(pictures), store, plan, 0)
    (pictures.folder / "a.tar").unlink()
    with pytest.raises(SettingsError, match="holds no tar"):
        curate(settings(pictures), store)


def test_a_caption_of_json_may_have_another_name(pictures, store):
    with tarfile.open(pictures.folder / "a.tar", "w") as tar:
        add(tar, "x.png", pictures.encode(pictures.noise(40, 36)))
        add(tar, "x.json", json.dumps({"alt": "an alternative", "caption": 3}).encode())
    assert [row["caption"] for row in rows_of(store, curate(settings(pictures, caption="alt"), store)).values()] == ["an alternative"]
