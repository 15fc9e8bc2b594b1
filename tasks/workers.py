"""The worker processes in which units of work run: spawned, kept between units, free of Prefect, gone with their parent.

Two processes of one thread each beat one process of two threads at sampling and at features, and a process that imports the
library alone is ready seconds before one that imports Prefect too. A worker holds one end of a pipe, the leash, and leaves at
once when the other end closes: because its parent closed it (Ctrl-C, end of the run), or because the parent died by whatever
signal. A unit that cannot afford to lose what it has may take SIGTERM as a request: a worker that dies by it is replaced, and its
unit goes on from what it has stored.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import queue
import resource
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Lock
from typing import Any, Generic, TypeVar

from selfcascade.config import ExecutionSettings
from selfcascade.settings import SettingsError
from selfcascade.traffic import Traffic, take
from selfcascade_tasks.logs import begin_lines
from selfcascade_tasks.scope import Scope, enter_process, scope, within

Value = TypeVar("Value")

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "536870912",
    "MALLOC_MMAP_MAX_": "0",
}
"""Steady step times on shared cores: waiting threads sleep, and freed memory stays with the process."""


CLUSTER = 64
"""Units that may run at once on a cluster whose size is not known here; ``workers`` says if there are more."""


class WorkerDied(SettingsError):
    """A unit of work took its process down again and again: most often memory."""


class Closed(RuntimeError):
    """The workers were closed while a unit waited for them."""


@dataclass(frozen=True)
class Measured(Generic[Value]):
    """What a unit returned and what it cost: wall seconds, processor seconds, the largest resident memory meanwhile, and what went over the network."""

    value: Value
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    traffic: Traffic


class Workers:
    """At most ``count`` worker processes, started as they are needed and replaced when one dies."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.RLock()  # a signal handler may close while its own thread starts
        self._pool: ProcessPoolExecutor | None = None
        self._leash: Connection | None = None
        self._closed = False
        self._post: Connection | None = None
        self._inboxes: dict[str, queue.SimpleQueue[Any]] = {}

    def run(
        self, function: Callable[..., Value], *arguments: Any, report: Callable[[Any], None] | None = None, tries: int = 4, unit: object = ""
    ) -> Measured[Value]:
        """Call ``function(*arguments)`` in a worker and wait for it.

        Args:
            function: importable from the library; it and the arguments must pickle.
            *arguments: what it is called with.
            report: if given, the function gets a keyword ``progress``, and what it calls that with arrives here, in the calling thread.
            tries: how often a unit may be started whose process dies.
            unit: what log lines of it call it, here and in the worker.

        Raises:
            WorkerDied: the process died ``tries`` times.
            Closed: :meth:`close` was called meanwhile.
            Exception: whatever the function raised.
        """
        with within(unit=str(unit)):
            return self._run_here(function, arguments, report, tries)

    def _run_here(self, function: Callable[..., Value], arguments: tuple[Any, ...], report: Callable[[Any], None] | None, tries: int) -> Measured[Value]:
        for _ in range(tries):
            pool = self._start()
            address = secrets.token_hex(8)
            inbox = self._inboxes[address] = queue.SimpleQueue()
            try:
                future = pool.submit(_call, function, arguments, scope(), address if report else None)
                future.add_done_callback(lambda _, inbox=inbox: inbox.put(_DONE))  # type: ignore[misc]
                for message in iter(inbox.get, _DONE):
                    assert report is not None
                    report(message)
                return future.result()
            except (BrokenProcessPool, CancelledError):
                self._discard(pool)
            except RuntimeError:
                if self._pool is pool:
                    raise
                # else the pool was closed between _start and submit
            finally:
                del self._inboxes[address]
        raise WorkerDied(
            f"a worker process died {tries} times in {function.__name__}, most likely out of memory; lower execution.workers or the batch of this stage"
        )

    def close(self, patience: float = 0.0) -> None:
        """End every worker. A unit that runs is lost, which costs nothing but time: it is done again at the next run.

        Args:
            patience: seconds for units that take SIGTERM as a request to store what they have; 0: at once.
        """
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        try:
            if pool is not None and patience:
                _ask_to_leave([*(pool._processes or {}).values()], patience)
        finally:
            self._drop_leash()
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._closed:
                raise Closed("the workers are closed")
            if self._pool is None:
                for name, value in ENVIRONMENT.items():
                    os.environ.setdefault(name, value)
                context = multiprocessing.get_context("spawn")
                held, self._leash = context.Pipe(duplex=False)
                arriving, self._post = context.Pipe(duplex=False)
                self._pool = ProcessPoolExecutor(self._count, mp_context=context, initializer=_begin, initargs=(held, self._post, context.Lock()))
                threading.Thread(target=self._sort, args=(arriving,), name="post", daemon=True).start()
            return self._pool

    def _sort(self, arriving: Connection) -> None:
        """Give each message to the call that waits for it, until the last worker of the pool is gone."""
        with suppress(EOFError, OSError):
            while True:
                address, message = arriving.recv()
                inbox = self._inboxes.get(address)
                if inbox is not None:
                    inbox.put(message)

    def _discard(self, pool: ProcessPoolExecutor) -> None:
        with self._lock:
            if self._pool is pool:
                self._pool = None
                self._drop_leash()
        pool.shutdown(wait=False, cancel_futures=True)

    def _drop_leash(self) -> None:
        if self._leash is not None:
            self._leash.close()
            self._leash = None
        if self._post is not None:
            self._post.close()
            self._post = None


_shared: dict[tuple[Any, ...], Workers] = {}
_shared_lock = threading.RLock()


def workers(execution: ExecutionSettings) -> Workers:
    """The workers that all tasks of this process share: processes of this machine, or a cluster's."""
    key = (execution.runner, execution.address, execution.workers, execution.gpus_per_unit)
    with _shared_lock:
        if key not in _shared:
            if execution.runner == "processes":
                _shared[key] = Workers(execution.workers)
            else:
                from selfcascade_tasks.cluster import DaskWorkers, RayWorkers

                _shared[key] = DaskWorkers(execution) if execution.runner == "dask" else RayWorkers(execution)
        return _shared[key]


def side_by_side(execution: ExecutionSettings) -> int:
    """How many units run at once: as many as there are workers; of a cluster somewhere, whose size may change, at least :data:`CLUSTER`."""
    return execution.workers if execution.address is None else max(execution.workers, CLUSTER)


def close_workers(patience: float = 0.0) -> None:
    """End all workers of this process, see :meth:`Workers.close`; the next unit starts new ones."""
    with _shared_lock:
        pools = list(_shared.values())
        _shared.clear()
    for pool in pools:
        pool.close(patience)


def _ask_to_leave(processes: Sequence[BaseProcess], patience: float) -> None:
    """SIGTERM to all, and wait until they are gone or the time is over."""
    end = time.monotonic() + patience
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


atexit.register(close_workers)


_DONE = None
"""Ends a stream of messages."""
_post: Callable[[tuple[str, Any]], None]
"""In a worker: sends a message, with its address, to the parent."""


def _begin(leash: Connection, post: Connection, turn: Lock) -> None:
    global _post

    def send(letter: tuple[str, Any]) -> None:
        with turn:
            post.send(letter)

    _post = send
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    threading.Thread(target=_watch, args=(leash,), name="leash", daemon=True).start()


def _watch(leash: Connection) -> None:
    try:
        leash.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _call(function: Callable[..., Value], arguments: tuple[Any, ...], whole: Scope, address: str | None) -> Measured[Value]:
    if address is None:
        return measured(function, arguments, whole)
    return measured(partial(function, progress=lambda message: _post((address, message))), arguments, whole)


def measured(function: Callable[..., Value], arguments: tuple[Any, ...], whole: Scope) -> Measured[Value]:
    """Call it in a worker, with log lines that say what it belongs to, and say what that cost."""
    enter_process(whole)
    begin_lines()
    _reset_peak()
    started, busy = time.perf_counter(), time.process_time()
    value = function(*arguments)
    return Measured(value, time.perf_counter() - started, time.process_time() - busy, _peak(), take())


def _reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # no Linux: the peak is that of the process so far


def _peak() -> int:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024
