"""Garbage collection: what no manifest refers to, nobody works on, and is old by the store's own clock."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta

from selfcascade.storage import embedded
from selfcascade.storage.entry import ObjectInfo
from selfcascade.storage.leases import collecting, expired, leased
from selfcascade.storage.manifest import KINDS, MANIFEST, Manifest
from selfcascade.storage.store import Store

VERSIONED = re.compile(r"((?:" + "|".join(KINDS) + r")/[^/]+/[0-9a-f]{64})/(.+)")
BATCH = 500


@dataclass(frozen=True)
class Garbage:
    """One object that may go, and why."""

    key: str
    size: int
    reason: str


@dataclass(frozen=True)
class Upload:
    """An upload in parts that was never completed; its parts take room and are seen by nobody."""

    key: str
    upload_id: str


@dataclass(frozen=True)
class Collection:
    """What a collection would delete."""

    garbage: tuple[Garbage, ...]
    uploads: tuple[Upload, ...]
    leases: tuple[str, ...]
    """Leases of dead processes."""
    kept_leased: tuple[str, ...]
    """Prefixes with garbage that somebody works on."""
    kept_young: int
    """Unreferenced objects within the grace period."""

    @property
    def bytes(self) -> int:
        """Bytes of all objects that would go."""
        return sum(item.size for item in self.garbage)


def plan_collection(store: Store, *, grace: timedelta | None = None, cache: bool = False) -> Collection:
    """Look for garbage; deletes nothing.

    Args:
        store: the store.
        grace: younger objects stay; by default ``store.grace_hours``.
        cache: take what is under ``cache/`` for garbage too.

    Raises:
        IntegrityError: a manifest cannot be read. It may refer to anything, so nothing is garbage for certain.
    """
    grace = timedelta(hours=store.settings.grace_hours) if grace is None else grace
    if store.absent:
        return Collection((), (), (), (), 0)
    now = store.now()
    working = leased(store)
    found = [info for kind in KINDS for info in store.list(f"{kind}/")]
    referenced, published = _referenced(store, found)
    garbage: list[Garbage] = []
    kept_leased: set[str] = set()
    kept_young = 0
    for info in found:
        match = VERSIONED.fullmatch(info.key)
        if match is None or match[2] == MANIFEST or info.key in referenced:
            continue
        if any(f"{match[1]}/".startswith(f"{prefix}/") for prefix in working):
            kept_leased.add(match[1])
        elif now - info.modified < grace:
            kept_young += 1
        else:
            garbage.append(Garbage(info.key, info.size, "in no manifest" if match[1] in published else "of an unfinished run"))
    loose = [(info, "left by a probe") for info in store.list("probe/") if not info.key.endswith(".json")]
    if cache:
        loose += [(info, "cache") for info in store.list("cache/")]
    garbage += [Garbage(info.key, info.size, reason) for info, reason in loose if now - info.modified >= grace]
    return Collection(
        garbage=tuple(sorted(garbage, key=lambda item: item.key)),
        uploads=_uploads(store, now - grace),
        leases=tuple(expired(store)),
        kept_leased=tuple(sorted(kept_leased)),
        kept_young=kept_young,
    )


def collect(store: Store, planned: Collection, *, grace: timedelta | None = None, cache: bool = False) -> Collection:
    """Delete what was planned and is garbage still, after reading leases and manifests once more. Returns what went.

    Raises:
        Conflict: another collector is at work.
    """
    with collecting(store) as collector:
        again = plan_collection(store, grace=grace, cache=cache)
        wanted = {item.key for item in planned.garbage}
        doomed = tuple(item for item in again.garbage if item.key in wanted)
        for first in range(0, len(doomed), BATCH):
            collector.assert_held()
            store.delete([item.key for item in doomed[first : first + BATCH]])
        uploads = tuple(upload for upload in again.uploads if upload in planned.uploads)
        for upload in uploads:
            arguments = {"Bucket": store.bucket, "Key": store.uri(upload.key).split("/", 3)[3], "UploadId": upload.upload_id}
            store.call(upload.key, lambda arguments=arguments: store.client.abort_multipart_upload(**arguments))  # type: ignore[misc]
        store.delete(again.leases)
    if store.is_embedded and doomed:
        embedded.vacuum(store.settings.folder)
    return Collection(doomed, uploads, again.leases, again.kept_leased, again.kept_young)


def _referenced(store: Store, found: list[ObjectInfo]) -> tuple[set[str], set[str]]:
    """Keys that some manifest lists, and prefixes of published artifacts."""
    manifests = [match for info in found if (match := VERSIONED.fullmatch(info.key)) and match[2] == MANIFEST]
    referenced: set[str] = set()

    def read(match: re.Match[str]) -> set[str]:
        manifest = Manifest.from_bytes(store.read(match[0]), where=f"object {store.uri(match[0])}")
        return {f"{entry.source or match[1]}/{entry.key}" for entry in manifest.objects}

    with ThreadPoolExecutor(min(store.settings.connections, 8)) as pool:
        for keys in pool.map(read, manifests):
            referenced |= keys
    return referenced, {match[1] for match in manifests}


def _uploads(store: Store, before: datetime) -> tuple[Upload, ...]:
    root = store.uri("").split("/", 3)[3]
    pages = store.call("", lambda: list(store.client.get_paginator("list_multipart_uploads").paginate(Bucket=store.bucket, Prefix=root)))
    return tuple(Upload(found["Key"][len(root) :], found["UploadId"]) for page in pages for found in page.get("Uploads", []) if found["Initiated"] <= before)
