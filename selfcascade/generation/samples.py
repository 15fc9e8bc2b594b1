"""Shards of samples: pictures with what made them in a tar, one row for each in a table that is derived from that tar."""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selfcascade.curation.ahead import PICTURES, mapped
from selfcascade.curation.encoding import encode
from selfcascade.curation.shards import Stored, add_member, read_tar
from selfcascade.generation.seeds import SampleSpec
from selfcascade.settings import canonical_json
from selfcascade.storage import Artifact

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("index", pa.int64()),
        ("seed", pa.int64()),
        ("height", pa.int64()),
        ("width", pa.int64()),
        ("method", pa.string()),
        ("settings", pa.string()),
        ("sha256", pa.string()),
    ]
)
"""Columns of a shard's table: ``settings`` is the digest of the settings, ``sha256`` that of the PNG."""

ENCODERS = 4
"""Threads that encode pictures."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One picture and what it was made from."""

    spec: SampleSpec
    image: NDArray[np.uint8]
    """(H, W, 3)"""

    @property
    def key(self) -> str:
        """The sample's key, unique in its artifact and equal for every method."""
        return self.spec.key

    @property
    def prompt(self) -> str:
        """Text of the prompt."""
        return self.spec.prompt

    @property
    def seed(self) -> int:
        """Seed of the sample's generator."""
        return self.spec.seed


def write_shard(path: Path, samples: Iterable[Sample], *, method: str, settings: str, ahead: int = 1) -> int:
    """Tar at ``path`` with ``<key>.json`` and ``<key>.png`` of every sample, in the order given; WebDataset reads it. Returns how many there are.

    Args:
        path: file to write.
        samples: consumed lazily and in this thread, while other threads encode those before.
        method: name of the method.
        settings: digest of the settings.
        ahead: pictures that are held at a time. One more than a batch: a batch is encoded while the next one is sampled.
    """
    count = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample, png in mapped(_encoded, samples, threads=min(ahead, ENCODERS), ahead=ahead):
            height, width, _ = sample.image.shape
            spec = sample.spec
            fields = {
                "key": spec.key,
                "prompt_id": spec.prompt_id,
                "prompt": spec.prompt,
                "negative_prompt": spec.negative_prompt,
                "index": spec.index,
                "seed": spec.seed,
                "height": height,
                "width": width,
                "method": method,
                "settings": settings,
            }
            add_member(tar, f"{spec.key}.json", canonical_json(fields))
            add_member(tar, f"{spec.key}.png", png)
            count += 1
    return count


def _encoded(sample: Sample) -> tuple[Sample, bytes]:
    return sample, encode(sample.image, "png")[0]


def shard_table(path: Path) -> bytes:
    """Parquet table of the tar at ``path``, one row a picture in the order of the tar: a function of the tar's bytes alone."""
    rows = [stored.fields | {"sha256": hashlib.sha256(stored.data).hexdigest()} for stored in read_tar(path)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def read_generated(artifact: Artifact, keys: Set[str] | None = None) -> Iterator[Sample]:
    """Samples of a published artifact in key order, one shard on disk at a time, every object verified against the manifest.

    With ``keys`` only these samples; shards without any are not fetched. A few pictures ahead of the one that was asked for are decoded by threads.

    Raises:
        NotFound: the artifact is not published.
        IntegrityError: an object does not match its manifest; names it.
    """
    with tempfile.TemporaryDirectory(prefix="selfcascade-") as folder:
        for key in _shards(artifact, ".tar"):
            if keys is not None and keys.isdisjoint(_table(artifact, key.removesuffix(".tar") + ".parquet")["key"].to_pylist()):
                continue
            path = Path(folder, "shard.tar")
            artifact.download(key, path)
            yield from mapped(_decoded, (stored for stored in read_tar(path) if keys is None or stored.fields["key"] in keys), ahead=PICTURES)


def read_table(artifact: Artifact) -> pa.Table:
    """All rows of a published artifact in key order, without its pictures. Raises as :func:`read_generated`."""
    tables = [_table(artifact, key) for key in _shards(artifact, ".parquet")]
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def _decoded(stored: Stored) -> Sample:
    spec = SampleSpec(**{name: stored.fields[name] for name in SampleSpec.__slots__})
    return Sample(spec=spec, image=stored.pixels())


def _table(artifact: Artifact, key: str) -> pa.Table:
    return pq.read_table(io.BytesIO(artifact.read(key)), schema=SCHEMA)


def _shards(artifact: Artifact, extension: str) -> list[str]:
    """Objects by the number of their shard: names of more than five digits do not sort as text."""
    keys = [entry.key for entry in artifact.manifest().objects if entry.key.endswith(extension)]
    return sorted(keys, key=lambda key: int(key.removesuffix(extension)))
