"""A removal request: one sample leaves every version and every cache, and a record of it stays.

What happens, in this order, so that a killed purge is finished by running it again:

1. a record under ``purged/records/`` names sample, reason and objects, and the artifacts that were made from the affected ones: weights that
   were trained on a picture and reports that show it are listed there, not changed. Curation rejects recorded samples and equal pictures from then on.
2. shards (``*.tar``), tables (``*.parquet``) and pages (``*.html``) of datasets and samples are read; those that hold the sample are rewritten without it. A
   tombstone is written first: it says which bytes are right from now on. Manifests do not change; ``verify`` reports such an object as purged.
   Units of artifacts that are not published yet are deleted instead; their run makes them again.
3. everything under ``cache/`` is deleted, since latents and previews of the sample may be in it.
4. old versions of the rewritten objects are deleted where the bucket keeps such, and the embedded server is told to give the bytes back.
"""

from __future__ import annotations

import json
import secrets
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfcascade.storage import embedded
from selfcascade.storage.collect import VERSIONED
from selfcascade.storage.entry import entry_of
from selfcascade.storage.errors import NotFound
from selfcascade.storage.figures import holds, without
from selfcascade.storage.leases import Collector, collecting
from selfcascade.storage.manifest import KINDS, MANIFEST, Manifest
from selfcascade.storage.store import Store
from selfcascade.storage.tombstone import RECORDS, Tombstone, tombstone, tombstones

HOLDERS = ("datasets", "samples")


@dataclass(frozen=True)
class Purge:
    """What a removal touches: object keys, by what happens to them."""

    samples: tuple[str, ...]
    contents: tuple[str, ...]
    """SHA-256 of the original pictures, as the tables have it."""
    artifacts: tuple[str, ...]
    """``kind/name`` of what held the samples."""
    rewritten: tuple[str, ...]
    deleted: tuple[str, ...]
    """Objects of unpublished units that hold a sample, with everything that was derived from them."""
    caches: int
    derived: tuple[str, ...]
    """Artifacts made from affected ones; they are not changed."""


def plan_purge(store: Store, samples: Iterable[str], under: str = "") -> Purge:
    """Look for samples by key in shards and tables; changes nothing. Reads every shard.

    Args:
        store: the store.
        samples: keys of samples, as in the ``key`` column of the tables.
        under: ``kind/name`` to search alone, since two sources may use one key for two pictures; all datasets and samples when empty.

    Raises:
        NotFound: nothing holds any of the samples.
    """
    wanted = frozenset(samples)
    if under and not under.startswith(tuple(f"{kind}/" for kind in HOLDERS)):
        raise NotFound(f"{under!r} cannot hold samples; write {' or '.join(f'{kind}/NAME' for kind in HOLDERS)}")
    found = {info.key for place in ([under] if under else HOLDERS) for info in store.list(f"{place.strip('/')}/")}
    published = {key.removesuffix(f"/{MANIFEST}") for key in found if key.endswith(f"/{MANIFEST}")}
    rewritten: list[str] = []
    deleted: set[str] = set()
    contents: set[str] = set()
    for key in sorted(found):
        match = VERSIONED.fullmatch(key)
        if match is None or not key.endswith((".tar", ".parquet", ".html")):
            continue
        holds, originals = _look(store, key, wanted)
        if not holds:
            continue
        contents |= originals
        if match[1] in published:
            rewritten.append(key)
        else:
            deleted |= {other for other in found if other.startswith((f"{_unit(key)}.", f"{_unit(key)}_"))}
    before = {stone.key for stone in tombstones(store) if wanted & set(stone.samples)} & found  # of a purge that was killed, or of an equal one
    if not rewritten and not deleted and not before:
        raise NotFound(f"no dataset and no samples in {store.uri(under)} hold {', '.join(sorted(wanted))}; keys are in the key column of the tables")
    rewritten = sorted({*rewritten, *before})
    touched = {key.rpartition("/")[0] for key in rewritten}
    caches = sum(1 for _ in store.list("cache/"))
    return Purge(
        samples=tuple(sorted(wanted)),
        contents=tuple(sorted(contents)),
        artifacts=tuple(sorted({"/".join(key.split("/")[:2]) for key in (*rewritten, *deleted)})),
        rewritten=tuple(rewritten),
        deleted=tuple(sorted(deleted)),
        caches=caches,
        derived=_derived(store, touched),
    )


def purge(store: Store, planned: Purge, *, reason: str) -> str:
    """Carry a plan out. Returns the key of the record.

    Raises:
        Conflict: a gc or another purge is at work.
    """
    with collecting(store) as collector:
        record = _record(store, planned, reason)
        for key in planned.rewritten:
            _rewrite(store, key, frozenset(planned.samples), collector)
        doomed = [*planned.deleted, *(info.key for info in store.list("cache/"))]
        collector.assert_held()
        store.delete(doomed)
        for key in [*planned.rewritten, *doomed]:
            _delete_old_versions(store, key)
    if store.is_embedded:
        embedded.vacuum(store.settings.folder)
    return record


def _record(store: Store, planned: Purge, reason: str) -> str:
    moment = store.now()
    key = f"{RECORDS}{moment:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}.json"
    tree = {
        "samples": planned.samples,
        "contents": planned.contents,
        "artifacts": planned.artifacts,
        "reason": reason,
        "when": moment.isoformat(),
        "rewritten": planned.rewritten,
        "deleted": planned.deleted,
        "caches": planned.caches,
        "derived": planned.derived,
    }
    store.put_cache(key, json.dumps(tree, sort_keys=True, indent=1).encode())
    return key


def _look(store: Store, key: str, samples: frozenset[str]) -> tuple[bool, set[str]]:
    """Whether a shard, table or page holds one of the samples, and the digests of the originals that a table gives."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(key).name
        store.download(key, path)
        if path.suffix == ".parquet":
            rows = _rows(path, samples)
            return bool(rows), {str(row["sha256"]) for row in rows if row.get("sha256")}
        if path.suffix == ".html":
            return holds(path.read_bytes(), samples), set()
        with tarfile.open(path) as archive:
            return any(_sample_of(name) in samples for name in archive.getnames()), set()


def _rewrite(store: Store, key: str, samples: frozenset[str], collector: Collector) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, changed = Path(folder) / Path(key).name, Path(folder) / f"new-{Path(key).name}"
        store.download(key, path)
        if path.suffix == ".parquet":
            changed.write_bytes(_table_without(path, samples))
        elif path.suffix == ".html":
            changed.write_bytes(without(path.read_bytes(), samples))
        else:
            with tarfile.open(path) as archive, tarfile.open(changed, "w", format=tarfile.USTAR_FORMAT) as result:
                for member in archive:
                    if _sample_of(member.name) not in samples:
                        result.addfile(member, archive.extractfile(member))
        entry = entry_of(key, changed)
        before = tombstone(store, key) or Tombstone(key, (), ())
        entries = before.entries if entry in before.entries[-1:] else (*before.entries, entry)
        collector.assert_held()
        Tombstone(key, entries, tuple(sorted({*before.samples, *samples}))).write(store)
        store.overwrite(key, changed)


def _rows(path: Path, samples: frozenset[str]) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    names = [name for name in ("key", "sha256") if name in pq.read_schema(path).names]
    rows: list[dict[str, Any]] = pq.read_table(path, columns=names).to_pylist() if "key" in names else []
    return [row for row in rows if row["key"] in samples]


def _table_without(path: Path, samples: frozenset[str]) -> bytes:
    """The table without the rows of the samples, as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    kept = [number for number, key in enumerate(table["key"].to_pylist()) if key not in samples]
    sink = pa.BufferOutputStream()
    pq.write_table(table.take(kept), sink)
    return bytes(sink.getvalue())


def _derived(store: Store, touched: set[str]) -> tuple[str, ...]:
    """Artifacts whose inputs, directly or through others, are among ``touched`` (prefixes)."""
    versions = {prefix.rsplit("/", 1)[1] for prefix in touched}
    manifests = [
        Manifest.from_bytes(store.read(info.key), where=f"object {store.uri(info.key)}")
        for kind in KINDS
        for info in store.list(f"{kind}/")
        if info.key.endswith(f"/{MANIFEST}")
    ]
    found: dict[str, str] = {}
    grew = True
    while grew:
        grew = False
        for manifest in manifests:
            if manifest.version not in found and any(version in value for value in manifest.inputs.values() for version in versions | set(found)):
                found[manifest.version] = f"{manifest.kind}/{manifest.name}@{manifest.version[:12]}"
                grew = True
    return tuple(sorted(found.values()))


def _delete_old_versions(store: Store, key: str) -> None:
    """A bucket with versioning keeps what was overwritten or deleted; there it has to go as well."""
    state = store.call("", lambda: store.client.get_bucket_versioning(Bucket=store.bucket))
    if not state.get("Status"):
        return
    full = store.uri(key).split("/", 3)[3]
    pages = store.call(key, lambda: list(store.client.get_paginator("list_object_versions").paginate(Bucket=store.bucket, Prefix=full)))
    for page in pages:
        for version in page.get("Versions", []):
            if version["Key"] == full and not version["IsLatest"]:
                arguments = {"Bucket": store.bucket, "Key": full, "VersionId": version["VersionId"]}
                store.call(key, lambda arguments=arguments: store.client.delete_object(**arguments))  # type: ignore[misc]


def _sample_of(member: str) -> str:
    """WebDataset's rule: the key ends at the first dot of the file name."""
    return member.rpartition("/")[2].partition(".")[0]


def _unit(key: str) -> str:
    folder, _, name = key.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"
