"""One training from where it is to its end: steps, and between them checkpoints, validations, previews and words to whoever watches."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from selfcascade.adaptation.checkpoint import Checkpoint, CheckpointFolder
from selfcascade.adaptation.checkpoint_writer import CheckpointWriter
from selfcascade.adaptation.early_stop import EarlyStop
from selfcascade.adaptation.preemption import Preempted, Preemption
from selfcascade.adaptation.sharding import copied
from selfcascade.adaptation.tensorboard_log import TensorBoardLog
from selfcascade.adaptation.trainer import COLUMNS, Trainer
from selfcascade.adaptation.validation import Validation


@dataclass(frozen=True)
class TrainingStep:
    """Where a training run is: what a progress bar shows."""

    step: int
    """Steps behind it."""
    steps: int
    loss: float
    """Mean since the last report."""
    lr: float
    samples_per_second: float
    seconds_left: float
    memory_bytes: int
    """Peak so far: of the GPU where it trains there, else of the process."""
    validation: float | None = None
    """Of the last validation."""
    preview: str | None = None
    """Key, in the store's cache, of the preview sheet that was drawn at this step."""


Progress: TypeAlias = Callable[[TrainingStep], None]


class TrainingRun:
    """The state that a checkpoint holds, trainer, validations and best weights, and the loop that moves it."""

    def __init__(self, trainer: Trainer) -> None:
        """At the trainer's step."""
        self.trainer = trainer
        self.settings = trainer.settings
        self.validation = Validation(trainer)
        self.early_stop = EarlyStop(self.validation)

    @property
    def over(self) -> bool:
        """Whether no step is left."""
        return self.trainer.step >= self.settings.steps or self.early_stop.stopped

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What :meth:`restore` needs."""
        tensors, record = self.trainer.state()
        return tensors | self.validation.state() | self.early_stop.state(), record

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where the checkpoint was taken; every later step is the one of an undisturbed run."""
        self.trainer.restore(checkpoint.tensors, checkpoint.record)
        self.validation.restore(checkpoint.tensors)
        self.early_stop.restore(checkpoint.tensors)

    def begin(self, newest: Checkpoint | None) -> None:
        """Go on from a checkpoint, or from nothing; where several ranks train, from what the first one was given or started with: all from the same bits."""
        ranks = self.trainer.ranks
        if ranks.agreed(newest is None):
            if ranks.count == 1 or self.trainer.sharded:  # shards were cut from the same base, and nothing of them is drawn
                return
            given: tuple[Mapping[str, Tensor], dict[str, Any]] = self.state()
        else:
            given = ({}, {}) if newest is None else (newest.tensors, newest.record)
        tensors, record = ranks.of_first(*given)
        self.restore(Checkpoint(record["step"], tensors, record))

    def counts(self) -> dict[str, float]:
        """What the manifest says of the validation of what is published, and of its step where that is not the last."""
        found = next((row for row in self.validation.rows if row.step == self.early_stop.step), None)
        counts = {} if found is None else {name: round(value, 6) for name, value in self.validation.columns(found).items()}
        return counts if self.early_stop.patience is None else {"best_step": self.early_stop.step, **counts}

    def train(
        self, checkpoints: CheckpointFolder, board: TensorBoardLog, *, preview: Callable[[], str | None] | None, progress: Callable[[TrainingStep], None]
    ) -> int:
        """Train until it is over, and leave the final state as a checkpoint. Of several ranks the first decides when to leave, and writes.

        Args:
            checkpoints: where states go, in the background.
            board: hears every number.
            preview: draws a preview sheet of the weights as they are and returns its key; called on every rank; unset: no previews.
            progress: called every ``log_steps`` steps, at every preview and at the last step.

        Returns:
            The steps that were done.

        Raises:
            Diverged: the loss is not finite; earlier checkpoints are kept.
            Preempted: SIGTERM came, and whoever handled it before goes on; the last step is stored.
        """
        settings, trainer, ranks = self.settings, self.trainer, self.trainer.ranks
        first = trainer.step
        report = _Report(self, board, progress if ranks.first else lambda reached: None)
        with Preemption() as preemption, ranks.together(), trainer.objective.held(), CheckpointWriter(checkpoints) as writer:
            saved = None if self._validate(preemption) else first  # a run that had to leave may have left it out
            while ranks.agreed(not self.over and not preemption.asked):
                trainer.advance()
                writer.check()
                self._validate(preemption)
                previewing = preview is not None and trainer.step % settings.preview_steps == 0
                # A preview may take longer than the machine is left to us: first what was trained is brought to safety.
                if previewing or trainer.step % settings.checkpoint_steps == 0:
                    self._save(writer)
                    saved = trainer.step
                if preview is not None and previewing and ranks.agreed(not self.over and not preemption.asked):
                    report.send(preview())
                elif self.over or trainer.step % settings.log_steps == 0:
                    report.send()
            if saved != trainer.step:
                self._save(writer)
        if not self.over:
            raise Preempted(f"training of {settings.name} was asked to end at step {trainer.step} of {settings.steps}; the same command goes on from there")
        return trainer.step - first

    def _save(self, writer: CheckpointWriter) -> None:
        """The first rank's state, which is everybody's, and what the others hold of it in shards."""
        if self.trainer.ranks.first:
            writer.save(self.trainer.step, *self.state())
        elif self.trainer.sharded:
            copied(self.state()[0], keep=False)

    def _validate(self, preemption: Preemption) -> bool:
        if not self.validation.due or not self.validation.look(stop=lambda: preemption.asked):
            return False
        self.early_stop.take()
        return True


class _Report:
    """Turns the trainer's log into what a progress bar and TensorBoard show."""

    def __init__(self, run: TrainingRun, board: TensorBoardLog, progress: Progress) -> None:
        self.run, self.board, self.progress = run, board, progress
        self.first = self.sent = run.trainer.step
        self.validated = len(run.validation.rows)
        self.started = time.monotonic()

    def send(self, preview: str | None = None) -> None:
        trainer, validation = self.run.trainer, self.run.validation
        step, log = trainer.step, trainer.log()
        recent = log[self.sent :] or log[-1:]
        seconds = (time.monotonic() - self.started) / (step - self.first)
        told = TrainingStep(
            step=step,
            steps=trainer.settings.steps,
            loss=sum(row[0] for row in recent) / len(recent),
            lr=recent[-1][1],
            samples_per_second=trainer.settings.batch / seconds,
            seconds_left=0.0 if self.run.over else seconds * (trainer.settings.steps - step),
            memory_bytes=peak_memory(trainer.device),
            validation=validation.rows[-1].loss if validation.rows else None,
            preview=preview,
        )
        for number, row in enumerate(log[self.sent :], start=self.sent + 1):
            self.board.scalars(number, {f"train/{name}": value for name, value in zip(COLUMNS, row, strict=True)})
        for validated in validation.rows[self.validated :]:
            self.board.scalars(validated.step, {name.replace("_", "/", 1): value for name, value in validation.columns(validated).items()})
        self.board.scalars(step, {"speed/samples_per_second": told.samples_per_second, "memory/peak_mib": told.memory_bytes / 2**20})
        self.sent, self.validated = step, len(validation.rows)
        self.progress(told)


def peak_memory(device: torch.device) -> int:
    """Bytes that torch held at most on a GPU; elsewhere the largest resident memory of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
