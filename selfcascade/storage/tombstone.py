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


def purged_samples(store: Store) -> frozenset[str]:
    """Keys of all samples that were ever removed on request; curation rejects them."""
    found: set[str] = set()
    for info in store.list(RECORDS):
        found.update(json.loads(store.read(info.key))["samples"])
    return frozenset(found)
