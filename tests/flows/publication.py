"""What a pipeline has published: every object by its SHA-256, and what the pointers name."""

from __future__ import annotations

import hashlib
import json

from selfcascade.storage import Store

ARTIFACTS = ("datasets/", "upsamplers/", "samples/", "reports/")

Published = tuple[dict[str, str], dict[str, str]]


def published(store: Store) -> Published:
    """SHA-256 of every object of every artifact, and the version that each pointer names."""
    # How often a sequence was taken tells how often a run began: that much may differ.
    keys = [info.key for prefix in ARTIFACTS for info in store.list(prefix) if not info.key.endswith("/sequence.json")]
    pointers = {key: json.loads(store.read(key))["version"] for key in keys if key.endswith("/latest.json")}
    return {key: hashlib.sha256(store.read(key)).hexdigest() for key in keys if key not in pointers}, pointers


def changed(found: Published, expected: Published) -> list[str]:
    """Keys of objects and pointers that are missing, added or other than expected."""
    return sorted(key for mine, theirs in zip(found, expected, strict=True) for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
