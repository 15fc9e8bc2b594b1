"""What an artifact is called and what its manifest lists. Equal runs write equal manifests: no clock, no host."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from selfcascade.config import NAME
from selfcascade.settings import Settings, canonical_json, digest_of
from selfcascade.storage.entry import HEX, ObjectEntry
from selfcascade.storage.errors import IntegrityError

Kind = Literal["datasets", "bases", "upsamplers", "upscalers", "adapters", "unets", "samples", "reports"]
KINDS: tuple[str, ...] = get_args(Kind)
MANIFEST = "manifest.json"


class ArtifactRef(BaseModel):
    """The address of an artifact, published or not: what a stage takes and returns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    name: str = Field(pattern=NAME)
    version: str = Field(pattern=HEX, description="digest of the what-settings and of the versions of the inputs")
    uri: str = Field(description="s3://bucket/prefix/kind/name/version")

    @property
    def prefix(self) -> str:
        """Key prefix inside the store, without a trailing slash."""
        return f"{self.kind}/{self.name}/{self.version}"

    @property
    def short(self) -> str:
        """The first twelve digits of the version, enough for people."""
        return self.version[:12]

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}@{self.short}"


class Manifest(BaseModel):
    """What a published artifact consists of and what it was made from. An artifact without one does not exist for consumers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    name: str = Field(pattern=NAME)
    version: str = Field(pattern=HEX)
    settings: dict[str, Any] = Field(description="the resolved what-settings")
    inputs: dict[str, str] = Field(description="versions of the inputs by role")
    objects: tuple[ObjectEntry, ...] = Field(description="every object but the manifest, sorted by key")
    counts: dict[str, int | float | str] = Field(description="what a reader wants to know at a glance")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if version_of(self.settings, self.inputs) != self.version:
            raise ValueError("version is not the digest of settings and inputs")
        keys = [entry.key for entry in self.objects]
        if keys != sorted(set(keys)):
            raise ValueError("objects are not sorted by key, or a key occurs twice")
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON, the stored form."""
        tree = self.model_dump(mode="json", exclude={"objects"})
        tree["objects"] = [entry.model_dump(mode="json", exclude_none=True) for entry in self.objects]
        return canonical_json(tree) + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Self:
        """Parse the stored form.

        Raises:
            IntegrityError: it is not a manifest, or contradicts itself; names ``where``.
        """
        try:
            return cls.model_validate(json.loads(data))
        except (ValidationError, ValueError) as error:
            raise IntegrityError(f"{where} is not a valid manifest ({' '.join(str(error).split())[:200]}); the artifact cannot be trusted") from None

    def entry(self, key: str) -> ObjectEntry | None:
        """The entry of ``key``, or None."""
        return self.by_key.get(key)

    @cached_property
    def by_key(self) -> dict[str, ObjectEntry]:
        """Entries by key; made once, since a large artifact has tens of thousands, which a reader asks for one by one."""
        return {entry.key: entry for entry in self.objects}


def version_of(settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """Version of an artifact from its what-settings and the versions of its inputs."""
    return digest_of({"settings": settings, "inputs": inputs})


def artifact_version(settings: Settings, inputs: dict[str, str]) -> str:
    """The same work has the same address: SHA-256 of what is computed and of what it is computed from."""
    return version_of(plain_settings(settings), inputs)


def plain_settings(settings: Settings) -> dict[str, Any]:
    """``settings.what()`` as it comes back from JSON (tuples as lists), so that a stored manifest equals the one in memory."""
    plain: dict[str, Any] = json.loads(canonical_json(settings.what()))
    return plain
