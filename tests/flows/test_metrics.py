"""Metrics reach a collector that decodes them: from threads and from worker processes, and never at the run's expense."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from collector import Collector
from conftest import command, environment
from served import free_port
from stored_unit import write

from selfcascade import traffic
from selfcascade.config import ExecutionSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store
from selfcascade.traffic import Traffic
from selfcascade_flows.configuration import load
from selfcascade_tasks import metrics
from selfcascade_tasks.progress import StageProgress
from selfcascade_tasks.record import StageCost, UnitCost
from selfcascade_tasks.workers import Workers


@pytest.fixture
def collector():
    with Collector() as found:
        yield found


@pytest.fixture
def quick(monkeypatch):
    """Exporters that give up soon, and complain anew."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setattr(metrics._Once, "said", False)
    yield
    metrics.close_metrics()


def test_what_units_cost_is_pushed_from_threads_and_from_worker_processes(store, collector, quick, monkeypatch):
    """Eight units in two processes and eight in threads of this one: each is counted once, with its bytes. What failed is counted too."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=hush")
    execution = ExecutionSettings(metrics=collector.url, workers=2)
    told = metrics.meters(execution, "run-1")
    assert metrics.meters(execution, "run-1") is told
    stage = StageCost(stage="curate", name="x", artifact="datasets/x@1", units=16)
    workers, processes = Workers(2), set()

    def far(number):
        measured = workers.run(write, store, number, unit=number)
        processes.add(measured.value)
        told.done(stage, UnitCost.of(number, measured, 1.0, pictures=3))

    def near(number):
        write(store, number)
        told.done(stage, UnitCost(unit=number, work=1, seconds=2.5, cpu_seconds=1, peak_bytes=1, pictures=3))

    write(store, 99)  # so that this process is connected
    traffic.take()
    threads = [threading.Thread(target=far if number < 8 else near, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    workers.close()
    told.failed(stage)
    own = traffic.take()
    told.ended(stage.model_copy(update={"seconds": 4.0, "error": "boom"}), own)
    with_progress(told)
    metrics.close_metrics()
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert collector.total("selfcascade.units", stage="curate", artifact="x", outcome="done") == 16
    assert collector.total("selfcascade.units", outcome="failed") == 1
    assert collector.total("selfcascade.pictures", stage="curate") == 48
    assert collector.total("selfcascade.unit.duration count") == 16
    assert collector.total("selfcascade.unit.duration") > 8 * 2.5
    assert own.sent == 8000
    assert collector.total("selfcascade.store.io", **{"network.io.direction": "transmit"}) == 16_000
    assert collector.total("selfcascade.store.io", **{"network.io.direction": "receive"}) >= 16_000
    assert collector.total("selfcascade.store.requests") >= 32
    assert collector.total("selfcascade.stage.duration", outcome="failed") == 4.0
    assert collector.total("selfcascade.stage.progress", stage="adapt", artifact="y") == 0.75
    assert collector.units["selfcascade.unit.duration"] == "s"
    assert collector.units["selfcascade.store.io"] == "By"
    [resource] = collector.resources
    assert (resource["service.name"], resource["service.instance.id"]) == ("selfcascade", "run-1")
    assert collector.headers[0]["authorization"] == "hush"


def with_progress(told):
    """Three of four, without a server that shows it."""
    progress = StageProgress("adapt", "y", start=0, total=4, meters=told)
    progress._begun = progress._said = time.monotonic()
    progress.reach(3)


def test_without_the_setting_nothing_is_made():
    assert metrics.meters(ExecutionSettings(), "run") is metrics.OFF
    metrics.OFF.done(StageCost(stage="curate", name="x"), UnitCost(unit=0, work=1, seconds=1, cpu_seconds=1, peak_bytes=1))
    metrics.OFF.close()


def test_a_collector_that_is_gone_costs_one_warning(quick):
    """Of all that reaches the handlers of the root."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    told = metrics.meters(ExecutionSettings(metrics=f"http://127.0.0.1:{free_port()}"), "run-2")
    told.ended(StageCost(stage="curate", name="x"), Traffic())
    logging.getLogger().addHandler(handler)
    began = time.monotonic()
    try:
        told._provider.force_flush()
        metrics.close_metrics()
    finally:
        logging.getLogger().removeHandler(handler)
    assert time.monotonic() - began < 6
    [line] = heard
    assert line.startswith("metrics do not reach execution.metrics, the run goes on without (")


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.metric_exporter", None)
    with pytest.raises(SettingsError, match=re.escape("pip install 'selfcascade[observe]'")):
        metrics.check_metrics(ExecutionSettings(metrics="http://127.0.0.1:4318"))
    metrics.check_metrics(ExecutionSettings())


@pytest.mark.parametrize("address", ["collector:4318", "http://me:hush@collector:4318", "ftp://collector"])
def test_an_address_is_a_url_without_keys(address):
    """Settings are stored and shown; keys belong to ``OTEL_EXPORTER_OTLP_HEADERS``."""
    with pytest.raises(SettingsError, match=r"execution\.metrics"):
        load("demo", [f"execution.metrics={address}"])


@pytest.mark.full
def test_a_run_tells_what_its_record_holds(tmp_path, collector):
    """Metrics and log lines of a real run against its manifest and its record; the same artifact as of a run that tells nobody."""
    options = ["--set", "curation.source.limit=40", "--set", "curation.shard_inputs=20", "--set", "curation.test=0.3"]
    told = ["--set", f"execution.metrics={collector.url}", "--set", "execution.logs=json"]
    outputs = []
    for name, more in (("told", told), ("quiet", [])):
        folder = tmp_path / name
        folder.mkdir()
        made = subprocess.run(command("curate", *options, *more), cwd=folder, env=environment(), capture_output=True, text=True, timeout=400, check=False)
        assert made.returncode == 0, made.stderr
        outputs.append(made.stdout.split("Prefect UI")[0])
        if name == "told":
            lines = [json.loads(line) for line in made.stderr.splitlines()]
    assert outputs[0] == outputs[1]
    kept = int(re.search(r"kept +│ (\d+)", outputs[0]).group(1))
    with Store.open(load("demo", [f"store.folder={tmp_path / 'told/.selfcascade/store'}"]).store, read_only=True) as store:
        [record] = [json.loads(store.read(info.key)) for info in store.list("runs/")]
    [stage] = record["stages"]
    assert collector.total("selfcascade.units", stage="curate", outcome="done") == stage["done"] == 6
    assert collector.total("selfcascade.pictures") == kept
    assert collector.total("selfcascade.store.requests") == stage["traffic"]["requests"] > 20
    assert collector.total("selfcascade.store.io", **{"network.io.direction": "transmit"}) == stage["traffic"]["sent"] > 100_000
    assert collector.total("selfcascade.stage.progress") == 1
    assert {line["run"] for line in lines} == {record["run"]}
    units = [line for line in lines if line.get("unit") and line["logger"] == "selfcascade_tasks.stage"]
    assert {(line["stage"], line["artifact"].partition("@")[0], line["unit"]) for line in units} == {("curate", "datasets/twemoji", str(n)) for n in range(6)}
