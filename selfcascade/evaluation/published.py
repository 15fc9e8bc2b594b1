"""Published reports: the numbers of one, and how they came about over the versions of its name."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from selfcascade.evaluation.replicates import Replicates
from selfcascade.evaluation.results import Results
from selfcascade.storage import Artifact, ArtifactRef, Store
from selfcascade.storage.listing import listing

METRICS_JSON, REPLICATES = "metrics.json", "replicates.parquet"
LONGEST = 20
"""Versions that are looked at for a history, the newest of them."""


@dataclass(frozen=True, slots=True)
class Past:
    """A version of a report."""

    version: str
    published: datetime
    """By the store's clock."""
    results: Results


def read_results(store: Store, ref: ArtifactRef) -> Results:
    """The numbers of a published report, verified."""
    return Results.model_validate_json(Artifact(store, ref).read(METRICS_JSON))


def read_replicates(store: Store, ref: ArtifactRef) -> Replicates:
    """What the half-samples of a published report said, verified."""
    return Replicates.of_parquet(Artifact(store, ref).read(REPLICATES))


def history_of(store: Store, ref: ArtifactRef) -> tuple[Past, ...]:
    """Versions of the report's name, the oldest first and ``ref`` last, without those that were measured by another protocol or at other counts."""
    rows = listing(store, f"{ref.kind}/{ref.name}")
    place = next(place for place, row in enumerate(rows) if row.ref.version == ref.version)
    found = [Past(row.ref.version, row.published, read_results(store, row.ref)) for row in rows[max(0, place + 1 - LONGEST) : place + 1]]
    return tuple(each for each in found if not each.results.incomparable(found[-1].results))
