"""The gallery of a samples artifact: a page a shard and an index, which a browser shows from any folder or web server; no script, no request."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from selfcascade.config import GenerationSettings
from selfcascade.curation.examples import thumbnail
from selfcascade.curation.shards import read_tar, tar_name
from selfcascade.storage import Artifact
from selfcascade.storage.figures import figure, figures

INDEX = "index.html"
SIDE = 256
"""Longer side of a picture on a page, in pixels."""
COVERS = 120
"""Pictures of the index, from all shards alike where there are no more shards than that."""


def page_name(index: int) -> str:
    """Name of the page of shard ``index``."""
    return f"{index:05d}.html"


def shard_page(path: Path, index: int, artifact: Artifact, settings: GenerationSettings, *, shards: int) -> bytes:
    """The page of the tar at ``path``, a small WebP for each sample: a function of the tar's bytes and of what the artifact's address is made from.

    Args:
        path: the tar of shard ``index``.
        index: of the shard.
        artifact: that it belongs to.
        settings: that it was planned with.
        shards: how many there are.
    """
    lines = [_figure(stored.fields, thumbnail(stored.pixels(), SIDE), page_name(index)) for stored in read_tar(path)]
    place = {
        "number": index,
        "shards": shards,
        "before": page_name(index - 1) if index else None,
        "after": page_name(index + 1) if index + 1 < shards else None,
    }
    return _render(artifact, settings, lines, place=place | {"tar": tar_name(index)}, pages=[])


def index_page(artifact: Artifact, settings: GenerationSettings, counts: Sequence[int]) -> bytes:
    """The index: the first samples of each page, and links to all pages. Reads at most :data:`COVERS` pages.

    Args:
        artifact: whose pages are in the store.
        settings: that it was planned with.
        counts: samples of each shard.
    """
    each = max(1, COVERS // max(1, len(counts)))
    covers = [line for index in range(min(len(counts), COVERS)) for line in list(figures(artifact.read(page_name(index))))[:each]]
    pages = [(page_name(index), last - count + 1, last) for index, (count, last) in enumerate(zip(counts, accumulate(counts), strict=True))]
    return _render(artifact, settings, covers, place=None, pages=pages)


def _figure(fields: Mapping[str, object], webp: bytes, page: str) -> str:
    """Text of prompts and keys is escaped here, where it becomes HTML."""
    key, prompt = str(fields["key"]), " ".join(str(fields["prompt"]).split())
    picture = f'<img src="data:image/webp;base64,{base64.b64encode(webp).decode()}" alt="{escape(prompt)}" loading="lazy">'
    told = f'<span title="{escape(prompt)}">{escape(prompt)}</span><small>{escape(key)}</small><small>seed {fields["seed"]}</small>'
    return figure(key, f'<a href="{page}#{escape(quote(key))}">{picture}</a><figcaption>{told}</figcaption>')


def _render(
    artifact: Artifact, settings: GenerationSettings, lines: Sequence[str], *, place: Mapping[str, object] | None, pages: Sequence[tuple[str, int, int]]
) -> bytes:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("selfcascade.generation").joinpath("gallery.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        name=f"{artifact.ref.kind}/{artifact.ref.name}",
        version=artifact.ref.version,
        facts=_facts(settings, artifact.inputs or {}),
        figures=Markup("\n".join(lines)),
        shown=len(lines),
        place=place,
        pages=pages,
        total=pages[-1][2] if pages else 0,
        index=INDEX,
    )
    return page.encode()


def _facts(settings: GenerationSettings, inputs: Mapping[str, str]) -> list[tuple[str, str]]:
    cascade = settings.cascade
    made = [
        ("method", settings.method),
        ("size", f"{cascade.width} x {cascade.height}"),
        ("steps", str(cascade.steps)),
        ("guidance", f"{cascade.guidance_scale:g}"),
    ]
    return [*made, *((role, _short(value)) for role, value in sorted(inputs.items()))]


def _short(value: str) -> str:
    name, at, version = value.rpartition("@")
    return f"{name}{at}{version[:12]}"
