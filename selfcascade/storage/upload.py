"""One write under a condition. Large objects go up in parts, side by side; there the last request carries the condition."""

from __future__ import annotations

import contextlib
import mimetypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from selfcascade.storage.entry import ObjectEntry

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

mimetypes.add_type("application/vnd.apache.parquet", ".parquet")

SMALLEST_PART = 8 * 2**20
MOST_PARTS = 9_000
"""S3 takes 10,000."""
SIDE_BY_SIDE = 4


def upload(client: S3Client, entry: ObjectEntry, data: bytes | Path, target: dict[str, Any], condition: dict[str, Any], *, in_parts: bool) -> str:
    """Write an object, with its digests as metadata; a failed upload in parts leaves nothing behind.

    Args:
        client: boto3 client.
        entry: what is written.
        data: bytes, or a file that is streamed.
        target: bucket and key.
        condition: ``IfNoneMatch`` or ``IfMatch``, or nothing.
        in_parts: whether to send it in parts.

    Returns:
        The ETag of the object.
    """
    described = {"Metadata": entry.metadata(), "ContentType": mimetypes.guess_type(entry.key)[0] or "application/octet-stream"}
    if in_parts:
        return _in_parts(client, entry.size, data, target, described, condition)
    arguments: dict[str, Any] = {**target, **described, **condition}
    if isinstance(data, Path):
        with data.open("rb") as body:
            return client.put_object(**arguments, Body=body)["ETag"]
    return client.put_object(**arguments, Body=bytes(data))["ETag"]


def _in_parts(client: S3Client, size: int, data: bytes | Path, target: dict[str, Any], described: dict[str, Any], condition: dict[str, Any]) -> str:
    length = max(SMALLEST_PART, -(-size // MOST_PARTS))
    upload_id = client.create_multipart_upload(**target, **described)["UploadId"]

    def send(number: int) -> dict[str, Any]:
        reply = client.upload_part(**target, UploadId=upload_id, PartNumber=number + 1, Body=_part(data, number * length, length))
        sums = {name: value for name, value in reply.items() if name.startswith("Checksum") and name != "ChecksumType"}
        return {"PartNumber": number + 1, "ETag": reply["ETag"], **sums}

    try:
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            parts = list(pool.map(send, range(-(-size // length))))
        done: dict[str, Any] = {**target, "UploadId": upload_id, "MultipartUpload": {"Parts": parts}, **condition}
        return client.complete_multipart_upload(**done)["ETag"]
    except BaseException:
        with contextlib.suppress(ClientError, BotoCoreError):
            client.abort_multipart_upload(**target, UploadId=upload_id)
        raise


def _part(data: bytes | Path, start: int, length: int) -> bytes:
    if isinstance(data, Path):
        with data.open("rb") as file:
            file.seek(start)
            return file.read(length)
    return bytes(memoryview(data)[start : start + length])
