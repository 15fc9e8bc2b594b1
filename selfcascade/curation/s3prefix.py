"""Pictures under a prefix of an S3 bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

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
        with self._one_line(f"{self.uri}/{file.name}"):
            try:
                found = self.store.client.get_object(Bucket=self.bucket, Key=self.prefix + file.name, IfMatch=f'"{file.etag}"')
                with closing(found["Body"]) as body:
                    return body.read()
            except ClientError as error:
                if code_of(error) in UNMET | MISSING:
                    raise SourceChanged(self.label, file.name) from None
                if status_of(error) == 403:
                    raise PermissionError(13, "access denied") from None
                raise

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """``size`` bytes from ``start``."""
        with self._one_line(f"{self.uri}/{name}"):
            try:
                found = self.store.client.get_object(Bucket=self.bucket, Key=self.prefix + name, Range=f"bytes={start}-{start + size - 1}")
                with closing(found["Body"]) as body:
                    return body.read()
            except ClientError as error:
                if code_of(error) in MISSING:
                    raise FileNotFoundError(2, "no such object") from None
                if status_of(error) == 416:
                    return b""
                raise

    def copy(self, file: File, path: Path) -> None:
        """The content into a file of this machine, a part in memory at a time.

        Raises:
            SourceChanged: the object is not the one that was listed.
        """
        with self._one_line(f"{self.uri}/{file.name}"), path.open("wb") as target:
            try:
                found = self.store.client.get_object(Bucket=self.bucket, Key=self.prefix + file.name, IfMatch=f'"{file.etag}"')
                with closing(found["Body"]) as body:
                    for chunk in body.iter_chunks(2**20):
                        target.write(chunk)
            except ClientError as error:
                if code_of(error) in UNMET | MISSING:
                    raise SourceChanged(self.label, file.name) from None
                raise

    def _one_line(self, what: str) -> AbstractContextManager[None]:
        return one_line(what, endpoint=self.store.settings.endpoint or "AWS", bucket=self.bucket, embedded=self.store.is_embedded)
