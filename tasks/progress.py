"""One progress for everyone who watches a stage: an artifact in the UI, a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfcascade_tasks.artifacts import artifact_key

SHORT = 2.0
"""Seconds: work that ends sooner gets no bar."""
EVERY = 10.0
"""Seconds between plain lines."""


class StageProgress:
    """A context that counts what is done.

    Args:
        stage: and ``name``, which the key of the artifact is made from.
        name: of the artifact under way.
        start: how many were done before.
        total: how many there are.
        what: what is counted.
    """

    def __init__(self, stage: str, name: str, *, start: int, total: int, what: str = "units") -> None:
        self._title = f"{stage} {name}"
        self._key = artifact_key(stage, name, "progress")
        self._done = start
        self._total = total
        self._what = what
        self._note = ""
        self._artifact: UUID | None = None
        self._bar: Progress | None = None
        self._begun = self._said = 0.0

    def __enter__(self) -> Self:
        self._begun = self._said = time.monotonic()
        self._artifact = cast(UUID, create_progress_artifact(self._percent, key=self._key, description=self._text))
        return self

    def advance(self) -> None:
        """One more is done."""
        self.reach(self._done + 1)

    def reach(self, done: int, note: str = "") -> None:
        """So many are done; ``note`` is a word on how it goes."""
        self._done, self._note = done, note
        if self._artifact is not None:
            update_progress_artifact(self._artifact, self._percent, description=self._text)
        if sys.stderr.isatty():
            self._draw()
        elif time.monotonic() - self._said > EVERY:
            self._say()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif time.monotonic() - self._begun > SHORT:
            self._say()

    @property
    def _percent(self) -> float:
        return 100.0 * self._done / self._total if self._total else 100.0

    @property
    def _text(self) -> str:
        count = f"{self._done} of {self._total} {self._what}" if self._total else "done before"
        return count + (f", {self._note}" if self._note else "")

    def _say(self) -> None:
        self._said = time.monotonic()
        print(f"{self._title}: {self._text} in {self._said - self._begun:.0f} s", file=sys.stderr, flush=True)

    def _draw(self) -> None:
        if self._bar is None:
            if time.monotonic() - self._begun < SHORT and self._done < self._total:
                return
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(self._title, total=self._total, completed=self._done, note="")
        self._bar.update(self._bar.task_ids[0], completed=self._done, note=self._note)
