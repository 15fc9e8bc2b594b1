"""What a stage has still to do, as a small record that travels between processes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from selfcascade.storage.manifest import ArtifactRef


class Plan(BaseModel):
    """Units of work of one artifact: which are in the store, which are not. Making one writes nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact_ref: ArtifactRef
    published: bool = Field(description="the manifest is there and the pointer has been moved: nothing is left to do")
    units: int = Field(ge=0, description="units of work in all")
    done: tuple[int, ...] = Field(description="units whose objects are in the store")
    todo: tuple[int, ...] = Field(description="units still to be done, in order")
    bytes_planned: int | None = Field(None, description="estimated bytes that the remaining units will write; unset: unknown")

    @property
    def ref(self) -> ArtifactRef:
        """The artifact that the plan leads to."""
        return self.artifact_ref
