"""Ctrl-C and SIGKILL in the middle: nobody is left behind, and the next run goes on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import command, environment, small

from selfcascade.config import StoreSettings
from selfcascade.storage import Store

CURATE = ["curate", *small(curation__source__limit=400, curation__shard_inputs=40)]


def processes(folder: Path) -> dict[int, str]:
    """Living processes that work in ``folder``."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if (entry / "cwd").resolve() == folder and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")[:120]
            except OSError:
                continue
    return found


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def started(home):
    return subprocess.Popen(command(*CURATE), cwd=home, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_a_shard(home):
    """Until the run has stored something: it is in the middle of its units then."""
    folder = home / ".selfcascade/store"
    until((folder / "credentials.json").exists, 120)
    with Store.open(StoreSettings(folder=folder)) as store:
        until(lambda: any(info.key.endswith("_stats.json") for info in store.list("datasets/")), 240)


@pytest.mark.parametrize("number", [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.full) for number in (signal.SIGTERM, signal.SIGKILL))])
def test_a_run_that_is_stopped_leaves_nobody_behind_and_goes_on(selfcascade, tmp_path, number):
    with started(tmp_path) as run:
        wait_for_a_shard(tmp_path)
        if number == signal.SIGINT:
            os.killpg(run.pid, number)  # as a terminal does
        else:
            run.send_signal(number)
        _, said = run.communicate(timeout=60)
    if number == signal.SIGINT:
        assert run.returncode == 130
        assert said.strip().splitlines()[-1] == "selfcascade: interrupted; the same command goes on from here"
        assert "Traceback" not in said
    until(lambda: not processes(tmp_path), 60)
    with Store.open(StoreSettings(folder=tmp_path / ".selfcascade/store")) as store:
        before = {info.key: info.etag for info in store.list("datasets/") if info.key.endswith(".tar")}
    again = selfcascade(*CURATE)
    assert again.returncode == 0, again.stderr
    with Store.open(StoreSettings(folder=tmp_path / ".selfcascade/store")) as store:
        after = {info.key: info.etag for info in store.list("datasets/") if info.key.endswith(".tar")}
    assert len(after) == 20
    assert before.items() <= after.items()
