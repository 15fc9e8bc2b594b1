"""Runs of one name that were left before their end, and what a run whose settings changed does about them: nothing is begun anew without a word.

Settings and inputs are the address of a run, so one that goes on with other settings would be another run, at step 0, while its checkpoints lie unused.
Beside its checkpoints a run leaves what its address was made from, so that the next one can say which settings differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from selfcascade.adaptation.checkpoint import clear_checkpoints, newest_step, run_prefix
from selfcascade.config import AdaptationSettings
from selfcascade.settings import SettingsError, canonical_json
from selfcascade.storage import Artifact, NotFound, pointer, reference

UNSET = "unset"


@dataclass(frozen=True)
class Unfinished:
    """A run that has checkpoints and published nothing."""

    artifact: Artifact
    step: int
    """Optimizer steps that its furthest checkpoint has behind it."""


def leave_record(artifact: Artifact) -> None:
    """Put settings and inputs of a run beside its checkpoints, with which they go."""
    assert artifact.settings is not None
    artifact.store.put_cache(_key(artifact.ref.version), canonical_json({"settings": artifact.settings, "inputs": artifact.inputs}) + b"\n")


def unfinished_runs(artifact: Artifact) -> Iterator[Unfinished]:
    """Other versions of the same kind and name that were begun and left at a checkpoint."""
    for version in sorted(pointer.sequences(artifact.store, artifact.base).pending):
        if version == artifact.ref.version:
            continue
        try:
            record = json.loads(artifact.store.read(_key(version)))
        except NotFound:  # never came to training, or its checkpoints were collected as cache
            continue
        found = Artifact(artifact.store, reference(artifact.store, artifact.ref.kind, artifact.ref.name, version), record["settings"], record["inputs"])
        step = newest_step(artifact.store, version)
        if step and not found.has("manifest.json"):
            yield Unfinished(found, step)


def check_unfinished(settings: AdaptationSettings, artifact: Artifact) -> None:
    """Refuse to begin what looks like an interrupted run with other settings. A run with checkpoints of its own simply goes on.

    Raises:
        SettingsError: an unfinished run of this name has checkpoints; lists every key that differs.
    """
    if settings.restart or newest_step(artifact.store, artifact.ref.version):
        return
    for run in unfinished_runs(artifact):
        there, here = _plain(run.artifact), _plain(artifact)
        steps = there.get("steps", UNSET)
        raise SettingsError(
            f"{run.artifact.ref} is at step {run.step} of {steps} and was begun with other settings: {differences(there, here)}; go on with those of that run, "
            "set adaptation.name to train beside it, or adaptation.restart=true to give it up and delete its checkpoints"
        )


def give_up_unfinished(artifact: Artifact) -> None:
    """Delete the checkpoints of every other unfinished run of this name."""
    for run in unfinished_runs(artifact):
        clear_checkpoints(artifact.store, run.artifact.ref.version)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Every key whose value differs, in words: ``lr 0.001 there, 0.003 here``; of one that a side does not have, ``unset``."""
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key, UNSET) != here.get(key, UNSET)]
    return ", and ".join(f"{key} {there.get(key, UNSET)} there, {here.get(key, UNSET)} here" for key in keys)


def _plain(artifact: Artifact) -> dict[str, Any]:
    """Settings and inputs of a run, nested ones by dotted keys; of a version, which is long, the first digits."""
    assert artifact.settings is not None
    assert artifact.inputs is not None
    return dict(_flat(artifact.settings)) | {role: version[:12] for role, version in artifact.inputs.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", UNSET if value is None else value


def _key(version: str) -> str:
    return f"{run_prefix(version)}run.json"
