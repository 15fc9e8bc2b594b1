"""Pages that are made by script are as the script makes them."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_list_of_modules_is_current():
    code = "import sys; sys.path.insert(0, 'docs'); import modules; text = modules.PAGE.read_text(); sys.exit(modules.filled(text) != text)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0, "run `make docs`"


def test_files_that_the_pages_name_exist():
    for page in ("CONTRIBUTING.md", "docs/architecture.md", "NOTICE"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"(?:selfcascade|flows|tasks|tests|docs)/[\w/.-]*\w\.(?:py|md|png|yaml)", text):
            assert (ROOT / name).is_file(), f"{page} names {name}"
