"""`selfcascade deploy`: a server is brought to a file, told what changes, and left alone by the second time; a schedule then runs the whole pipeline."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from conftest import command, environment, small
from served import asked, free_port, prefect_server, running, until

from selfcascade.config import StoreSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store, resolve
from selfcascade_flows.desired import read

SHIPPED = Path(__file__).parents[2] / "infra/prefect.yaml"
WORKER = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "selfcascade", "--type", "process"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with prefect_server(tmp_path_factory.mktemp("server")) as port:
        yield port


@pytest.fixture
def deploy(server, tmp_path):
    """Run the command with a file; the lines that it prints."""

    def run(tree: dict, *options: str) -> list[str]:
        path = tmp_path / "prefect.yaml"
        path.write_text(yaml.safe_dump(tree))
        given = environment() | {"PREFECT_API_URL": f"http://127.0.0.1:{server}/api"}
        result = subprocess.run(
            command("deploy", "--file", str(path), *options), cwd=tmp_path, env=given, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run


def changed(lines: list[str]) -> list[str]:
    """The things that change, without what says how."""
    return [line.strip() for line in lines[:-1] if line.startswith(("create", "update"))]


def test_a_server_is_brought_to_the_file_and_then_left_alone(server, deploy):
    tree = yaml.safe_load(SHIPPED.read_text())
    planned = deploy(tree, "--dry-run")
    assert planned[-1] == "14 to change; nothing was changed"
    assert asked(server, "/api/deployments/filter", {}) == []
    assert asked(server, "/api/work_pools/filter", {}) == []
    made = deploy(tree)
    assert made[:-1] == planned[:-1]
    assert made[-1] == "14 changed"
    assert [line for line in made if line.startswith("left out")] == [
        "left out  automation selfcascade - tell of a failed run  (there is no block slack-webhook/selfcascade on this server)"
    ]
    assert changed(deploy(tree)) == []
    found = {item["name"]: item for item in asked(server, "/api/deployments/filter", {})}
    assert set(found) == {"nightly", "curate", "pretrain", "adapt", "generate", "evaluate"}
    nightly = found["nightly"]
    assert [(one["schedule"]["cron"], one["schedule"]["timezone"], one["active"]) for one in nightly["schedules"]] == [("0 2 * * *", "Etc/UTC", False)]
    assert (nightly["global_concurrency_limit"]["limit"], nightly["concurrency_options"]["collision_strategy"]) == (1, "CANCEL_NEW")
    assert (nightly["work_pool_name"], nightly["work_queue_name"], found["curate"]["work_queue_name"]) == ("selfcascade", "gpu", "cpu")
    assert nightly["parameter_openapi_schema"]["properties"]["stage"]["enum"][0] == "run"
    queues = {item["name"]: item["concurrency_limit"] for item in asked(server, "/api/work_pools/selfcascade/queues/filter", {})}
    assert (queues["cpu"], queues["gpu"]) == (2, 1)
    automations = {item["name"]: item for item in asked(server, "/api/automations/filter", {})}
    assert [name for name, item in automations.items() if item["enabled"]] == ["selfcascade - end runs without a heartbeat"]
    assert automations["selfcascade - end runs without a heartbeat"]["trigger"]["within"] >= 540
    assert automations["selfcascade - adapt after curation"]["actions"][0]["deployment_id"] == found["adapt"]["id"]


def test_what_changes_is_told_and_nothing_else_is_touched(server, deploy):
    tree = yaml.safe_load(SHIPPED.read_text())
    deploy(tree)
    ids = {item["name"]: item["id"] for item in asked(server, "/api/deployments/filter", {})}
    nightly, curate = tree["deployments"][:2]
    nightly["schedules"] = [{"cron": "30 4 * * 1-5", "timezone": "Europe/Berlin"}, {"cron": "0 12 * * 6", "timezone": "Europe/Berlin", "active": False}]
    nightly["parameters"]["overrides"] = ["adaptation.steps=400"]
    del curate["schedules"]
    tree["work_pools"][0]["queues"][0]["concurrency_limit"] = 5
    tree["automations"][2]["enabled"] = True
    lines = deploy(tree)
    assert changed(lines) == [
        "update    work queue selfcascade/cpu",
        "update    deployment scheduled/nightly",
        "update    deployment scheduled/curate",
        "update    automation selfcascade - adapt after curation",
    ]
    assert "            concurrency_limit: 2 -> 5" in lines
    assert "            enabled: false -> true" in lines
    assert any("parameters:" in line and "adaptation.steps=400" in line.partition("->")[2] for line in lines)
    found = {item["name"]: item for item in asked(server, "/api/deployments/filter", {})}
    assert {name: item["id"] for name, item in found.items()} == ids
    assert sorted((one["schedule"]["cron"], one["active"]) for one in found["nightly"]["schedules"]) == [("0 12 * * 6", False), ("30 4 * * 1-5", True)]
    assert found["curate"]["schedules"] == []
    assert changed(deploy(tree)) == []
    elsewhere = {key: tree[key] for key in tree if key != "deployments"} | {"deployments": [nightly]}
    assert changed(deploy(elsewhere)) == []
    assert len(asked(server, "/api/deployments/filter", {})) == 6


def test_a_failure_is_told_once_there_is_a_block_to_tell_it_by(server, deploy):
    tree = yaml.safe_load(SHIPPED.read_text())
    kind = asked(server, "/api/block_types/slug/slack-webhook")["id"]
    schema = asked(server, "/api/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind]}}})[0]["id"]
    block = {"name": "selfcascade", "block_type_id": kind, "block_schema_id": schema, "data": {"url": "http://127.0.0.1:9/hook"}}
    made = asked(server, "/api/block_documents/", block)
    assert "create    automation selfcascade - tell of a failed run" in deploy(tree)
    automations = {item["name"]: item for item in asked(server, "/api/automations/filter", {})}
    assert automations["selfcascade - tell of a failed run"]["actions"][0]["block_document_id"] == made["id"]


def one_deployment(**fields):
    return {"deployments": [{"name": "x", "work_pool": {"name": "p"}, "parameters": {"config": "demo"}} | fields]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_deployment(parameters={"config": "nowhere"}), "deployment 'x': --config 'nowhere' is neither"),
        (one_deployment(parameters={"config": "demo", "overrides": ["adaptation.step=4"]}), "deployment 'x': .*adaptation.step is not a setting"),
        (one_deployment(schedules=[{"cron": "0 25 * * *"}]), "deployment 'x': schedule cron: Invalid cron"),
        (one_deployment(schedules=[{"cron": "0 2 * * *", "timezone": "Mars"}]), "deployment 'x': schedule timezone: Invalid timezone"),
        ({"deployments": [{"name": "x", "parameters": {"config": "demo"}}]}, "deployments.0.work_pool: Field required"),
        ({"work_pool": []}, "work_pool: Extra inputs"),
    ],
)
def test_what_would_fail_in_the_night_is_refused_at_once(tmp_path, change, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(change))
    with pytest.raises(SettingsError, match=f"mine.yaml: {message}"):
        read(path)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"--file .*gone.yaml does not exist"):
        read(tmp_path / "gone.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(SettingsError, match=r"bad.yaml is not valid YAML"):
        read(tmp_path / "bad.yaml")


@pytest.fixture
def database():
    """URL of an empty PostgreSQL database, on a server that ends with the test.

    Its user must reach the folder, and every session of pytest closes those of all sessions to others.
    """
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs and "CI" not in os.environ:
        pytest.skip("PostgreSQL is not installed")
    assert programs, "PostgreSQL is not installed"
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    data, port = folder / "data", free_port()
    (folder / "password").write_text("secret")

    def run(*arguments: str) -> None:
        # initdb refuses to run as root.
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        subprocess.run([*as_user, str(programs[-1] / arguments[0]), *arguments[1:]], cwd=folder, check=True, capture_output=True, timeout=120)

    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        (folder / "password").chmod(0o644)
    run("initdb", "-D", str(data), "-U", "prefect", f"--pwfile={folder / 'password'}", "-A", "scram-sha-256", "-E", "UTF8", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "-D", str(data), "-w", "-t", "60", "-l", str(folder / "log"), "-o", options, "start")
    try:
        given = os.environ | {"PGPASSWORD": "secret"}
        subprocess.run([programs[-1] / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect"], env=given, check=True, timeout=60)
        yield f"postgresql+asyncpg://prefect:secret@127.0.0.1:{port}/prefect"
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@pytest.mark.timeout(2400)
def published(port: int) -> set[str]:
    """Resources of all events that an artifact was published."""
    found = asked(port, "/api/events/filter", {"filter": {"event": {"name": ["selfcascade.artifact.published"]}}})
    return {event["resource"]["prefect.resource.id"] for event in found["events"]}


def test_a_schedule_runs_the_whole_pipeline_on_postgresql(database, tmp_path):
    """A server on PostgreSQL, a worker, and a schedule of every minute: the pipeline runs to its end, and what is due meanwhile is cancelled, not queued."""
    overrides = [part for part in small(execution__workers=1) if part != "--set"]
    tree = yaml.safe_load(SHIPPED.read_text())
    nightly = tree["deployments"][0]
    nightly["parameters"]["overrides"] = [*overrides, f"store.folder={tmp_path / 'store'}"]
    nightly["schedules"] = [{"cron": "* * * * *", "timezone": "Etc/UTC"}]
    tree["deployments"] = [nightly]
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(tree | {"automations": []}))
    variables = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database, "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5"}
    with prefect_server(tmp_path, **variables) as port:
        here = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_HOME": str(tmp_path / "prefect")}
        done = subprocess.run(
            command("deploy", "--file", "prefect.yaml"), cwd=tmp_path, env=environment() | here, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr

        def runs(*states: str) -> list[dict]:
            found = asked(port, "/api/flow_runs/filter", {"flows": {"name": {"any_": ["scheduled"]}}})
            return [run for run in found if run["state_type"] in states]

        with running(WORKER, tmp_path, tmp_path / "worker.log", at_once=True, **here, PREFECT_WORKER_QUERY_SECONDS="2"):
            until(lambda: runs("RUNNING"), 400)
            deployment = asked(port, "/api/deployments/name/scheduled/nightly")["id"]
            another = asked(port, f"/api/deployments/{deployment}/create_flow_run", {})["id"]
            first = until(lambda: runs("COMPLETED", "FAILED", "CRASHED"), 1200)[-1]
            assert until(lambda: asked(port, f"/api/flow_runs/{another}")["state_type"] != "SCHEDULED", 300)
            if first["state_type"] == "COMPLETED":  # the server writes events some time after states
                wanted = {f"selfcascade.{name}" for name in ("datasets.twemoji", "upsamplers.demo", "reports.demo")}
                until(lambda: wanted <= published(port), 60)
        assert asked(port, f"/api/flow_runs/{another}")["state_type"] == "CANCELLED"
        assert first["state_type"] == "COMPLETED", (tmp_path / "worker.log").read_text()[-3000:]
        assert first["name"] == "run demo"
        assert first["auto_scheduled"]
    with Store.open(StoreSettings(folder=tmp_path / "store")) as store:
        assert resolve(store, "reports/demo").manifest().objects


@pytest.mark.full
def test_a_killed_worker_and_a_killed_store_cost_no_work(home, tmp_path):
    """SIGKILL of the worker with its run, and of the store, while samples are made: the automation ends the run, which no longer sends heartbeats, the next
    one goes on from what is stored and ends with the same bytes."""
    tree = yaml.safe_load(SHIPPED.read_text())
    nightly = tree["deployments"][0] | {"schedules": [], "concurrency_limit": None}
    nightly["parameters"]["overrides"] = [*(part for part in small() if part != "--set"), f"store.folder={tmp_path / 'store'}"]
    ends = next(automation for automation in tree["automations"] if "heartbeat" in automation["name"])
    ends["trigger"]["within"] = 45  # ten minutes in the file
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(tree | {"automations": [ends], "deployments": [nightly]}))
    with prefect_server(tmp_path) as port:
        here = {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_WORKER_QUERY_SECONDS": "2"}
        here |= {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
        subprocess.run(command("deploy", "--file", "prefect.yaml"), cwd=tmp_path, env=environment() | here, check=True, capture_output=True, timeout=300)
        deployment = asked(port, "/api/deployments/name/scheduled/nightly")["id"]

        def state(run: str) -> str:
            return asked(port, f"/api/flow_runs/{run}")["state_type"]

        first = asked(port, f"/api/deployments/{deployment}/create_flow_run", {})["id"]
        with running(WORKER, tmp_path, tmp_path / "first.log", at_once=True, **here):

            def sampling() -> bool:
                keys = {artifact["key"] for artifact in asked(port, "/api/artifacts/latest/filter", {"limit": 100})}
                return "generate-demo-lanczos-progress" in keys and "evaluate-demo" not in keys

            until(sampling, 400)
            os.kill(json.loads((tmp_path / "store/server.json").read_text())["pid"], signal.SIGKILL)
        assert state(first) == "RUNNING"  # nobody is left to say otherwise, and it holds the place of its queue
        second = asked(port, f"/api/deployments/{deployment}/create_flow_run", {})["id"]
        with running(WORKER, tmp_path, tmp_path / "second.log", at_once=True, **here):
            until(lambda: state(first) == "CRASHED", 200)
            until(lambda: state(second) in ("COMPLETED", "FAILED", "CRASHED"), 250)
        assert state(second) == "COMPLETED", (tmp_path / "second.log").read_text()[-3000:]
    with Store.open(StoreSettings(folder=tmp_path / "store")) as store, Store.open(StoreSettings(folder=home / ".selfcascade/store")) as undisturbed:
        for name in ("datasets/twemoji", "upsamplers/demo", "samples/demo-tuned", "reports/demo"):
            found, expected = resolve(store, name), resolve(undisturbed, name)
            assert found.ref.version == expected.ref.version
            assert [(entry.key, entry.sha256) for entry in found.manifest().objects] == [(entry.key, entry.sha256) for entry in expected.manifest().objects]
