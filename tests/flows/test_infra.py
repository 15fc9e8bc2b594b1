"""What runs elsewhere: containers cannot be run here, so the strictest tools of each kind read the files, and what can be run of them runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import command, environment
from served import free_port, prefect_server, running

from selfcascade.config import StoreSettings
from selfcascade.storage import Store, StoreDenied

INFRA = Path(__file__).parents[2] / "infra"
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
PROGRAMS = Path(sys.executable).parent
MANIFESTS = sorted(path for path in (INFRA / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")


def checked(*arguments: str) -> None:
    program = shutil.which(arguments[0], path=PROGRAMS)
    assert program is not None, f"{arguments[0]} is not installed"
    result = subprocess.run([program, *arguments[1:]], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_image_is_as_hadolint_wants_it():
    checked("hadolint", str(INFRA / "Dockerfile"))


def test_compose_keeps_its_schema():
    checked("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(INFRA / "compose.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_keeps_its_schema(path):
    checked("kubernetes-validate", "--strict", "--no-warn", str(path))


def test_the_kustomization_names_every_manifest():
    listed = yaml.safe_load((INFRA / "kubernetes/kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [path.name for path in MANIFESTS]


def test_no_password_has_a_default_and_no_port_is_open_to_the_world():
    text = (INFRA / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+)", text)) == {"POSTGRES_PASSWORD", "PREFECT_PASSWORD", "STORE_ACCESS_KEY", "STORE_SECRET_KEY", "STORE_INNER_KEY"}
    assert all(given.startswith(":?") for given in re.findall(r"\$\{\w+([^}]*)\}", text))
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
    for path in MANIFESTS:
        assert "secretKeyRef" not in path.read_text()


def test_every_service_that_stays_has_limits_and_starts_again():
    for name, service in COMPOSE["services"].items():
        once = service["restart"] == "no"
        assert once == (name in ("bucket", "deploy")), name
        assert once or service["deploy"]["resources"]["limits"]["memory"], name
        assert once or name == "store" or service["healthcheck"]["test"], name


def test_the_queues_of_the_workers_are_those_that_are_deployed():
    queues = {queue["name"] for queue in yaml.safe_load((INFRA / "prefect.yaml").read_text())["work_pools"][0]["queues"]}
    containers = [item["command"] for item in COMPOSE["services"].values() if "worker" in item.get("command", ())]
    containers += [yaml.safe_load(path.read_text())["spec"]["template"]["spec"]["containers"][0]["command"] for path in MANIFESTS if "worker" in path.name]
    assert len(containers) == 4
    for each in containers:
        assert {value for flag, value in pairwise(each) if flag == "--work-queue"} <= queues
        assert each[each.index("--pool") + 1] == "selfcascade"


@pytest.fixture
def served_store(tmp_path):
    """The store of the compose file, on loopback: its endpoint, and its keys."""
    port, service = free_port(), COMPOSE["services"]["store"]
    changes = {
        "-dir=/data": f"-dir={tmp_path / 'data'}",
        "-ip=store": "-ip=127.0.0.1",
        "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1",
        "-s3.port=8333": f"-s3.port={port}",
    }
    assert set(changes) <= set(service["command"])
    (tmp_path / "data").mkdir()
    inner = {f"-{name}.port": str(free_port()) for name in ("master", "volume", "filer", "admin")}
    arguments = [str(PROGRAMS / "weed"), *(changes.get(part, part) for part in service["command"]), *(f"{name}={value}" for name, value in inner.items())]
    given = {"STORE_ACCESS_KEY": "someone", "STORE_SECRET_KEY": "hush" * 8, "STORE_INNER_KEY": "inner" * 8}
    variables = {name: re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: given[found[1]], value) for name, value in service["environment"].items()}
    with running(arguments, tmp_path, tmp_path / "weed.log", **variables):
        yield f"http://127.0.0.1:{port}", given


def test_the_store_of_compose_takes_its_bucket_and_its_keys(served_store, tmp_path):
    """Its own command line and the script that makes the bucket, run here: artifacts can be stored, and without the keys nothing can be read."""
    endpoint, given = served_store
    program, flag, script = COMPOSE["services"]["bucket"]["command"]
    keys = {"AWS_ACCESS_KEY_ID": given["STORE_ACCESS_KEY"], "AWS_SECRET_ACCESS_KEY": given["STORE_SECRET_KEY"]}
    variables = environment() | keys | {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    for _ in range(2):  # again, it leaves the bucket alone
        made = subprocess.run([sys.executable, flag, script], env=variables, capture_output=True, text=True, timeout=150, check=False)
        assert made.returncode == 0, made.stdout + made.stderr
    assert program == "python"
    settings = StoreSettings(endpoint=endpoint, access_key=given["STORE_ACCESS_KEY"], secret_key=given["STORE_SECRET_KEY"])
    with Store.open(settings) as store:
        store.put_new("datasets/x", b"data")
        assert store.read("datasets/x") == b"data"
    with pytest.raises(StoreDenied), Store.open(StoreSettings(endpoint=endpoint, access_key=given["STORE_ACCESS_KEY"], secret_key="wrong")) as store:
        store.read("datasets/x")


def test_a_server_with_a_password_lets_in_who_has_it(tmp_path):
    """As in the compose file: commands with the password work, and without it end in one line that says what to set."""
    with prefect_server(tmp_path, PREFECT_SERVER_API_AUTH_STRING="prefect:hush") as port:
        here = environment() | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_HOME": str(tmp_path / "home")}

        def deploy(**more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(command("deploy", "--dry-run"), cwd=tmp_path, env=here | more, capture_output=True, text=True, timeout=200, check=False)

        assert deploy(PREFECT_API_AUTH_STRING="prefect:hush").returncode == 0
        for wrong in ({}, {"PREFECT_API_AUTH_STRING": "prefect:guess"}):
            refused = deploy(**wrong)
            assert refused.returncode == 2
            assert refused.stderr.strip().splitlines()[-1].startswith(f"selfcascade: PREFECT_API_URL http://127.0.0.1:{port}/api asks for a password")
            assert "hush" not in refused.stdout + refused.stderr
