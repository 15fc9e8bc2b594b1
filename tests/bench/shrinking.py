"""What it costs a picture that its JPEG is shrunk by the decoder before it is resized, beside what storing it as JPEG of quality 95 costs it.

Each photograph is decoded by the product's own code to sizes that leave the filter a given factor, with the decoder's shrinking and without it; the difference
is the error. Photographs whose crop would begin or end within a shrunken pixel are left out: theirs is shifted by a part of one, which is no loss.

python tests/bench/shrinking.py PHOTOGRAPHS [--out docs/results/shrinking.json]
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.records import commit, machine

from selfcascade.config import CurationSettings
from selfcascade.curation import decoding

GAPS = (1.0, 1.15, 1.3, 1.5, 2.0)
SMALLEST = 64
"""Pixels of a target below which a photograph is left out."""


def at_size(data: bytes, size: int, gaps: dict[int, float]) -> NDArray[np.uint8]:
    """The centre at ``size``, shrunk by the decoder where ``gaps`` say so."""
    decoding.SHRINK_GAPS = gaps
    settings = CurationSettings.model_construct(size=size, shape="square", background="white", linear_light=False)
    return decoding.decode(data, decoding.open_picture(data, None, max_pixels=10**9), settings).pixels


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Decibels; 99 for equal pictures."""
    error = float(np.square(one.astype(np.float64) - other).mean())
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


def stored(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What is left of a picture as JPEG of quality 95 with all of its colour."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    return np.asarray(Image.open(buffer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    chosen = dict(decoding.SHRINK_GAPS)
    rows = []
    for shrink in sorted(chosen):
        for gap in GAPS:
            found = []
            for path in sorted(arguments.photographs.glob("*.jp*g")):
                data = path.read_bytes()
                with Image.open(path) as image:
                    side, over = min(image.size), max(image.size) - min(image.size)
                size = int(side / shrink / gap)
                if size < SMALLEST or side % shrink or over % (2 * shrink):
                    continue
                whole = at_size(data, size, {})
                found.append((psnr(at_size(data, size, {shrink: gap}), whole), psnr(stored(whole), whole)))
            more = [ours - jpeg for ours, jpeg in found]
            row = {"shrink": shrink, "gap": gap, "chosen": gap >= chosen[shrink], "photographs": len(found), "psnr": statistics.mean(ours for ours, _ in found)}
            row |= {"psnr_jpeg": statistics.mean(jpeg for _, jpeg in found), "worse": sum(margin < 0 for margin in more), "worst": min(more)}
            rows.append(row)
            print(row, flush=True)
    if arguments.out:
        record = {"machine": machine(), "commit": commit(), "when": datetime.now(UTC).date().isoformat(), "rows": rows}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
