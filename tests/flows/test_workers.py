"""Worker processes: measured, replaced when they die, closed at once, and gone with a parent that is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selfcascade.settings import SettingsError
from selfcascade_tasks.workers import Closed, WorkerDied, Workers


@pytest.fixture
def pool():
    workers = Workers(2)
    yield workers
    workers.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_unit_runs_in_another_process_and_is_measured(pool):
    measured = pool.run(os.getpid)
    assert measured.value != os.getpid()
    assert 0 <= measured.seconds < 5
    assert 1 << 20 < measured.peak_bytes < 1 << 32


def test_two_units_run_side_by_side(pool, tmp_path):
    """Each waits for the other to have begun."""
    one, two = tmp_path / "one", tmp_path / "two"
    with ThreadPoolExecutor(2) as threads:
        met = threads.map(lambda paths: pool.run(_met, *map(str, paths)).value, [(one, two), (two, one)])
        assert list(met) == [True, True]


def test_an_error_of_the_unit_arrives_unchanged(pool):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pool.run(os.stat, "/nowhere")


def test_what_a_unit_reports_arrives_in_order_in_the_calling_thread(pool):
    heard = []
    measured = pool.run(_count, 3, report=lambda message: heard.append((message, threading.current_thread())))
    assert measured.value == 3
    assert [message for message, _ in heard] == [0, 1, 2]
    assert {thread for _, thread in heard} == {threading.current_thread()}


def test_a_dead_worker_is_replaced_and_the_unit_done_again(pool, tmp_path):
    flag = tmp_path / "died"
    assert pool.run(_die_once, str(flag)).value == "done"
    assert flag.exists()


def test_a_unit_that_always_dies_ends_in_one_line_about_memory(pool):
    with pytest.raises(WorkerDied, match="died 2 times in _exit, most likely out of memory; lower") as caught:
        pool.run(os._exit, 9, tries=2)
    assert isinstance(caught.value, SettingsError)


def test_closing_ends_a_running_unit_at_once(pool):
    pids: list[int] = []
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            pool.run(_sleep, 300.0, report=pids.append)
        except Closed as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: pids)
    pool.close()
    thread.join(60)
    assert caught
    until(lambda: not alive(pids[0]))


@pytest.mark.parametrize(("patience", "needed", "stored"), [(300.0, 0.5, True), (0.2, 300.0, False), (0.0, 300.0, False)])
def test_a_unit_that_takes_sigterm_as_a_request_gets_its_time(pool, tmp_path, patience, needed, stored):
    """It stores what it has where there is patience, loses it where there is none or too little; in the end nobody is left."""
    path = tmp_path / "stored"
    pids: list[int] = []
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            pool.run(_store_when_asked, str(path), needed, report=pids.append)
        except Closed as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: pids)
    other = pool.run(os.getpid).value
    started = time.monotonic()
    pool.close(patience)
    assert time.monotonic() - started < 60  # neither what the unit wants nor all that it may have
    thread.join(60)
    assert ended
    assert path.exists() == stored
    until(lambda: not alive(pids[0]) and not alive(other))


def test_workers_leave_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\nfrom selfcascade.config import ExecutionSettings\n"
        "from selfcascade_tasks.workers import workers\n"
        "if __name__ == '__main__':\n"
        "    print(workers(ExecutionSettings(workers=1)).run(os.getpid).value, flush=True)\n"
        "    workers(ExecutionSettings(workers=1)).run(time.sleep, 300)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(signal.SIGKILL)
        until(lambda: not alive(child))


def test_a_worker_imports_the_library_but_not_prefect(pool):
    names = pool.run(_modules).value
    assert "selfcascade.settings" in names
    assert "prefect" not in names


def _met(mine: str, theirs: str) -> bool:
    Path(mine).touch()
    until(Path(theirs).exists)
    return True


def _sleep(seconds: float, progress) -> None:
    progress(os.getpid())
    time.sleep(seconds)


def _store_when_asked(path: str, seconds: float, progress) -> None:
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    progress(os.getpid())
    while not asked.is_set():
        time.sleep(0.05)
    time.sleep(seconds)
    Path(path).touch()
    signal.signal(signal.SIGTERM, before)
    signal.raise_signal(signal.SIGTERM)


def _die_once(flag: str) -> str:
    if not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def _count(number: int, progress) -> int:
    for index in range(number):
        progress(index)
        time.sleep(0.2)
    return number


def _modules() -> list[str]:
    return sorted(sys.modules)
