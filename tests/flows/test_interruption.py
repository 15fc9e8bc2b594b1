"""Ctrl-C and SIGKILL in the middle: nobody is left behind, and the next run goes on."""

import os
import re
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


def heed_interrupts():
    """A shell starts what it runs in the background deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(home, number, whom, moment="before:tar:3", run=CURATE):
    """A run that sends the signal to some of itself, at its third shard of twenty if not told otherwise: it cannot be over before."""
    killer = {"PYTHONPATH": str(Path(__file__).parent / "killer"), "SELFCASCADE_JOURNAL": str(home / "journal")}
    told = {"SELFCASCADE_KILL": moment, "SELFCASCADE_SIGNAL": f"{whom}:{number:d}"}
    return subprocess.run(
        command(*run),
        cwd=home,
        env=environment() | killer | told,
        capture_output=True,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
        timeout=400,
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.full) for number in (signal.SIGTERM, signal.SIGKILL))])
def test_a_run_that_is_stopped_leaves_nobody_behind_and_goes_on(selfcascade, tmp_path, number):
    run = interrupted(tmp_path, number, "group" if number == signal.SIGINT else "leader")  # a Ctrl-C comes from a terminal, to all of it
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


def checkpoints(home):
    """Steps of the checkpoints that were written, in order."""
    return [int(found) for found in re.findall(r"cache/checkpoints/\S+/step-(\d+)", (home / "journal").read_text())]


@pytest.mark.full
@pytest.mark.parametrize("whom", ["leader", "writer", "group"])
def test_a_preempted_training_loses_no_step(selfcascade, tmp_path, whom):
    """SIGTERM once the first checkpoint of the training, at step 15, is written: steps went on meanwhile, and the one under way is stored too.

    Where the process that trains got it alone, the flow has another one go on from that very step; otherwise the run ends, nobody is left behind, and the same
    command goes on.
    """
    options = small(adaptation__steps=36, adaptation__checkpoint_steps=15, adaptation__validation_samples=4)
    assert selfcascade("curate", *options).returncode == 0
    # Latents of two shards and the record of the run are written to the cache before it.
    run = interrupted(tmp_path, signal.SIGTERM, whom, "after:cache:4", ["adapt", *options])
    until(lambda: not processes(tmp_path), 60)
    first, last, *rest = checkpoints(tmp_path)
    assert first == 15 < last < 30
    if whom == "writer":
        assert run.returncode == 0, run.stderr
        assert rest == [30, 36]
    else:
        assert run.returncode == -signal.SIGTERM
        assert rest == []
        (tmp_path / "journal").unlink()
        again = interrupted(tmp_path, 0, "leader", "", ["adapt", *options])
        assert again.returncode == 0, again.stderr
        assert checkpoints(tmp_path) == [30, 36]
