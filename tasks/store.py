"""The store of this process: opened once, shared by all tasks, kept until the process ends.

The embedded server goes with its last user, so that a store held here spans all stages of a run.
"""

from __future__ import annotations

from functools import lru_cache

from selfcascade.config import StoreSettings
from selfcascade.storage import Store


@lru_cache(maxsize=8)
def opened(settings: StoreSettings) -> Store:
    """The store that ``settings`` name.

    Raises:
        StoreError: it cannot be used; one line.
    """
    return Store.open(settings)
