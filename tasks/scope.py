"""What the work under way belongs to: run, stage, artifact, unit. It goes along to threads of tasks and to worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import SecretStr


@dataclass(frozen=True)
class Scope:
    """Where a log line comes from, and how it is written. Texts are empty where nothing is known."""

    run: str = ""
    flow: str = ""
    stage: str = ""
    artifact: str = ""
    unit: str = ""
    logs: Literal["text", "json"] = "text"
    secrets: tuple[SecretStr, ...] = ()
    """What no line may hold."""


_scope: ContextVar[Scope | None] = ContextVar("scope", default=None)
_process = Scope()
"""In a worker, all of whose threads belong to the unit that it was given last."""


def scope() -> Scope:
    """That of this thread's context, else of the process."""
    return _scope.get() or _process


@contextmanager
def within(**changes: object) -> Iterator[Scope]:
    """Change some fields of the scope for the block."""
    inner = replace(scope(), **changes)  # type: ignore[arg-type]
    token = _scope.set(inner)
    try:
        yield inner
    finally:
        _scope.reset(token)


def enter_process(whole: Scope) -> None:
    """``whole`` is that of this process, a worker, until the next one is."""
    global _process
    _process = whole
