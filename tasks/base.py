"""Whether a base is there to be adapted."""

from __future__ import annotations

from selfcascade.bases import names_artifact
from selfcascade.storage import NotFound, Store, resolve


def base_exists(base: str, store: Store) -> bool:
    """False for an artifact (``bases/...``) that nobody has published. What ships, a folder or a hub id is not made here, so it counts as there."""
    if not names_artifact(base, "bases"):
        return True
    try:
        resolve(store, base, "bases")
    except NotFound:
        return False
    return True
