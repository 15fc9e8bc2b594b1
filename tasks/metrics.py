"""Metrics of a run, pushed by OTLP: units, seconds, pictures, bytes, requests, progress.

Everything is counted in the process of the flow, to which workers of any kind return what their units cost: they need no exporter and no way to the collector.
A run is pushed rather than scraped because it may be over before anybody asks. Metrics are told to nobody unless ``execution.metrics`` says so, and whatever
becomes of them, the run goes on.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from opentelemetry.metrics import MeterProvider, NoOpMeterProvider

from selfcascade.config import ExecutionSettings
from selfcascade.settings import SettingsError
from selfcascade.traffic import Traffic

if TYPE_CHECKING:
    from selfcascade_tasks.record import StageCost, UnitCost

log = logging.getLogger(__name__)
EVERY = 15_000
"""Milliseconds between two pushes, unless ``OTEL_METRIC_EXPORT_INTERVAL`` has others."""
PATIENCE = 5.0
"""Seconds for one push with all its tries, unless ``OTEL_EXPORTER_OTLP_TIMEOUT`` has others: so much longer a run takes whose collector is gone."""
BOUNDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
"""Seconds of a unit: from a shard of small pictures to a training of hours."""


class Meters:
    """The instruments of a run. Attributes are stage and artifact without its version, so that there are as many series as stages."""

    def __init__(self, provider: MeterProvider) -> None:
        self._provider = provider
        meter = provider.get_meter("selfcascade", version("selfcascade"))
        self._units = meter.create_counter("selfcascade.units", "{unit}", "Units of work that ended; outcome is done or failed.")
        self._seconds = meter.create_histogram("selfcascade.unit.duration", "s", "Seconds of a unit in its worker.", explicit_bucket_boundaries_advisory=BOUNDS)
        self._pictures = meter.create_counter("selfcascade.pictures", "{picture}", "Pictures that units kept, sampled or measured.")
        self._stage = meter.create_gauge("selfcascade.stage.duration", "s", "Seconds of a stage that ended; outcome is done, skipped or failed.")
        self._progress = meter.create_gauge("selfcascade.stage.progress", "1", "Share of a stage, or of the steps of a training, that is done.")
        self._io = meter.create_counter("selfcascade.store.io", "By", "Bytes of objects between the run and its store.")
        self._requests = meter.create_counter("selfcascade.store.requests", "{request}", "Requests to the store.")
        self._retries = meter.create_counter("selfcascade.store.retries", "{retry}", "Requests that were sent again.")
        self._damaged = meter.create_counter("selfcascade.store.damaged_reads", "{read}", "Reads that were repeated, since their bytes were not those written.")

    def done(self, stage: StageCost, unit: UnitCost) -> None:
        """A unit of ``stage`` is done."""
        where = _where(stage)
        self._units.add(unit.units, where | {"outcome": "done"})
        self._seconds.record(unit.seconds, where)
        self._pictures.add(unit.pictures, where)
        self._traffic(unit.traffic, where)

    def failed(self, stage: StageCost) -> None:
        """A unit of ``stage`` failed, for good."""
        self._units.add(1, _where(stage) | {"outcome": "failed"})

    def reached(self, stage: str, name: str, share: float) -> None:
        """So much of it is done, 0 to 1."""
        self._progress.set(share, {"stage": stage, "artifact": name})

    def ended(self, stage: StageCost, own: Traffic) -> None:
        """``stage`` is over, well or badly; ``own`` is what went over the network besides its units, for plans and for publishing."""
        where = _where(stage)
        self._stage.set(stage.seconds, where | {"outcome": stage.state})
        self._traffic(own, where)

    def close(self) -> None:
        """Push what was not pushed yet."""
        if not isinstance(self._provider, NoOpMeterProvider):
            self._provider.shutdown()  # type: ignore[attr-defined]

    def _traffic(self, traffic: Traffic, where: dict[str, str]) -> None:
        self._io.add(traffic.sent, where | {"network.io.direction": "transmit"})
        self._io.add(traffic.received, where | {"network.io.direction": "receive"})
        self._requests.add(traffic.requests, where)
        self._retries.add(traffic.retries, where)
        self._damaged.add(traffic.damaged, where)


OFF = Meters(NoOpMeterProvider())
"""Told to nobody."""
_open: dict[tuple[str, str], Meters] = {}
_guard = threading.Lock()


def meters(execution: ExecutionSettings, run: str) -> Meters:
    """The instruments of ``run`` in this process; :data:`OFF` where ``execution.metrics`` is unset.

    Raises:
        SettingsError: the extra ``observe`` is not installed.
    """
    if execution.metrics is None:
        return OFF
    key = (execution.metrics, run)
    with _guard:
        if key not in _open:
            _open[key] = Meters(_pushing(execution.metrics, run))
        return _open[key]


def check_metrics(execution: ExecutionSettings) -> None:
    """Refuse a run whose metrics could not be told, before it begins.

    Raises:
        SettingsError: the extra ``observe`` is not installed.
    """
    if execution.metrics is not None:
        _exporter(execution.metrics)


def close_metrics() -> None:
    """Push what was not pushed yet, of all runs of this process."""
    with _guard:
        found = [*_open.values()]
        _open.clear()
    for each in found:
        each.close()


atexit.register(close_metrics)


def _pushing(address: str, run: str) -> MeterProvider:
    exporter = _exporter(address)
    from opentelemetry.sdk.metrics import MeterProvider as PushingProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource

    for name in ("opentelemetry.sdk.metrics", "opentelemetry.exporter.otlp"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Once) for handler in logger.handlers):
            logger.addHandler(_Once())
            logger.propagate = False
    # One instance a run: its counters begin at 0, whatever other runs of the service say at the same time.
    resource = Resource.create({"service.name": "selfcascade", "service.version": version("selfcascade"), "service.instance.id": run})
    every = None if "OTEL_METRIC_EXPORT_INTERVAL" in os.environ else EVERY
    return PushingProvider([PeriodicExportingMetricReader(exporter, export_interval_millis=every)], resource, shutdown_on_exit=False)


def _where(stage: StageCost) -> dict[str, str]:
    return {"stage": stage.stage, "artifact": stage.name}


def _exporter(address: str) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    except ImportError:
        raise SettingsError("execution.metrics needs the packages of an extra that is not installed; pip install 'selfcascade[observe]', or unset it") from None
    patience = None if {"OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT"} & os.environ.keys() else PATIENCE
    return OTLPMetricExporter(endpoint=f"{address.rstrip('/')}/v1/metrics", timeout=patience)


class _Once(logging.Handler):
    """Of all that the exporter complains of, the first, in a line that names the setting: a collector that is gone is no trouble of the run's."""

    said = False

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, if nothing was said yet."""
        if record.levelno >= logging.WARNING and not _Once.said:
            _Once.said = True
            log.warning("metrics do not reach execution.metrics, the run goes on without (%s); this is said once", " ".join(record.getMessage().split())[:200])
