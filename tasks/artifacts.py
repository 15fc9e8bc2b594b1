"""What a stage shows in the Prefect UI besides its progress: tables, contact sheets, links. Text from outside is escaped here."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from selfcascade.storage import ArtifactRef, Store

LINK_SECONDS = 3600
"""A presigned link opens what it names for anyone who has it: an hour at most."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~>])")


def artifact_key(*parts: str) -> str:
    """A key that Prefect takes and that stays the same from run to run: lower-case letters, digits, dashes."""
    return re.sub(r"-+", "-", re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower())).strip("-")


def escaped(text: str) -> str:
    """Text from outside (a caption, a prompt, a file name) that markdown and HTML show as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def data_uri(image: bytes, kind: str = "image/png") -> str:
    """The image itself as a URI."""
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def show_table(stage: str, name: str, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """A table artifact; numbers and our own words only."""
    create_table_artifact([dict(row) for row in rows], key=artifact_key(stage, name), description=title)


def show_sheet(stage: str, name: str, sheet: bytes, *, title: str, captions: Sequence[str] = ()) -> None:
    """A contact sheet inside markdown, where the UI shows it best, and the captions of its rows below."""
    listed = "".join(f"\n{number}. {escaped(caption)}" for number, caption in enumerate(captions, start=1))
    create_markdown_artifact(f"![contact sheet]({data_uri(sheet)})\n{listed}\n", key=artifact_key(stage, name, "sheet"), description=title)


def show_link(stage: str, name: str, store: Store, key: str, *, text: str) -> None:
    """A link to an object of the store, good for an hour."""
    create_link_artifact(store.presign(key, LINK_SECONDS), link_text=text, key=artifact_key(stage, name, "link"), description=f"{text}, for one hour")


def counts_rows(ref: ArtifactRef, counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Counts of an artifact as rows, its address first."""
    return [{"what": "artifact", "value": str(ref)}, *({"what": key, "value": value} for key, value in counts.items())]
