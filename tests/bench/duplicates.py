"""Near duplicates: precision and recall of the perceptual hash on a labelled set, and time and memory of the stage as rows grow.

The labelled set is made of real pictures: photographs of a folder, each cut into tiles that overlap nowhere, and the twemoji. Each picture has variants that
are near duplicates by construction (encoded again, resized, cropped, recoloured); pictures of different tiles or emoji are none. The rows of the second part
are uniform hashes of 64 bits, a tenth of them within four bits of another.

python tests/bench/duplicates.py PHOTOGRAPHS [--rows 100000 1000000] [--out duplicates.json]

Photographs of a free licence: apt-get download mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 ukui-wallpapers, unpacked with dpkg -x.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.records import commit, machine

from selfcascade.config import CurationSettings, TwemojiSource
from selfcascade.curation.near import Hashed, masks, near_duplicates
from selfcascade.curation.picture import picture_of
from selfcascade.curation.record import Rejected
from selfcascade.curation.twemoji import twemoji_records

TILE = 512
SETTINGS = CurationSettings(size=256, filters={"min_side": 64})
DISTANCES = range(0, 17, 2)


def encoded(image: Image.Image, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Without ``share`` of each side, off the centre: twice at the left and top, none at the right and bottom."""
    width, height = image.size
    return image.crop((round(2 * share * width), round(2 * share * height), width, height))


def variants(image: Image.Image) -> dict[str, bytes]:
    """Near duplicates by kind."""
    half = image.resize((image.width // 2 + 32, image.height // 2 + 32), Image.Resampling.BILINEAR)
    return {
        "encoded again, quality 75": encoded(image, 75),
        "encoded again, quality 25": encoded(image, 25),
        "resized to 288": encoded(half),
        "cropped by 2 % a side": encoded(cropped(image, 0.02)),
        "cropped by 5 % a side": encoded(cropped(image, 0.05)),
        "brighter by a quarter": encoded(ImageEnhance.Brightness(image).enhance(1.25)),
        "grey": encoded(image.convert("L").convert("RGB")),
        "more contrast, other hue": encoded(ImageEnhance.Contrast(hue(image)).enhance(1.3)),
    }


def hue(image: Image.Image) -> Image.Image:
    channels = list(image.convert("HSV").split())
    channels[0] = channels[0].point(lambda level: (level + 24) % 256)
    return Image.merge("HSV", channels).convert("RGB")


def tiles(folder: Path) -> Iterator[Image.Image]:
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.is_symlink()):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        for top in range(0, image.height - TILE + 1, TILE):
            for left in range(0, image.width - TILE + 1, TILE):
                yield image.crop((left, top, left + TILE, top + TILE))


def emoji() -> Iterator[Image.Image]:
    for record in twemoji_records(TwemojiSource(backgrounds=("white",), limit=1000)):
        yield Image.fromarray(record.render(TILE))


def hashes(images: Iterator[Image.Image]) -> tuple[list[int], dict[str, list[tuple[int, int]]]]:
    """Hash of each picture, and (picture, hash) of each variant by kind. Pictures that curation rejects, such as even sky, are left out."""
    originals: list[int] = []
    found: dict[str, list[tuple[int, int]]] = {}
    for image in images:
        try:
            first = phash(encoded(image))
            made = {kind: phash(data) for kind, data in variants(image).items()}
        except Rejected:
            continue
        for kind, value in made.items():
            found.setdefault(kind, []).append((len(originals), value))
        originals.append(first)
    return originals, found


def phash(data: bytes) -> int:
    return int(str(picture_of(data, None, SETTINGS, "").scores["phash"]), 16)


def quality(originals: list[int], found: dict[str, list[tuple[int, int]]], distance: int) -> dict[str, object]:
    """Recall by kind; precision of the stage run over all; share of different pictures that it takes for one."""
    recall = {kind: float(np.mean([(originals[label] ^ value).bit_count() <= distance for label, value in rows])) for kind, rows in found.items()}
    pictures = [Hashed(f"{label:05d}", value, 2) for label, value in enumerate(originals)]
    alone = near_duplicates(pictures, distance=distance)
    everything = pictures + [Hashed(f"{label:05d}/{kind}", value, 1) for kind, rows in found.items() for label, value in rows]
    gone = near_duplicates(everything, distance=distance)
    right = sum(key[:5] == survivor[:5] for key, (survivor, _) in gone.items())
    return {
        "distance": distance,
        "recall": recall,
        "precision": right / len(gone) if gone else 1.0,
        "mistaken": len(alone) / len(originals),
    }


def scale(rows: int, distance: int) -> None:
    """In a process of its own: seconds and peak memory of one run."""
    random = np.random.default_rng(0)
    values = random.integers(0, 2**64, rows, dtype=np.uint64)
    near = rows // 10
    values[:near] = values[near : 2 * near]
    for _ in range(4):
        values[:near] ^= np.uint64(1) << random.integers(0, 64, near, dtype=np.uint64)
    before = time.perf_counter()
    gone = near_duplicates((Hashed(f"k{number:08d}", int(value), 1) for number, value in enumerate(values)), distance=distance)
    seconds = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    passes = len(list(masks(distance, rows)))
    print(json.dumps({"rows": rows, "distance": distance, "seconds": round(seconds, 1), "mib": round(peak), "passes": passes, "left_out": len(gone)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--distances", type=int, nargs="*", default=[4, 6])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scale", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scale:
        scale(*arguments.scale)
        return
    record: dict[str, object] = {"machine": machine(), "commit": commit(), "when": time.strftime("%Y-%m-%d"), "sets": {}, "scale": []}
    for name, images in (("photographs", tiles(arguments.photographs)), ("twemoji", emoji())):
        originals, found = hashes(images)
        rows = [quality(originals, found, distance) for distance in DISTANCES]
        record["sets"][name] = {"pictures": len(originals), "variants": sum(map(len, found.values())), "rows": rows}  # type: ignore[index]
        for row in rows:
            print(name, len(originals), row["distance"], f"precision {row['precision']:.4f} mistaken {row['mistaken']:.4f}", row["recall"])
    for rows in arguments.rows:
        for distance in arguments.distances:
            made = subprocess.run(
                [sys.executable, __file__, str(arguments.photographs), "--scale", str(rows), str(distance)], capture_output=True, text=True, check=True
            )
            record["scale"].append(json.loads(made.stdout))  # type: ignore[attr-defined]
            print(made.stdout.strip())
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
