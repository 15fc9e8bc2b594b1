"""Shards: equal bytes for equal samples, read by WebDataset's own loader."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from selfcascade.curation.encoding import encode
from selfcascade.curation.record import Entry, Picture
from selfcascade.curation.shards import counts_of, read_table_bytes, read_tar, table_bytes, write_tar
from selfcascade.storage import IntegrityError


def picture(pictures, number):
    return Picture(*encode(np.asarray(pictures.noise(16, 16, seed=number)), "png"), 160, 120, f"{number:064d}", {"sharpness": float(number), "mine": 0.5})


def samples(pictures, count=3):
    for number in range(count):
        entry = Entry(f"k-{number}", f"k/{number}.png", 10, f"sha256:{number}", f"thing {number}, 猫")
        yield entry, picture(pictures, number), "train" if number else "test"


def test_equal_samples_give_equal_bytes_without_clock_or_user(pictures, tmp_path):
    first, second = tmp_path / "a.tar", tmp_path / "b.tar"
    write_tar(first, samples(pictures))
    write_tar(second, samples(pictures))
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [f"k-{number}.{kind}" for number in range(3) for kind in ("json", "png", "txt")]
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) for member in members} == {(0, 0, 0, "", "", 0o644)}


def test_webdataset_reads_a_shard(pictures, tmp_path):
    path = tmp_path / "00000.tar"
    write_tar(path, samples(pictures))
    found = list(webdataset.WebDataset(f"file:{path}", shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in found] == ["k-0", "k-1", "k-2"]
    for number, sample in enumerate(found):
        assert np.array_equal(sample["png"], np.asarray(pictures.noise(16, 16, seed=number)))
        assert sample["txt"] == f"thing {number}, 猫"
        assert (sample["json"]["split"], sample["json"]["width"]) == ("train" if number else "test", 160)


def test_the_table_has_a_row_for_every_input(pictures, tmp_path):
    path = tmp_path / "00000.tar"
    write_tar(path, samples(pictures))
    rejected = {"k-1x": {"key": "k-1x", "source": "k/1x.png", "split": "tune", "kept": False, "reason": "duplicate of k-0"}}
    table = read_table_bytes(table_bytes(path, rejected, dict.fromkeys(["k-0", "k-1", "k-1x", "k-2"], "0")))
    assert table.column("key").to_pylist() == ["k-0", "k-1", "k-1x", "k-2"]
    assert table.column("kept").to_pylist() == [True, True, False, True]
    assert table.column("picture_sha256").to_pylist()[0] == hashlib.sha256(picture(pictures, 0).data).hexdigest()
    assert table.column("sharpness").to_pylist() == [0, 1, None, 2]
    assert counts_of(table) == {"inputs": 4, "kept": 3, "rejected": 1, "rejected: duplicate": 1, "test": 1, "train": 2, "tune": 0}


def test_a_shard_without_a_picture_is_a_tar(tmp_path):
    path = tmp_path / "00000.tar"
    write_tar(path, [])
    assert list(read_tar(path)) == []


@pytest.mark.parametrize("content", [b"no tar", b""])
def test_what_is_no_tar_is_refused(tmp_path, content):
    path = Path(tmp_path, "00000.tar")
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"00000\.tar is not a tar"):
        list(read_tar(path))


def test_a_picture_without_its_metadata_is_refused(pictures, tmp_path):
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("k.png")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(IntegrityError, match=r"k\.png has no metadata before it"):
        list(read_tar(path))
