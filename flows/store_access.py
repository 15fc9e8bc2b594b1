"""The way into an object store as a Prefect block: keys that only the server's database holds, for runs that are named after a configuration."""

from __future__ import annotations

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from selfcascade.config import StoreSettings


class StoreAccess(Block):
    """Where the artifacts of a run live, and with which keys. What is unset is as the run's settings have it."""

    _block_type_name = "Selfcascade store"
    _block_type_slug = "selfcascade-store"
    _description = "Where the artifacts of Self-Cascade runs live, and the keys to them."

    endpoint: str | None = Field(None, description="S3 endpoint URL, or 'aws'")
    bucket: str | None = Field(None, description="bucket that holds every artifact")
    prefix: str | None = Field(None, description="key prefix inside the bucket")
    region: str | None = Field(None, description="region of the bucket")
    access_key: SecretStr | None = Field(None, description="access key id")
    secret_key: SecretStr | None = Field(None, description="secret access key")

    def over(self, store: StoreSettings) -> StoreSettings:
        """``store`` with what this block says."""
        given = {name: value for name in StoreAccess.model_fields if (value := getattr(self, name)) is not None}
        return StoreSettings.model_validate(store.model_dump() | given)
