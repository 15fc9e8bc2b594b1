"""A collector of OpenTelemetry metrics on loopback: takes OTLP over HTTP as a real one does, and keeps the last value of every series."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest


class Collector:
    """Listens while the context is open. Metrics are counters, gauges (a number each) and histograms (count and sum)."""

    def __init__(self) -> None:
        self.resources: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.series: dict[tuple[str, frozenset[tuple[str, str]]], Any] = {}
        self.units: dict[str, str] = {}
        collector = self

        class Taking(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/metrics"
                collector.headers.append(dict(self.headers))
                collector._take(ExportMetricsServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Taking)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def total(self, name: str, **attributes: str) -> Any:
        """Sum over the series that have these attributes."""
        return sum(value for (found, where), value in self.series.items() if found == name and where >= attributes.items())

    def _take(self, request: ExportMetricsServiceRequest) -> None:
        for resource in request.resource_metrics:
            self.resources.append(_plain(resource.resource.attributes))
            for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
                self.units[metric.name] = metric.unit
                data = getattr(metric, metric.WhichOneof("data"))
                for point in data.data_points:
                    where = frozenset(_plain(point.attributes).items())
                    value = point.sum if hasattr(point, "bucket_counts") else getattr(point, point.WhichOneof("value"))
                    self.series[metric.name, where] = value
                    if hasattr(point, "bucket_counts"):
                        self.series[f"{metric.name} count", where] = point.count

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def _plain(attributes: Any) -> dict[str, str]:
    return {each.key: each.value.string_value for each in attributes}
