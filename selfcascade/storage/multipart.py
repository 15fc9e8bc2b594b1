"""Large objects go up in parts, side by side; the last request carries the condition, so that nothing is overwritten either."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

SMALLEST_PART = 8 * 2**20
MOST_PARTS = 9_000
"""S3 takes 10,000."""
SIDE_BY_SIDE = 4


def put_parts(client: S3Client, data: bytes | Path, size: int, target: dict[str, Any], described: dict[str, Any], condition: dict[str, Any]) -> str:
    """Upload in parts and complete under ``condition``; a failed upload leaves nothing behind.

    Args:
        client: boto3 client.
        data: bytes, or a file that is read part by part.
        size: bytes in all.
        target: bucket and key.
        described: metadata and content type.
        condition: ``IfNoneMatch`` or ``IfMatch``, or nothing.

    Returns:
        The ETag of the object.
    """
    length = max(SMALLEST_PART, -(-size // MOST_PARTS))
    upload = client.create_multipart_upload(**target, **described)["UploadId"]

    def send(number: int) -> dict[str, Any]:
        reply = client.upload_part(**target, UploadId=upload, PartNumber=number + 1, Body=_part(data, number * length, length))
        sums = {name: value for name, value in reply.items() if name.startswith("Checksum") and name != "ChecksumType"}
        return {"PartNumber": number + 1, "ETag": reply["ETag"], **sums}

    try:
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            parts = list(pool.map(send, range(-(-size // length))))
        done: dict[str, Any] = {**target, "UploadId": upload, "MultipartUpload": {"Parts": parts}, **condition}
        return client.complete_multipart_upload(**done)["ETag"]
    except BaseException:
        with contextlib.suppress(ClientError, BotoCoreError):
            client.abort_multipart_upload(**target, UploadId=upload)
        raise


def _part(data: bytes | Path, start: int, length: int) -> bytes:
    if isinstance(data, Path):
        with data.open("rb") as file:
            file.seek(start)
            return file.read(length)
    return bytes(memoryview(data)[start : start + length])
