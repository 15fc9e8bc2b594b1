"""Preemption: a machine that is about to be taken away says so by SIGTERM, and training leaves with its last step stored."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from selfcascade.settings import SettingsError


class Preempted(SettingsError):
    """The machine was about to be taken away; the last step is stored."""


class Preemption:
    """A context in which SIGTERM only asks: :attr:`asked` says so, whoever works inside comes to an end, and then the signal does what it did before.

    In a process of ours that is to end it, by that very signal, so that a parent sees a death and not a failure. Outside the main thread, which alone may
    handle signals, and where SIGTERM is ignored, nothing changes.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self.asked:
            signal.raise_signal(signal.SIGTERM)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
