"""Units on a Dask or Ray cluster: the same units, with the same bytes, on as many machines as the cluster has.

Only units travel. Flows, their tasks and Prefect stay in this process, and so does a training, whose progress is watched here. Data do not pass through the
cluster either: a unit reads and writes the object store, so every machine must reach it.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from selfcascade.config import ExecutionSettings
from selfcascade.settings import SettingsError
from selfcascade_tasks.workers import Closed, Measured, WorkerDied, Workers, measured

Value = TypeVar("Value")


class DaskWorkers(Workers):
    """Units on Dask: a cluster that runs at ``address``, else one of this machine with a process for each of ``workers``."""

    def __init__(self, execution: ExecutionSettings) -> None:
        super().__init__(execution.workers)
        self._execution = execution
        self._client: Any = None
        self._cluster: Any = None
        self._cluster_lock = threading.RLock()

    def run(self, function: Callable[..., Value], *arguments: Any, report: Callable[[Any], None] | None = None, tries: int = 4) -> Measured[Value]:
        """See :meth:`Workers.run`; a unit that reports runs here."""
        if report is not None:
            return super().run(function, *arguments, report=report, tries=tries)
        client = self._connected()
        from distributed import CancelledError, KilledWorker
        from distributed.client import FutureCancelledError

        resources = {"GPU": self._execution.gpus_per_unit} if self._execution.gpus_per_unit else None
        future = client.submit(measured, function, arguments, pure=False, resources=resources)
        try:
            return future.result()  # type: ignore[no-any-return]
        except KilledWorker:
            raise _died(function) from None
        except (CancelledError, FutureCancelledError):
            raise Closed("the cluster was left") from None

    def close(self, patience: float = 0.0) -> None:
        """Take back what is under way and leave; a cluster of this machine ends."""
        with self._cluster_lock:
            client, cluster, self._client, self._cluster = self._client, self._cluster, None, None
        super().close(patience)
        if client is not None:
            client.close(timeout=10)
        if cluster is not None:
            cluster.close(timeout=10)

    def _connected(self) -> Any:
        with self._cluster_lock:
            if self._closed:
                raise Closed("the workers are closed")
            if self._client is None:
                try:
                    from distributed import Client, LocalCluster
                except ImportError:
                    raise _missing("dask", "distributed") from None
                address = self._execution.address
                if address is not None and not _answers(address):
                    raise SettingsError(f"execution.address: no Dask scheduler answers at {address}; give its address, such as tcp://host:8786")
                if address is None:
                    self._cluster = LocalCluster(  # type: ignore[no-untyped-call]
                        n_workers=self._execution.workers,
                        threads_per_worker=1,
                        host="127.0.0.1",
                        dashboard_address=None,
                        silence_logs=logging.CRITICAL,
                        resources={"GPU": self._execution.gpus_per_unit} if self._execution.gpus_per_unit else None,
                    )
                try:
                    self._client = Client(address or self._cluster, timeout=30, set_as_default=False)  # type: ignore[no-untyped-call]
                except OSError as error:
                    raise SettingsError(f"execution.address: what answers at {address} is no Dask scheduler ({' '.join(str(error).split())[:120]})") from None
            return self._client


class RayWorkers(Workers):
    """Units on Ray: a cluster that runs at ``address``, else one of this machine with a processor for each of ``workers``."""

    def __init__(self, execution: ExecutionSettings) -> None:
        super().__init__(execution.workers)
        self._execution = execution
        self._ray: Any = None
        self._cluster_lock = threading.RLock()

    def run(self, function: Callable[..., Value], *arguments: Any, report: Callable[[Any], None] | None = None, tries: int = 4) -> Measured[Value]:
        """See :meth:`Workers.run`; a unit that reports runs here."""
        if report is not None:
            return super().run(function, *arguments, report=report, tries=tries)
        ray = self._connected()
        from ray.exceptions import RayTaskError, TaskCancelledError, WorkerCrashedError

        unit = ray.remote(measured).options(num_cpus=1, num_gpus=self._execution.gpus_per_unit, max_retries=tries - 1)
        try:
            return ray.get(unit.remote(function, arguments))  # type: ignore[no-any-return]
        except WorkerCrashedError:
            raise _died(function) from None
        except TaskCancelledError:
            raise Closed("the cluster was left") from None
        except RayTaskError as error:
            raise error.cause from None

    def close(self, patience: float = 0.0) -> None:
        """Leave; a cluster of this machine ends, and what is under way is taken back."""
        with self._cluster_lock:
            ray, self._ray = self._ray, None
        super().close(patience)
        if ray is not None:
            ray.shutdown()

    def _connected(self) -> Any:
        with self._cluster_lock:
            if self._closed:
                raise Closed("the workers are closed")
            if self._ray is None:
                try:
                    import ray
                except ImportError:
                    raise _missing("ray", "ray") from None
                address = self._execution.address
                if address is not None and not _answers(address):
                    raise SettingsError(f"execution.address: no Ray cluster answers at {address}; give host:port of its head, or auto on a machine of it")
                # A cluster of this machine listens to this machine alone.
                here: dict[str, Any] = {} if address else {"num_cpus": self._execution.workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
                try:
                    ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **here)
                except ConnectionError as error:
                    raise SettingsError(f"execution.address: no Ray cluster is found ({' '.join(str(error).split())[:120]})") from None
                self._ray = ray
            return self._ray


def _answers(address: str) -> bool:
    """Whether somebody listens there; Ray itself would try for minutes. What names no port is Ray's to find."""
    host, colon, port = address.rpartition("//")[2].rpartition(":")
    if not colon or not port.isdigit():
        return True
    try:
        with socket.create_connection((host, int(port)), timeout=10):
            return True
    except OSError:
        return False


def _missing(runner: str, package: str) -> SettingsError:
    return SettingsError(f"execution.runner {runner!r} needs the package {package}, which is not installed; install selfcascade[{runner}]")


def _died(function: Callable[..., Any]) -> WorkerDied:
    return WorkerDied(f"a process of the cluster died again and again in {function.__name__}, most likely out of memory; lower the batch of this stage")
