"""What a report rests on: artifacts, what they were made from, and the loss curves of what was trained."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pyarrow.parquet as pq

from selfcascade.evaluation.results import Curve, Lineage
from selfcascade.storage import ArtifactRef, Store, resolve
from selfcascade.storage.lineage import walk

LOSS = "loss.parquet"
"""Object of whatever was trained on a base that holds its log: columns ``step`` and ``loss``."""

_POINTS = 1000


def lineage_of(store: Store, roots: Mapping[str, ArtifactRef]) -> tuple[Lineage, ...]:
    """``roots`` (artifacts by role) and, once each, every artifact of this store among their inputs, and among the inputs of those."""
    return tuple(
        Lineage(role=step.role, artifact=str(step.ref), version=step.ref.version, inputs={each.role: each.value for each in step.sources})
        for step in walk(store, roots)
    )


def curves_of(store: Store, lineage: tuple[Lineage, ...]) -> tuple[Curve, ...]:
    """Loss curves of all that was trained on a base in ``lineage``, thinned to about a thousand points by averaging neighbours."""
    curves = []
    for item in lineage:
        if item.artifact.startswith(("upsamplers/", "upscalers/", "adapters/", "unets/")):
            artifact = resolve(store, item.artifact)
            if artifact.manifest().entry(LOSS) is not None:
                table = pq.read_table(io.BytesIO(artifact.read(LOSS)), columns=["step", "loss"])
                curves.append(thinned(item.artifact, table["step"].to_pylist(), table["loss"].to_pylist()))
    return tuple(curves)


def thinned(name: str, steps: list[int], losses: list[float]) -> Curve:
    """A curve of at most about a thousand points: each the mean loss of a run of neighbours, at the last of their steps."""
    width = max(1, -(-len(steps) // _POINTS))
    groups = range(0, len(steps), width)
    return Curve(
        name=name,
        steps=tuple(steps[min(start + width, len(steps)) - 1] for start in groups),
        losses=tuple(sum(losses[start : start + width]) / len(losses[start : start + width]) for start in groups),
    )
