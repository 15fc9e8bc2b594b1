"""The process behind an embedded store: it runs ``weed``, restarts it after a crash, and stops it after its last user.

Run as a plain script with nothing but the standard library, so that it costs little while it waits. Files of the data folder:

    credentials.json   generated keys, 0600          users/*      one file a live user process, locked by it
    server.json        pid, ports, readiness         start.lock   held while a server is started or stopped
    server.lock        held while a watchdog lives   daemon       exists while the server shall outlive its users
    weed.log           what weed says                data/        what weed stores

A killed user loses its lock with its life, so nobody has to clean up after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

POLL = 0.25
LINGER = 4.0
"""Seconds that a server outlives its last user, so that one command after another does not restart it."""
CRASHES = 5
"""Crashes within a minute after which the watchdog gives up."""
SERVICES = ("s3", "master", "volume", "filer", "admin")
GRPC = 10_000
LOG_LIMIT = 16 * 2**20


def read_state(folder: Path) -> dict[str, Any]:
    """``server.json``, or an empty mapping when there is none or it is torn."""
    try:
        state = json.loads((folder / "server.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_private(path: Path, value: dict[str, Any]) -> None:
    """Write JSON that only the owner can read, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(value, file)
    part.replace(path)


def lock(path: Path, *, wait: bool) -> int | None:
    """File descriptor of an exclusive lock on ``path``; None when it is taken and ``wait`` is false."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def live_users(folder: Path) -> list[int]:
    """Process ids of the users whose lock is held; files that dead users left are removed."""
    found = []
    for path in (folder / "users").glob("*.lock"):
        handle = lock(path, wait=False)
        if handle is None:
            found.append(int(path.name.split("-")[0]))
        else:
            path.unlink(missing_ok=True)
            os.close(handle)
    return sorted(found)


def free_ports(wanted: dict[str, int]) -> dict[str, int]:
    """One free loopback port a service, with the port 10,000 above it free too; those of ``wanted`` when they are still free."""
    if set(wanted) == set(SERVICES) and all(_is_free(port) and _is_free(port + GRPC) for port in wanted.values()):
        return wanted
    found: dict[str, int] = {}
    while len(found) < len(SERVICES):
        # Both ports stay below the range that Linux hands to outgoing connections.
        port = random.SystemRandom().randrange(11_000, 22_000)
        if port not in found.values() and _is_free(port) and _is_free(port + GRPC):
            found[SERVICES[len(found)]] = port
    return found


def command(weed: str, data: Path, ports: dict[str, int]) -> list[str]:
    """The command line: everything on loopback, nothing reported anywhere, no port but the ones that were chosen."""
    return [
        weed,
        "-logtostderr=true",
        "mini",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.allowDeleteBucketNotEmpty=false",
        "-s3.autoCreateBucket=false",
        "-master.volumePreallocate=false",
        "-master.resumeState=false",  # a single master that resumes is not leader at once, and the volumes come seconds later
        "-volume.preStopSeconds=0",
        *(f"-{service}.port={port}" for service, port in ports.items()),
    ]


def environment(folder: Path) -> dict[str, str]:
    """A closed environment: the generated pair becomes the only identity, and keys that nobody knows shut the inner HTTP ports."""
    pair = json.loads((folder / "credentials.json").read_text(encoding="utf-8"))
    inner = ("JWT_SIGNING_KEY", "JWT_SIGNING_READ_KEY", "JWT_FILER_SIGNING_KEY", "JWT_FILER_SIGNING_READ_KEY")
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "AWS_ACCESS_KEY_ID": pair["access_key"],
        "AWS_SECRET_ACCESS_KEY": pair["secret_key"],
        "WEED_FILER_EXPOSE_DIRECTORY_METADATA_ENABLED": "false",
        **{f"WEED_{name}": secrets.token_hex(32) for name in inner},
    }


class Watchdog:
    """Runs one server over one data folder."""

    def __init__(self, folder: Path, weed: str) -> None:
        self.folder = folder
        self.weed = weed
        self.stopping = False
        self.process: subprocess.Popen[bytes] | None = None
        self.ports: dict[str, int] = {}

    def run(self) -> None:
        """Until nobody needs the server any more."""
        held = lock(self.folder / "server.lock", wait=False)
        if held is None:
            return
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._end_leftover()
        self._start()
        idle_since = time.monotonic()
        crashes: list[float] = []
        while not self.stopping and self.folder.exists():
            time.sleep(POLL)
            assert self.process is not None
            if self.process.poll() is not None:
                crashes = [when for when in crashes if when > time.monotonic() - 60] + [time.monotonic()]
                if len(crashes) > CRASHES:
                    break
                self._start()
            if (self.folder / "daemon").exists() or live_users(self.folder):
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > LINGER and self._stop_if_unused():
                return
        self._stop()

    def _on_term(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _start(self) -> None:
        log = self.folder / "weed.log"
        if log.exists() and log.stat().st_size > LOG_LIMIT:
            log.replace(self.folder / "weed.log.1")
        data = self.folder / "data"
        data.mkdir(mode=0o700, exist_ok=True)
        (data / "mini.options").unlink(missing_ok=True)  # remembers ports that may be taken by now
        self.ports = free_ports(self.ports or read_state(self.folder).get("ports", {}))
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                command(self.weed, data, self.ports),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                cwd=self.folder,
                env=environment(self.folder),
                preexec_fn=_die_with_parent,
            )
        write_private(self.folder / "server.json", {"watchdog": os.getpid(), "pid": self.process.pid, "ports": self.ports})

    def _stop_if_unused(self) -> bool:
        held = lock(self.folder / "start.lock", wait=False)
        if held is None:
            return False  # somebody is attaching
        try:
            if (self.folder / "daemon").exists() or live_users(self.folder):
                return False
            self._stop()
            return True
        finally:
            os.close(held)

    def _stop(self) -> None:
        with contextlib.suppress(OSError):  # the folder may be gone
            write_private(self.folder / "server.json", {"ports": self.ports})
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _remove_sockets(self.ports)

    def _end_leftover(self) -> None:
        """End a server whose watchdog was killed: two on one data folder would ruin it."""
        pid = read_state(self.folder).get("pid")
        if not isinstance(pid, int) or not runs_on(pid, self.folder / "data"):
            return
        for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                if not runs_on(pid, self.folder / "data"):
                    return
                time.sleep(0.05)


def _remove_sockets(ports: dict[str, int]) -> None:
    """The server leaves its Unix sockets behind, named by their ports."""
    for port in ports.values():
        for path in (*Path("/tmp").glob(f"seaweedfs-*-{port}.sock"), *Path("/tmp").glob(f"seaweedfs-*-{port + GRPC}.sock")):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def runs_on(pid: int, data: Path) -> bool:
    """Whether ``pid`` is a weed over ``data``, and not another process that has the number by now."""
    wanted = f"-dir={data}"
    if sys.platform == "linux":
        try:
            return wanted.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
    return wanted in subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout


def _die_with_parent() -> None:
    """Linux: the server gets SIGTERM when its watchdog is killed. Elsewhere the next watchdog ends it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)


def main() -> None:
    """``watchdog.py FOLDER WEED``: detach from the caller, then watch."""
    folder, weed = Path(sys.argv[1]), sys.argv[2]
    if os.fork():
        os._exit(0)
    os.setsid()
    Watchdog(folder, weed).run()


if __name__ == "__main__":
    main()
