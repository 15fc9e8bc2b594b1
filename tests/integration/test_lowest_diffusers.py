"""The lowest diffusers that the packaging allows, by the make target that has it in its name; everything else runs on the highest."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def bounds() -> tuple[str, str]:
    """Lowest and first forbidden minor version of diffusers in ``pyproject.toml``."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (found,) = (re.fullmatch(r"diffusers>=(\d+\.\d+),<(\d+\.\d+)", line) for line in wanted if line.startswith("diffusers"))
    return found[1], found[2]


def minor(text: str) -> int:
    return int(text.split(".")[1])


def test_make_has_the_lowest_diffusers_and_this_is_the_highest():
    """Raising or lowering a bound asks for another target, or other pinned versions."""
    lowest, forbidden = bounds()
    assert f"\ntest-diffusers-{lowest}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert minor(version("diffusers")) in (minor(forbidden) - 1, minor(lowest))  # the latter where make runs it


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not Path(sys.prefix).samefile(ROOT / ".venv") or shutil.which("make") is None, reason="needs make and its virtual environment")
def test_the_method_and_the_baselines_pass_on_the_lowest_diffusers():
    run = subprocess.run(["make", "-o", ".venv/.dev", f"test-diffusers-{bounds()[0]}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
