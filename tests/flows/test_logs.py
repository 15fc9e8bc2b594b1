"""Log lines for machines: what a line holds, here and in worker processes, and what none may hold."""

import io
import json
import logging
import subprocess
import sys

import pytest
from conftest import environment
from pydantic import SecretStr

from selfcascade_tasks.logs import Lines, redacted, say
from selfcascade_tasks.scope import within

HUSH = 'k"ey\\/+ü'
SCRIPT = """
import logging, os, sys, threading
from pydantic import SecretStr

log = logging.getLogger("selfcascade.anything")

def work(number):
    log.info("unit %s, key %s", number, "hu/sh+")
    thread = threading.Thread(target=log.warning, args=("from a thread of the unit",))
    thread.start()
    thread.join()
    logging.getLogger("another.library").info("too quiet to be told")
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("divided")

if __name__ == "__main__":
    from selfcascade_tasks.logs import begin_lines, say
    from selfcascade_tasks.scope import within
    from selfcascade_tasks.workers import Workers
    workers = Workers(1)
    with within(run="r-1", flow="curate x", stage="curate", artifact="datasets/x@1", logs=sys.argv[1], secrets=(SecretStr("hu/sh+"),)):
        begin_lines()
        say("two of four", done=2, total=4)
        workers.run(work, 7, unit=7)
        workers.run(work, 8, unit="8 to 9")
    workers.close()
"""


def said(tmp_path, form: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    made = subprocess.run([sys.executable, str(path), form], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 0, made.stderr
    return made.stderr


def test_lines_name_the_unit_also_in_worker_processes_and_their_threads(tmp_path):
    text = said(tmp_path, "json")
    assert "hu/sh+" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "message", "process"} <= line.keys() for line in lines)
    assert {(line["run"], line["flow"], line["stage"], line["artifact"]) for line in lines} == {("r-1", "curate x", "curate", "datasets/x@1")}
    first, *others = lines
    assert (first["message"], first["done"], first["total"], "unit" in first) == ("two of four", 2, 4, False)
    assert [(line["message"], line["unit"]) for line in others] == [
        (message, unit) for number, unit in (("7", "7"), ("8", "8 to 9")) for message in (f"unit {number}, key ***", "from a thread of the unit", "divided")
    ]
    assert {line["process"] for line in others}.isdisjoint({first["process"]})
    assert "ZeroDivisionError: division by zero" in others[-1]["error"]
    assert first["time"].endswith("+00:00")


def test_lines_for_people_stay_as_they_were(tmp_path):
    lines = said(tmp_path, "text").splitlines()
    assert lines[0] == "two of four"
    assert not any(line.startswith("{") for line in lines)


@pytest.mark.parametrize(
    "text",
    [
        f"the key is {HUSH}",
        "postgresql://prefect:hush-hush@db:5432/prefect",
        "https://s3/b/k?X-Amz-Credential=hush-hush%2F20260101&X-Amz-Signature=hushhush&X-Amz-Security-Token=hush%2Bhush",
        "from the environment: t0ken-hush",
    ],
)
def test_no_line_holds_a_secret(text, monkeypatch):
    """Nor does a traceback: what it says went through the same line."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "t0ken-hush")
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(Lines())
    with within(secrets=(SecretStr(HUSH),)):
        try:
            raise ValueError(text)
        except ValueError:
            handler.emit(logging.LogRecord("x", logging.ERROR, __file__, 1, "failed: %s", (text,), sys.exc_info()))
    line = json.loads(handler.stream.getvalue())
    for place in (line["message"], line["error"]):
        assert "***" in place
        assert "hush" not in place
        assert HUSH not in place


def test_what_opens_nothing_stays():
    assert redacted('{"message": "http://127.0.0.1:4200/api says a@b.c"}', []) == '{"message": "http://127.0.0.1:4200/api says a@b.c"}'


def test_a_line_for_people_goes_to_standard_error(capsys):
    say("trying again", logging.WARNING, seconds=2)
    assert capsys.readouterr().err == "trying again\n"
