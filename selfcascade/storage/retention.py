"""Retention: which published artifacts may go by rules, and never one that a kept one refers to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from graphlib import TopologicalSorter

from selfcascade.storage.lineage import VERSION
from selfcascade.storage.manifest import KINDS, Manifest


@dataclass(frozen=True)
class Rules:
    """What stays by itself. An artifact goes only where no rule keeps it; the newest of each name and the one that ``latest`` points to always stay."""

    keep_last: int | None = None
    """Newest versions of each name; unset: this rule keeps none."""
    keep: timedelta | None = None
    """Whatever is younger by the store's clock; unset: this rule keeps none."""
    kinds: frozenset[str] = frozenset(KINDS)
    """Kinds that are looked at; the others stay."""


@dataclass(frozen=True)
class Published:
    """One published artifact as rules see it."""

    prefix: str
    """``kind/name/version``."""
    published: datetime
    named: frozenset[str] = frozenset()
    """Versions that its inputs name."""
    holders: frozenset[str] = frozenset()
    """Prefixes of other artifacts whose objects it lists."""
    pointed: bool = False
    """``latest`` points to it, or is about to."""

    @classmethod
    def of(cls, manifest: Manifest, prefix: str, published: datetime, *, pointed: bool) -> Published:
        """From what a manifest says."""
        named = {version for value in manifest.inputs.values() for version in VERSION.findall(value)}
        holders = {entry.source for entry in manifest.objects if entry.source is not None}
        return cls(prefix, published, frozenset(named), frozenset(holders), pointed)

    @property
    def base(self) -> str:
        """``kind/name``."""
        return self.prefix.rpartition("/")[0]


@dataclass(frozen=True)
class Retirement:
    """What rules let go."""

    retired: tuple[str, ...]
    """Prefixes, each before whatever it refers to: deleted in this order, and stopped anywhere, no manifest is left that refers to what is gone."""
    needed: tuple[str, ...]
    """Prefixes that no rule keeps, but something does that is kept."""


def retire(artifacts: Iterable[Published], rules: Rules, *, now: datetime, grace: timedelta, only: Set[str] | None = None) -> Retirement:
    """Apply the rules.

    Args:
        artifacts: all that are published, of every kind: one that is left out cannot keep what it refers to.
        rules: what stays.
        now: by the store's clock.
        grace: younger artifacts stay.
        only: prefixes of which alone some may go, whatever the rules say; all by default.
    """
    there = {artifact.prefix: artifact for artifact in artifacts}
    names: dict[str, list[Published]] = defaultdict(list)
    for artifact in there.values():
        names[artifact.base].append(artifact)
    newest = {
        artifact.prefix
        for same in names.values()
        for artifact in sorted(same, key=lambda each: (each.published, each.prefix), reverse=True)[: max(rules.keep_last or 1, 1)]
    }

    def kept(artifact: Published) -> bool:
        age = now - artifact.published
        return (
            artifact.prefix in newest
            or artifact.pointed
            or artifact.prefix.partition("/")[0] not in rules.kinds
            or age < grace
            or (rules.keep is not None and age < rules.keep)
            or (only is not None and artifact.prefix not in only)
        )

    needs = _needs(there)
    wanted = {artifact.prefix for artifact in there.values() if kept(artifact)}
    reached, waiting = set(wanted), list(wanted)
    while waiting:
        fresh = needs[waiting.pop()] - reached
        reached |= fresh
        waiting += fresh
    going = there.keys() - reached
    users: dict[str, set[str]] = {prefix: set() for prefix in sorted(going)}
    for prefix in users:
        for needed in needs[prefix] & going:
            users[needed].add(prefix)
    return Retirement(tuple(TopologicalSorter(users).static_order()), tuple(sorted(reached - wanted)))


def _needs(there: Mapping[str, Published]) -> dict[str, set[str]]:
    """Prefixes that each artifact refers to. One version under two names is the same work: both are meant, since the input may name neither."""
    by_version: dict[str, set[str]] = defaultdict(set)
    for prefix in there:
        by_version[prefix.rpartition("/")[2]].add(prefix)
    return {
        artifact.prefix: {prefix for version in artifact.named for prefix in by_version.get(version, ())}.union(artifact.holders & there.keys())
        - {artifact.prefix}
        for artifact in there.values()
    }
