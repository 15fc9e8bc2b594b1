"""Reading a published dataset: pictures shard by shard, or the table of everything that went in."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selfcascade.curation import shards
from selfcascade.curation.ahead import PICTURES, mapped
from selfcascade.curation.index import numbered, tars_of
from selfcascade.curation.splits import Split
from selfcascade.storage import Artifact


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One picture of a dataset."""

    key: str
    image: NDArray[np.uint8]
    """(H, W, 3), sRGB; a square unless the dataset keeps shapes."""
    caption: str
    split: Split


def read_samples(artifact: Artifact, split: Split | None = None) -> Iterator[Sample]:
    """Samples in key order, of one split or of all; one shard is on disk at a time, and every object is checked against the manifest.

    A few pictures ahead of the one that was asked for are decoded by threads.

    Raises:
        NotFound: the artifact is not published.
        IntegrityError: an object does not match its manifest; names it.
    """
    names = tars_of(artifact)
    with tempfile.TemporaryDirectory(prefix="selfcascade-") as folder:
        for name in names:
            path = Path(folder, name)
            artifact.download(name, path)
            chosen = (stored for stored in shards.read_tar(path) if split is None or stored.fields["split"] == split)
            yield from mapped(_decoded, chosen, ahead=PICTURES)
            path.unlink()


def read_table(artifact: Artifact) -> pa.Table:
    """Every row of every shard in key order, rejected inputs with their reason; columns as in :data:`selfcascade.curation.shards.SCHEMA`.

    Raises:
        NotFound: the artifact is not published.
        IntegrityError: an object does not match its manifest; names it.
    """
    tables = [shards.read_table_bytes(artifact.read(name)) for name in numbered(artifact, ".parquet")]
    return pa.concat_tables(tables) if tables else shards.SCHEMA.empty_table()


def read_rows(artifact: Artifact) -> Iterator[tuple[int, pa.Table]]:
    """Number and table of each shard, with all columns that it has, those of scorers and sources too; one is in memory at a time. Raises as above."""
    for name in numbered(artifact, ".parquet"):
        yield int(name.removesuffix(".parquet")), pq.read_table(io.BytesIO(artifact.read(name)))


def _decoded(stored: shards.Stored) -> Sample:
    fields = stored.fields
    return Sample(fields["key"], stored.pixels(), fields["caption"], fields["split"])
