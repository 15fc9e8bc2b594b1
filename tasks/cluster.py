"""Units on a Dask or Ray cluster: the same units, with the same bytes, on as many machines as the cluster has.

Only units travel. Flows, their tasks and Prefect stay in this process, and so does a training, whose progress is watched here. Data do not pass through the
cluster either: a unit reads and writes the object store, so every machine must reach it.
"""

from __future__ import annotations

import logging
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from selfcascade.config import ExecutionSettings
from selfcascade.settings import SettingsError
from selfcascade_tasks.scope import Scope, scope, within
from selfcascade_tasks.workers import Closed, Measured, WorkerDied, Workers, measured

Value = TypeVar("Value")


class ClusterWorkers(Workers, ABC):
    """Units on a cluster that runs at ``address``, else on one of this machine. It is joined at the first unit and left by :meth:`close`."""

    def __init__(self, execution: ExecutionSettings) -> None:
        super().__init__(execution.workers)
        self._execution = execution
        self._joined: Any = None
        self._cluster_lock = threading.RLock()

    def run(
        self, function: Callable[..., Value], *arguments: Any, report: Callable[[Any], None] | None = None, tries: int = 4, unit: object = ""
    ) -> Measured[Value]:
        """See :meth:`Workers.run`; a unit that reports runs here."""
        if report is not None:
            return super().run(function, *arguments, report=report, tries=tries, unit=unit)
        with self._cluster_lock:
            if self._closed:
                raise Closed("the workers are closed")
            if self._joined is None:
                address = self._execution.address
                if address is not None and not _answers(address):
                    raise SettingsError(f"execution.address: nobody answers at {address}; {self.example}")
                self._joined = self._join(address)
            joined = self._joined
        with within(unit=str(unit)):
            found: Measured[Value] = self._run(joined, function, arguments, tries)
        return found

    def close(self, patience: float = 0.0) -> None:
        """Take back what is under way and leave; a cluster of this machine ends."""
        with self._cluster_lock:
            joined, self._joined = self._joined, None
        super().close(patience)
        if joined is not None:
            self._leave(joined)

    example: ClassVar[str]
    """What an address is, in words."""

    @abstractmethod
    def _join(self, address: str | None) -> Any:
        """The cluster at ``address``, which answers, or a new one of this machine."""

    @abstractmethod
    def _run(self, joined: Any, function: Callable[..., Any], arguments: tuple[Any, ...], tries: int) -> Any: ...

    @abstractmethod
    def _leave(self, joined: Any) -> None: ...


class DaskWorkers(ClusterWorkers):
    """Units on Dask; on this machine a process for each of ``workers``."""

    example = "give the address of a Dask scheduler, such as tcp://host:8786"

    def _join(self, address: str | None) -> Any:
        try:
            from distributed import Client, LocalCluster
        except ImportError:
            raise _missing("dask", "distributed") from None
        cluster = None
        if address is None:
            cluster = LocalCluster(  # type: ignore[no-untyped-call]
                n_workers=self._execution.workers,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address=None,
                silence_logs=logging.CRITICAL,
                resources=self._resources,
            )
        try:
            return Client(address or cluster, timeout=30, set_as_default=False), cluster  # type: ignore[no-untyped-call]
        except OSError as error:
            raise SettingsError(f"execution.address: what answers at {address} is no Dask scheduler ({' '.join(str(error).split())[:120]})") from None

    def _run(self, joined: Any, function: Callable[..., Any], arguments: tuple[Any, ...], tries: int) -> Any:
        from distributed import CancelledError, KilledWorker

        try:
            return joined[0].submit(measured, function, arguments, scope(), pure=False, resources=self._resources).result()
        except KilledWorker:
            raise _died(function) from None
        except CancelledError:
            raise Closed("the cluster was left") from None

    def _leave(self, joined: Any) -> None:
        for part in joined:
            if part is not None:
                part.close(timeout=10)

    @property
    def _resources(self) -> dict[str, float] | None:
        return {"GPU": self._execution.gpus_per_unit} if self._execution.gpus_per_unit else None


class RayWorkers(ClusterWorkers):
    """Units on Ray, in actors: processes that live as long as the run, so that each loads its networks once and keeps the GPU that it was given.

    (A task that holds a GPU takes its process down with it.) There is an actor for each of ``workers`` on a cluster of this machine; elsewhere as many as the
    cluster, as large as it is by then, has room for. A process can be in one cluster of Ray at a time: all of these workers share it, and the last that leaves
    ends it, unless it was joined before by somebody else.
    """

    example = "give host:port of the head of a Ray cluster, or auto on a machine of it"
    _sharing = threading.Lock()
    _members: ClassVar[list[RayWorkers]] = []
    _joined_by_us: ClassVar[bool] = False

    def __init__(self, execution: ExecutionSettings) -> None:
        super().__init__(execution)
        self._turn = threading.Condition()
        self._idle: list[Any] = []
        self._all: list[Any] = []
        self._actors = self._starting = self._waiting = 0

    def _join(self, address: str | None) -> Any:
        try:
            import ray
        except ImportError:
            raise _missing("ray", "ray") from None
        # A cluster of this machine listens to this machine alone.
        here: dict[str, Any] = {} if address else {"num_cpus": self._execution.workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        with RayWorkers._sharing:
            if not ray.is_initialized():
                try:
                    ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **here)
                except ConnectionError as error:
                    raise SettingsError(f"execution.address: no Ray cluster is found ({' '.join(str(error).split())[:120]})") from None
                RayWorkers._joined_by_us = True
            elif others := {each._execution.address for each in RayWorkers._members} - {address}:
                where = others.pop() or "of this machine"
                raise SettingsError(f"execution.address: this process is in the Ray cluster {where} already; give the same for all that it runs")
            RayWorkers._members.append(self)
        return ray

    def _run(self, joined: Any, function: Callable[..., Any], arguments: tuple[Any, ...], tries: int) -> Any:
        from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError

        for _ in range(tries):
            actor = None
            if self._closed:
                raise Closed("the cluster was left")
            try:
                actor = self._taken(joined)
                found = joined.get(actor.run.remote(function, arguments, scope()))
            except RayActorError:
                self._lost()
                continue
            except TaskCancelledError:
                raise Closed("the cluster was left") from None
            except RayTaskError as error:
                self._back(joined, actor)
                raise error.cause from None
            self._back(joined, actor)
            return found
        raise _died(function)

    def _leave(self, joined: Any) -> None:
        with RayWorkers._sharing:
            RayWorkers._members.remove(self)
            if RayWorkers._members or not RayWorkers._joined_by_us:
                for actor in self._all:
                    joined.kill(actor)
                return
            RayWorkers._joined_by_us = False
            joined.shutdown()

    def _taken(self, joined: Any) -> Any:
        """An actor that has nothing to do, or a new one where there is room; waits for one."""
        with self._turn:
            self._waiting += 1
            while not self._idle and self._actors >= self._room(joined):
                self._turn.wait(timeout=5)  # a cluster may grow meanwhile
            self._waiting -= 1
            if self._idle:
                return self._idle.pop()
            self._actors += 1
            self._starting += 1
        try:
            # On a cluster of this machine ``workers`` is the bound; an actor that held a CPU would keep it from other workers of this process.
            held = 1 if self._execution.address else 0
            actor = joined.remote(_Actor).options(num_cpus=held, num_gpus=self._execution.gpus_per_unit).remote()
            self._all.append(actor)
            joined.get(actor.ready.remote())
        finally:
            with self._turn:
                self._starting -= 1
        return actor

    def _back(self, joined: Any, actor: Any) -> None:
        with self._turn:
            if self._starting and not self._waiting:
                # Somebody else holds what an actor needs to begin, and nobody needs this one: its place is worth more.
                self._actors -= 1
                joined.kill(actor)
            else:
                self._idle.append(actor)
            self._turn.notify()

    def _lost(self) -> None:
        with self._turn:
            self._actors -= 1
            self._turn.notify()

    def _room(self, joined: Any) -> int:
        """How many actors there may be."""
        if self._execution.address is None:
            return self._execution.workers
        there, gpus = joined.cluster_resources(), self._execution.gpus_per_unit
        return max(1, int(there.get("GPU", 0) / gpus if gpus else there.get("CPU", 0)))


class _Actor:
    """What an actor runs."""

    def ready(self) -> None:
        """Returns once the process has begun."""

    def run(self, function: Callable[..., Value], arguments: tuple[Any, ...], whole: Scope) -> Measured[Value]:
        """Call it, and say what that cost."""
        return measured(function, arguments, whole)


def is_here(address: str) -> bool:
    """Whether the processes of a cluster at ``address`` run here and reach what this machine has on loopback; Ray's ``auto`` is the cluster of this machine."""
    return _host_port(address)[0] in ("127.0.0.1", "localhost", "auto")


def _host_port(address: str) -> tuple[str, int | None]:
    """Host and port of ``scheme://host:port``, ``host:port`` or a name alone."""
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        return parts.hostname or "", parts.port
    except ValueError:  # what follows the colon is no port
        return address, None


def _answers(address: str) -> bool:
    """Whether somebody listens there; Ray itself would try for minutes. What names no port is Ray's to find."""
    host, port = _host_port(address)
    if port is None:
        return True
    try:
        with socket.create_connection((host, port), timeout=10):
            return True
    except OSError:
        return False


def _missing(runner: str, package: str) -> SettingsError:
    return SettingsError(f"execution.runner {runner!r} needs the package {package}, which is not installed; install selfcascade[{runner}]")


def _died(function: Callable[..., Any]) -> WorkerDied:
    return WorkerDied(f"a process of the cluster died again and again in {function.__name__}, most likely out of memory; lower the batch of this stage")
