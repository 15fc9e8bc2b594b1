"""The ``urls`` source: a table with a URL a row, listed without a download, fetched unit by unit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfcascade.config import CurationSettings, UrlsSource
from selfcascade.curation import download, tables
from selfcascade.curation.captions import caption_of
from selfcascade.curation.folder import FolderTree
from selfcascade.curation.keys import key_from
from selfcascade.curation.picture import picture_of
from selfcascade.curation.record import Entry, Picture, Rejected
from selfcascade.curation.s3prefix import PrefixTree
from selfcascade.curation.tree import File
from selfcascade.settings import SettingsError, canonical_json
from selfcascade.storage import Store

_SHA256 = re.compile(r"[0-9a-f]{64}")
HOSTS = 8
"""If so many hosts are asked and none can even be reached, it is this machine that is offline."""


class UrlSource:
    """Pictures of the web."""

    def __init__(self, source: UrlsSource, store: Store, removed: frozenset[str] = frozenset()) -> None:
        """Args: settings; the store whose endpoint and credentials read ``s3://``; SHA-256 of contents that were removed on request."""
        self.source = source
        self.store = store
        self.removed = removed
        self._downloads: download.Downloads | None = None

    @property
    def label(self) -> str:
        """The table, as the user named it."""
        return self.source.path

    def listing(self) -> Iterator[Entry]:
        """An entry a row. Its key is the given one, or 32 hex digits of the SHA-256 of its URL: neither depends on where the row stands."""
        source = self.source
        columns = [source.url, source.caption, source.key, source.sha256, *source.carry]
        empty = True
        for path, kind, label in self._tables():
            for row in tables.rows(path, kind, label, list(dict.fromkeys(name for name in columns if name is not None))):
                empty = False
                yield self._entry(row)
        if empty:
            raise SettingsError(f"source.path: {self.label} holds no row; give a table with a URL a row")

    @contextmanager
    def fetching(self, entries: Iterable[Entry]) -> Iterator[None]:
        """Within the block the pictures of ``entries`` arrive side by side, ahead of :meth:`picture`.

        Raises:
            ConnectionError: nothing could be reached, so that nothing is known of any of them.
        """
        wanted = {entry.key: entry.source for entry in entries if entry.reason is None}
        with download.Downloads(wanted, self.source) as self._downloads:
            try:
                yield
                unreached = self._downloads.unreached
            finally:
                self._downloads = None
        hosts = {download.checked(url).host for url in unreached}
        if wanted and len(unreached) == len(wanted) and len(hosts) >= HOSTS:
            raise ConnectionError(f"{self.label}: none of {len(hosts)} hosts can be reached; is this machine online?")

    def picture(self, entry: Entry, settings: CurationSettings) -> Picture:
        """See :class:`selfcascade.curation.sources.Source`. The type that the server claims is not asked."""
        if self._downloads is None:
            with self.fetching([entry]):
                return self.picture(entry, settings)
        data = self._downloads.take(entry.key)
        sha256 = hashlib.sha256(data).hexdigest()
        expected = entry.digest.partition(" sha256:")[2]
        if expected and sha256 != expected:
            raise Rejected(f"other content: its SHA-256 is {sha256}")
        if sha256 in self.removed:
            raise Rejected("removed on request")
        return picture_of(data, None, settings, entry.caption)

    def _entry(self, row: dict[str, Any]) -> Entry:
        source = self.source
        extra = {name: tables.plain(row[name]) for name in source.carry} or None
        caption = caption_of(None if source.caption is None else row[source.caption], f"column {source.caption!r}")
        reason = caption.problem
        url = row[source.url]
        if isinstance(url, str):
            url = url.strip().encode("utf-8", "backslashreplace").decode()
        try:
            if not isinstance(url, str) or not url:
                raise Rejected("URL: none is given")
            download.checked(url)
        except Rejected as rejection:
            reason = rejection.reason
            if reason.startswith("URL: it holds a user"):
                url = re.sub(r"//[^/]*@", "//", url)
        # Rows without a URL are told apart by what else they hold.
        name = url if isinstance(url, str) and url else f"row {hashlib.sha256(canonical_json({k: tables.plain(v) for k, v in row.items()})).hexdigest()[:16]}"
        digest = hashlib.sha256(name.encode()).hexdigest()
        expected = None if source.sha256 is None else row[source.sha256]
        if expected is not None and not (isinstance(expected, str) and _SHA256.fullmatch(expected.lower())):
            reason, expected = reason or f"sha256: column {source.sha256!r} holds none", None
        key = digest[:32]
        given = None if source.key is None else row[source.key]
        if given is not None:
            key = key_from(str(given), digest)
        return Entry(key, name, 0, f"url:{digest}" + (f" sha256:{expected.lower()}" if expected else ""), caption.text, reason, None, extra)

    def _tables(self) -> Iterator[tuple[Path, str, str]]:
        """Path on this machine, kind and name of each table."""
        path = self.source.path
        remote = path.startswith("s3://")
        kind = tables.kind_of_table(path)
        tree = PrefixTree(path.rpartition("/")[0] if kind else path, self.store) if remote else FolderTree(Path(path).parent if kind else Path(path))
        if kind:
            name = path.rpartition("/")[2]
            if not remote and not Path(path).is_file():
                raise SettingsError(f"source.path: {path} does not exist; give a table of URLs, or a folder of such tables")
            # Of a prefix all is listed: the one wanted comes with its ETag.
            found = [file for file in tree.files() if file.name == name] if remote else [File(name, 0)]
        else:
            found = [file for file in tree.files() if tables.kind_of_table(file.name)]
        if not found:
            raise SettingsError(f"source.path: {path} holds no table; looked for {', '.join('.' + extension for extension in tables.KINDS)}")
        for file in sorted(found, key=lambda file: file.name):
            label = f"{tree.label}/{file.name}"
            with tree.local(file) as local:
                yield local, tables.kind_of_table(file.name) or "", label
