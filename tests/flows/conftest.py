"""A command line in a folder of its own, and a run that is as small as a real one can be."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from selfcascade.storage import embedded

SMALL = {
    "curation.source.limit": 40,
    "curation.source.backgrounds": "[white, yellow]",
    "curation.shard_inputs": 40,
    "curation.test": 0.3,
    "adaptation.steps": 4,
    "adaptation.warmup": 1,
    "adaptation.batch": 2,
    "adaptation.checkpoint_steps": 2,
    "adaptation.log_steps": 1,
    "adaptation.previews": 0,
    "generation.prompts.count": 4,
    "generation.prompts.known_words": "false",
    "generation.cascade.steps": 4,
    "generation.chunk": 2,
    "generation.batch": 2,
    "evaluation.half_samples": 4,
    "evaluation.kid_subsets": 2,
    "evaluation.sheet_prompts": 2,
}

ROOT = Path(__file__).parents[2]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    """Ours without what would send a command to the user's own store or server."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PREFECT_"))}


def command(*arguments: str) -> list[str]:
    """The command line of ``selfcascade``."""
    return [sys.executable, "-m", "selfcascade_flows.cli", *arguments]


def small(**more: object) -> list[str]:
    """Options that make a run small; ``more`` in the form ``adaptation__steps=3``."""
    settings = SMALL | {name.replace("__", "."): value for name, value in more.items()}
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def script(path: str) -> ModuleType:
    """A script of the repository as a module, imported here: in a process of its own it would import diffusers anew."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copied(made: Path, folder: Path) -> Path:
    """A copy of a folder in which commands ran, for more commands; its server is not running."""
    return Path(shutil.copytree(made, folder, ignore=shutil.ignore_patterns("*.sock", "*.lock")))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``selfcascade run --config demo`` ran once, small; its output is ``output.txt`` and ``said.txt``.

    The first process of tests that needs it makes it, and each has a copy of its own.
    """
    mine = tmp_path_factory.getbasetemp()
    everyones = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine
    with (everyones / "home").open("a+") as where:
        fcntl.flock(where, fcntl.LOCK_EX)
        where.seek(0)
        made = where.read()
        if not made:
            made = str(demonstrated(tmp_path_factory.mktemp("demo")))
            where.write(made)
    return copied(Path(made), tmp_path_factory.mktemp("home") / "home")


def demonstrated(folder: Path) -> Path:
    """``folder``, once the small demo has run there and its store lies still."""
    result = subprocess.run(command("run", *small()), cwd=folder, env=environment(), capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    (folder / "output.txt").write_text(result.stdout)
    (folder / "said.txt").write_text(result.stderr)
    embedded.stop(folder / ".selfcascade/store", now=True)
    return folder


@pytest.fixture
def selfcascade(tmp_path: Path) -> Run:
    """Run a command in ``tmp_path``, or in ``cwd``."""

    def run(*arguments: str, cwd: Path = tmp_path, timeout: float = 500) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)

    return run
