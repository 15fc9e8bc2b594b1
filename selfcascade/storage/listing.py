"""What is published in a store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from selfcascade.storage import pointer
from selfcascade.storage.artifact import Artifact, reference
from selfcascade.storage.collect import VERSIONED
from selfcascade.storage.entry import ObjectInfo
from selfcascade.storage.errors import NotFound
from selfcascade.storage.manifest import KINDS, MANIFEST, ArtifactRef
from selfcascade.storage.store import Store


@dataclass(frozen=True)
class Row:
    """One published artifact."""

    ref: ArtifactRef
    published: datetime
    """By the store's clock."""
    is_latest: bool
    objects: int
    bytes: int
    counts: dict[str, int | float | str]


def listing(store: Store, under: str = "") -> list[Row]:
    """Published artifacts, by kind and name, oldest first.

    Args:
        store: the store.
        under: a kind or ``kind/name``; all when empty.

    Raises:
        NotFound: there is no such kind.
    """
    kind, _, name = under.partition("/")
    if kind and kind not in KINDS:
        raise NotFound(f"{kind!r} is no kind of artifact; there are {', '.join(KINDS)}")
    found = []
    for each in [kind] if kind else KINDS:
        for info in store.list(f"{each}/{name}/" if name else f"{each}/"):
            if (match := VERSIONED.fullmatch(info.key)) and match[2] == MANIFEST:
                found.append((match[1], info))
    latest = {base: pointer.latest(store, base) for base in {prefix.rpartition("/")[0] for prefix, _ in found}}

    def row(item: tuple[str, ObjectInfo]) -> Row:
        prefix, info = item
        base, _, version = prefix.rpartition("/")
        at = base.partition("/")
        ref = reference(store, at[0], at[2], version)  # type: ignore[arg-type]
        manifest = Artifact(store, ref).manifest()
        pointed = latest[base]
        is_latest = pointed is not None and pointed.version == version
        return Row(ref, info.modified, is_latest, len(manifest.objects), sum(entry.size for entry in manifest.objects), manifest.counts)

    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(row, found))
    return sorted(rows, key=lambda row: (row.ref.kind, row.ref.name, row.published, row.ref.version))
