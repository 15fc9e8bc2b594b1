"""Records of measurements: one JSON list that figures are added to, and a table of it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path


def machine() -> str:
    """Processor and cores, as told with every figure."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}"


def commit() -> str:
    """The commit under test, marked where the tree differs from it."""
    if shutil.which("git") is None:
        return "unknown"
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


@dataclass(frozen=True)
class Record:
    """One figure, and what it is to be held against."""

    id: str
    value: float
    unit: str
    aim: str
    low: float
    high: float
    n: int
    """Paired runs that value (their median), low and high come from."""
    against: str
    note: str = ""
    machine: str = field(default_factory=machine)
    commit: str = field(default_factory=commit)
    when: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())


def write(path: Path, records: Sequence[Record]) -> None:
    """Put records into the list at ``path``, in place of older ones of their ids."""
    before = json.loads(path.read_text()) if path.is_file() else []
    kept = {record["id"]: record for record in before} | {record.id: asdict(record) for record in records}
    path.write_text(json.dumps([kept[name] for name in sorted(kept)], indent=1) + "\n")


def table(records: Sequence[Record]) -> str:
    """A table in markdown."""
    lines = ["| figure | value | aim | low | high | n | against |", "|---|---|---|---|---|---|---|"]
    for record in records:
        numbers = " | ".join(f"{value:.3g}" for value in (record.low, record.high))
        lines.append(f"| {record.id} | {record.value:.3g} {record.unit} | {record.aim} | {numbers} | {record.n} | {record.against} |")
    return "\n".join(lines)
