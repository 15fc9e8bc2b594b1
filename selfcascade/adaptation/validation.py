"""Validation: the loss on pictures that are not trained on, at fixed noise and timesteps, so that steps and runs can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from selfcascade.adaptation.cache import moved
from selfcascade.adaptation.loss import noise_loss
from selfcascade.adaptation.objective import FinetuneObjective, LatentObjective, NoiseObjective
from selfcascade.adaptation.trainer import Trainer
from selfcascade.generation.seeds import sample_generator, sample_seed

BINS = 5
SEED = 0
"""Of noise and timesteps: not the run's, since runs of different seeds are compared too."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class TimestepBin:
    """Timesteps ``first`` .. ``last``."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """What tables and counts call it."""
        return f"t{self.first}_{self.last}"


@dataclass(frozen=True)
class Validated:
    """One validation: mean squared errors of the moving average after ``step`` steps."""

    step: int
    loss: float
    """Mean over the bins."""
    bins: tuple[float, ...]
    """In the order of :attr:`Validation.bins`."""


class Validation:
    """The validations of one run. They draw nothing from what training draws, and leave its weights as they are, bit for bit.

    A picture has noise of its own, by its key, and in each bin a timestep of its own. Captions stay, no weighting of timesteps enters: it is the plain error
    in the noise, or velocity, whatever the run trains with. A latent upscaler has no timesteps: its loss is the one of its training.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Validate ``trainer`` on ``validation_samples`` pictures of the tune split, spread evenly over its keys; on none where there are none."""
        settings, objective = trainer.settings, trainer.objective
        self.trainer = trainer
        keys = trainer.latents.keys("tune") if settings.validation_steps is not None else []
        self.keys = spread(keys, settings.validation_samples)
        self.bins = bins_below(objective.below) if isinstance(objective, (NoiseObjective, FinetuneObjective)) else ()
        self.rows: list[Validated] = []

    @property
    def due(self) -> bool:
        """Whether the trainer is where a validation belongs, and none has been made there."""
        settings, step = self.trainer.settings, self.trainer.step
        if not self.keys or settings.validation_steps is None or not step or (self.rows and self.rows[-1].step == step):
            return False
        return step % settings.validation_steps == 0 or step == settings.steps

    @torch.no_grad()
    def look(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Validate where the trainer is, unless ``stop`` of the first rank says meanwhile to leave it; returns whether it was done.

        Several ranks take a part each, and all of them have the row.
        """
        part, ranks = self.trainer.part, self.trainer.ranks
        squares = [0.0 for _ in self.bins or (None,)]
        with averaged_weights(self.trainer):
            for number, _ in enumerate(squares):
                for all_keys in (chunk for bucket in self.trainer.latents.buckets(self.keys) for chunk in parts(bucket, part * ranks.count)):
                    if ranks.agreed(stop()):
                        return False
                    keys = all_keys[part * ranks.rank : part * (ranks.rank + 1)]
                    if keys:
                        squares[number] += len(keys) * float(self._errors(keys, number))
                    elif self.trainer.sharded:  # the others cannot pass theirs without what this rank holds of the weights
                        self._errors(all_keys[:1], number)
        bins = [square / len(self.keys) for square in ranks.total(squares)]
        self.rows.append(Validated(self.trainer.step, sum(bins) / len(bins), tuple(bins) if self.bins else ()))
        return True

    def best(self) -> Validated | None:
        """The lowest loss so far, the earlier of equal ones."""
        return min(self.rows, key=lambda row: row.loss, default=None)

    def since_best(self) -> int:
        """How many validations came after the best one."""
        best = self.best()
        return 0 if best is None else len(self.rows) - 1 - self.rows.index(best)

    def table(self) -> list[dict[str, float]]:
        """A row for each validation by ``step``, ``validation`` and ``validation_t0_99`` for each bin."""
        return [{"step": row.step} | self.columns(row) for row in self.rows]

    def columns(self, row: Validated) -> dict[str, float]:
        """The losses of a validation by name."""
        return {"validation": row.loss} | {f"validation_{bin_.name}": loss for bin_, loss in zip(self.bins, row.bins, strict=True)}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        rows = [[float(row.step), row.loss, *row.bins] for row in self.rows]
        return {"validation": torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1 if rows else 0)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """As :meth:`state` left it."""
        self.rows = [Validated(int(step), loss, tuple(bins)) for step, loss, *bins in tensors["validation"].tolist()]

    def _errors(self, keys: Sequence[str], number: int) -> Tensor:
        """Mean squared error of these pictures in bin ``number``, a float32 scalar."""
        trainer, objective = self.trainer, self.trainer.objective
        batch, device = trainer.latents.batch(keys), trainer.device
        with torch.autocast(device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
            if isinstance(objective, LatentObjective):
                batch = batch.to(device)
                return objective.distance(objective.trained(batch.pivot, (batch.target.shape[-2], batch.target.shape[-1])).float(), batch.target)
            assert isinstance(objective, (NoiseObjective, FinetuneObjective))
            noise, t = draws(keys, batch.target.shape[1:], self.bins[number], number)
            batch = batch.to(device)
            conditioning = batch.conditioning(trainer.settings.size)
            return noise_loss(
                lambda z, t: objective.predicted(z, t, batch, conditioning),
                batch.target,
                noise=moved(noise, device),
                t=moved(t, device),
                alphas_cumprod=objective.alphas_cumprod,
                prediction=objective.prediction,
            )


def bins_below(below: int) -> tuple[TimestepBin, ...]:
    """Timesteps 0 .. ``below`` - 1 in at most :data:`BINS` bins of nearly one width."""
    count = min(BINS, below)
    edges = [below * number // count for number in range(count + 1)]
    return tuple(TimestepBin(first, end - 1) for first, end in pairwise(edges))


def draws(keys: Sequence[str], shape: Sequence[int], within: TimestepBin, number: int) -> tuple[Tensor, Tensor]:
    """Noise, (B, *shape), and timesteps, (B,), of pictures in a bin, the ``number``-th: by key and number alone."""
    noise, timesteps = [], []
    for key in keys:
        generator = sample_generator(sample_seed(SEED, f"validation/{key}", number))
        noise.append(torch.randn(tuple(shape), generator=generator))
        timesteps.append(torch.randint(within.first, within.last + 1, (), generator=generator))
    return torch.stack(noise), torch.stack(timesteps)


@contextmanager
def averaged_weights(trainer: Trainer) -> Iterator[None]:
    """The moving average in place of the weights that train, which come back as they were."""
    trainer.trained.eval()
    trainer.average.swap(trainer.trainable)
    try:
        yield
    finally:
        trainer.average.swap(trainer.trainable)
        trainer.trained.train()


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` of ``items``, evenly over their order."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """``items`` in runs of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
