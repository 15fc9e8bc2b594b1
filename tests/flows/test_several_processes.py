"""Training on several processes from the command line: the same flow, with what each process says in its log."""

import re
import sqlite3
import subprocess

import pytest
from conftest import command, environment, small


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small dataset in its store."""
    folder = tmp_path_factory.mktemp("several")
    subprocess.run(command("curate", *small()), cwd=folder, env=environment(), check=True, capture_output=True, timeout=500)
    return folder


def logged(place):
    with sqlite3.connect(place / ".selfcascade/prefect/prefect.db") as database:
        return [message for (message,) in database.execute("select message from log order by timestamp")]


def test_it_trains_and_the_log_of_the_task_has_every_processs_lines(selfcascade, place):
    result = selfcascade("adapt", *small(adaptation__processes=2, adaptation__upsampler__variant="C", execution__workers=1), cwd=place)
    assert result.returncode == 0, result.stderr
    assert re.search(r"upsamplers/demo@[0-9a-f]{12}", result.stdout)
    found = [re.fullmatch(r"rank (\d): process (\d+) computes on cpu", message) for message in logged(place)]
    assert sorted(match[1] for match in found if match) == ["0", "1"]
    assert len({match[2] for match in found if match}) == 2


@pytest.mark.full
def test_what_ends_one_of_them_is_one_clear_line_and_in_the_log(selfcascade, place):
    options = small(adaptation__processes=2, adaptation__lr=1e30, adaptation__name="wild", execution__workers=1)
    result = selfcascade("adapt", *options, cwd=place)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "training stopped at step" in line]
    assert "lower adaptation.lr=1e+30" in line
    assert any("training stopped at step" in message for message in logged(place))
