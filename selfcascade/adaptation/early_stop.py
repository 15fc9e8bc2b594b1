"""Early stopping: when the loss on the tune split has not become better for a while, training ends and the best weights are published."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from selfcascade.adaptation.objective import Trained
from selfcascade.adaptation.sharding import part_for
from selfcascade.adaptation.validation import Validation
from selfcascade.config import AdaptationSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact

BEST = "best/"
"""Of the names that a checkpoint gives to the weights of the best validation."""


def check_early_stop(settings: AdaptationSettings, dataset: Artifact) -> None:
    """Refuse to stop by the loss on a split that is empty.

    Raises:
        SettingsError: the dataset has no tune split.
    """
    if settings.early_stop is not None and not dataset.manifest().counts.get("tune"):
        raise SettingsError(f"{dataset.ref} has no tune split, which adaptation.early_stop looks at; unset it, or curate with curation.tune above 0")


class EarlyStop:
    """Keeps the moving average of the best validation; without ``early_stop`` in the settings it keeps nothing and never stops."""

    def __init__(self, validation: Validation) -> None:
        """Watch ``validation``."""
        self.validation = validation
        self.patience = validation.trainer.settings.early_stop
        self._best: dict[str, Tensor] = {}

    @property
    def stopped(self) -> bool:
        """Whether so many validations as the patience is came after the best one."""
        return self.patience is not None and self.validation.since_best() >= self.patience

    def take(self) -> None:
        """Keep the moving average if the newest validation, which has just been made, is the best."""
        if self.patience is not None and self.validation.since_best() == 0:
            self._best = {name: value.clone() for name, value in self.validation.trainer.average.values.items()}

    def published(self) -> Trained:
        """The network that is published: the moving average of the best validation, or of the last step."""
        trained = self.validation.trainer.averaged()
        trained.load_state_dict(self._best, strict=False)
        return trained

    @property
    def step(self) -> int:
        """Of what is published."""
        best = self.validation.best() if self.patience is not None else None
        return self.validation.trainer.step if best is None else best.step

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {f"{BEST}{name}": value for name, value in self._best.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """As :meth:`state` left it."""
        trainer = self.validation.trainer
        kept = [(name, parameter) for name, parameter in trainer.trainable if f"{BEST}{name}" in tensors]
        self._best = {name: part_for(parameter, tensors[f"{BEST}{name}"]).to(trainer.device) for name, parameter in kept}
