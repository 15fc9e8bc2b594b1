"""Requests to the store and their bytes, counted by every process for itself, and handed over once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


class Traffic(BaseModel):
    """What went to the store and came from it."""

    model_config = ConfigDict(frozen=True)

    requests: int = Field(0, description="requests, each counted once however often it was sent")
    retries: int = Field(0, description="how often one was sent again, because the store did not answer or asked to")
    sent: int = Field(0, description="bytes of bodies that were sent, those that were sent again included")
    received: int = Field(0, description="bytes of the objects, or parts of them, that the store began to send")
    damaged: int = Field(0, description="reads that were repeated because their bytes did not match their digest")

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{name: getattr(self, name) + getattr(other, name) for name in Traffic.model_fields})


_lock = threading.Lock()
_counted = Traffic()


def count(**more: int) -> None:
    """Count so much more; names as in :class:`Traffic`."""
    global _counted
    with _lock:
        _counted += Traffic(**more)


def take() -> Traffic:
    """All that this process has counted and nobody has taken yet, so that sums are right whoever takes, and in whatever order."""
    global _counted
    with _lock:
        taken, _counted = _counted, Traffic()
    return taken


def watch(client: S3Client) -> None:
    """Count what ``client`` does from now on."""
    client.meta.events.register("before-call.s3", _begins)
    client.meta.events.register("before-send.s3", _leaves)
    client.meta.events.register("needs-retry.s3", _tried)
    client.meta.events.register("after-call.s3", _answered)


def _begins(**_: Any) -> None:
    count(requests=1)


def _leaves(request: Any, **_: Any) -> None:
    headers = request.headers
    count(sent=int(headers.get("X-Amz-Decoded-Content-Length") or headers.get("Content-Length") or 0))


def _tried(attempts: int, **_: Any) -> None:
    if attempts > 1:
        count(retries=1)


def _answered(parsed: dict[str, Any], model: Any, **_: Any) -> None:
    if model.has_streaming_output:
        count(received=int(parsed.get("ContentLength") or 0))
