"""The ``webdataset`` source: pictures and captions out of tars, as WebDataset, img2dataset and this software write them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfcascade.config import CurationSettings, WebDatasetSource
from selfcascade.curation.captions import LARGEST_TXT, Caption, caption_of
from selfcascade.curation.decoding import format_of_name
from selfcascade.curation.folder import FolderTree
from selfcascade.curation.keys import key_from
from selfcascade.curation.picture import picture_of
from selfcascade.curation.record import Entry, Picture
from selfcascade.curation.s3prefix import PrefixTree
from selfcascade.curation.tree import LARGEST_FILE, File, SourceChanged
from selfcascade.settings import SettingsError
from selfcascade.storage import Store

TEXTS = ("txt", "text", "caption")
"""Extensions of a member that holds the caption; else the JSON of the sample is asked."""


class TarSource:
    """Tars of a folder or under a prefix. Nothing is ever unpacked to disk, so what members are called leads nowhere."""

    def __init__(self, source: WebDatasetSource, store: Store) -> None:
        self.source = source
        remote = source.path.startswith("s3://")
        self.tree: FolderTree | PrefixTree = PrefixTree(source.path, store) if remote else FolderTree(Path(source.path))

    @property
    def label(self) -> str:
        """The folder or the prefix."""
        return self.tree.label

    def listing(self) -> Iterator[Entry]:
        """An entry a sample, by reading every tar once. A tar that breaks off gives the samples before, and an entry that says so."""
        found = False
        for file in self.tree.files():
            if file.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
                found = True
                with self.tree.local(file) as path:
                    yield from self._entries(file, path)
        if not found:
            raise SettingsError(f"source.path: {self.label} holds no tar; give a folder or prefix with WebDataset shards")

    def picture(self, entry: Entry, settings: CurationSettings) -> Picture:
        """See :class:`selfcascade.curation.sources.Source`."""
        name, _, offset = (entry.place or "").rpartition("@")
        try:
            data = self.tree.read_range(name, int(offset), entry.size)
        except FileNotFoundError:
            raise SourceChanged(self.label, name) from None
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != entry.digest:
            raise SourceChanged(self.label, entry.source)
        return picture_of(data, entry.source, settings, entry.caption)

    def _entries(self, file: File, path: Path) -> Iterator[Entry]:
        """Samples are members that follow one another under one stem; the first picture of a sample is its picture."""
        sample: dict[str, Any] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue  # links and devices lead out of the tar
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    stem = f"{folder}/{stem}"
                    if sample.get("stem") != stem:
                        yield from self._entry(file, sample)
                        sample = {"stem": stem}
                    self._take(tar, member, extension.lower(), sample)
                    tar.members = []  # type: ignore[attr-defined]  # it remembers every member otherwise
            yield from self._entry(file, sample)
        except tarfile.TarError as error:
            yield from self._entry(file, sample)
            reason = "compressed: unpack it first" if _is_compressed(path) else f"damaged tar: {' '.join(str(error).split())[:100]}"
            yield Entry(_key(file.name), file.name, file.size, "", None, reason)

    @staticmethod
    def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: dict[str, Any]) -> None:
        if format_of_name(f"x.{extension}"):
            if "name" in sample:
                return
            sample |= {"name": member.name, "size": member.size, "offset": member.offset_data}
            if member.size <= LARGEST_FILE:
                stream = tar.extractfile(member)
                assert stream is not None
                sample["digest"] = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
                if stream.tell() < member.size:
                    raise tarfile.ReadError("unexpected end of data")
        elif extension in (*TEXTS, "json") and member.size <= LARGEST_TXT:
            stream = tar.extractfile(member)
            assert stream is not None
            sample["json" if extension == "json" else "text"] = stream.read()

    def _entry(self, file: File, sample: dict[str, Any]) -> Iterator[Entry]:
        if "name" not in sample:
            return
        place = f"{file.name}@{sample['offset']}"
        fields = _fields(sample.get("json"))
        caption = self._caption(sample, fields)
        name = f"{file.name}/{sample['name']}".encode("utf-8", "backslashreplace").decode()
        extra = {column: fields[column] for column in self.source.carry if column in fields} or None
        reason = caption.problem
        if "digest" not in sample:
            reason = f"too large: {sample['size']} bytes, more than {LARGEST_FILE}"
        digest = f"sha256:{sample['digest']}" if "digest" in sample else ""
        yield Entry(_key(sample["stem"].lstrip("/")), name, sample["size"], digest, caption.text, reason, None, extra, place)

    def _caption(self, sample: dict[str, Any], fields: dict[str, Any]) -> Caption:
        if "text" in sample:
            try:
                return caption_of(sample["text"].decode("utf-8-sig"), sample["stem"])
            except UnicodeDecodeError:
                return Caption(problem=f"caption encoding: the text of {sample['name']!r} is not UTF-8")
        return caption_of(fields.get(self.source.caption), f"field {self.source.caption!r}")


def _fields(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(stem: str) -> str:
    return key_from(stem, hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest())


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"))
