"""Plant known defects one at a time and demand that a named test notices each: ``python tests/mutants.py [WORD]``.

A mutant is a text of the library, found exactly once, and what replaces it in a copy of the package; the lists are in ``tests/mutants/*.yaml``.
The named tests must pass on the unharmed copy and fail on the harmed one. WORD restricts the run to mutants whose name holds it.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LISTS = ROOT / "tests" / "mutants"
PRELOADED = [
    "torch",
    "pytest",
    "hypothesis",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
]
"""Imported once, by the process that every run is forked from."""


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    """Inside ``selfcascade``."""
    old: str
    new: str
    test: str
    """Inside ``tests``; the first failure of a parametrised test is enough."""


def mutants(word: str) -> list[Mutant]:
    """The listed mutants whose name holds ``word``."""
    listed = [Mutant(**entry) for path in sorted(LISTS.glob("*.yaml")) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]
    return [mutant for mutant in listed if word in mutant.name]


def run(folder: str, tests: list[str]) -> tuple[int, str]:
    """Exit code and end of the output of pytest, in this process, with the package in ``folder`` in place of the repository's."""
    os.chdir(ROOT / "tests")
    sys.path.insert(0, folder)
    import selfcascade

    if not selfcascade.__file__.startswith(folder):
        raise RuntimeError(f"{selfcascade.__file__} was imported, not the copy in {folder}")
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    return code, "\n".join(output.getvalue().splitlines()[-15:])


def copy_package(folder: str) -> Path:
    """A copy without weights, which no named test reads."""
    return shutil.copytree(ROOT / "selfcascade", Path(folder) / "selfcascade", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))


def unharmed(tests: list[str]) -> str:
    """What the named tests say of the package as it is; nothing if they pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy_package(folder)
        code, output = run(folder, tests)
    return "" if code == pytest.ExitCode.OK else f"the named tests do not pass on the unharmed package:\n{output}"


def fate(mutant: Mutant) -> tuple[bool, str]:
    """Whether the named test noticed, and what to say about it. That it could not be run, or collected, proves nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = copy_package(folder) / mutant.file
        text = source.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            return False, f"STALE     {mutant.name}: its text occurs {text.count(mutant.old)} times in {mutant.file}"
        source.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        code, output = run(folder, [mutant.test])
    if code == pytest.ExitCode.TESTS_FAILED:
        return True, f"killed    {mutant.name}"
    return False, f"{'SURVIVED ' if code == pytest.ExitCode.OK else 'BROKEN   '} {mutant.name}: {mutant.test}\n{output}"


def main() -> int:
    """Exit code: 0 where every mutant was noticed."""
    chosen = mutants(sys.argv[1] if len(sys.argv) > 1 else "")
    if not chosen:
        print("no mutant of that name")
        return 2
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=context, max_tasks_per_child=1) as pool:
        complaint = pool.submit(unharmed, sorted({mutant.test for mutant in chosen})).result()
        if complaint:
            print(complaint)
            return 1
        survivors = 0
        for noticed, line in pool.map(fate, chosen):
            survivors += not noticed
            print(line, flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
