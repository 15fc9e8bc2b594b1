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


def interrupted(home, number):
    """A run that gets the signal at its third shard of twenty, by its own hand: it cannot be over before. All of it gets a Ctrl-C, as from a terminal."""
    whom = "group" if number == signal.SIGINT else "leader"
    killer = {"PYTHONPATH": str(Path(__file__).parent / "killer"), "SELFCASCADE_JOURNAL": str(home / "journal")}
    moment = {"SELFCASCADE_KILL": "before:tar:3", "SELFCASCADE_SIGNAL": f"{whom}:{number:d}"}
    return subprocess.run(
        command(*CURATE), cwd=home, env=environment() | killer | moment, capture_output=True, text=True, start_new_session=True, timeout=400, check=False
    )


@pytest.mark.parametrize("number", [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.full) for number in (signal.SIGTERM, signal.SIGKILL))])
def test_a_run_that_is_stopped_leaves_nobody_behind_and_goes_on(selfcascade, tmp_path, number):
    run = interrupted(tmp_path, number)
    assert run.returncode != 0
    if number == signal.SIGINT:
        assert run.returncode == 130
        assert run.stderr.strip().splitlines()[-1] == "selfcascade: interrupted; the same command goes on from here"
        assert "Traceback" not in run.stderr
    until(lambda: not processes(tmp_path), 60)
    with Store.open(StoreSettings(folder=tmp_path / ".selfcascade/store")) as store:
        before = {info.key: info.etag for info in store.list("datasets/") if info.key.endswith(".tar")}
    assert 0 < len(before) < 20
    again = selfcascade(*CURATE)
    assert again.returncode == 0, again.stderr
    with Store.open(StoreSettings(folder=tmp_path / ".selfcascade/store")) as store:
        after = {info.key: info.etag for info in store.list("datasets/") if info.key.endswith(".tar")}
    assert len(after) == 20
    assert before.items() <= after.items()
