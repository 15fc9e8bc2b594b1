"""Pictures under a prefix of an S3 bucket."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from selfcascade.curation.tree import File, SourceChanged, is_hidden
from selfcascade.settings import SettingsError
from selfcascade.storage import Store
from selfcascade.storage.errors import MISSING, UNMET, code_of, one_line, status_of


class PrefixTree:
    """Objects under ``s3://bucket/prefix``, reached with the endpoint and the credentials of the store."""

    def __init__(self, uri: str, store: Store) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self.uri = uri.rstrip("/")
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.store = store

    @property
    def label(self) -> str:
        """The URI as the user named it."""
        return self.uri

    def files(self) -> Iterator[File]:
        """Every object but hidden ones and the empty markers of folders."""
        with self._one_line(self.uri):
            try:
                for page in self.store.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix):
                    for found in page.get("Contents", []):
                        name = found["Key"].removeprefix(self.prefix)
                        if name and not name.endswith("/") and not is_hidden(name):
                            yield File(name, found["Size"], found["ETag"].strip('"'))
            except ClientError as error:
                if status_of(error) >= 500:
                    raise
                code = code_of(error)
                raise SettingsError(f"source.uri: {self.uri} cannot be listed ({code}); check the bucket, store.endpoint and the credentials") from None

    def digest(self, file: File) -> str:
        """The ETag: two objects with one ETag hold the same bytes. The reverse is not promised of uploads in parts."""
        return f"etag:{file.etag}"

    def read(self, file: File) -> bytes:
        """The content, if it still is what was listed."""
        with self._body(file.name, alone=True, IfMatch=f'"{file.etag}"') as body:
            data: bytes = body.read()
        return data

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """``size`` bytes from ``start``."""
        with self._body(name, Range=f"bytes={start}-{start + size - 1}") as body:
            data: bytes = body.read()
        return data

    def size(self, name: str) -> int:
        """Bytes of an object."""
        with self._one_line(f"{self.uri}/{name}"):
            try:
                return self.store.client.head_object(Bucket=self.bucket, Key=self.prefix + name)["ContentLength"]
            except ClientError as error:
                if code_of(error) in MISSING:
                    raise SourceChanged(self.label, name) from None
                raise

    @contextmanager
    def local(self, file: File) -> Iterator[Path]:
        """A copy, fetched a part in memory at a time, if the object still is what was listed."""
        with tempfile.NamedTemporaryFile(prefix="selfcascade-") as copy:
            with self._body(file.name, IfMatch=f'"{file.etag}"') as body:
                for chunk in body.iter_chunks(2**20):
                    copy.write(chunk)
            copy.flush()
            yield Path(copy.name)

    @contextmanager
    def _body(self, name: str, *, alone: bool = False, **request: str) -> Iterator[Any]:
        """The body of an object.

        Args:
            name: relative to the prefix.
            alone: whether being denied this object costs no more than it.
            **request: conditions and range.

        Raises:
            SourceChanged: the object is gone, shorter than the range, or another one than the condition says.
            PermissionError: it is denied, where that concerns it alone.
        """
        with self._one_line(f"{self.uri}/{name}"):
            try:
                found = self.store.client.get_object(Bucket=self.bucket, Key=self.prefix + name, **request)  # type: ignore[arg-type]
                with closing(found["Body"]) as body:
                    yield body
            except ClientError as error:
                if code_of(error) in UNMET | MISSING or status_of(error) == 416:
                    raise SourceChanged(self.label, name) from None
                if alone and status_of(error) == 403:
                    raise PermissionError(13, "access denied") from None
                raise

    def _one_line(self, what: str) -> AbstractContextManager[None]:
        return one_line(what, endpoint=self.store.settings.endpoint or "AWS", bucket=self.bucket, embedded=self.store.is_embedded)
