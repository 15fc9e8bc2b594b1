"""Whether a bucket honours conditional writes: tried once, remembered in the bucket."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING

from selfcascade.storage.errors import ConditionalWritesUnsupported, Conflict, NotFound

if TYPE_CHECKING:
    from selfcascade.storage.store import Store

RECORD = "probe/conditional-writes.json"
FORMAT = 1


def check(store: Store) -> None:
    """Refuse a bucket in which two runs could overwrite each other; costs one GET once the answer is known.

    Raises:
        ConditionalWritesUnsupported: names the condition that the bucket ignores.
    """
    try:
        if json.loads(store.read(RECORD)).get("format") == FORMAT:
            return
    except (NotFound, ValueError):
        pass
    key = f"probe/{secrets.token_hex(16)}"
    try:
        etag = store.compare_and_swap(key, b"first", None)
        _must_refuse(store, "If-None-Match: *", key, b"second", None)
        changed = store.compare_and_swap(key, b"third", etag)
        if changed != etag:
            _must_refuse(store, "If-Match", key, b"fourth", etag)
        if store.read(key) != b"third":
            raise _refusal(store, "If-Match")
        _must_refuse_parts(store, key)
    finally:
        store.delete([key])
    store.put_cache(RECORD, json.dumps({"format": FORMAT, "conditional_writes": True}).encode())


def _must_refuse(store: Store, condition: str, key: str, data: bytes, etag: str | None) -> None:
    try:
        store.compare_and_swap(key, data, etag)
    except Conflict:
        return
    raise _refusal(store, condition)


def _must_refuse_parts(store: Store, key: str) -> None:
    try:
        store.put_parts_if_absent(key, b"fifth")
    except Conflict:
        return
    raise _refusal(store, "If-None-Match: * at the end of an upload in parts")


def _refusal(store: Store, condition: str) -> ConditionalWritesUnsupported:
    return ConditionalWritesUnsupported(
        f"bucket {store.bucket!r} ignores {condition}, so two runs could overwrite each other; "
        "use a store with conditional writes, such as AWS S3, MinIO or SeaweedFS 4"
    )
