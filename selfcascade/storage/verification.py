"""Whether an artifact holds what its manifest lists: every object read and compared, nothing trusted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from selfcascade.storage.artifact import Artifact
from selfcascade.storage.entry import ObjectEntry, entry_of
from selfcascade.storage.errors import NotFound
from selfcascade.storage.tombstone import tombstone

State = Literal["sound", "purged", "missing", "corrupt"]


@dataclass(frozen=True)
class Finding:
    """What became of one object. ``purged`` is a rewritten object whose bytes are the right ones after a removal request."""

    key: str
    state: State
    detail: str

    @property
    def is_sound(self) -> bool:
        """Whether a consumer may read the object."""
        return self.state in ("sound", "purged")


def verify(artifact: Artifact, *, progress: Callable[[int], None] | None = None) -> list[Finding]:
    """Read every object of a published artifact, streaming, and compare size, SHA-256 and the digest of each block.

    Args:
        artifact: a published artifact.
        progress: called with the number of bytes of each object that was read.

    Returns:
        One finding an object, in the order of the manifest.
    """

    def check(entry: ObjectEntry) -> Finding:
        finding = _check(artifact, entry)
        if progress is not None:
            progress(entry.size)
        return finding

    with ThreadPoolExecutor(min(artifact.store.settings.connections, 4)) as pool:
        return list(pool.map(check, artifact.manifest().objects))


def _check(artifact: Artifact, entry: ObjectEntry) -> Finding:
    committed = artifact.entry(entry.key)
    try:
        found = entry_of(committed.key, artifact.store.stream(committed.key))
    except NotFound:
        return Finding(entry.key, "missing", f"object {artifact.store.uri(committed.key)} does not exist")
    if found.same_bytes(committed):
        return Finding(entry.key, "sound", "")
    replaced = tombstone(artifact.store, committed.key)
    if replaced is not None and found.same_bytes(replaced.entry):
        return Finding(entry.key, "purged", f"{len(replaced.samples)} samples were removed on request")
    blocks = [number for number, (one, other) in enumerate(zip(found.blocks, committed.blocks, strict=False)) if one != other]
    where = f"{found.size} bytes instead of {committed.size}" if found.size != committed.size else f"block {blocks[0]} differs"
    return Finding(entry.key, "corrupt", f"object {artifact.store.uri(committed.key)}: {where}")
