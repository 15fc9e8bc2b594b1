"""SIGKILL at fifty seeded writes of the whole pipeline, two pipelines at once, and a stored byte that changes: what is published is always the same set."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import command, environment, small
from publication import Published, changed, published

from selfcascade.config import StoreSettings
from selfcascade.storage import Store, resolve

KILLS = 50
NAMED = ["after:tar:1", "before:manifest:1", "after:manifest:1", "before:latest:2", "after:sidecar:1", "after:cache:2", "before:sidecar:2"]
"""Between shard and sidecar, sidecar and manifest, manifest and pointer (a sequence is taken by the first write of a pointer), and others worth a name."""

pytestmark = pytest.mark.full


def run(home: Path, journal: Path, kill: str | None = None) -> subprocess.Popen[str]:
    """The small pipeline in ``home``, in a process group of its own."""
    journal.unlink(missing_ok=True)
    variables = environment() | {"PYTHONPATH": str(Path(__file__).parent / "killer"), "SELFCASCADE_JOURNAL": str(journal)}
    if kill:
        variables["SELFCASCADE_KILL"] = kill
    return subprocess.Popen(
        command("run", *small()), cwd=home, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen[str]) -> int:
    _, said = process.communicate(timeout=900)
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode


def published_in(home: Path) -> Published:
    """What is published in the embedded store of ``home``."""
    with Store.open(StoreSettings(folder=home / ".selfcascade/store")) as store:
        return published(store)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run that nobody disturbs publishes, and how many writes of each class it makes."""
    home = tmp_path_factory.mktemp("undisturbed")
    assert finished(run(home, home / "journal")) == 0
    return published_in(home), Counter(line.split()[0] for line in (home / "journal").read_text().splitlines())


def moments(writes: Counter[str]) -> list[str]:
    """Fifty moments: the named ones, then seeded draws. They are early writes of an attempt, since each attempt goes on where the last one died."""
    draws = random.Random(0)
    kinds = sorted(kind for kind in writes if kind != "record")
    drawn = [f"{draws.choice(['before', 'after'])}:{draws.choice(kinds)}:{draws.randint(1, 3)}" for _ in range(KILLS - len(NAMED))]
    return NAMED + drawn


def killed_again_and_again(waiting: list[str], place: Path, expected: Published) -> Counter[str]:
    """Killed, run again, killed again ...; whenever a store is complete its objects and pointers are compared and the next kills go on in an empty one."""
    killed: Counter[str] = Counter()
    while waiting:
        home = Path(tempfile.mkdtemp(dir=place))  # not the last one's place, where its server may still be leaving
        complete = False
        while not complete:
            # A moment that no longer comes in this store ends the attempt whole; it waits for the next store.
            kill = waiting.pop(0) if waiting else None
            complete = finished(run(home, home / "journal", kill)) == 0
            if kill and complete:
                waiting.append(kill)
            elif kill:
                killed[kill.split(":")[1]] += 1
        assert changed(published_in(home), expected) == []
        shutil.rmtree(home, ignore_errors=True)
    return killed


@pytest.mark.timeout(3000)
def test_a_run_killed_at_fifty_moments_publishes_what_an_undisturbed_one_does(undisturbed, tmp_path):
    """Two stores at a time: a run waits for its server, its store and its workers most of the time."""
    expected, writes = undisturbed
    waiting = moments(writes)
    with ThreadPoolExecutor(2) as pool:
        killed = sum(pool.map(lambda part: killed_again_and_again(part, tmp_path, expected), (waiting[::2], waiting[1::2])), Counter())
    assert killed.total() == KILLS
    assert set(killed) >= {"tar", "sidecar", "manifest", "latest", "cache"}


@pytest.mark.timeout(1200)
def test_two_pipelines_at_once_end_well_and_publish_one_set(undisturbed, tmp_path):
    first, second = run(tmp_path, tmp_path / "first"), run(tmp_path, tmp_path / "second")
    assert [finished(first), finished(second)] == [0, 0]
    assert changed(published_in(tmp_path), undisturbed[0]) == []


@pytest.mark.timeout(600)
def test_a_changed_byte_is_refused_by_name(home, tmp_path):
    """One byte of a stored shard of samples is flipped behind the store's back: measuring it again ends with exit code 2 and a line that names the object."""
    folder = tmp_path / "home"
    shutil.copytree(home, folder, ignore=shutil.ignore_patterns("*.sock", "*.lock"))
    with Store.open(StoreSettings(folder=folder / ".selfcascade/store")) as store:
        artifact = resolve(store, "samples/demo-tuned")
        shard = next(entry.key for entry in artifact.manifest().objects if entry.key.endswith(".tar"))
        key = f"{artifact.prefix}/{shard}"
        data = bytearray(store.read(key))
        data[len(data) // 2] ^= 1
        store.delete([key])
        store.put_new(key, bytes(data))
        result = subprocess.run(
            command("evaluate", *small(evaluation__seed=1)), cwd=folder, env=environment(), capture_output=True, text=True, timeout=500, check=False
        )
    assert result.returncode == 2, result.stderr
    assert shard in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_the_journal_counts_over_processes(tmp_path):
    """The killer is no part of the software, so it is tested here: the second write of a class is number two, whoever made the first."""
    script = "import sitecustomize; print(sitecustomize.number_of('tar a'))"
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parent / "killer"), "SELFCASCADE_JOURNAL": str(tmp_path / "journal")}
    numbers = [subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)]
    assert numbers == ["1", "2"]
