"""The two ways to a Prefect UI: the runs of the past (`make ui`), and flows that can be started (`selfcascade serve`)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command, environment, small
from served import asked, free_port, running, until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.full


def test_six_servers_that_start_at_once_on_a_new_database_all_come_up(tmp_path):
    """Each command brings its own; they take turns at the tables."""
    code = "from selfcascade_flows.server import PrefectServer\nwith PrefectServer() as server: server.wait()"
    starts = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(6)]
    assert [(start.communicate(timeout=180)[1], start.returncode) for start in starts] == [("", 0)] * 6


def test_make_ui_shows_the_runs_of_the_past(home, tmp_path):
    port = free_port()
    run = re.search(r"flow-run/(\S+)", (home / "output.txt").read_text()).group(1)
    recipe = ["make", "-o", ".venv/.user", "ui", f"UI_PORT={port}", f"UI_HOME={home / '.selfcascade/prefect'}"]
    with running(recipe, ROOT, tmp_path / "log"):
        until(lambda: asked(port, "/api/health"), 180)
        found = asked(port, f"/api/flow_runs/{run}")
        assert (found["name"], found["state_type"]) == ("demo", "COMPLETED")
        artifacts = asked(port, "/api/artifacts/latest/filter", {"limit": 100})
        assert {"evaluate-demo", "evaluate-demo-sheet", "generate-demo-tuned-sheet"} <= {artifact["key"] for artifact in artifacts}
        assert "<html" in asked(port, "/").lower()
        assert json.loads(asked(port, "/ui-settings"))["api_url"] == f"http://127.0.0.1:{port}/api"  # else the page asks another server


def test_a_flow_is_started_from_the_form_of_the_ui(tmp_path):
    port = free_port()
    with running(command("serve", "--port", str(port), *small(), "--set", "store.secret_key=hush", "--set", "store.access_key=me"), tmp_path, tmp_path / "log"):
        deployments = until(lambda: len(found := asked(port, "/api/deployments/filter", {})) == 6 and found, 240)
        by_flow = {asked(port, f"/api/flows/{item['flow_id']}")["name"]: item for item in deployments}
        assert set(by_flow) == {"curate", "pretrain", "adapt", "generate", "evaluate", "pipeline"}
        assert "hush" not in json.dumps(deployments)
        form = by_flow["curate"]["parameter_openapi_schema"]
        assert form["definitions"]["FilterSettings"]["properties"]["min_side"]["description"] == "smallest side in pixels of the decoded picture"
        started = asked(port, f"/api/deployments/{by_flow['curate']['id']}/create_flow_run", {"name": "by hand"})
        state = until(lambda: (found := asked(port, f"/api/flow_runs/{started['id']}"))["state_type"] in ("COMPLETED", "FAILED", "CRASHED") and found, 300)
        assert state["state_type"] == "COMPLETED", (tmp_path / "log").read_text()[-3000:]
        assert state["name"] in ("by hand", "twemoji")
