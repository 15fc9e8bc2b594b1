"""The whole way with one command: what it leaves, that it does nothing twice, and that a look ahead writes nothing."""

import hashlib
import json
import re
import shlex
import sqlite3
import subprocess

import pytest
from conftest import command, environment, small
from served import prefect_server

from selfcascade.config import StoreSettings
from selfcascade.storage import Store, resolve


@pytest.fixture(scope="module")
def first(home):
    """What the first run printed."""
    return (home / "output.txt").read_text()


@pytest.fixture
def stored(home):
    with Store.open(StoreSettings(folder=home / ".selfcascade/store")) as store:
        yield store


def contents(store):
    """Every object but what runs leave behind, with its digest."""
    return {info.key: hashlib.sha256(store.read(info.key)).hexdigest() for info in store.list("") if not info.key.startswith(("runs/", "leases/"))}


def table(output):
    return re.findall(r"^(?:base|lanczos|direct eta \d|tuning-free|tuned) +[\d.]+ .*$", output, re.M)


def test_it_prints_table_report_and_how_to_open_the_ui(first, home):
    assert len(table(first)) == 5
    assert "tuned minus tuning-free:" in first
    page = home / re.search(r"^Report: +(\S+)", first, re.M).group(1)
    assert page.read_text(encoding="utf-8").startswith("<!")
    assert re.search(r"make ui  and open  http://127\.0\.0\.1:4200/runs/flow-run/[0-9a-f-]{36}$", first, re.M)
    said = (home / "said.txt").read_text()
    assert "Traceback" not in said
    assert "Warning" not in said


def test_every_stage_left_an_artifact(stored):
    for name in ("datasets/twemoji", "upsamplers/demo", "samples/demo-base", "samples/demo-direct-eta-1", "samples/demo-tuned", "reports/demo"):
        assert resolve(stored, name).manifest().objects


def test_the_record_of_the_run_tells_clock_host_and_cost(first, stored):
    run = re.search(r"flow-run/(\S+)", first).group(1)
    record = json.loads(stored.read(f"runs/{run}.json"))
    assert record["host"]["cores"] >= 1
    assert record["packages"]["torch"]
    stages = [(stage["stage"], stage["method"]) for stage in record["stages"]]
    assert stages == [
        ("curate", None), ("adapt", None), ("generate", "base"), ("generate", "lanczos"), ("generate", "direct"), ("generate", "direct"),
        ("generate", "tuning-free"), ("generate", "tuned"), ("evaluate", None),
    ]  # fmt: skip
    for stage in record["stages"]:
        assert stage["done"] == stage["units"] > 0
        assert stage["seconds"] > 0
        assert stage["peak_bytes"] > 1 << 20
        assert stage["work"] > 0


def test_the_ui_shows_progress_tables_and_sheets_under_stable_keys(first, home):
    with sqlite3.connect(home / ".selfcascade/prefect/prefect.db") as database:
        artifacts = dict(database.execute("select key, type from artifact").fetchall())
        states = {state for (state,) in database.execute("select state_type from flow_run union select state_type from task_run")}
        dump = "\n".join(database.iterdump())
    assert states == {"COMPLETED"}
    assert artifacts["curate-twemoji-progress"] == "progress"
    assert artifacts["train-demo-progress"] == "progress"
    assert artifacts["curate-twemoji"] == "table"
    assert artifacts["evaluate-demo"] == "table"
    assert artifacts["evaluate-demo-sheet"] == "markdown"
    assert artifacts["generate-demo-tuned-sheet"] == "markdown"
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in artifacts)
    secret = json.loads((home / ".selfcascade/store/credentials.json").read_text())["secret_key"]
    assert secret not in dump


def test_the_status_says_where_the_output_is(selfcascade, first, stored, home):
    """Of the run, whose summary is in the UI too: every stage, done, with its artifact."""
    run = re.search(r"flow-run/(\S+)", first).group(1)
    text = selfcascade("status", "--runs", "50", cwd=home).stdout
    told = text[text.index(f"run {run}") :].split("\nrun ")[0]
    assert len(re.findall(r"^\w+ +\S+ +done ", told, re.M)) == 9
    for name in ("datasets/twemoji", "upsamplers/demo", "samples/demo-tuned", "reports/demo"):
        assert str(resolve(stored, name).ref) in re.sub(r"\s+", "", told)
    with sqlite3.connect(home / ".selfcascade/prefect/prefect.db") as database:
        pages = [json.loads(data) for (data,) in database.execute("select data from artifact where key = 'run-summary' and flow_run_id = ?", [run])]
    [page] = pages  # of the pipeline's own run, where it is looked for
    assert page.startswith("**9 done** in ")


def test_the_look_ahead_finds_everything_published_and_writes_nothing(selfcascade, stored, home):
    before = {info.key: info.etag for info in stored.list("")}
    result = selfcascade("run", *small(), "--dry-run", cwd=home)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^(?:curate|adapt|generate|evaluate) .*$", result.stdout, re.M)
    assert len(rows) == 9
    assert all(" published " in row for row in rows)
    assert {info.key: info.etag for info in stored.list("")} == before


def test_the_same_command_again_does_no_work_and_prints_the_same_table(selfcascade, first, stored, home):
    before = contents(stored)
    again = selfcascade("run", *small(), cwd=home)
    assert again.returncode == 0, again.stderr
    assert table(again.stdout) == table(first)
    assert contents(stored) == before
    newest = max((info for info in stored.list("runs/") if info.key.endswith(".json")), key=lambda info: info.modified)
    assert [stage["done"] for stage in json.loads(stored.read(newest.key))["stages"]] == [0] * 9


def test_a_stage_alone_finds_what_the_run_made(selfcascade, stored, home):
    before = contents(stored)
    result = selfcascade("generate", *small(generation__method="tuned"), cwd=home)
    assert result.returncode == 0, result.stderr
    assert "samples/demo-tuned@" in result.stdout
    assert contents(stored) == before


def test_a_report_is_held_against_another(selfcascade, first, stored, home):
    """Equal numbers pass; a report of another protocol is published, and the run then ends in one line that says why the two cannot be compared."""
    gate = {"evaluation__name": "nightly", "evaluation__gate__against": "reports/demo", "execution__workers": 1}
    passes = selfcascade("evaluate", *small(**gate), cwd=home)
    assert passes.returncode == 0, passes.stderr
    assert table(passes.stdout) == table(first)
    refused = selfcascade("evaluate", *small(**gate | {"evaluation__name": "other", "evaluation__seed": 1}), cwd=home)
    assert refused.returncode == 2
    assert "evaluation.gate.against: demo was measured with another crop" in refused.stderr.splitlines()[-1]
    assert resolve(stored, "reports/other").ref.name == "other"


def test_the_commands_beside_the_rows_name_the_samples_that_are_there(stored, home):
    """Run as printed, each finds its row's artifact published and makes nothing. One server serves them all."""
    report = resolve(stored, "reports/demo")
    before = contents(stored)
    with prefect_server(home, PREFECT_HOME=str(home / ".selfcascade/prefect")) as port:
        here = environment() | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
        for row in json.loads(report.read("metrics.json"))["rows"]:
            program, *arguments = shlex.split(row["command"])
            result = subprocess.run(command(*arguments), cwd=home, env=here, capture_output=True, text=True, timeout=500, check=False)
            assert (program, result.returncode) == ("selfcascade", 0), result.stderr
            assert row["artifact"] in result.stdout
    assert contents(stored) == before


def test_further_rows_make_nothing_but_themselves(selfcascade, stored, home):
    """Two settings of the cascade and another upsampler, compared in one report with what was there: what is trained for two rows is trained once."""
    tuned_c = {"generation.method": "tuned", "adaptation.upsampler.variant": "C"}
    further = {"fewer steps": {"generation.cascade.later_steps": 1}, "tuned C": tuned_c, "C at half strength": tuned_c | {"generation.cascade.strength": 0.5}}
    rows = json.dumps([{"label": label, "changes": changes} for label, changes in further.items()])
    options = small(evaluation__name="rows", rows=rows)
    before = contents(stored)
    ahead = selfcascade("run", *options, "--dry-run", cwd=home)
    lines = [line for line in re.findall(r"^(?:curate|adapt|generate|evaluate) .*$", ahead.stdout, re.M) if " published " not in line]
    planned = [re.match(r"(\w+) +(?:\w+/)?([\w-]+)", line).groups() for line in lines]
    assert planned == [
        ("adapt", "demo-tuned-c"),
        ("generate", "demo-fewer-steps"),
        ("generate", "demo-tuned-c"),
        ("generate", "demo-c-at-half-strength"),
        ("evaluate", "rows"),
    ]
    result = selfcascade("run", *options, cwd=home)
    assert result.returncode == 0, result.stderr
    after = contents(stored)
    assert {key: after[key] for key in before if not key.endswith("/latest.json")} == {key: before[key] for key in before if not key.endswith("/latest.json")}
    made = {"/".join(key.split("/")[:2]) for key in after.keys() - before.keys() if not key.startswith("cache/")}
    assert made == {"upsamplers/demo-tuned-c", "samples/demo-fewer-steps", "samples/demo-tuned-c", "samples/demo-c-at-half-strength", "reports/rows"}
    results = json.loads(resolve(stored, "reports/rows").read("metrics.json"))
    assert set(further) < {row["label"] for row in results["rows"]}
    values = {row["label"]: row["numbers"]["fid_b"]["value"] for row in results["rows"]}
    assert len({values[label] for label in ("tuning-free", "tuned", *further)}) == 5
