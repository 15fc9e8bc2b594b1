"""Shards: the kept pictures in a WebDataset tar, one row for every input in a table beside it, and the counts that close it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from selfcascade.curation import scores
from selfcascade.curation.encoding import FORMATS
from selfcascade.curation.record import Entry, Picture, kind_of
from selfcascade.settings import canonical_json
from selfcascade.storage import IntegrityError

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("split", pa.string()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("picture_sha256", pa.string()),
        ("offset", pa.int64()),
        ("listed", pa.string()),
        *scores.SCHEMA,
    ]
)
"""Columns of a shard's table. ``sha256``, ``width`` and ``height`` describe the input, as far as it was read before it was rejected;
``picture_sha256`` is the stored picture's, and ``offset`` the byte of the tar at which its sample begins; ``listed`` is
:attr:`selfcascade.curation.record.Entry.listed` of the input, by which an increment knows it again. Scores are those of
:mod:`selfcascade.curation.scores`, of every picture that could be decoded, and those of scorers of the user's."""

EXTRA = pa.field("extra", pa.string())
"""Further column of the tables of a source that says more of its inputs than a caption: a JSON object."""


THUMBNAIL = pa.field("thumbnail", pa.binary())
"""Further column of the tables that keep examples: WebP of some of the pictures that were left out (:mod:`selfcascade.curation.examples`)."""


def tar_name(index: int) -> str:
    """Name of the tar of shard ``index``."""
    return f"{index:05d}.tar"


def table_name(index: int) -> str:
    """Name of the table of shard ``index``."""
    return f"{index:05d}.parquet"


def stats_name(index: int) -> str:
    """Name of the counts of shard ``index``: the last object of a unit, so the unit is done when it exists."""
    return f"{index:05d}_stats.json"


def write_tar(path: Path, samples: Iterable[tuple[Entry, Picture, str]]) -> None:
    """Tar of ``<key>.json``, ``<key>.png`` (or .webp, .jpg) and ``<key>.txt`` for each (entry, picture, split), in the order given.

    No clock, no user, no metadata of the source: equal samples give equal bytes. ``samples`` is consumed lazily, one picture at a time.
    """
    # The plain old format: keys fit its names, and nothing in it depends on the machine.
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for entry, picture, split in samples:
            fields = {
                "key": entry.key,
                "source": entry.source,
                "sha256": picture.sha256,
                "width": picture.width,
                "height": picture.height,
                "caption": entry.caption or "",
                "split": split,
                "scores": picture.scores,
            }
            if entry.extra is not None:
                fields["extra"] = entry.extra
            add_member(tar, f"{entry.key}.json", canonical_json(fields))
            add_member(tar, f"{entry.key}.{picture.extension}", picture.data)
            add_member(tar, f"{entry.key}.txt", (entry.caption or "").encode())


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """One sample of a tar."""

    fields: dict[str, Any]
    """Its metadata."""
    data: bytes
    """Its picture as it is stored."""
    extension: str
    """png, webp or jpg."""
    offset: int
    """Byte of the tar at which it begins."""

    def pixels(self) -> NDArray[np.uint8]:
        """The picture, uint8 (H, W, 3), sRGB.

        Raises:
            OSError: it cannot be decoded.
        """
        with Image.open(io.BytesIO(self.data), formats=[FORMATS[self.extension]]) as picture:
            return np.array(picture.convert("RGB"))


def read_tar(file: Path | IO[bytes]) -> Iterator[Stored]:
    """Each sample of a tar that :func:`write_tar` wrote, or of a stretch of one from a sample's begin on, in its order.

    Raises:
        IntegrityError: it is not such a tar.
    """
    fields: dict[str, Any] = {}
    offset = 0
    label = f"shard {file.name}" if isinstance(file, Path) else "shard"
    try:
        with tarfile.open(file, "r:") if isinstance(file, Path) else tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                stem, _, extension = info.name.rpartition(".")
                member = tar.extractfile(info)
                data = b"" if member is None else member.read()
                if extension == "json":
                    fields, offset = json.loads(data), info.offset
                elif extension in FORMATS:
                    if fields.get("key") != stem:
                        raise IntegrityError(f"{label}: {info.name} has no metadata before it")
                    yield Stored(fields, data, extension, offset)
    except (tarfile.TarError, ValueError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{label} is not a tar of samples") from None


def table_bytes(path: Path, rejected: dict[str, dict[str, Any]], listed: Mapping[str, str]) -> bytes:
    """Parquet with a row for every input: kept ones out of the tar at ``path``, the others out of ``rejected``.

    Args:
        path: the tar that the store holds.
        rejected: row by key of each input that was left out.
        listed: of all inputs, in the order of rows, by key.
    """
    rows = {sample.fields["key"]: _row(sample) for sample in read_tar(path)}
    rows = {key: (rows.get(key) or rejected[key]) | {"listed": value} for key, value in listed.items()}
    schema = SCHEMA
    for name in sorted({name for row in rows.values() for name in row.get("scores") or {}} - set(SCHEMA.names)):
        schema = schema.append(pa.field(name, pa.float32()))
    if any(row.get("extra") is not None for row in rows.values()):
        schema = schema.append(EXTRA)
    if any(not row["kept"] and "thumbnail" in row for row in rows.values()):
        schema = schema.append(THUMBNAIL)
    flat = [row | (row.get("scores") or {}) | {"extra": _json(row.get("extra"))} for row in rows.values()]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(flat, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _row(sample: Stored) -> dict[str, Any]:
    return sample.fields | {"kept": True, "reason": None, "picture_sha256": hashlib.sha256(sample.data).hexdigest(), "offset": sample.offset}


def _json(value: Any) -> str | None:
    return None if value is None else canonical_json(value).decode()


def read_table_bytes(data: bytes) -> pa.Table:
    """The table of one shard."""
    return pq.read_table(io.BytesIO(data), schema=SCHEMA)


def counts_of(table: pa.Table) -> dict[str, int]:
    """``inputs``, ``kept``, ``rejected``, kept ones by split, and ``rejected: <kind>`` for each kind of reason."""
    counts: Counter[str] = Counter({"inputs": table.num_rows, "kept": 0, "rejected": 0, "train": 0, "tune": 0, "test": 0})
    for kept, split, reason in zip(*(table.column(name).to_pylist() for name in ("kept", "split", "reason")), strict=True):
        counts.update(["kept", split] if kept else ["rejected", f"rejected: {kind_of(reason)}"])
    return dict(sorted(counts.items()))


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file without clock or owner."""
    info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the names of user and group empty
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))
