"""Several processes that train together, as their parent sees them: started by torchrun, heard, and ended together with whoever fails.

torchrun starts the ranks and ends the others when one fails. What it does not know is how they tell what they have reached and what went wrong, and that they
must not outlive a parent that is killed: for that each rank holds one end of a socket (see :mod:`selfcascade.adaptation.rank`). Ranks and torchrun meet by
files in a folder of this run: nothing listens but on loopback.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from selfcascade.adaptation.preemption import Preempted, Preemption
from selfcascade.adaptation.rank import SOCKET, Hello, Job, Outcome, RankFailed, Told, received, send
from selfcascade.adaptation.ranks import RankLost
from selfcascade.settings import SettingsError

log = logging.getLogger(__name__)

PATIENCE = 20.0
"""Seconds for the others to come to their end once one rank has failed: the first may be storing a checkpoint."""
LOOK = 0.2
"""Seconds between looks at whether torchrun lives and whether we are asked to leave."""
LINE = re.compile(r"rank (\d+): (.*)")


class RankDied(SettingsError):
    """A rank was ended from outside: most often for want of memory."""


@dataclass(frozen=True)
class RankLine:
    """A line that a rank wrote to its standard output or error."""

    rank: int
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.text}"


def log_line(line: RankLine) -> None:
    """Give a line to the logger of this module."""
    log.info("%s", line)


@dataclass
class _Member:
    """A rank as far as its parent has heard of it."""

    connection: Connection
    rank: int = -1
    pid: int = 0
    outcome: Outcome | None = None
    gone: bool = False

    @property
    def settled(self) -> bool:
        return self.gone or self.outcome is not None


class RankGroup:
    """``count`` ranks, each a process, on GPUs one each."""

    def __init__(self, count: int, device: torch.device, *, threads: int = 1, heard: Callable[[RankLine], None] = log_line) -> None:
        """Nothing starts yet.

        Args:
            count: of ranks.
            device: cpu, or cuda, where rank r computes on the r-th GPU.
            threads: that OpenMP starts with in each.
            heard: called with every line that a rank writes.
        """
        self.count, self.device, self.threads, self.heard = count, device, threads, heard
        self._members: list[_Member] = []
        self._errors: list[Exception] = []
        self._trouble: float | None = None
        self._rest = b""
        self._silent = False
        self._said: deque[str] = deque(maxlen=20)

    def run(self, function: Callable[..., Any], *arguments: Any, progress: Callable[[Any], None]) -> Any:
        """What ``function(*arguments, ranks=..., progress=...)`` returns on the first rank, called on every one.

        Args:
            function: importable; it and the arguments must pickle.
            *arguments: what it is called with.
            progress: called here with what the function calls its own with, on whatever rank.

        Raises:
            Preempted: SIGTERM came, and whoever handled it before goes on. The first rank is asked to leave, the others follow it.
            RankDied: a rank was ended from outside.
            RankFailed: a rank met an error that nobody foresaw; names it.
            Exception: what a rank has to say to the user, or what may pass, as it was raised there.
        """
        with Preemption() as preemption, TemporaryDirectory(prefix="selfcascade-") as name, socket.socket(socket.AF_UNIX) as listener:
            folder = Path(name)
            listener.bind(str(folder / SOCKET))
            listener.listen(self.count)
            with self._started(folder) as torchrun:
                try:
                    self._follow(torchrun, listener, Job(function, arguments, self.device), progress, preemption)
                    value = self._value(torchrun)
                except Preempted:
                    preemption.asked = True  # the ranks alone were: as if it had come to the process that trains, which is them
                    raise
                finally:
                    self._end(torchrun)
        return value

    def _started(self, folder: Path) -> subprocess.Popen[bytes]:
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={folder / 'torchrun'}", "--rdzv-conf=store_type=file", f"--rdzv-id={folder.name}"]
        command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--local-addr=127.0.0.1", "--nnodes=1", f"--nproc-per-node={self.count}"]
        logs = [f"--log-dir={folder}", "--tee=3"]
        return subprocess.Popen(
            [*command, *logs, "-m", "selfcascade.adaptation.rank", str(folder)],
            env=os.environ | self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at a terminal is the parent's alone
        )

    def _environment(self) -> Mapping[str, str]:
        return {
            "PYTHONPATH": os.pathsep.join(sys.path),  # as multiprocessing does it: ranks import what their parent imports
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(self.threads),
            "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "rank ${rank}: ",
        }

    def _follow(self, torchrun: subprocess.Popen[bytes], listener: socket.socket, job: Job, progress: Callable[[Any], None], preemption: Preemption) -> None:
        """Hear the ranks until all have come to an end, or one has failed and the others have had their time."""
        asked = False
        assert torchrun.stdout is not None
        output = torchrun.stdout.fileno()
        while not self._over():
            if preemption.asked and not asked:
                self._ask(torchrun)
                asked = True
            open_ends = [member.connection for member in self._members if not member.gone]
            ready = wait([listener, *open_ends, *([] if self._silent else [output])], LOOK)
            if listener in ready:
                self._members.append(_Member(Connection(listener.accept()[0].detach())))
            if output in ready:
                self._silent = not self._read(os.read(output, 65536))
            self._hear([member for member in self._members if member.connection in ready], job, progress)
            if not ready and torchrun.poll() is not None:
                self._trouble = self._trouble or time.monotonic()

    def _over(self) -> bool:
        settled = all(member.settled for member in self._members)
        if self._trouble is None:
            return settled and len(self._members) == self.count
        return settled or time.monotonic() - self._trouble > PATIENCE

    def _hear(self, members: list[_Member], job: Job, progress: Callable[[Any], None]) -> None:
        """One message of each. Errors are kept in the order in which they came up, since one rank's brings on those of the others."""
        failed: list[tuple[float, Exception]] = []
        for member in members:
            try:
                message = received(member.connection)
            except (EOFError, OSError):
                member.gone = True
                if member.outcome is None:
                    failed.append((time.monotonic(), self._died(member)))
                continue
            match message:
                case Hello(rank, pid):
                    member.rank, member.pid = rank, pid
                    with suppress(OSError):  # its end is heard next
                        send(member.connection, job)
                case Told(value):
                    progress(value)
                case Outcome():
                    member.outcome = message
                    if message.failed:
                        failed.append((message.at, message.value))
        if failed:
            self._errors += [error for _, error in sorted(failed, key=lambda entry: entry[0])]
            self._trouble = self._trouble or time.monotonic()

    def _died(self, member: _Member) -> RankDied:
        name = f"rank {member.rank}" if member.rank >= 0 else "a rank"
        return RankDied(
            f"{name} of {self.count} was ended from outside, most likely out of memory; lower adaptation.processes or adaptation.batch, "
            "or raise adaptation.accumulation"
        )

    def _ask(self, torchrun: subprocess.Popen[bytes]) -> None:
        """Ask the first rank to leave, without the time limit of torchrun, or all of them by it if there is no first one yet."""
        first = next((member for member in self._members if member.rank == 0 and not member.settled), None)
        with suppress(ProcessLookupError):
            if first is None:
                torchrun.terminate()
            else:
                os.kill(first.pid, signal.SIGTERM)

    def _value(self, torchrun: subprocess.Popen[bytes]) -> Any:
        """What the first rank returned; raises what went wrong first, and that a rank is lost only if nothing says how."""
        for error in sorted(self._errors, key=lambda error: isinstance(error, RankLost)):
            raise error
        if self._trouble is not None:
            raise RankFailed(f"torchrun ended with code {torchrun.poll()} before the ranks did: {' '.join(list(self._said)[-1:])}")
        return next(member.outcome.value for member in self._members if member.rank == 0 and member.outcome is not None)

    def _end(self, torchrun: subprocess.Popen[bytes]) -> None:
        """Leave nobody behind, and hear what was written last."""
        done = self._trouble is None and self._over() and self._gone(torchrun)
        for member in self._members:
            member.connection.close()
        if not done:
            torchrun.terminate()
            if not self._gone(torchrun):
                torchrun.kill()

    def _gone(self, torchrun: subprocess.Popen[bytes]) -> bool:
        """Whether torchrun ends by itself."""
        try:
            self._read(torchrun.communicate(timeout=PATIENCE)[0])
        except subprocess.TimeoutExpired:
            return False
        return True

    def _read(self, chunk: bytes) -> bool:
        """Split what torchrun writes: lines of ranks are heard, its own are kept for the case that it fails itself. False where nothing is left."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            found = LINE.fullmatch(text)
            if found:
                self.heard(RankLine(int(found[1]), found[2]))
            elif text:
                self._said.append(text)
        return bool(chunk)
