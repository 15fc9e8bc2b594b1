"""Units on Dask and Ray clusters, real ones on this machine: the same bytes, errors as they are, and nothing left behind."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import command, environment, small

from selfcascade.config import ExecutionSettings, StoreSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store, resolve
from selfcascade_tasks.cluster import DaskWorkers, RayWorkers, is_here
from selfcascade_tasks.workers import WorkerDied

RUNNERS = {"dask": DaskWorkers} | ({"ray": RayWorkers} if importlib.util.find_spec("ray") else {})
"""Ray is installed by `make test-ray`."""
SILENT = {"dask": "tcp://127.0.0.1:1", "ray": "127.0.0.1:1"}


@pytest.fixture(params=RUNNERS)
def cluster(request):
    workers = RUNNERS[request.param](ExecutionSettings(runner=request.param, workers=2))
    yield workers
    workers.close()


def objects(home: Path) -> dict[str, str]:
    with Store.open(StoreSettings(folder=home / ".selfcascade/store")) as store:
        return {entry.key: entry.sha256 for entry in resolve(store, "datasets/twemoji").manifest().objects}


def test_a_dataset_has_the_same_bytes_whatever_runs_its_units(tmp_path):
    """Under one address: the runner is no part of it."""
    found = {}
    for runner in ("processes", *RUNNERS):
        home = tmp_path / runner
        home.mkdir()
        words = command("curate", *small(curation__shard_inputs=8, execution__runner=runner))
        made = subprocess.run(words, cwd=home, env=environment(), capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        found[runner] = objects(home)
    assert len(found["processes"]) > 10
    assert all(found[runner] == found["processes"] for runner in RUNNERS)


def test_units_run_elsewhere_side_by_side_and_are_measured(cluster):
    one = cluster.run(os.getpid)
    assert one.value != os.getpid()
    assert one.peak_bytes > 10**7
    assert cluster.run(time.sleep, 0.2).seconds >= 0.2


def test_an_error_of_the_unit_arrives_unchanged(cluster):
    with pytest.raises(SettingsError, match=r"settings file .*nowhere\.yaml does not exist"):
        cluster.run(ExecutionSettings.from_yaml, Path("/nowhere.yaml"))


def test_a_unit_that_always_dies_ends_in_one_line_about_memory(cluster):
    with pytest.raises(WorkerDied, match="most likely out of memory"):
        cluster.run(os._exit, 9, tries=2)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_cluster_that_does_not_answer_is_named(runner):
    address = SILENT[runner]
    code = (
        "from selfcascade.config import ExecutionSettings as E; from selfcascade_tasks.cluster import DaskWorkers, RayWorkers; import os\n"
        "from selfcascade.settings import SettingsError\n"
        f"workers = dict(dask=DaskWorkers, ray=RayWorkers)[{runner!r}](E(runner={runner!r}, address={address!r}))\n"
        "try: workers.run(os.getpid)\nexcept SettingsError as error: print(error)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert f"execution.address: nobody answers at {address}; give" in made.stdout, made.stderr[-1500:]
    assert runner.capitalize() in made.stdout


def test_a_cluster_of_other_machines_needs_a_store_that_they_reach(tmp_path):
    words = command("curate", *small(execution__runner="dask", execution__address="tcp://10.1.2.3:8786"))
    made = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert made.stderr.strip().endswith("cannot reach the embedded store of this one; set store.endpoint")


def test_a_cluster_that_is_not_installed_is_named(monkeypatch):
    for runner, package, workers in (("dask", "distributed", DaskWorkers), ("ray", "ray", RayWorkers)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SettingsError, match=rf"needs the package {package}, which is not installed; install selfcascade\[{runner}\]"):
            workers(ExecutionSettings(runner=runner)).run(os.getpid)


def test_no_process_of_a_cluster_outlives_its_use(cluster):
    unit = cluster.run(os.getpid).value
    cluster.close()
    end = time.monotonic() + 20
    while Path(f"/proc/{unit}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{unit}").exists()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "localhost:6379", "auto", "ray://localhost:10001"])
def test_a_cluster_of_this_machine_is_known_by_its_host(address):
    assert is_here(address)


@pytest.mark.parametrize("address", ["tcp://autoscaler.example:8786", "localhost.example.org:6379", "10.127.0.0.1:1", "head", "tcp://[::1:bad"])
def test_a_host_whose_name_only_holds_such_a_word_is_another(address):
    assert not is_here(address)
