"""How often 95 % intervals hold the truth, and how often a gate fires, over simulated studies (``tests/studies.py``): seeded, so that they can be had again.

python tests/bench/coverage.py [--studies 1000] [--out coverage.json]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.records import Record, table, write
from studies import WIDTH, Study, fid_truth, fires, held, kid_truth, many, mean_of


def rate(name: str, share: float, studies: int, aim: str, against: str, note: str = "") -> Record:
    """With the 95 % interval of a share (Wilson, 1927)."""
    z = 1.96
    middle = (share + z**2 / (2 * studies)) / (1 + z**2 / studies)
    half = z * math.sqrt(share * (1 - share) / studies + z**2 / (4 * studies**2)) / (1 + z**2 / studies)
    return Record(f"coverage/{name}", share, "share", aim, middle - half, middle + half, studies, against, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--count", type=int, default=100, help="prompts a method; real pictures are twice as many")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    studies, count = arguments.studies, arguments.count
    shape = f"{count} prompts, {2 * count} real pictures, {WIDTH} features"
    aim = "0.95"
    kid = many(studies, lambda seed: Study(seed, count).kid())
    none = many(studies, lambda seed: Study(seed, count).difference())
    some = many(studies, lambda seed: Study(seed, count).difference(gain=0.1))
    fid = many(studies, lambda seed: Study(seed, 10 * WIDTH).fid())
    records = [
        rate("KID", held(kid, kid_truth()), studies, aim, "the true KID", shape),
        rate("KID, paired difference, none", held(none, 0.0), studies, aim, "no difference", shape),
        rate("KID, paired difference, some", held(some, kid_truth(0.4) - kid_truth()), studies, aim, "the true difference", shape),
        rate(
            "FID", held(fid, mean_of(fid)), studies, aim, "FID of as many pictures, mean", f"{10 * WIDTH} prompts, {20 * WIDTH} real pictures, {WIDTH} features"
        ),
        rate("FID, bias and all", held(fid, fid_truth()), studies, "", "the true FID", f"mean {mean_of(fid):.2f} where {fid_truth():.2f} is true"),
    ]
    for name, worse, aim in (("quiet", 0.0, "<= 0.05"), ("worse by a tenth", 0.05, ""), ("worse by half", 0.25, ""), ("twice as far", 0.5, ">= 0.99")):
        seen = sum(fires(seed, count, worse=worse) for seed in range(studies)) / studies
        against = "the same method on other prompts" if not worse else f"a method at {0.5 + worse:g} in place of 0.5 deviations from real"
        records.append(rate(f"gate, {name}", seen, studies, aim, against, shape))
    print(table(records))
    if arguments.out:
        write(arguments.out, records)


if __name__ == "__main__":
    main()
