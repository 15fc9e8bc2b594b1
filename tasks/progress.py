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
from selfcascade_tasks.logs import say
from selfcascade_tasks.metrics import OFF, Meters
from selfcascade_tasks.scope import scope

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
        meters: hear of every step.
    """

    def __init__(self, stage: str, name: str, *, start: int, total: int, what: str = "units", meters: Meters = OFF) -> None:
        self._stage, self._name, self._meters = stage, name, meters
        self._title = f"{stage} {name}"
        self._key = artifact_key(stage, name, "progress")
        self._done = start
        self._total = total
        self._what = what
        self._start = start
        self._note = ""
        self._left: float | None = None
        self._artifact: UUID | None = None
        self._bar: Progress | None = None
        self._begun = self._said = 0.0

    def __enter__(self) -> Self:
        self._begun = self._said = time.monotonic()
        self._meters.reached(self._stage, self._name, self._percent / 100)
        self._artifact = cast(UUID, create_progress_artifact(self._percent, key=self._key, description=self._text))
        return self

    def advance(self, units: int = 1) -> None:
        """So many more are done."""
        self.reach(self._done + units)

    def reach(self, done: int, note: str = "", seconds_left: float | None = None) -> None:
        """So many are done; ``note`` is a word on how it goes. Who knows better than the pace so far says how long the rest takes."""
        self._done, self._note = done, note
        self._left = self._paced() if seconds_left is None else seconds_left
        if self._artifact is not None:
            update_progress_artifact(self._artifact, self._percent, description=self._text)
        self._meters.reached(self._stage, self._name, self._percent / 100)
        if sys.stderr.isatty() and scope().logs == "text":
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
        return self._count + self._rest

    @property
    def _count(self) -> str:
        count = f"{self._done} of {self._total} {self._what}" if self._total else "done before"
        return count + (f", {self._note}" if self._note else "")

    @property
    def _rest(self) -> str:
        return f", {_span(self._left)} left" if self._left and self._done < self._total else ""

    def _paced(self) -> float | None:
        """Seconds that the rest takes at the pace of what was done since the beginning."""
        done = self._done - self._start
        return (time.monotonic() - self._begun) / done * (self._total - self._done) if done > 0 else None

    def _say(self) -> None:
        self._said = time.monotonic()
        seconds = self._said - self._begun
        say(f"{self._title}: {self._count} in {seconds:.0f} s{self._rest}", seconds=round(seconds, 3), done=self._done, total=self._total)

    def _draw(self) -> None:
        if self._bar is None:
            if time.monotonic() - self._begun < SHORT and self._done < self._total:
                return
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(self._title, total=self._total, completed=self._done, note="")
        self._bar.update(self._bar.task_ids[0], completed=self._done, note=self._note)


def _span(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
