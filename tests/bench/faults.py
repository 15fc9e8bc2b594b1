"""The small pipeline before a store of which a share of the requests goes wrong, against the same on a whole one: what was spoilt, and that no object differs.

python tests/bench/faults.py [--share 0.1] [--seed 0] [--out docs/results/faults.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "flows"))
from bench.records import commit, machine
from faulty_proxy import DELAY
from publication import changed
from test_faults import compare

from selfcascade.storage import embedded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        embedded.attach(folder / "weed")
        try:
            whole, spoilt, proxy = compare(folder / "weed", folder, share=arguments.share, seed=arguments.seed)
        finally:
            embedded.release(folder / "weed")
            embedded.stop(folder / "weed", now=True)
    record = {
        "share": arguments.share,
        "delay": DELAY,
        "requests": proxy.requests,
        "spoilt": dict(sorted(proxy.spoilt.items())),
        "objects": len(whole[0]),
        "pointers": len(whole[1]),
        "different": len(changed(spoilt, whole)),
        "machine": machine(),
        "commit": commit(),
    }
    print(json.dumps(record, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
