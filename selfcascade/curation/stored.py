"""The ``dataset`` source: the pictures of a published dataset once more, under other filters or sizes, without the files that they came from."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from selfcascade.config import CurationSettings, DatasetSource
from selfcascade.curation import filters
from selfcascade.curation.decoding import decode
from selfcascade.curation.encoding import EXTENSIONS, FORMATS
from selfcascade.curation.examples import may_be_shown, thumbnail
from selfcascade.curation.near import Hashed, near_duplicates
from selfcascade.curation.picture import scored
from selfcascade.curation.reading import read_rows
from selfcascade.curation.record import Entry, Picture, Rejected
from selfcascade.curation.scores import SCHEMA as SCORES
from selfcascade.curation.shards import Stored, read_tar, tar_name
from selfcascade.curation.tree import SourceChanged
from selfcascade.settings import SettingsError
from selfcascade.storage import Store, resolve


class DatasetPictures:
    """Rows of a dataset's tables, and the pictures of its shards."""

    def __init__(self, source: DatasetSource, store: Store) -> None:
        """Raises: NotFound: the dataset, or one of ``near_to``, is not published."""
        self.source = source
        self.store = store
        self.artifact = resolve(store, source.dataset, "datasets")
        self._folder: str | None = None
        self._shard, self._last = -1, ""
        self._samples: Iterator[Stored] = iter(())

    @property
    def label(self) -> str:
        """The artifact with its version."""
        return str(self.artifact)

    def listing(self) -> Iterator[Entry]:
        """An entry a row, with its caption and split. What was rejected then stays rejected for that reason: its picture was not stored.

        Raises:
            SettingsError: near duplicates are to be found in a dataset without perceptual hashes.
        """
        near = {} if self.source.near_distance is None else near_duplicates(self._hashes(), distance=self.source.near_distance)
        for number, table in read_rows(self.artifact):
            for row in table.to_pylist():
                digest = f"sha256:{row['sha256']}" if row["sha256"] else ""
                if row["kept"]:
                    digest += f" stored:{row.get('picture_sha256') or row['png_sha256']}"
                reason = row["reason"]
                if row["key"] in near:
                    survivor, bits = near[row["key"]]
                    reason = f"near duplicate: of {survivor}, {bits} bits apart, source.near_distance is {self.source.near_distance}"
                extra = json.loads(row["extra"]) if row.get("extra") else None
                yield Entry(row["key"], row["source"], 0, digest, row["caption"], reason, row["split"], extra, str(number) if row["kept"] else None)

    @contextmanager
    def fetching(self, entries: Iterable[Entry]) -> Iterator[None]:
        """Within the block the shards that :meth:`picture` needs are fetched whole, each once."""
        with tempfile.TemporaryDirectory(prefix="selfcascade-") as self._folder:
            try:
                yield
            finally:
                self._folder, self._shard, self._samples = None, -1, iter(())

    def picture(self, entry: Entry, settings: CurationSettings) -> Picture:
        """See :class:`selfcascade.curation.sources.Source`. What is stored as it is wanted already is not decoded."""
        if self._folder is None:
            with self.fetching([entry]):
                return self.picture(entry, settings)
        stored = self._stored(int(entry.place or 0), entry.key)
        if hashlib.sha256(stored.data).hexdigest() != entry.digest.partition(" stored:")[2]:
            raise SourceChanged(self.label, entry.key)
        fields = stored.fields
        source = {name: fields[name] for name in ("width", "height", "sha256")}
        scores = fields.get("scores")
        with Image.open(io.BytesIO(stored.data), formats=[FORMATS[stored.extension]]) as image:
            try:
                filters.check_shape(fields["width"], fields["height"], settings.filters, size=1)
                if min(image.size) < settings.size:
                    raise Rejected(f"smaller than the target: stored as {image.width}x{image.height}, for {settings.size}x{settings.size}")
                fits = _fits(image, stored, settings)
                if scores and fits and all(name in scores for name in _wanted(settings)):
                    filters.check_scores(scores, settings.filters)
                    return Picture(stored.data, stored.extension, scores=scores, **source)
            except Rejected as rejected:
                small = (lambda: thumbnail(stored.pixels())) if may_be_shown(rejected.reason, settings.filters) else None
                raise Rejected(rejected.reason, thumbnail=small, **source, **({"scores": scores} if scores else {})) from None
            pixels = decode(stored.data, image, settings).pixels
        area = fields["width"] * fields["height"]
        per_pixel = scores["bytes_per_pixel"] if scores else len(stored.data) / area
        picture = scored(pixels, settings, entry.caption, bytes_per_pixel=per_pixel, **source)
        # What only lacked a score is not encoded twice.
        return replace(picture, data=stored.data, extension=stored.extension) if fits else picture

    def _stored(self, number: int, key: str) -> Stored:
        """The sample ``key`` of a shard, which is read once while keys are asked for in its order."""
        if self._shard != number or self._last >= key:
            path = Path(str(self._folder), tar_name(number))
            self.artifact.download(path.name, path)
            self._shard, self._samples = number, read_tar(path)
        self._last = key
        for stored in self._samples:
            if stored.fields["key"] == key:
                return stored
        raise SourceChanged(self.label, key)

    def _hashes(self) -> Iterator[Hashed]:
        for artifact in (self.artifact, *(resolve(self.store, name, "datasets") for name in self.source.near_to)):
            other = artifact is not self.artifact
            for _, table in read_rows(artifact):
                if "phash" not in table.column_names:
                    raise SettingsError(f"source.near_distance: {artifact} has no perceptual hashes; curate it anew with this version")
                for row in table.select(["key", "kept", "phash", "width", "height"]).to_pylist():
                    if row["kept"]:
                        name = f"{artifact.ref.name}@{artifact.ref.version[:12]}/{row['key']}" if other else row["key"]
                        yield Hashed(name, int(row["phash"], 16), row["width"] * row["height"], other)


def _wanted(settings: CurationSettings) -> list[str]:
    """Scores that a picture must have: a dataset of an earlier format lacks some."""
    return [*SCORES.names, *(scorer.name for scorer in settings.filters.scorers)]


def _fits(image: Image.Image, stored: Stored, settings: CurationSettings) -> bool:
    """Whether a stored picture is what these settings would store of it."""
    if stored.extension != EXTENSIONS[settings.encoding]:
        return False
    wanted: dict[str, Any] = {"square": (settings.size, settings.size), "original": image.size}
    return bool(image.size == wanted.get(settings.shape, image.size) and (settings.shape == "original" or min(image.size) == settings.size))
