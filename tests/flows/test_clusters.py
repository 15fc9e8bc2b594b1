"""Units on Dask and Ray clusters, real ones on this machine: the same bytes, errors as they are, and nothing left behind."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import command, copied, environment, small

from selfcascade.config import ExecutionSettings, StoreSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store, resolve
from selfcascade_tasks.cluster import DaskWorkers, RayWorkers, is_here
from selfcascade_tasks.workers import WorkerDied

RUNNERS = {"dask": DaskWorkers} | ({"ray": RayWorkers} if importlib.util.find_spec("ray") else {})
"""Ray is installed by `make test-ray`."""
SILENT = {"dask": "tcp://127.0.0.1:1", "ray": "127.0.0.1:1"}


def started(runner):
    """Two processes of a cluster of this machine; closed at the end."""
    workers = RUNNERS[runner](ExecutionSettings(runner=runner, workers=2))
    yield workers
    workers.close()


@pytest.fixture(scope="module", params=RUNNERS)
def cluster(request):
    """A cluster for all tests that leave it as it was."""
    yield from started(request.param)


@pytest.fixture(params=RUNNERS)
def own_cluster(request):
    """A cluster that a test may ruin."""
    yield from started(request.param)


def objects(home: Path, name: str) -> dict[str, str]:
    """SHA-256 of every object of a published artifact, its version among the names."""
    with Store.open(StoreSettings(folder=home / ".selfcascade/store")) as store:
        artifact = resolve(store, name)
        return {f"{artifact.prefix}/{entry.key}": entry.sha256 for entry in artifact.manifest().objects}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a small dataset in its store, and no sample."""
    home = tmp_path_factory.mktemp("start")
    made = subprocess.run(command("curate", *small(curation__shard_inputs=8)), cwd=home, env=environment(), capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return home


@pytest.fixture(scope="module")
def expected(start, tmp_path_factory):
    """What one process makes of it: the dataset's objects, and those of the samples."""
    home = sampled(start, tmp_path_factory.mktemp("expected") / "home", "processes", 1)
    found = objects(home, "datasets/twemoji"), objects(home, "samples/demo-tuning-free")
    assert len(found[0]) > 10
    assert len(found[1]) == 19
    return found


def sampled(start: Path, home: Path, runner: str, workers: int) -> Path:
    """A copy of ``start`` in which six chunks of a sample each were made."""
    copied(start, home)
    options = small(generation__method="tuning-free", generation__prompts__count=6, generation__chunk=1, execution__runner=runner, execution__workers=workers)
    made = subprocess.run(command("generate", *options), cwd=home, env=environment(), capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return home


LONG = [("processes", 4), *((runner, workers) for runner in RUNNERS for workers in (1, 4))]
"""Each starts a process and loads the models for every worker."""


@pytest.mark.parametrize(("runner", "workers"), [*((runner, 2) for runner in RUNNERS), *(pytest.param(*case, marks=pytest.mark.full) for case in LONG)])
def test_samples_have_the_same_bytes_whatever_runs_their_units(start, expected, tmp_path, runner, workers):
    """As one process makes them, under one address, object by object: neither the runner nor the number of workers is a part of it."""
    assert objects(sampled(start, tmp_path / "home", runner, workers), "samples/demo-tuning-free") == expected[1]


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_dataset_has_the_same_bytes_whatever_runs_its_units(expected, tmp_path, runner):
    """Under one address: the runner is no part of it."""
    words = command("curate", *small(curation__shard_inputs=8, execution__runner=runner, execution__workers=2))
    made = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert objects(tmp_path, "datasets/twemoji") == expected[0]


def test_a_process_of_a_cluster_keeps_what_it_has_loaded(cluster):
    """Six units one after another meet at most the two processes that there are."""
    assert len({cluster.run(os.getpid).value for _ in range(6)}) <= 2


def test_a_process_that_died_is_replaced_and_the_unit_done_again(cluster, tmp_path):
    flag = str(tmp_path / "died")
    dies_once = f"'done' if os.path.exists({flag!r}) else (open({flag!r}, 'w').close(), os.kill(os.getpid(), 9))"
    assert cluster.run(eval, dies_once.replace("os.", "__import__('os').")).value == "done"


def test_units_run_elsewhere_side_by_side_and_are_measured(cluster):
    one = cluster.run(os.getpid)
    assert one.value != os.getpid()
    assert one.peak_bytes > 10**7
    assert cluster.run(time.sleep, 0.2).seconds >= 0.2


def test_an_error_of_the_unit_arrives_unchanged(cluster):
    with pytest.raises(SettingsError, match=r"settings file .*nowhere\.yaml does not exist"):
        cluster.run(ExecutionSettings.from_yaml, Path("/nowhere.yaml"))


def test_a_unit_that_always_dies_ends_in_one_line_about_memory(own_cluster):
    with pytest.raises(WorkerDied, match="most likely out of memory"):
        own_cluster.run(os._exit, 9, tries=2)


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


def gone(process: int) -> None:
    """Within a minute it is."""
    end = time.monotonic() + 60
    while Path(f"/proc/{process}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{process}").exists()


def test_no_process_of_a_cluster_outlives_its_use(own_cluster):
    unit = own_cluster.run(os.getpid).value
    own_cluster.close()
    gone(unit)


@pytest.mark.parametrize("runner", RUNNERS)
def test_workers_of_other_settings_work_in_one_process(runner):
    """As flows of one program do, side by side and one after another; who is done first takes no process from the others, and all of its own along."""
    two, three = (RUNNERS[runner](ExecutionSettings(runner=runner, workers=count)) for count in (2, 3))
    try:
        first, second = two.run(os.getpid).value, three.run(os.getpid).value
        assert first != second
        two.close()
        gone(first)
        assert three.run(os.getpid).value != first
        assert Path(f"/proc/{second}").exists()
    finally:
        two.close()
        three.close()
    gone(second)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "localhost:6379", "auto", "ray://localhost:10001"])
def test_a_cluster_of_this_machine_is_known_by_its_host(address):
    assert is_here(address)


@pytest.mark.parametrize("address", ["tcp://autoscaler.example:8786", "localhost.example.org:6379", "10.127.0.0.1:1", "head", "tcp://[::1:bad"])
def test_a_host_whose_name_only_holds_such_a_word_is_another(address):
    assert not is_here(address)
