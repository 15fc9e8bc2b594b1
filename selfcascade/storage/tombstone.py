"""Tombstones: which object of a published artifact was rewritten on purpose, because a sample had to be removed from it.

A manifest never changes. Where a removal request forces an object to change, a tombstone beside the artifacts says which bytes are right
now, so that a reader tells removal from damage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from selfcascade.storage.entry import ObjectEntry
from selfcascade.storage.errors import NotFound
from selfcascade.storage.store import Store

OBJECTS = "purged/objects/"
RECORDS = "purged/records/"


@dataclass(frozen=True)
class Tombstone:
    """The rewritten forms of one object, oldest first, and the samples that are gone from the last one."""

    key: str
    entries: tuple[ObjectEntry, ...]
    samples: tuple[str, ...]

    @property
    def entry(self) -> ObjectEntry:
        """What the object shall hold now."""
        return self.entries[-1]

    def write(self, store: Store) -> None:
        """Keep it in the store."""
        tree = {"object": self.key, "entries": [entry.model_dump(mode="json") for entry in self.entries], "samples": list(self.samples)}
        store.put_cache(f"{OBJECTS}{self.key}.json", json.dumps(tree, sort_keys=True).encode())


def tombstone(store: Store, key: str) -> Tombstone | None:
    """The tombstone of the object ``key`` (relative to the store), or None when it was never rewritten."""
    try:
        return _parse(key, store.read(f"{OBJECTS}{key}.json"))
    except NotFound:
        return None


def tombstones(store: Store) -> Iterator[Tombstone]:
    """All of them."""
    for info in store.list(OBJECTS):
        yield _parse(info.key.removeprefix(OBJECTS).removesuffix(".json"), store.read(info.key))


def _parse(key: str, data: bytes) -> Tombstone:
    tree = json.loads(data)
    return Tombstone(key, tuple(ObjectEntry.model_validate(entry) for entry in tree["entries"]), tuple(tree["samples"]))


@dataclass(frozen=True)
class Withdrawn:
    """What was removed on request and must not come back."""

    keys: frozenset[str]
    """Sample keys."""
    contents: frozenset[str]
    """SHA-256, in hex, of the original pictures, where the tables had it: it holds under any name."""


def withdrawn(store: Store, base: str) -> Withdrawn:
    """What a new version of ``base`` (kind/name) has to leave out: keys removed from ``base``, contents removed from anywhere."""
    keys: set[str] = set()
    contents: set[str] = set()
    for info in store.list(RECORDS):
        record = json.loads(store.read(info.key))
        contents.update(record["contents"])
        if base in record["artifacts"]:
            keys.update(record["samples"])
    return Withdrawn(frozenset(keys), frozenset(contents))
