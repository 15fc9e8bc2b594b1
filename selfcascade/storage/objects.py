"""The objects under one prefix of one bucket, request by request: keys in full, errors that name them, and what is only looked at."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from selfcascade.storage.connection import Connection
from selfcascade.storage.entry import ObjectEntry, ObjectInfo
from selfcascade.storage.errors import DAMAGED, BucketMissing, Conflict, NotFound, StoreError, code_of
from selfcascade.storage.upload import upload

MIB = 2**20
PAGE = 1000
"""Keys that one request lists or deletes; S3 takes no more."""
TRIES = 4
"""How often bytes are sent that arrive damaged; the client itself sends again what did not arrive."""

T = TypeVar("T")


class Objects:
    """What S3 can be asked for. Keys are relative to the prefix; in a read-only view nothing is written, and what was never made is empty."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def full(self, key: str) -> str:
        """The key with the prefix."""
        prefix = self.connection.settings.prefix.strip("/")
        return f"{prefix}/{key}" if prefix else key

    def uri(self, key: str) -> str:
        """``s3://bucket/prefix/key``."""
        return f"s3://{self.connection.settings.bucket}/{self.full(key)}"

    def named(self, key: str) -> str:
        """What messages call it."""
        return f"object {self.uri(key)}" if key else f"bucket {self.connection.settings.bucket}"

    def address(self, key: str) -> dict[str, Any]:
        """What a request of the client calls it."""
        return {"Bucket": self.connection.settings.bucket, "Key": self.full(key)}

    def call(self, key: str, request: Callable[[], T]) -> T:
        """Run a request of the client; what boto3 raises becomes one line that names ``key``."""
        return self.connection.call(self.named(key), request)

    def must_exist(self, key: str) -> None:
        """Refuse to look for an object where there is no store.

        Raises:
            NotFound: names the object and the folder.
        """
        if self.connection.absent:
            raise NotFound(f"{self.named(key)} does not exist: there is no store in {self.connection.settings.folder} yet")

    def get(self, key: str, how: dict[str, Any]) -> Any:
        """The client's reply, with a body to read.

        Raises:
            NotFound: there is no such object.
        """
        try:
            return self.call(key, lambda: self.connection.client.get_object(**self.address(key), **how))
        except BucketMissing:
            if self._looks_only():
                raise NotFound(f"{self.named(key)} does not exist") from None
            raise

    def head(self, key: str) -> Any:
        """The client's reply, or None when there is no such object."""
        if self.connection.absent:
            return None
        try:
            return self.call(key, lambda: self.connection.client.head_object(**self.address(key)))
        except NotFound:
            return None
        except BucketMissing:
            if self._looks_only():
                return None
            raise

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects under ``prefix``, in no order that may be relied on."""
        more = not self.connection.absent
        token: dict[str, Any] = {}
        while more:
            arguments: dict[str, Any] = {"Bucket": self.connection.settings.bucket, "Prefix": self.full(prefix), "MaxKeys": PAGE, **token}
            try:
                page = self.call(prefix, lambda arguments=arguments: self.connection.client.list_objects_v2(**arguments))  # type: ignore[misc]
            except BucketMissing:
                if self._looks_only():
                    return
                raise
            for found in page.get("Contents", []):
                yield ObjectInfo(found["Key"][len(self.full("")) :], found["Size"], found["ETag"], found["LastModified"])
            more = page.get("IsTruncated", False)
            token = {"ContinuationToken": page.get("NextContinuationToken")}

    def put(self, entry: ObjectEntry, data: bytes | Path, condition: dict[str, Any], unsure: builtins.list[bool] | None = None) -> str:
        """One write under a condition; in parts above the threshold.

        Args:
            entry: what is written.
            data: bytes, or a file that is streamed.
            condition: ``IfNoneMatch`` or ``IfMatch``, or nothing.
            unsure: hears of failed tries that may have succeeded.

        Returns:
            The ETag.

        Raises:
            Conflict: the condition does not hold.
        """
        self._may_write()
        in_parts = entry.size > self.connection.settings.multipart_mb * MIB

        def put() -> str:
            if in_parts and "IfNoneMatch" in condition and self.head(entry.key) is not None:
                raise Conflict(f"{self.named(entry.key)} exists")  # spares sending what would be refused
            return upload(self.connection.client, entry, data, self.address(entry.key), condition, in_parts=in_parts)

        def watched() -> str:
            try:
                return put()
            except (ClientError, BotoCoreError) as error:
                if unsure is not None:
                    unsure.append(not isinstance(error, ClientError) or error.response["ResponseMetadata"].get("RetryAttempts") != 0)
                raise

        def sound() -> str:
            for _ in range(TRIES - 1):
                try:
                    return watched()
                except ClientError as error:
                    if code_of(error) not in DAMAGED:
                        raise
            return watched()

        return self.call(entry.key, sound)

    def delete(self, keys: Iterable[str]) -> int:
        """Delete objects; missing ones do not matter. Returns how many were named."""
        names, bucket = [self.full(key) for key in keys], self.connection.settings.bucket
        self._may_write()
        for first in range(0, len(names), PAGE):
            batch: Any = {"Objects": [{"Key": name} for name in names[first : first + PAGE]], "Quiet": True}
            reply = self.call("", lambda batch=batch: self.connection.client.delete_objects(Bucket=bucket, Delete=batch))  # type: ignore[misc]
            for error in reply.get("Errors", [])[:1]:
                raise StoreError(f"object s3://{bucket}/{error.get('Key')} cannot be deleted: {error.get('Code')} {error.get('Message', '')}".rstrip())
        return len(names)

    def _looks_only(self) -> bool:
        return self.connection.read_only and self.connection.embedded

    def _may_write(self) -> None:
        if self.connection.read_only:
            raise StoreError("the store was opened to look, not to write (--dry-run)")
