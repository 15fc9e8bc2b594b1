"""Digests of objects and of their blocks."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfcascade.storage import entry as module
from selfcascade.storage.entry import BlockHasher, ObjectEntry, entry_from_metadata, entry_of


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)


def naive(data: bytes) -> ObjectEntry:
    blocks = tuple(hashlib.sha256(data[i : i + 16]).hexdigest() for i in range(0, len(data), 16))
    return ObjectEntry(key="k", size=len(data), sha256=hashlib.sha256(data).hexdigest(), blocks=blocks)


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_digests_do_not_depend_on_how_the_bytes_arrive(pieces):
    """Any cutting of a stream gives the entry that the definition gives for the whole."""
    hasher = BlockHasher()
    for piece in pieces:
        hasher.update(piece)
    assert hasher.entry("k") == naive(b"".join(pieces)) == entry_of("k", b"".join(pieces)) == entry_of("k", iter(pieces))


@given(st.binary(max_size=16 * 40))
def test_what_the_writer_leaves_on_an_object_gives_its_entry_back(data):
    """Metadata of at most 32 blocks restores the entry; of more it says that the object must be read. It always fits S3's 2 KB."""
    made = entry_of("k", data)
    metadata = made.metadata()
    restored = entry_from_metadata("k", len(data), metadata)
    assert restored == (made if len(made.blocks) <= module.METADATA_BLOCKS else None)
    assert sum(len(name) + len(value) for name, value in metadata.items()) < 2000


def test_metadata_of_others_is_no_entry():
    assert entry_from_metadata("k", 5, {}) is None
    assert entry_from_metadata("k", 50, {"sha256": "a" * 64, "blocks": "aGk="}) is None


def test_files_are_read_as_their_bytes(tmp_path: Path):
    path = tmp_path / "f"
    path.write_bytes(b"x" * 1000)
    assert entry_of("k", path) == naive(b"x" * 1000)
