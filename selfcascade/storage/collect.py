"""Garbage collection: what no manifest refers to, nobody works on, and is old by the store's own clock; by rules, whole published artifacts, too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from selfcascade.storage import embedded, pointer
from selfcascade.storage.entry import ObjectInfo
from selfcascade.storage.leases import collecting, expired, leased
from selfcascade.storage.manifest import KINDS, MANIFEST, Manifest
from selfcascade.storage.retention import Published, Retirement, Rules, retire
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
    retired: tuple[str, ...] = ()
    """Prefixes of published artifacts that go by the rules, in the order in which they go; their objects are among the garbage."""
    needed: tuple[str, ...] = ()
    """Prefixes that no rule keeps, but an artifact that stays refers to them."""
    at_work: tuple[str, ...] = ()
    """Prefixes that somebody works under, where for that reason nothing published goes: a lease does not say what its run reads."""

    @property
    def bytes(self) -> int:
        """Bytes of all objects that would go."""
        return sum(item.size for item in self.garbage)


def plan_collection(
    store: Store, *, grace: timedelta | None = None, cache: bool = False, rules: Rules | None = None, only: Set[str] | None = None
) -> Collection:
    """Look for garbage; deletes nothing.

    Args:
        store: the store.
        grace: younger objects stay; by default ``store.grace_hours``.
        cache: take what is under ``cache/`` for garbage too.
        rules: by which published artifacts go; by default none does.
        only: prefixes of published artifacts of which alone some may go.

    Raises:
        IntegrityError: a manifest cannot be read. It may refer to anything, so nothing is garbage for certain.
    """
    grace = timedelta(hours=store.settings.grace_hours) if grace is None else grace
    if store.absent:
        return Collection((), (), (), (), 0)
    now = store.now()
    working = leased(store)
    found = [info for kind in KINDS for info in store.list(f"{kind}/")]
    manifests = _manifests(store, found)
    going = Retirement((), ())
    if rules is not None and not working:
        going = retire(_as_published(store, manifests, found), rules, now=now, grace=grace, only=only)
    retired = set(going.retired)
    referenced = {f"{entry.source or prefix}/{entry.key}" for prefix, manifest in manifests.items() if prefix not in retired for entry in manifest.objects}
    garbage: list[Garbage] = []
    kept_leased: set[str] = set()
    kept_young = 0
    for info in found:
        match = VERSIONED.fullmatch(info.key)
        if match is None or info.key in referenced:
            continue
        if match[1] in retired:
            garbage.append(Garbage(info.key, info.size, "retired by the rules"))
        elif match[2] == MANIFEST:
            continue
        elif any(f"{match[1]}/".startswith(f"{prefix}/") for prefix in working):
            kept_leased.add(match[1])
        elif now - info.modified < grace:
            kept_young += 1
        else:
            garbage.append(Garbage(info.key, info.size, "in no manifest" if match[1] in manifests else "of an unfinished run"))
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
        retired=going.retired,
        needed=going.needed,
        at_work=tuple(sorted(working)) if rules is not None else (),
    )


def collect(store: Store, planned: Collection, *, grace: timedelta | None = None, cache: bool = False, rules: Rules | None = None) -> Collection:
    """Delete what was planned and is garbage still, after reading leases and manifests once more. Returns what went.

    Of a published artifact the manifest goes first, and artifacts go before what they refer to: a collection that is killed leaves no artifact incomplete.

    Raises:
        Conflict: another collector is at work.
    """
    with collecting(store) as collector:
        again = plan_collection(store, grace=grace, cache=cache, rules=rules, only=set(planned.retired))
        wanted = {item.key for item in planned.garbage}
        doomed = tuple(item for item in again.garbage if item.key in wanted)
        for prefix in again.retired:
            collector.assert_held()
            store.delete([f"{prefix}/{MANIFEST}"])
        rest = [item.key for item in doomed if item.key not in {f"{prefix}/{MANIFEST}" for prefix in again.retired}]
        for first in range(0, len(rest), BATCH):
            collector.assert_held()
            store.delete(rest[first : first + BATCH])
        uploads = tuple(upload for upload in again.uploads if upload in planned.uploads)
        for upload in uploads:
            arguments = {"Bucket": store.bucket, "Key": store.uri(upload.key).split("/", 3)[3], "UploadId": upload.upload_id}
            store.call(upload.key, lambda arguments=arguments: store.client.abort_multipart_upload(**arguments))  # type: ignore[misc]
        store.delete(again.leases)
    if store.is_embedded and doomed:
        embedded.vacuum(store.settings.folder)
    return replace(again, garbage=doomed, uploads=uploads)


def _manifests(store: Store, found: list[ObjectInfo]) -> dict[str, Manifest]:
    """Every manifest by the prefix of its artifact."""
    prefixes = [match[1] for info in found if (match := VERSIONED.fullmatch(info.key)) and match[2] == MANIFEST]

    def read(prefix: str) -> Manifest:
        key = f"{prefix}/{MANIFEST}"
        return Manifest.from_bytes(store.read(key), where=f"object {store.uri(key)}")

    with ThreadPoolExecutor(min(store.settings.connections, 8)) as pool:
        return dict(zip(prefixes, pool.map(read, prefixes), strict=True))


def _as_published(store: Store, manifests: Mapping[str, Manifest], found: list[ObjectInfo]) -> list[Published]:
    moments = {info.key: info.modified for info in found}
    pointed: set[str] = set()
    for base in {prefix.rpartition("/")[0] for prefix in manifests}:
        latest = pointer.latest(store, base)
        pointed |= {f"{base}/{version}" for version in pointer.sequences(store, base).pending}
        if latest is not None:
            pointed.add(f"{base}/{latest.version}")
    return [Published.of(manifest, prefix, moments[f"{prefix}/{MANIFEST}"], pointed=prefix in pointed) for prefix, manifest in manifests.items()]


def _uploads(store: Store, before: datetime) -> tuple[Upload, ...]:
    root = store.uri("").split("/", 3)[3]
    pages = store.call("", lambda: list(store.client.get_paginator("list_multipart_uploads").paginate(Bucket=store.bucket, Prefix=root)))
    return tuple(Upload(found["Key"][len(root) :], found["UploadId"]) for page in pages for found in page.get("Uploads", []) if found["Initiated"] <= before)
