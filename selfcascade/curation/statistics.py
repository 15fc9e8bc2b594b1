"""Statistics of a dataset: counts, histograms of what its tables hold, examples of each rejection, and a sample of its pictures; in bounded memory."""

from __future__ import annotations

import hashlib
import heapq
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from selfcascade.curation.encoding import FORMATS
from selfcascade.curation.reading import read_rows
from selfcascade.curation.record import kind_of
from selfcascade.storage import Artifact

EXAMPLES = 5
"""Rows that are shown of each kind of rejection."""
THUMBNAIL = 128
"""Longer side of a picture on the page, in pixels."""


@dataclass(slots=True)
class Histogram:
    """How often values fall between fixed edges, the same for every dataset, so that two pages can be laid side by side; the outer bins are open."""

    title: str
    edges: NDArray[np.float64]
    logarithmic: bool
    kept: NDArray[np.int64] = field(init=False)
    rejected: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = np.zeros(len(self.edges) - 1, np.int64)
        self.rejected = np.zeros(len(self.edges) - 1, np.int64)

    def add(self, values: NDArray[np.float64], kept: NDArray[np.bool_]) -> None:
        """Count ``values``, (N,), NaN where a row has none."""
        places = np.clip(np.searchsorted(self.edges, values, side="right") - 1, 0, len(self.edges) - 2)
        known = ~np.isnan(values)
        self.kept += np.bincount(places[known & kept], minlength=len(self.kept))
        self.rejected += np.bincount(places[known & ~kept], minlength=len(self.kept))

    @property
    def total(self) -> int:
        """Values in all."""
        return int(self.kept.sum() + self.rejected.sum())


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture of the sample."""

    key: str
    caption: str
    split: str
    webp: bytes


@dataclass(frozen=True, slots=True)
class Example:
    """A rejected input."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the page of a dataset shows."""

    name: str
    """The artifact with its version."""
    inputs: int
    kept: int
    splits: dict[str, int]
    reasons: dict[str, int]
    """Rejected inputs by kind of reason, most first."""
    examples: dict[str, list[Example]]
    histograms: list[Histogram]
    pictures: list[Shown]


def statistics_of(artifact: Artifact, *, pictures: int = 48) -> Statistics:
    """Read every table, and as many ``pictures``, whose keys' SHA-256 are the smallest: a sample that depends on nothing else.

    Raises:
        NotFound: the artifact is not published.
        IntegrityError: an object does not match its manifest; names it.
    """
    histograms = {name: Histogram(title, edges, logarithmic) for name, (title, edges, logarithmic, _) in COLUMNS.items()}
    splits: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    examples: dict[str, list[Example]] = {}
    chosen: list[tuple[bytes, int, str]] = []
    inputs = 0
    for shard, table in read_rows(artifact):
        inputs += table.num_rows
        kept = np.asarray(table["kept"].to_numpy(zero_copy_only=False), bool)
        for name, (_, _, _, values) in COLUMNS.items():
            found = values(table)
            if found is not None:
                histograms[name].add(found, kept)
        keys = table["key"].to_pylist()
        splits.update(np.array(table["split"].to_pylist(), object)[kept].tolist())
        for place in np.flatnonzero(~kept).tolist():
            reason = table["reason"][place].as_py()
            kind = kind_of(reason)
            reasons[kind] += 1
            if len(examples.setdefault(kind, [])) < EXAMPLES:
                examples[kind].append(Example(table["source"][place].as_py(), reason))
        # The smallest digests: the first of the heap is the largest that is still in.
        for place in np.flatnonzero(kept).tolist():
            entry = (bytes(255 - byte for byte in hashlib.sha256(keys[place].encode()).digest()), shard, keys[place])
            heapq.heappush(chosen, entry) if len(chosen) < pictures else heapq.heappushpop(chosen, entry)
    return Statistics(
        name=str(artifact),
        inputs=inputs,
        kept=sum(splits.values()),
        splits=dict(sorted(splits.items())),
        reasons=dict(reasons.most_common()),
        examples=examples,
        histograms=[histogram for histogram in histograms.values() if histogram.total],
        pictures=_pictures(artifact, {(shard, key) for _, shard, key in chosen}),
    )


def _pictures(artifact: Artifact, wanted: set[tuple[int, str]]) -> list[Shown]:
    """Thumbnails in key order; a sample is read by its place in the tar, or out of the whole tar where the table does not say."""
    shown: list[Shown] = []
    by_shard: dict[int, list[str]] = {}
    for shard, key in wanted:
        by_shard.setdefault(shard, []).append(key)
    tables = {shard: table for shard, table in read_rows(artifact) if shard in by_shard} if by_shard else {}
    for shard, keys in by_shard.items():
        table, name = tables[shard], f"{shard:05d}.tar"
        size = artifact.entry(name).size
        offsets = table["offset"].to_pylist() if "offset" in table.column_names else [None] * table.num_rows
        begins = sorted(offset for offset in offsets if offset is not None)
        for place, key in enumerate(table["key"].to_pylist()):
            if key not in keys:
                continue
            begin = offsets[place] or 0
            end = size if offsets[place] is None else next((offset for offset in begins if offset > begin), size)
            found = _thumbnail(artifact.read_range(name, begin, end), key)
            if found is not None:
                shown.append(Shown(key, table["caption"][place].as_py() or "", table["split"][place].as_py(), found))
    return sorted(shown, key=lambda each: each.key)


def _thumbnail(data: bytes, key: str) -> bytes | None:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", ignore_zeros=True) as tar:
        for member in tar:
            stem, _, extension = member.name.rpartition(".")
            if stem == key and extension in FORMATS:
                stream = tar.extractfile(member)
                assert stream is not None
                with Image.open(io.BytesIO(stream.read()), formats=[FORMATS[extension]]) as image:
                    small = image.convert("RGB")
                small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                small.save(buffer, "WEBP", quality=80)
                return buffer.getvalue()
    return None


def _numbers(values: Iterable[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _column(name: str) -> Callable[[pa.Table], NDArray[np.float64] | None]:
    return lambda table: _numbers(table[name].to_pylist()) if name in table.column_names else None


def _shorter(table: pa.Table) -> NDArray[np.float64]:
    return np.minimum(_numbers(table["width"].to_pylist()), _numbers(table["height"].to_pylist()))


def _aspect(table: pa.Table) -> NDArray[np.float64]:
    return _numbers(table["width"].to_pylist()) / _numbers(table["height"].to_pylist())


def _characters(table: pa.Table) -> NDArray[np.float64]:
    return _numbers(None if caption is None else len(caption) for caption in table["caption"].to_pylist())


COLUMNS: dict[str, tuple[str, NDArray[np.float64], bool, Callable[[pa.Table], NDArray[np.float64] | None]]] = {
    "shorter": ("shorter side of the source, pixels", np.geomspace(32, 8192, 33), True, _shorter),
    "aspect": ("width over height", np.geomspace(0.25, 4, 33), True, _aspect),
    "caption": ("characters of the caption", np.linspace(0, 320, 33), False, _characters),
    "bytes_per_pixel": ("bytes a pixel of the file", np.geomspace(0.01, 10, 31), True, _column("bytes_per_pixel")),
    "sharpness": ("sharpness", np.geomspace(1, 1e5, 31), True, _column("sharpness")),
    "entropy": ("entropy, bits", np.linspace(0, 8, 33), False, _column("entropy")),
    "deviation": ("standard deviation, levels", np.linspace(0, 128, 33), False, _column("deviation")),
    "border": ("share of even bars", np.linspace(0, 1, 26), False, _column("border")),
}
"""Title, edges, whether they grow by a factor, and how a table gives the values."""
