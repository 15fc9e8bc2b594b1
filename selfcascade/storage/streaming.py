"""Bodies of objects as streams: taken up where a connection broke, and as files that appear whole or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from selfcascade.storage.errors import StoreError, StoreUnreachable

CHUNK = 2**20
BREAKS = 3
"""Broken connections that one download survives."""


def resumed(
    get: Callable[[dict[str, Any]], dict[str, Any]],
    reading: Callable[[], AbstractContextManager[None]],
    span: tuple[int, int] | None = None,
) -> Iterator[bytes]:
    """Chunks of a body of at most 1 MiB.

    Args:
        get: sends the request with more arguments (a range, where only a span is wanted or once a connection broke) and returns the reply.
        reading: what turns an error while the body is read into a :class:`StoreError`.
        span: first byte and the one after the last; all of the body by default.

    Raises:
        StoreUnreachable: the connection broke too often.
        Conflict: the object was replaced meanwhile.
    """
    done, breaks = (0 if span is None else span[0]), 0
    last = "" if span is None else str(span[1] - 1)
    more: dict[str, Any] = {} if span is None else {"Range": f"bytes={done}-{last}"}
    while True:
        reply = get(more)
        try:
            with reading(), closing(reply["Body"]) as body:
                for chunk in body.iter_chunks(CHUNK):
                    done += len(chunk)
                    yield chunk
            return
        except StoreUnreachable:
            breaks += 1
            if breaks > BREAKS:
                raise
            more = {"Range": f"bytes={done}-{last}", "IfMatch": reply["ETag"]}


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes ``path`` when the block ends well, and vanishes when it does not.

    Raises:
        StoreError: it cannot be written; names the path.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise StoreError(f"cannot write {path} ({error.strerror}); free space or choose another folder") from None
    finally:
        with suppress(OSError):
            part.unlink()
