"""Artifacts in an object store: nothing overwritten, everything checked, found again by what it was made from."""

from selfcascade.storage.artifact import Artifact, reference, resolve, rollback, versions
from selfcascade.storage.entry import BLOCK, ObjectEntry, ObjectInfo, entry_of
from selfcascade.storage.errors import (
    BucketMissing,
    ConditionalWritesUnsupported,
    Conflict,
    IntegrityError,
    NotFound,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreUnreachable,
)
from selfcascade.storage.leases import Lease, lease
from selfcascade.storage.location import located
from selfcascade.storage.manifest import ArtifactRef, Kind, Manifest, artifact_version
from selfcascade.storage.plan import Plan
from selfcascade.storage.store import Store
from selfcascade.storage.tombstone import Withdrawn, withdrawn

__all__ = [
    "BLOCK",
    "Artifact",
    "ArtifactRef",
    "BucketMissing",
    "ConditionalWritesUnsupported",
    "Conflict",
    "IntegrityError",
    "Kind",
    "Lease",
    "Manifest",
    "NotFound",
    "ObjectEntry",
    "ObjectInfo",
    "Plan",
    "Store",
    "StoreDenied",
    "StoreError",
    "StoreFull",
    "StoreUnreachable",
    "Withdrawn",
    "artifact_version",
    "entry_of",
    "lease",
    "located",
    "reference",
    "resolve",
    "rollback",
    "versions",
    "withdrawn",
]
