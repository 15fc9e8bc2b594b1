"""Links: every object of an artifact as a URL that reads it without keys, until it expires."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from urllib.parse import parse_qs, urlsplit

from selfcascade.settings import SettingsError
from selfcascade.storage.artifact import Artifact
from selfcascade.storage.manifest import MANIFEST
from selfcascade.storage.tombstone import OBJECTS, tombstone

Format = Literal["text", "csv", "json"]

LONGEST = timedelta(days=7)
"""S3 signs no link for longer."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Link:
    """One object and the URL that reads it."""

    key: str
    size: int
    """Bytes."""
    sha256: str
    """Of the object as it is now: of one that a removal request rewrote, not what the manifest says."""
    expires: str
    """ISO 8601, UTC."""
    url: str


def duration(text: str) -> timedelta:
    """``90s``, ``30m``, ``1h``, ``7d``: how long a link lasts.

    Raises:
        SettingsError: it is no such text, nothing, or longer than S3 allows.
    """
    match = re.fullmatch(r"(\d{1,9})([smhd])", text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is no time; write a whole number and a unit, such as 90s, 30m, 1h or 7d")
    found = timedelta(seconds=int(match[1]) * _UNITS[match[2]])
    if not timedelta(seconds=1) <= found <= LONGEST:
        raise SettingsError(f"links cannot last {text}: S3 signs them for 1s to 7d")
    return found


def links(artifact: Artifact, lasting: timedelta) -> list[Link]:
    """A link for each object of a published artifact, those it shares with others too, and for its manifest, which comes last.

    Signing asks nothing of the store and grants no more than the signer's keys: links of temporary keys end with these.

    Raises:
        NotFound: the artifact is not published.
        SettingsError: ``lasting`` is under a second or over seven days.
    """
    duration(f"{int(lasting.total_seconds())}s")
    store, found = artifact.store, []
    entries = [entry.renamed(entry.key, source=entry.source or artifact.prefix) for entry in artifact.manifest().objects]
    stones = [info.key for holder in {entry.source for entry in entries} for info in store.list(f"{OBJECTS}{holder}/")]
    rewritten = {key.removeprefix(OBJECTS).removesuffix(".json") for key in stones}
    manifest = store.entry(f"{artifact.prefix}/{MANIFEST}").renamed(MANIFEST, source=artifact.prefix)
    for entry in [*entries, manifest]:
        key = f"{entry.source}/{entry.key}"
        stone = tombstone(store, key) if key in rewritten else None
        now = entry if stone is None else stone.entry
        url = store.presign(key, int(lasting.total_seconds()))
        found.append(Link(entry.key, now.size, now.sha256, _expiry(url), url))
    return found


def written(artifact: Artifact, found: Iterable[Link], form: Format) -> str:
    """The listing: ``text`` has a URL a line, for ``wget -i``; ``csv`` and ``json`` have key, size, digest and expiry beside it."""
    if form == "text":
        return "".join(f"{link.url}\n" for link in found)
    if form == "json":
        tree = {"artifact": f"{artifact.ref.kind}/{artifact.ref.name}@{artifact.ref.version}", "objects": [asdict(link) for link in found]}
        return json.dumps(tree, indent=1) + "\n"
    sink = io.StringIO()
    table = csv.DictWriter(sink, list(Link.__dataclass_fields__), lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(link) for link in found)
    return sink.getvalue()


def _expiry(url: str) -> str:
    """When a link ends, by its own words: the moment of signing and the seconds from there."""
    words = parse_qs(urlsplit(url).query)
    signed = datetime.strptime(words["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return (signed + timedelta(seconds=int(words["X-Amz-Expires"][0]))).isoformat()
