"""Measure whether training gains more than the seed of training moves: the demo's run once for every seed, all but training and tuned pictures shared.

python tests/bench/seeds.py [--config demo] [--seeds 1 2 0] [--set KEY=VALUE ...] [--out seeds.json]

The last seed's report is the one that the store's pointers are left at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.records import commit, machine

from selfcascade.evaluation.results import Results

GUIDED, FREE = "tuned", "tuning-free"


def results_of(seed: int, arguments: argparse.Namespace) -> Results:
    """The report of a run whose upsampler was trained with ``seed``."""
    options = [part for setting in [*arguments.set, f"adaptation.seed={seed}"] for part in ("--set", setting)]
    command = [sys.executable, "-m", "selfcascade_flows.cli"]
    subprocess.run([*command, "run", "--config", arguments.config, *options], check=True)
    with TemporaryDirectory() as folder:
        subprocess.run([*command, "pull", f"reports/{arguments.config}", f"{folder}/report"], check=True)
        return Results.model_validate_json(Path(folder, "report/metrics.json").read_bytes())


def gains(found: dict[int, Results]) -> dict[str, dict[str, object]]:
    """Of each metric, by how much every seed's tuned row lies below the tuning-free row, their mean, and the standard deviation between seeds."""
    rows: dict[str, dict[str, object]] = {}
    for metric in next(iter(found.values())).metrics:
        values = {}
        for seed, results in found.items():
            numbers = {row.label: row.numbers[metric.name].value for row in results.rows}
            if numbers.get(GUIDED) is not None and numbers.get(FREE) is not None:
                values[seed] = numbers[FREE] - numbers[GUIDED]
        if metric.judged and len(values) == len(found):
            rows[metric.name] = {"gains": values, "mean": statistics.fmean(values.values()), "spread": statistics.stdev(values.values())}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 0])
    parser.add_argument("--set", action="append", default=[], help="as the command line has it")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {seed: results_of(seed, arguments) for seed in arguments.seeds}
    rows = gains(found)
    for name, row in rows.items():
        print(f"{name:10} gain {row['mean']:.4f}, spread of {len(found)} seeds {row['spread']:.4f}")
    if arguments.out:
        first = next(iter(found.values()))
        record = {"prompts": first.prompts, "rows": rows, "machine": machine(), "commit": commit()}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
