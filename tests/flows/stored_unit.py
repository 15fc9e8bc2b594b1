"""A unit of work that does nothing but talk to the store; alone in its module, so that a worker process imports little."""

from __future__ import annotations

import os

from selfcascade.storage import Store


def write(store: Store, number: int) -> int:
    """Store 1000 bytes, read them, and say which process did it."""
    store.put_new(f"x{number}", bytes(1000))
    store.read(f"x{number}")
    return os.getpid()
