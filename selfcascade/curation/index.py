"""What a dataset's shards hold, as far as a reader must know before it reads: which samples are of a split, and where they lie."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selfcascade.curation.splits import Split
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, ObjectEntry
from selfcascade.storage.tombstone import tombstone

COLUMNS = ("kept", "split", "offset")
"""Of the tables, where they have them. ``offset`` is the byte of the tar at which a kept sample begins."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One tar. Four bytes a sample, eight more where its table has offsets."""

    name: str
    """Inside the artifact."""
    entry: ObjectEntry
    """Its size and digests as they are now; the key is relative to the store."""
    samples: int
    """In the tar, of all splits."""
    chosen: NDArray[np.uint32]
    """Places in the tar of the samples that are read, ascending."""
    offsets: NDArray[np.int64] | None
    """First byte of every sample of the tar."""


def read_index(artifact: Artifact, split: Split | None) -> list[Shard]:
    """Every shard that holds a sample of ``split`` (None: of any), by number; reads the tables, eight at a time, and no tar.

    Raises:
        NotFound: the artifact is not published, or a tar has no table.
        IntegrityError: a table does not match the manifest; names it.
        SettingsError: there is no sample of the split.
    """
    names = tars_of(artifact)
    with ThreadPoolExecutor(8) as pool:
        found = [shard for shard in pool.map(lambda name: _shard(artifact, name, split), names) if len(shard.chosen)]
    if not found:
        raise SettingsError(f"{artifact} holds no sample of split {split!r}; choose another split, or None for all")
    return found


def tars_of(artifact: Artifact) -> list[str]:
    """Tars of an artifact by their number."""
    return numbered(artifact, ".tar")


def numbered(artifact: Artifact, extension: str) -> list[str]:
    """Objects of one extension by their number: names of more than five digits do not sort as text."""
    names = [entry.key for entry in artifact.manifest().objects if entry.key.endswith(extension)]
    return sorted(names, key=lambda name: (len(name), name))


def read_table_of(artifact: Artifact, tar: str, columns: Sequence[str] | None = None) -> tuple[pa.Table, ObjectEntry]:
    """The table beside a tar, and the tar's entry, both as they are now. Where a removal request rewrote them, the column ``offset`` is empty: what the table
    says of places is about the tar of before.

    Args:
        artifact: a published dataset.
        tar: name of the tar inside the artifact.
        columns: those that are read, where the table has them; unset: all.

    Raises:
        NotFound: the artifact is not published, or the tar has no table.
        IntegrityError: the table does not match the manifest; names it.
    """
    key = tar.removesuffix(".tar") + ".parquet"
    data, entry = artifact.read(key), artifact.entry(tar)
    wanted = None if columns is None else [column for column in columns if column in pq.read_schema(io.BytesIO(data)).names] or None
    table = pq.read_table(io.BytesIO(data), columns=wanted)
    if hashlib.sha256(data).hexdigest() == artifact.entry(key).sha256:
        return table, entry
    stone = tombstone(artifact.store, entry.key)
    if "offset" in table.column_names:
        table = table.set_column(table.column_names.index("offset"), "offset", pa.nulls(table.num_rows, pa.int64()))
    return table, entry if stone is None else stone.entry


def _shard(artifact: Artifact, name: str, split: Split | None) -> Shard:
    table, entry = read_table_of(artifact, name, COLUMNS)
    if split is not None and "split" not in table.column_names:
        raise SettingsError(f"{artifact} has no splits; read it with split=None")
    if "kept" in table.column_names:
        table = table.filter(table["kept"])
    count = table.num_rows
    chosen = np.arange(count) if split is None else np.flatnonzero(np.array(table["split"].to_pylist(), dtype=object) == split)
    offsets = table["offset"].to_numpy() if "offset" in table.column_names and not table["offset"].null_count else None
    return Shard(name, entry, count, chosen.astype(np.uint32), offsets)
