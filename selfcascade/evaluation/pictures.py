"""The pictures of the report: the same prompts for every method, side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from selfcascade.evaluation.results import Results, SheetRow
from selfcascade.evaluation.sets import PictureSet, read_pictures
from selfcascade.generation.samples import read_table
from selfcascade.generation.sheet import contact_sheet
from selfcascade.storage import Artifact, ArtifactRef, Store

LOOKED_AT = 512
"""Samples, in the order of their keys, that the prompts of the sheet are picked from: a report of many samples reads a few shards only."""

LARGEST_SIDE = 384
"""Longer side in pixels at which the report shows a picture."""

Pictures = Mapping[str, Sequence[NDArray[np.uint8]]]
"""Label to pictures, (H, W, 3) each, in the order of the sheet's rows."""


def sheet_rows(store: Store, samples: ArtifactRef, count: int) -> tuple[SheetRow, ...]:
    """At most ``count`` samples, one a prompt, evenly spaced: chosen by nothing that the eye could have preferred."""
    first: dict[str, SheetRow] = {}
    for row in read_table(Artifact(store, samples)).select(["key", "prompt_id", "prompt"]).slice(0, LOOKED_AT).to_pylist():
        first.setdefault(row["prompt_id"], SheetRow(key=row["key"], prompt=row["prompt"]))
    rows = list(first.values())
    count = min(count, len(rows))
    return tuple(rows[place * len(rows) // count] for place in range(count))


def read_sheet(store: Store, sets: Sequence[PictureSet], rows: Sequence[SheetRow]) -> Pictures:
    """The pictures of ``rows`` in every set of samples."""
    wanted = {row.key for row in rows}
    found: dict[str, dict[str, NDArray[np.uint8]]] = {}
    for chosen in sets:
        pictures = found.setdefault(chosen.label, {})
        for picture in read_pictures(store, chosen):
            if picture.key in wanted:
                pictures[picture.key] = picture.image
            if len(pictures) == len(wanted):
                break
    return {label: [pictures[row.key] for row in rows] for label, pictures in found.items()}


def sheet_png(results: Results, pictures: Pictures) -> bytes:
    """The contact sheet as one PNG, for places that show a single image."""
    columns = {row.label: pictures[row.label] for row in results.shown()}
    return contact_sheet(columns, [row.prompt for row in results.sheet], cell=128)


def data_uri(picture: NDArray[np.uint8]) -> str:
    """A picture, (H, W, 3), as a JPEG inside a URI: for the eye alone, no number is computed from it."""
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
