"""``latest.json``, the pointer that consumers follow, and the sequence that keeps it from going back.

A run takes a sequence when it is planned and moves the pointer when it is done, only from a lower sequence to its own. Of two runs the one
that was planned later wins, whichever ends first. A sequence that was taken and not yet used is pending; it survives a killed run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from selfcascade.storage.errors import Conflict, IntegrityError, NotFound
from selfcascade.storage.store import Store

TRIES = 50


@dataclass(frozen=True)
class Latest:
    """What ``latest.json`` says."""

    version: str
    sequence: int


@dataclass(frozen=True)
class Sequences:
    """What ``sequence.json`` says: the highest sequence taken, and the one that each unfinished version will use."""

    taken: int = 0
    pending: dict[str, int] = field(default_factory=dict)


def latest(store: Store, base: str) -> Latest | None:
    """The pointer of ``base`` (kind/name), or None when nothing was published."""
    return _read_latest(store, base)[0]


def sequences(store: Store, base: str) -> Sequences:
    """Sequences of ``base``."""
    return _read_sequences(store, base)[0]


def take(store: Store, base: str, version: str) -> int:
    """Take the next sequence for ``version`` by compare-and-swap."""
    for _ in range(TRIES):
        found, tag = _read_sequences(store, base)
        number = found.taken + 1
        try:
            _swap(store, f"{base}/sequence.json", {"taken": number, "pending": found.pending | {version: number}}, tag)
            return number
        except Conflict:
            continue
    raise Conflict(f"{base}: too many runs take a sequence at this moment; run again")


def move(store: Store, base: str, version: str, sequence: int) -> bool:
    """Point ``base`` at ``version`` unless the pointer has a higher sequence; then the pending entry is cleared. Says whether it moved."""
    moved = False
    for _ in range(TRIES):
        found, tag = _read_latest(store, base)
        if found is not None and found.sequence >= sequence:
            break
        try:
            _swap(store, f"{base}/latest.json", {"version": version, "sequence": sequence}, tag)
            moved = True
            break
        except Conflict:
            continue
    else:
        raise Conflict(f"{base}: too many runs move the pointer at this moment; run again")
    _clear(store, base, version, sequence)
    return moved


def _clear(store: Store, base: str, version: str, sequence: int) -> None:
    for _ in range(TRIES):
        found, tag = _read_sequences(store, base)
        if found.pending.get(version, sequence + 1) > sequence:
            return
        pending = {name: number for name, number in found.pending.items() if name != version}
        try:
            _swap(store, f"{base}/sequence.json", {"taken": found.taken, "pending": pending}, tag)
            return
        except Conflict:
            continue


def _read_latest(store: Store, base: str) -> tuple[Latest | None, str | None]:
    tree, tag = _read(store, f"{base}/latest.json")
    if tree is None:
        return None, None
    try:
        return Latest(str(tree["version"]), int(tree["sequence"])), tag
    except (KeyError, TypeError, ValueError):
        raise IntegrityError(f"object {store.uri(base)}/latest.json is no pointer; delete it and run the stage again") from None


def _read_sequences(store: Store, base: str) -> tuple[Sequences, str | None]:
    tree, tag = _read(store, f"{base}/sequence.json")
    if tree is None:
        return Sequences(), None
    return Sequences(int(tree["taken"]), {str(name): int(number) for name, number in tree["pending"].items()}), tag


def _read(store: Store, key: str) -> tuple[Any, str | None]:
    try:
        data, tag = store.read_tagged(key)
        return json.loads(data), tag
    except NotFound:
        return None, None
    except ValueError:
        raise IntegrityError(f"object {store.uri(key)} is not valid JSON; delete it and run the stage again") from None


def _swap(store: Store, key: str, tree: dict[str, Any], tag: str | None) -> None:
    store.compare_and_swap(key, json.dumps(tree, sort_keys=True).encode() + b"\n", tag)
