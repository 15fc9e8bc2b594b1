"""What a report rests on: artifacts, what they were made from, and the loss curves of what was trained."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pyarrow.parquet as pq

from selfcascade.evaluation.results import Curve, Lineage
from selfcascade.storage import Artifact, ArtifactRef, NotFound, Store, resolve

_KINDS = {"dataset": "datasets", "base": "bases", "upsampler": "upsamplers", "upscaler": "upscalers", "adapter": "adapters", "unet": "unets"}
"""Kind of the artifact that an input with this role may name."""

LOSS = "loss.parquet"
"""Object of whatever was trained on a base that holds its log: columns ``step`` and ``loss``."""

_POINTS = 1000


def lineage_of(store: Store, roots: Mapping[str, ArtifactRef]) -> tuple[Lineage, ...]:
    """``roots`` (artifacts by role) and, once each, every artifact of this store among their inputs, and among the inputs of those."""
    found: dict[str, Lineage] = {}
    waiting = [(role, Artifact(store, ref)) for role, ref in roots.items()]
    while waiting:
        role, artifact = waiting.pop(0)
        if artifact.ref.prefix in found:
            continue
        inputs = artifact.manifest().inputs
        found[artifact.ref.prefix] = Lineage(role=role, artifact=str(artifact.ref), version=artifact.ref.version, inputs=dict(sorted(inputs.items())))
        waiting += [(name, parent) for name, value in sorted(inputs.items()) if (parent := _parent(store, name, value)) is not None]
    return tuple(found.values())


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


def _parent(store: Store, role: str, value: str) -> Artifact | None:
    """The artifact that an input names; None where the input is a digest, a file or a hub model, or the artifact is not in this store."""
    kind = _KINDS.get(role)
    if kind is None or "@" not in value:
        return None
    name, _, version = value.rpartition("@")
    try:
        return resolve(store, f"{kind}/{name.removeprefix(kind + '/')}@{version}")
    except (NotFound, ValueError):
        return None
