"""Published upsamplers side by side: what differs between them, and their losses where these can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfcascade.adaptation.card import flattened
from selfcascade.settings import SettingsError
from selfcascade.storage import ArtifactRef, Store, resolve

SHARED = ("size", "start")
"""Settings without which no loss of one upsampler says anything of another's, beside base and data."""
OF_LOSS, OF_VALIDATION = ("snr_gamma", "caption_dropout"), ("validation_samples",)
"""Settings that a loss in training, and a validation, depend on too."""


@dataclass(frozen=True)
class Side:
    """One upsampler."""

    ref: ArtifactRef
    variant: str
    parameters: int
    fitted: int
    base: str
    """``name@version``."""
    dataset: str
    """Version of the dataset."""
    steps: int
    best_step: int | None
    """Step that is published, where training chose it."""
    settings: Mapping[str, Any]
    """By dotted name."""
    loss: float
    """Mean over the last tenth of training."""
    validation: Mapping[str, float]
    """Mean and, by its bin, of each; nothing where it was not validated."""


@dataclass(frozen=True)
class Comparison:
    """Two upsamplers or more."""

    sides: tuple[Side, ...]

    @property
    def differing(self) -> dict[str, list[Any]]:
        """Settings that are not the same for all, by dotted name; None where one does not have it."""
        names = sorted({name for side in self.sides for name in side.settings})
        values = {name: [side.settings.get(name) for side in self.sides] for name in names}
        return {name: found for name, found in values.items() if _differ(found)}

    @property
    def obstacles(self) -> list[str]:
        """Why no loss can be compared; empty where they can."""
        found = []
        if _differ([side.base for side in self.sides]):
            found.append(f"their bases are {_listed(side.base for side in self.sides)}")
        if _differ([side.dataset for side in self.sides]):
            found.append(f"their data are versions {_listed(side.dataset[:12] for side in self.sides)}")
        return found + self._of(SHARED)

    @property
    def obstacles_of_loss(self) -> list[str]:
        """Why the losses in training cannot."""
        return self.obstacles + self._of(OF_LOSS)

    @property
    def obstacles_of_validation(self) -> list[str]:
        """Why the validations cannot."""
        without = [str(side.ref) for side in self.sides if not side.validation]
        return self.obstacles + self._of(OF_VALIDATION) + ([f"{', '.join(without)} {'was' if len(without) == 1 else 'were'} not validated"] if without else [])

    def _of(self, names: Sequence[str]) -> list[str]:
        return [f"{name} is {_listed(values)}" for name, values in self.differing.items() if name in names]


def compare(store: Store, references: Sequence[str]) -> Comparison:
    """The upsamplers of these names, in this order. Reads manifests and configurations only.

    Raises:
        SettingsError: there are less than two.
        NotFound: one is not published.
    """
    if len(references) < 2:
        raise SettingsError("a comparison takes two upsamplers or more; `selfcascade ls upsamplers` shows what is published")
    return Comparison(tuple(_side(store, reference) for reference in references))


def _side(store: Store, reference: str) -> Side:
    artifact = resolve(store, reference, kind="upsamplers")
    manifest = artifact.manifest()
    config, counts = json.loads(artifact.read("config.json")), manifest.counts
    return Side(
        ref=artifact.ref,
        variant=str(config["variant"]),
        parameters=int(counts["parameters"]),
        fitted=int(counts["fitted"]),
        base=str(config["base"]),
        dataset=manifest.inputs["dataset"],
        steps=int(counts["steps"]),
        best_step=int(counts["best_step"]) if "best_step" in counts else None,
        settings=flattened(manifest.settings),
        loss=float(counts["loss"]),
        validation={name: float(counts[name]) for name in sorted((name for name in counts if name.startswith("validation")), key=_first_timestep)},
    )


def _first_timestep(name: str) -> int:
    """Of a bin such as ``validation_t140_279``; the mean of all comes before them."""
    _, _, bin_ = name.partition("_t")
    return int(bin_.partition("_")[0]) if bin_ else -1


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _listed(values: Any) -> str:
    return " and ".join(str(value) for value in dict.fromkeys(values))
