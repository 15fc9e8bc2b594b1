"""Statistics of a dataset: counts, histograms of what its tables hold, examples of each rejection, and a sample of its pictures; in bounded memory."""

from __future__ import annotations

import heapq
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfcascade.curation.examples import thumbnail, turned
from selfcascade.curation.index import read_table_of, tars_of
from selfcascade.curation.record import kind_of
from selfcascade.curation.shards import read_tar
from selfcascade.storage import Artifact, ObjectEntry

EXAMPLES = 5
"""Rows that are shown of each kind of rejection."""


@dataclass(slots=True)
class Histogram:
    """How often values fall between fixed edges, the same for every dataset, so that two pages can be laid side by side; the outer bins are open."""

    title: str
    edges: NDArray[np.float64]
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

    key: str
    source: str
    reason: str
    webp: bytes | None
    """What it looks like, where that was kept."""

    @property
    def found(self) -> str:
        """What was found of it: the reason without its kind, which others share, and without the setting."""
        return self.reason.partition(": ")[2].partition(", filters.")[0]


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
    histograms = {name: Histogram(title, edges) for name, (title, edges, _) in COLUMNS.items()}
    splits: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    examples: dict[str, list[tuple[bool, bytes, Example]]] = {}
    chosen: list[tuple[bytes, _Place]] = []
    inputs = 0
    for tar in tars_of(artifact):
        table, tar_entry = read_table_of(artifact, tar)
        inputs += table.num_rows
        kept = np.asarray(table["kept"].to_numpy(zero_copy_only=False), bool)
        for name, (_, _, values) in COLUMNS.items():
            found = values(table)
            if found is not None:
                histograms[name].add(found, kept)
        splits.update(np.array(table["split"].to_pylist(), object)[kept].tolist())
        small = table["thumbnail"] if "thumbnail" in table.column_names else None
        for place in np.flatnonzero(~kept).tolist():
            reason = table["reason"][place].as_py()
            kind = kind_of(reason)
            reasons[kind] += 1
            example = Example(table["key"][place].as_py(), table["source"][place].as_py(), reason, small[place].as_py() if small else None)
            # Those that can be shown first, then the smallest digests: neither depends on the length of shards.
            _keep(examples.setdefault(kind, []), (example.webp is not None, turned(example.key), example), EXAMPLES)
        for lying in _places(tar_entry, table.filter(table["kept"])):
            _keep(chosen, (turned(lying.key), lying), pictures)
    return Statistics(
        name=str(artifact),
        inputs=inputs,
        kept=sum(splits.values()),
        splits=dict(sorted(splits.items())),
        reasons=dict(reasons.most_common()),
        examples={kind: sorted((example for *_, example in chosen), key=lambda example: example.key) for kind, chosen in examples.items()},
        histograms=[histogram for histogram in histograms.values() if histogram.total],
        pictures=[_shown(artifact, place) for place in sorted(place for _, place in chosen)],
    )


@dataclass(frozen=True, order=True)
class _Place:
    """Where the sample of a key lies: bytes ``start`` to ``stop`` of a tar, or somewhere in there."""

    key: str
    caption: str = field(compare=False)
    split: str = field(compare=False)
    tar: ObjectEntry = field(compare=False)
    start: int = field(compare=False)
    stop: int = field(compare=False)


def _places(tar: ObjectEntry, kept: pa.Table) -> Iterator[_Place]:
    """Where each kept sample of a table lies; in the whole tar, where the table does not say."""
    keys, captions, splits = (kept[name].to_pylist() for name in ("key", "caption", "split"))
    known = "offset" in kept.column_names and not kept["offset"].null_count
    starts = kept["offset"].to_pylist() if known else [0] * len(keys)
    stops = [*starts[1:], tar.size][: len(keys)] if known else [tar.size] * len(keys)
    for row in zip(keys, captions, splits, starts, stops, strict=True):
        key, caption, split, start, stop = row
        yield _Place(key, caption or "", split, tar, start, stop)


def _shown(artifact: Artifact, place: _Place) -> Shown:
    data = bytes(artifact.store.read_range(place.tar, place.start, place.stop))
    stored = next(sample for sample in read_tar(io.BytesIO(data)) if sample.fields["key"] == place.key)
    return Shown(place.key, place.caption, place.split, thumbnail(stored.pixels()))


def _keep(chosen: list[Any], item: tuple[Any, ...], count: int) -> None:
    """The ``count`` largest items that were offered stay in the heap ``chosen``."""
    heapq.heappush(chosen, item) if len(chosen) < count else heapq.heappushpop(chosen, item)


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


COLUMNS: dict[str, tuple[str, NDArray[np.float64], Callable[[pa.Table], NDArray[np.float64] | None]]] = {
    "shorter": ("shorter side of the source, pixels", np.geomspace(32, 8192, 33), _shorter),
    "aspect": ("width over height", np.geomspace(0.25, 4, 33), _aspect),
    "caption": ("characters of the caption", np.linspace(0, 320, 33), _characters),
    "bytes_per_pixel": ("bytes a pixel of the file", np.geomspace(0.01, 10, 31), _column("bytes_per_pixel")),
    "sharpness": ("sharpness", np.geomspace(1, 1e5, 31), _column("sharpness")),
    "entropy": ("entropy, bits", np.linspace(0, 8, 33), _column("entropy")),
    "deviation": ("standard deviation, levels", np.linspace(0, 128, 33), _column("deviation")),
    "border": ("share of even bars", np.linspace(0, 1, 26), _column("border")),
    "watermark": ("tiled mark", np.linspace(0, 20, 41), _column("watermark")),
}
"""Title, edges, and how a table gives the values."""
