"""What lists, sorts, captions and compares the inputs takes the same memory however many there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

PARENT = """
import resource, sys
from selfcascade.config import CurationSettings, StoreSettings
from selfcascade.curation.curate import plan_curation, stage_listing
from selfcascade.storage import Store
settings = CurationSettings.model_validate_json(sys.argv[1])
with Store.open(StoreSettings(folder=sys.argv[2])) as store:
    plan = plan_curation(settings, store)
    stage_listing(settings, store, plan)
print(plan.inputs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def folder(root: Path, count: int) -> dict:
    """Small files in a hundred folders, each with a caption beside it."""
    for number in range(count):
        place = root / f"{number % 100:02d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"picture-{number:06d}.png").write_bytes(b"no picture %d" % number)
        (place / f"picture-{number:06d}.txt").write_text(f"thing {number % 1000}")
    return {"kind": "folder", "path": str(root)}


def table(root: Path, count: int) -> dict:
    """A line of JSON for each picture of a folder: captions are matched, and some of the pictures are equal."""
    source = folder(root, count)
    lines = (json.dumps({"file_name": f"{number % 100:02d}/picture-{number:06d}.png", "text": f"thing {number}"}) for number in range(count))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return source


def parquet(root: Path, count: int) -> dict:
    root.mkdir(parents=True)
    columns = {"url": [f"https://example.org/{number}.png" for number in range(count)], "caption": [f"thing {number}" for number in range(count)]}
    pq.write_table(pa.table(columns), root / "table.parquet")
    return {"kind": "urls", "path": str(root / "table.parquet")}


def urls(root: Path, count: int) -> dict:
    root.mkdir(parents=True)
    (root / "table.csv").write_text("url,caption\n" + "".join(f"https://example.org/{number}.png,thing {number}\n" for number in range(count)))
    return {"kind": "urls", "path": str(root / "table.csv")}


@pytest.mark.full
@pytest.mark.parametrize(("make", "few"), [(folder, 1_000), (table, 1_000), (urls, 1_000), (parquet, 1_000)])
def test_the_parent_takes_the_same_memory_for_few_inputs_and_a_hundred_thousand(tmp_path, make, few):
    """Within 10 %, the interpreter and its libraries included."""
    peaks = {}
    for count in (few, 100_000):
        settings = {"name": "many", "size": 32, "source": make(tmp_path / str(count), count), "filters": {"max_caption_copies": 50}}
        words = [sys.executable, "-c", PARENT, json.dumps(settings), str(tmp_path / f"store-{count}")]
        made = subprocess.run(words, capture_output=True, text=True, check=False, timeout=900)
        assert made.returncode == 0, made.stderr[-2000:]
        inputs, peaks[count] = map(int, made.stdout.split())
        assert inputs == count
    assert peaks[100_000] < 1.1 * peaks[few], peaks
