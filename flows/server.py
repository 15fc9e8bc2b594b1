"""The Prefect server of a command that was given none: a child on loopback over a database under `.selfcascade/prefect`.

Prefect's own temporary server outlives a killed parent; this one holds the read end of a pipe and leaves when the other end closes.
`make ui` serves the same database, so the runs and artifacts of every command are there to look at afterwards.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from selfcascade.settings import SettingsError

HOME = Path(".selfcascade/prefect")
PATIENCE = 180.0
"""Seconds until a server that does not answer is given up: its first start creates the database."""

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
}


def prepare_environment() -> None:
    """Settings that Prefect reads when it is imported: the local home, no analytics, quiet. What the user has set stays."""
    if not os.environ.get("PREFECT_API_URL"):
        os.environ.setdefault("PREFECT_HOME", str(HOME.absolute()))
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


class PrefectServer:
    """A context in which Prefect has a server: the user's where ``PREFECT_API_URL`` names one, else a child of this process.

    The child starts on entering; :meth:`wait` before the first flow, so that imports and start-up overlap.

    Args:
        port: where a child listens; unset: any free port, without the UI and without the services that a single run does not need.
    """

    def __init__(self, port: int | None = None) -> None:
        self._port = port
        self._child: subprocess.Popen[bytes] | None = None
        self._log = Path()

    def __enter__(self) -> Self:
        prepare_environment()
        if not os.environ.get("PREFECT_API_URL"):
            self._start(Path(os.environ["PREFECT_HOME"]))
        return self

    @property
    def is_ours(self) -> bool:
        """Whether the server is a child of this process rather than one that the user named."""
        return self._child is not None

    def _start(self, home: Path) -> None:
        try:
            home.mkdir(parents=True, exist_ok=True)
            (home / "server.log").touch()
        except OSError as error:
            raise SettingsError(f"cannot write {home} ({error.strerror}); run where you may write, or set PREFECT_HOME") from None
        self._log = home / "server.log"
        with socket.socket() as listener, self._log.open("ab") as log:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", self._port or 0))
            except OSError as error:
                raise SettingsError(f"port {self._port} of 127.0.0.1 cannot be used ({error.strerror}); give another --port") from None
            listener.listen(128)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            environment = os.environ | {"PREFECT__SERVER_FINAL": "1"}
            environment |= {"PREFECT_UI_API_URL": url} if self._port else {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT_UI_ENABLED": "0"}
            self._child = subprocess.Popen(
                [sys.executable, "-m", "selfcascade_flows.server", str(listener.fileno())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the run, which reports its end to this server
            )
            os.environ["PREFECT_API_URL"] = url

    def wait(self) -> None:
        """Return once the server answers.

        Raises:
            RuntimeError: the child died or stayed silent; names its log.
            SettingsError: the user's server does not answer.
        """
        if self._child is None:
            self._check_theirs()
            return
        health, end = os.environ["PREFECT_API_URL"] + "/health", time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self._child.poll() is not None:
                raise RuntimeError(f"the local Prefect server ended with code {self._child.returncode}; its log is {self._log}")
            try:
                with urllib.request.urlopen(health, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise RuntimeError(f"the local Prefect server did not answer in {PATIENCE:.0f} s; its log is {self._log}")

    def _check_theirs(self) -> None:
        from prefect import get_client
        from prefect.exceptions import PrefectHTTPStatusError

        url = os.environ["PREFECT_API_URL"]
        with get_client(sync_client=True) as client:
            failure = client.api_healthcheck()
            try:
                if failure is None:
                    client.api_version()  # health is told to anyone
            except PrefectHTTPStatusError as error:
                if error.response.status_code not in (401, 403):
                    raise
                raise SettingsError(f"PREFECT_API_URL {url} asks for a password; set PREFECT_API_AUTH_STRING to the server's, USER:PASSWORD") from None
        if failure is not None:
            raise SettingsError(
                f"PREFECT_API_URL {url} does not answer ({type(failure).__name__}); start that server, or unset the variable to use one of our own"
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._child is None:
            return
        _send_what_is_queued()
        del os.environ["PREFECT_API_URL"]
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def _send_what_is_queued() -> None:
    """Logs and events leave in the background: without this the last ones would meet a server that is gone."""
    if "prefect" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker

    for handler in logging.getLogger("prefect.flow_runs").handlers:
        handler.flush()
    EventsWorker.drain_all(timeout=10)


def _serve(descriptor: int) -> None:
    """What the child does: serve on the inherited socket until standard input ends."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            os.close(turn)

    def leave_with_parent() -> None:
        while os.read(0, 4096):  # not through Python's buffer, whose lock would outlive a server that fails
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(8)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    logging.captureWarnings(True)
    # Two servers that create or migrate one database at once would meet half-made tables.
    turn = os.open(Path(os.environ["PREFECT_HOME"], "server.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(turn, fcntl.LOCK_EX)
    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, fd=descriptor, log_level="error", lifespan="on")
    server = Server(config)
    server.run()
    sys.exit(0 if server.started else 3)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
