"""A Prefect server of a test's own, asked over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from conftest import environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def asked(port: int, path: str, body: Any = None, method: str | None = None) -> Any:
    """What the server answers: of its API the JSON, else the text."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=30) as reply:
        text = reply.read().decode()
    return json.loads(text) if path.startswith("/api") and text else text


def until(answer: Callable[[], Any], seconds: float) -> Any:
    """What ``answer`` gives, once it gives something."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(urllib.error.URLError, OSError):
            found = answer()
            if found:
                return found
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.5)


@contextlib.contextmanager
def running(arguments: list[str], cwd: Path, log: Path, *, at_once: bool = False, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with all its children, which Ctrl-C must end; or is killed with all of them, whatever they are at, with ``at_once``."""
    given = environment() | variables
    with log.open("w") as sink, subprocess.Popen(arguments, cwd=cwd, env=given, stdout=sink, stderr=sink, start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                everyone = [parent, *parent.children(recursive=True)] if at_once else []  # the parent first, so that it cannot tell of the others
                for each in everyone:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(40)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def prefect_server(folder: Path, **variables: str) -> Iterator[int]:
    """A whole server, with scheduler and automations, over a database in ``folder``; its port."""
    port = free_port()
    arguments = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    home = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with running(arguments, folder, folder / "server.log", **home | variables):
        until(lambda: asked(port, "/api/health"), 240)
        yield port
