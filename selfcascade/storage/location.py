"""Which store a reference means: an ``s3://`` URI names bucket and prefix itself, the rest comes from the settings."""

from __future__ import annotations

import re

from selfcascade.config import StoreSettings
from selfcascade.storage.errors import NotFound
from selfcascade.storage.manifest import KINDS

_URI = re.compile(r"s3://([^/]+)/(?:(.*)/)?((?:" + "|".join(KINDS) + r")/[^/@]+(?:@[0-9a-f]+|/[0-9a-f]+)?)/?")


def located(reference: str, settings: StoreSettings | None = None) -> StoreSettings:
    """The store in which ``reference`` is.

    For ``s3://bucket/prefix/kind/name[/version]`` the settings with that bucket and prefix, else the settings as they are.

    Args:
        reference: as :func:`selfcascade.storage.resolve` takes it.
        settings: endpoint and keys, which no URI names; by default those of the environment, or the embedded store.

    Raises:
        NotFound: it is an ``s3://`` URI and not one of an artifact.
    """
    settings = settings or StoreSettings()
    if not reference.startswith("s3://"):
        return settings
    match = _URI.fullmatch(reference)
    if match is None:
        raise NotFound(f"{reference!r} is no artifact; write s3://BUCKET/PREFIX/KIND/NAME/VERSION as `selfcascade show` prints it, KIND of {', '.join(KINDS)}")
    return settings.model_copy(update={"bucket": match[1], "prefix": match[2] or ""})
