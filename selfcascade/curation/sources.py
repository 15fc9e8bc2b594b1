"""Sources: from settings to a listing, and from an entry of it to a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

from selfcascade.config import Captions, CurationSettings, DatasetSource, FolderSource, HuggingFaceSource, S3Source, UrlsSource, WebDatasetSource
from selfcascade.curation.ahead import mapped
from selfcascade.curation.captions import Caption, Tables, captioned
from selfcascade.curation.decoding import FORMATS, format_of_name
from selfcascade.curation.folder import FolderTree
from selfcascade.curation.huggingface import ParquetPictures
from selfcascade.curation.keys import folded, keys_of
from selfcascade.curation.picture import picture_of
from selfcascade.curation.record import Entry, Picture
from selfcascade.curation.rows import Rows
from selfcascade.curation.s3prefix import PrefixTree
from selfcascade.curation.stored import DatasetPictures
from selfcascade.curation.tars import TarSource
from selfcascade.curation.tree import LARGEST_FILE, File, SourceChanged, Tree
from selfcascade.curation.twemoji import Twemoji
from selfcascade.settings import SettingsError
from selfcascade.storage import Store, withdrawn


class Source(Protocol):
    """Where pictures and captions come from."""

    @property
    def label(self) -> str:
        """How messages name it."""

    def listing(self) -> Iterable[Entry]:
        """Every input, in any order; no pixel is decoded.

        Raises:
            SettingsError: the source is missing, unreadable or holds no picture.
        """

    def picture(self, entry: Entry, settings: CurationSettings) -> Picture:
        """Read, check, decode and fit one entry.

        Raises:
            Rejected: it is left out, for this reason.
            SourceChanged: the input is not the one that was listed.
        """


def open_source(settings: CurationSettings, store: Store) -> Source:
    """The source that the settings name."""
    source = settings.source
    if isinstance(source, FolderSource):
        return FileSource(FolderTree(source.path), source.captions)
    if isinstance(source, S3Source):
        return FileSource(PrefixTree(source.uri, store), source.captions)
    if isinstance(source, UrlsSource):
        from selfcascade.curation.urls import UrlSource  # its HTTP library is an extra

        return UrlSource(source, store, withdrawn(store, f"datasets/{settings.name}").contents)
    if isinstance(source, WebDatasetSource):
        return TarSource(source, store)
    if isinstance(source, HuggingFaceSource):
        return ParquetPictures(source, store)
    if isinstance(source, DatasetSource):
        return DatasetPictures(source, store)
    return Twemoji(source)


def fetching(source: Source, entries: Iterable[Entry]) -> AbstractContextManager[None]:
    """Around the pictures of one unit: a source that fetches ahead does so within."""
    ahead = getattr(source, "fetching", None)
    return nullcontext() if ahead is None else cast(AbstractContextManager[None], ahead(entries))


class FileSource:
    """Picture files of a tree."""

    def __init__(self, tree: Tree, captions: Captions) -> None:
        self.tree = tree
        self.captions = captions

    @property
    def label(self) -> str:
        """The folder or the prefix."""
        return self.tree.label

    def listing(self) -> Iterator[Entry]:
        """Every picture file with content hash and caption. What is known of the files is sorted and matched on disk."""
        with Rows() as found, Rows() as texts, Rows() as pictures:
            tables = Tables()
            for file in self.tree.files():
                if format_of_name(file.name):
                    found.add(folded(file.name), file.name, file.size, file.etag)
                elif file.name.endswith(".txt"):
                    texts.add(file.name[:-4], file.name, file.size, file.etag)
                else:
                    tables.take(file)
            if not found:
                raise SettingsError(f"source: {self.label} holds no pictures; looked for {', '.join('.' + extension for extension in FORMATS)}")
            for (_, name, size, etag), key in keys_of(found):
                pictures.add(name, size, etag, key)
            yield from mapped(self._entry, captioned(self.tree, pictures, texts, tables, self.captions), threads=8, ahead=1024)

    def picture(self, entry: Entry, settings: CurationSettings) -> Picture:
        """See :class:`Source`."""
        kind, _, expected = entry.digest.partition(":")
        try:
            data = self.tree.read(File(entry.source, entry.size, expected if kind == "etag" else None))
        except FileNotFoundError:
            raise SourceChanged(self.label, entry.source) from None
        if kind == "sha256" and hashlib.sha256(data).hexdigest() != expected:
            raise SourceChanged(self.label, entry.source)
        return picture_of(data, entry.source, settings, entry.caption)

    def _entry(self, found: tuple[list[Any], Caption]) -> Entry:
        (name, size, etag, key), caption = found
        file = File(name, size, etag)
        digest = self._digest(file)
        shown = file.name.encode("utf-8", "backslashreplace").decode()
        reason = caption.problem
        if shown != file.name:
            reason = "file name: it is not UTF-8; rename the file"
        elif file.size > LARGEST_FILE:
            reason = f"too large: {file.size} bytes, more than {LARGEST_FILE}"
        elif not digest:
            reason = "unreadable: the file cannot be opened"
        return Entry(key, shown, file.size, digest, caption.text, reason)

    def _digest(self, file: File) -> str:
        try:
            return "" if file.size > LARGEST_FILE else self.tree.digest(file)
        except OSError:
            return ""
