"""The built wheel, installed outside the clone: configs, templates and base are in it, and nothing is called `flows`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "docs"))
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source], check=True, capture_output=True, text=True)
    [wheel] = folder.glob("selfcascade-*.whl")
    target = folder / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel], check=True, capture_output=True)
    return target


def run(site, cwd, *arguments):
    clean = environment() | {"PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300, check=False)


def test_it_holds_packages_data_and_no_common_word(site):
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {
        *("bin", "selfcascade", "selfcascade_flows", "selfcascade_infra", "selfcascade_tasks"),
    }
    pages = ("selfcascade/evaluation/report.html.j2", "selfcascade/evaluation/report.js")
    for data in ("selfcascade_flows/configs/demo.yaml", "selfcascade_infra/prefect.yaml", *pages, "selfcascade/bases/tiny-emoji/model_index.json"):
        assert (site / data).is_file(), data
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "selfcascade/bases/tiny-emoji").rglob("*") if path.is_file() and path.name[0] != "."}
    assert {path for path in shipped if not (site / path).is_file()} == set()


def test_the_demo_looks_ahead_from_it(site, tmp_path):
    where = run(site, tmp_path, "-c", "import selfcascade, selfcascade_flows, selfcascade_tasks; print(selfcascade_flows.__file__)")
    assert where.stdout.startswith(str(site)), where.stderr
    result = run(site, tmp_path, "-m", "selfcascade_flows.cli", "run", "--config", "demo", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "Nothing was written." in result.stdout
    assert not list(tmp_path.iterdir())
