"""One process of a group that trains together: ``python -m selfcascade.adaptation.rank FOLDER``, started by torchrun for :mod:`rank_group`.

Over a socket in the folder it hears from the parent what to do and tells it how that goes. The socket is its leash as well: it leaves at once when the other
end closes, because the parent wants so or because the parent is dead.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from selfcascade.adaptation.preemption import Preempted
from selfcascade.adaptation.ranks import RankLost, joined, lost
from selfcascade.settings import SettingsError

SOCKET = "socket"
"""Name in the folder of where the parent listens."""
PASSED = (SettingsError, ConnectionError, TimeoutError, RankLost)
"""What a rank fails with that says all by itself, or that the parent knows what to do about; of anything else it says that it was this rank."""


class RankFailed(RuntimeError):
    """A rank met an error that nobody foresaw; its traceback is in the log."""


@dataclass(frozen=True)
class Hello:
    """The first message of a rank."""

    rank: int
    pid: int


@dataclass(frozen=True)
class Job:
    """The first message to a rank."""

    function: Callable[..., Any]
    """Called with the arguments and with the keywords ``ranks`` and ``progress``, whose argument goes to the parent."""
    arguments: tuple[Any, ...]
    device: torch.device


@dataclass(frozen=True)
class Told:
    """What the function called ``progress`` with."""

    value: Any


@dataclass(frozen=True)
class Outcome:
    """The last message of a rank."""

    value: Any
    """What the function returned, or the error that it ended with."""
    failed: bool
    at: float
    """Of the monotonic clock, which processes of a machine share."""


def send(connection: Connection, message: Any) -> None:
    """Pickled plainly: multiprocessing's own way has torch share the memory of tensors, which asks for a sender that stays."""
    connection.send_bytes(pickle.dumps(message))


def received(connection: Connection) -> Any:
    """What :func:`send` sent; EOFError when the other end is closed."""
    return pickle.loads(connection.recv_bytes())


def main(folder: Path) -> int:
    """Do what the parent says; 0 if that went well."""
    signal.signal(signal.SIGTERM, _leave)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    parent = Client(str(folder / SOCKET), "AF_UNIX")
    send(parent, Hello(rank, os.getpid()))
    try:
        job: Job = received(parent)
        threading.Thread(target=_watch, args=(parent,), name="leash", daemon=True).start()
        with joined(folder, rank=rank, count=count, device=job.device) as ranks:
            print(f"process {os.getpid()} computes on {f'{job.device}:{rank}' if job.device.type == 'cuda' else job.device}", flush=True)
            value = job.function(*job.arguments, ranks=ranks, progress=lambda told: send(parent, Told(told)))
        outcome = Outcome(value, False, time.monotonic())
    except Exception as error:
        outcome = Outcome(_passed(error, rank, count), True, time.monotonic())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    send(parent, outcome)
    return int(outcome.failed)


def _passed(error: Exception, rank: int, count: int) -> Exception:
    """The error as the parent raises it."""
    if isinstance(error, PASSED):
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:
            return SettingsError(str(error)) if isinstance(error, SettingsError) else RankFailed(str(error))
    gone = lost(error)
    if gone is not None:
        return gone
    traceback.print_exception(error)
    return RankFailed(f"rank {rank} of {count} failed: {type(error).__name__}: {error}")


def _leave(number: int, frame: FrameType | None) -> None:
    """What SIGTERM does outside of a training, and after one that has stored its last step."""
    raise Preempted("training was asked to end; the same command goes on from its last checkpoint")


def _watch(parent: Connection) -> None:
    try:
        parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


if __name__ == "__main__":
    from selfcascade.adaptation import rank as imported  # the parent knows the messages by this name, not by __main__

    sys.exit(imported.main(Path(sys.argv[1])))
