"""The pictures of the report: the same prompts for every method, side by side, and those of each method that look least and most real."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from selfcascade.evaluation.manifold import realism
from selfcascade.evaluation.results import Extreme, Results, SheetRow
from selfcascade.evaluation.sets import PictureSet, read_pictures
from selfcascade.evaluation.tables import FeatureTable
from selfcascade.generation.samples import read_table
from selfcascade.generation.sheet import contact_sheet
from selfcascade.storage import Artifact, ArtifactRef, Store

LOOKED_AT = 512
"""Samples, in the order of their keys, that the prompts of the sheet are picked from: of many samples a few shards are read."""

LARGEST_SIDE = 384
"""Longer side in pixels at which the report shows a picture."""

Pictures = Mapping[str, Mapping[str, NDArray[np.uint8]]]
"""Label, then key of the sample, to pictures, (H, W, 3) each."""


def sheet_rows(store: Store, samples: ArtifactRef, count: int) -> tuple[SheetRow, ...]:
    """At most ``count`` samples, one a prompt, evenly spaced: chosen by nothing that the eye could have preferred."""
    first: dict[str, SheetRow] = {}
    for row in read_table(Artifact(store, samples)).select(["key", "prompt_id", "prompt"]).slice(0, LOOKED_AT).to_pylist():
        first.setdefault(row["prompt_id"], SheetRow(key=row["key"], prompt=row["prompt"]))
    rows = list(first.values())
    count = min(count, len(rows))
    return tuple(rows[place * len(rows) // count] for place in range(count))


def extremes_of(real: NDArray[np.float32], table: FeatureTable, label: str, prompts: Mapping[str, str], count: int) -> list[Extreme]:
    """The ``count`` pictures of a method that look least real, then as many that look most real, from the least real to the most; none is named twice.

    Args:
        real: features of the real pictures, (n, d).
        table: the method's.
        label: the method's.
        prompts: by the samples' keys.
        count: on each side.
    """
    scores = realism(torch.from_numpy(real), torch.from_numpy(table.features))
    if scores is None:
        return []
    order = sorted(zip(scores.tolist(), table.keys, strict=True))
    count = min(count, len(order) // 2)
    sides: tuple[tuple[Literal["least", "most"], list[tuple[float, str]]], ...] = (("least", order[:count]), ("most", order[len(order) - count :]))
    return [Extreme(label=label, key=key, prompt=prompts[key], realism=float(f"{score:.6g}"), side=side) for side, chosen in sides for score, key in chosen]


def read_shown(store: Store, sets: Sequence[PictureSet], results: Results) -> Pictures:
    """What the report shows of every set of samples; shards without any of it are not fetched."""
    sheet = {row.key for row in results.sheet}
    return {
        chosen.label: {
            picture.key: picture.image
            for picture in read_pictures(store, chosen, sheet | {each.key for each in results.extremes if each.label == chosen.label})
        }
        for chosen in sets
    }


def sheet_png(results: Results, pictures: Pictures) -> bytes:
    """The contact sheet as one PNG, for places that show a single image."""
    columns = {row.label: [pictures[row.label][line.key] for line in results.sheet] for row in results.shown()}
    return contact_sheet(columns, [row.prompt for row in results.sheet], cell=128)


def data_uri(picture: NDArray[np.uint8]) -> str:
    """A picture, (H, W, 3), as a JPEG inside a URI: for the eye alone, no number is computed from it."""
    image = Image.fromarray(picture)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
