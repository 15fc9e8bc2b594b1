"""What a dataset's shards hold, as far as a reader must know before it reads: which samples are of a split, and where they lie."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
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
    names = [entry.key for entry in artifact.manifest().objects if entry.key.endswith(".tar")]
    names.sort(key=lambda name: (len(name), name))  # names of more than five digits do not sort as text
    with ThreadPoolExecutor(8) as pool:
        found = [shard for shard in pool.map(lambda name: _shard(artifact, name, split), names) if len(shard.chosen)]
    if not found:
        raise SettingsError(f"{artifact} holds no sample of split {split!r}; choose another split, or None for all")
    return found


def _shard(artifact: Artifact, name: str, split: Split | None) -> Shard:
    key = name.removesuffix(".tar") + ".parquet"
    data = artifact.read(key)
    entry = artifact.entry(name)
    rewritten = hashlib.sha256(data).hexdigest() != artifact.entry(key).sha256
    if rewritten:  # by a removal request, and then the tar as well: what the table says of offsets is about the tar of before
        stone = tombstone(artifact.store, entry.key)
        entry = entry if stone is None else stone.entry
    columns = [column for column in COLUMNS if column in pq.read_schema(io.BytesIO(data)).names]
    if split is not None and "split" not in columns:
        raise SettingsError(f"{artifact} has no splits; read it with split=None")
    table = pq.read_table(io.BytesIO(data), columns=columns or None)
    if "kept" in columns:
        table = table.filter(table["kept"])
    count = table.num_rows
    chosen = np.arange(count) if split is None else np.flatnonzero(np.array(table["split"].to_pylist(), dtype=object) == split)
    offsets = table["offset"].to_numpy() if "offset" in columns and not rewritten and not table["offset"].null_count else None
    return Shard(name, entry, count, chosen.astype(np.uint32), offsets)
