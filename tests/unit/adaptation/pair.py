"""Two processes that train as one: real ones, over gloo, each of which does one thing after another, and what tests have them do."""

from __future__ import annotations

import hashlib
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tiny_run import synthetic_latents

from selfcascade import SelfCascadePipeline
from selfcascade.adaptation.ranks import ALONE, Ranks, joined
from selfcascade.adaptation.sharding import copied
from selfcascade.adaptation.start import trainer_of
from selfcascade.adaptation.training_run import TrainingRun
from selfcascade.bases import load_pipeline, resolve_base
from selfcascade.config import AdaptationSettings

COUNT = 2

State = dict[str, bytes]


class Pair:
    """Two ranks, each in a process of its own that does one thing after another."""

    def __init__(self, ends: list[Connection]) -> None:
        self._ends = ends

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(ranks, *arguments)`` returns on each."""
        for end in self._ends:
            end.send((function, arguments))
        found = [end.recv() for end in self._ends]
        for failed, value in found:
            assert not failed, value
        return [value for _, value in found]


def serve(folder: Path, rank: int, end: Connection) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    with joined(folder, rank=rank, count=COUNT, device=torch.device("cpu")) as ranks:
        while (job := end.recv()) is not None:
            function, arguments = job
            try:
                end.send((False, function(ranks, *arguments)))
            except Exception:
                end.send((True, traceback.format_exc()))


@contextmanager
def two(folder: Path) -> Iterator[Pair]:
    """A pair for as long as the block lasts."""
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for rank in range(COUNT):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(folder, rank, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        ends.append(ours)
    yield Pair(ends)
    for end, process in zip(ends, processes, strict=True):
        end.send(None)
        process.join(60)
        assert process.exitcode == 0


def run_of(settings: AdaptationSettings, ranks: Ranks = ALONE) -> TrainingRun:
    """A run at step 0 on random latents of nine pictures, three of them to validate on."""
    base = resolve_base(settings.base)
    pipeline = SelfCascadePipeline.from_pipe(load_pipeline(base, getattr(torch, settings.compute.dtype)))
    return TrainingRun(trainer_of(settings, pipeline, synthetic_latents(train=9, tune=3), base, torch.device("cpu"), ranks))


def frozen(run: TrainingRun) -> tuple[State, dict[str, Any]]:
    """All that a checkpoint of a run holds, as bytes."""
    tensors, record = run.state()
    return {name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in copied(tensors).items()}, record


def hashed(run: TrainingRun) -> str:
    """Of weights, averages, optimizer, random numbers and log together.

    Without torch's own generator: training leaves it where the process had it before.
    """
    tensors, record = frozen(run)
    return hashlib.sha256(b"".join(name.encode() + tensors[name] for name in sorted(tensors) if name != "random/torch") + repr(record).encode()).hexdigest()


def steps(run: TrainingRun, count: int) -> TrainingRun:
    for _ in range(count):
        run.trainer.advance()
    return run


def steps_on(ranks: Ranks, settings: AdaptationSettings, count: int) -> str:
    return hashed(steps(run_of(settings, ranks), count))
