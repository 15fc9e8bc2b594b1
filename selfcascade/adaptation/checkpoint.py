"""Checkpoints of a training run in the store: whole or absent, the newest sound one found again, the last few kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selfcascade.adaptation.tensorfile import open_tensor_file, written_tensor_file
from selfcascade.settings import SettingsError
from selfcascade.storage import IntegrityError, NotFound, Store

log = logging.getLogger(__name__)

KEEP = 2
"""Checkpoints kept of a run: the newest, and one more in case the newest is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after ``step`` optimizer steps: named tensors (CPU) and a JSON record."""

    step: int
    tensors: Mapping[str, Tensor]
    record: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one version of an upsampler that is trained on one cache of latents.

    They are no part of the artifact: they live under ``cache/``, may be deleted at any time, and go when the artifact is published. The
    digest of the latents is in the address, so that two machines that train the same version on latents of their own never mix states.
    """

    def __init__(self, store: Store, *, version: str, latents: str) -> None:
        """Checkpoints in ``store`` of artifact version ``version`` (hex) on latents of digest ``latents`` (hex)."""
        self.store = store
        self.latents = latents
        self.prefix = f"{run_prefix(version)}{latents[:12]}/"

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store the state after ``step`` steps, then drop all but the newest few.

        The new object is put whole before an old one goes: a full disk or a crash leaves the previous checkpoint.
        """
        with written_tensor_file(tensors, {"step": step, "latents": self.latents, "state": dict(record)}) as file:
            self.store.put_cache(self._key(step), file)
        self.store.delete([self._key(old) for old in self.steps()[:-KEEP]])

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, ascending."""
        return sorted(_step_of(info.key) for info in self.store.list(self.prefix))

    def newest(self) -> Checkpoint | None:
        """The newest sound checkpoint, or None. A damaged one is passed over with a warning: the run repeats a few steps and ends the same.

        Raises:
            SettingsError: the checkpoint was trained on other latents than its address says.
        """
        for step in reversed(self.steps()):
            try:
                file = open_tensor_file(self.store, self._key(step))
            except IntegrityError as error:
                log.warning("%s; an older checkpoint takes its place", error)
                continue
            except NotFound:  # dropped meanwhile by a second run of the same work
                continue
            found = str(file.record["latents"])
            if found != self.latents:
                raise SettingsError(f"{file.name} was trained on latents {found[:12]}…, but the cache holds {self.latents[:12]}…; delete it to start over")
            return Checkpoint(step, {name: file.tensor(name).clone() for name in file.names}, file.record["state"])
        return None

    def _key(self, step: int) -> str:
        return f"{self.prefix}step-{step:06d}.safetensors"


def newest_step(store: Store, version: str) -> int:
    """Steps that the furthest checkpoint of ``version`` has behind it, on whatever latents; 0 when there is none. Only lists keys."""
    return max((_step_of(info.key) for info in store.list(run_prefix(version)) if "/step-" in info.key), default=0)


def clear_checkpoints(store: Store, version: str) -> None:
    """Delete every checkpoint of ``version``, and the record beside them: what is published needs none."""
    store.delete([info.key for info in store.list(run_prefix(version))])


def run_prefix(version: str) -> str:
    """Key prefix of all checkpoints of artifact version ``version``, and of the record of its run."""
    return f"cache/checkpoints/{version}/"


def _step_of(key: str) -> int:
    return int(key.rsplit("/", 1)[-1].removeprefix("step-").removesuffix(".safetensors"))
