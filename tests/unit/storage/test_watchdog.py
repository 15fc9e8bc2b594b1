"""The watchdog's parts: ports, locks, who is alive, what the server is told."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from selfcascade.storage import watchdog


def test_ports_are_free_with_their_twins_and_kept_while_they_are():
    """Each service gets a port p with p and p + 10,000 free; the same ones again, unless one was taken meanwhile."""
    ports = watchdog.free_ports({})
    assert set(ports) == set(watchdog.SERVICES)
    assert len({*ports.values(), *(port + watchdog.GRPC for port in ports.values())}) == 2 * len(ports)
    assert watchdog.free_ports(ports) == ports
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports["filer"] + watchdog.GRPC))
        taken.listen()
        assert not set(watchdog.free_ports(ports).values()) & {ports["filer"]}


def test_a_killed_user_is_no_user(tmp_path: Path):
    """A lock goes with its process, by SIGKILL too; the file that is left is removed."""
    (tmp_path / "users").mkdir()
    code = (
        "import os, fcntl, sys, time; h = os.open(f'{sys.argv[1]}/users/{os.getpid()}-x.lock', os.O_RDWR | os.O_CREAT);"
        "fcntl.flock(h, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    user = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert user.stdout is not None
    user.stdout.readline()
    assert watchdog.live_users(tmp_path) == [user.pid]
    os.kill(user.pid, signal.SIGKILL)
    user.wait()
    assert watchdog.live_users(tmp_path) == []
    assert list((tmp_path / "users").iterdir()) == []


def test_state_is_private_and_torn_state_is_no_state(tmp_path: Path):
    watchdog.write_private(tmp_path / "server.json", {"pid": 1})
    assert watchdog.read_state(tmp_path) == {"pid": 1}
    assert (tmp_path / "server.json").stat().st_mode & 0o777 == 0o600
    for torn in ("", "{", "[1]"):
        (tmp_path / "server.json").write_text(torn)
        assert watchdog.read_state(tmp_path) == {}


def test_the_server_listens_on_loopback_and_reports_to_nobody(tmp_path: Path):
    words = watchdog.command("weed", tmp_path, dict.fromkeys(watchdog.SERVICES, 1))
    for flag in ("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.allowDeleteBucketNotEmpty=false"):
        assert flag in words


def test_the_environment_of_the_server_is_closed(tmp_path: Path, monkeypatch):
    """The user's own keys do not reach the server, and the generated ones do not stay in ours."""
    watchdog.write_private(tmp_path / "credentials.json", {"access_key": "a", "secret_key": "b"})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    monkeypatch.setenv("S3_BUCKET", "mine")
    found = watchdog.environment(tmp_path)
    assert found["AWS_SECRET_ACCESS_KEY"] == "b"
    assert "S3_BUCKET" not in found
    assert "mine" not in found.values()
    assert found["WEED_JWT_SIGNING_KEY"] != watchdog.environment(tmp_path)["WEED_JWT_SIGNING_KEY"]


def test_the_watchdog_needs_nothing_but_the_standard_library():
    """It waits beside every run: a bare interpreter runs it, and few modules are loaded."""
    code = f"import runpy, sys; runpy.run_path({watchdog.__file__!r}); print('boto3' in sys.modules, len(sys.modules))"
    shown = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert shown[0] == "False"
    assert int(shown[1]) < 150
