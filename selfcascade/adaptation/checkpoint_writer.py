"""Checkpoints written behind the back of the training loop: it hands over a copy of its state and goes on."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from selfcascade.adaptation.checkpoint import CheckpointFolder
from selfcascade.adaptation.sharding import copied


class CheckpointWriter:
    """A context with one thread that stores checkpoints, at most one at a time.

    What was handed over is in the store when the context ends, also by an exception. An error of the thread is raised by the next call, or at the end, as
    the folder raised it: the checkpoint before is whole then.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        """Write into ``folder``."""
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Copy the state after ``step`` steps to host memory and store it meanwhile; waits for the checkpoint before, if that is still under way.

        Of a state in shards the other ranks copy at the same time.
        """
        self.wait()
        self._writing = self._thread.submit(self._folder.save, step, copied(tensors), dict(record))

    def check(self) -> None:
        """Raise what the thread has failed with; waits for nothing."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until what was handed over is in the store."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()
