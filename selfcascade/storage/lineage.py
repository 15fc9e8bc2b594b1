"""Lineage: from an artifact back to its sources, by what manifests say of their inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from selfcascade.storage.artifact import Artifact, reference
from selfcascade.storage.manifest import MANIFEST, ArtifactRef, Kind, Manifest
from selfcascade.storage.store import Store

State = Literal["artifact", "missing", "outside"]

VERSION = re.compile(r"[0-9a-f]{64}")
_MANIFESTS = re.compile(r"[a-z]+/([^/]+)/([0-9a-f]{64})/" + re.escape(MANIFEST))
_ROLES: Mapping[str, Kind] = {
    "dataset": "datasets",
    "before": "datasets",
    "base": "bases",
    "init": "bases",
    "upsampler": "upsamplers",
    "upscaler": "upscalers",
    "adapter": "adapters",
    "unet": "unets",
}
"""Kind of the artifact that an input of this role may name."""
_ALWAYS = ("datasets", "samples")
"""Kinds that come from a store only; the others may be a folder or a model of a hub, at the digest of its files."""


@dataclass(frozen=True)
class Source:
    """One input of an artifact."""

    role: str
    value: str
    """As the manifest has it."""
    state: State
    """``artifact``: published in this store. ``missing``: an artifact that is not, or no longer. ``outside``: a listing, a file, a shipped or hub model."""
    ref: ArtifactRef | None = None


@dataclass(frozen=True)
class Step:
    """One artifact of a lineage, and what it was made from, by role."""

    role: str
    ref: ArtifactRef
    manifest: Manifest
    sources: tuple[Source, ...]


def walk(store: Store, roots: Mapping[str, ArtifactRef]) -> tuple[Step, ...]:
    """``roots`` (published artifacts by role) and, once each, every artifact of this store among their inputs, and among the inputs of those; nearest first.

    Raises:
        NotFound: a root is not published.
        IntegrityError: a manifest cannot be read.
    """
    known = _Published(store)
    found: dict[str, Step] = {}
    waiting = list(roots.items())
    while waiting:
        role, ref = waiting.pop(0)
        if ref.prefix in found:
            continue
        manifest = Artifact(store, ref).manifest()
        sources = tuple(_source(known, name, value) for name, value in sorted(manifest.inputs.items()))
        found[ref.prefix] = Step(role, ref, manifest, sources)
        waiting += [(source.role, source.ref) for source in sources if source.ref is not None]
    return tuple(found.values())


def kind_of(role: str) -> Kind | None:
    """Kind of the artifact that an input of this role may name; None where it names none."""
    return "samples" if role.startswith("samples/") else _ROLES.get(role)


def _source(known: _Published, role: str, value: str) -> Source:
    kind = kind_of(role)
    if kind is None or VERSION.search(value) is None:
        return Source(role, value, "outside")
    ref = known.named(kind, value)
    if ref is not None:
        return Source(role, value, "artifact", ref)
    must_be = kind in _ALWAYS or ("@" in value and kind != "bases")
    return Source(role, value, "missing" if must_be else "outside")


@dataclass
class _Published:
    """What is published, asked for no more than is needed: a kind is listed only where an input names a version alone."""

    store: Store
    listed: dict[str, dict[str, ArtifactRef]] = field(default_factory=dict)

    def named(self, kind: Kind, value: str) -> ArtifactRef | None:
        """The artifact that an input's value, ``[kind/]name@version`` or a version, names."""
        name, _, version = value.rpartition("@")
        if not name:
            return self._of(kind).get(version)
        name = name.removeprefix(f"{kind}/")
        if "/" in name:  # a model of a hub, at its commit
            return None
        ref = reference(self.store, kind, name, version)
        return None if self.store.head(f"{ref.prefix}/{MANIFEST}") is None else ref

    def _of(self, kind: Kind) -> dict[str, ArtifactRef]:
        if kind not in self.listed:
            keys = sorted(info.key for info in self.store.list(f"{kind}/"))
            matches = [match for key in keys if (match := _MANIFESTS.fullmatch(key)) is not None]
            self.listed[kind] = {match[2]: reference(self.store, kind, match[1], match[2]) for match in reversed(matches)}
        return self.listed[kind]
