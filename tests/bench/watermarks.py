"""Tiled marks: how many the score finds, by kind and opacity, and how many pictures without one it takes for marked.

The labelled set is made of real pictures: tiles of the photographs of a folder, and the twemoji on textures. Each is taken as it is, with marks that are
tiled over it (a text, a logo, a grid of lines) and with a single text in a corner. Patterns, which are made of copies on purpose and bear no mark, are a set
of their own. All of it follows from a seed; everything passes JPEG and curation before it is scored. The threshold is the smallest whole number that takes
at most one in a hundred unmarked photographs and emoji of one half of the pictures for marked; figures are of the other half.

python tests/bench/watermarks.py PHOTOGRAPHS [--pictures 200] [--out watermarks.json]

Photographs of a free licence: apt-get download mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 ukui-wallpapers, unpacked with dpkg -x.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.records import commit, machine

from selfcascade.config import CurationSettings, TwemojiSource
from selfcascade.curation.picture import picture_of
from selfcascade.curation.record import Rejected
from selfcascade.curation.scores import luma_of
from selfcascade.curation.twemoji import twemoji_records
from selfcascade.curation.watermark import tiling

SIDE = 768
SETTINGS = CurationSettings(size=512, encoding="jpeg")
OPACITIES = (0.1, 0.2, 0.4)
KINDS = ("text", "logo", "lines")
WORDS = ("SAMPLE", "PREVIEW", "stock photo", "© Example", "do not copy", "proof")
TONES = (255, 255, 0, 128)
CORNER = "a text in a corner, 0.5"
THRESHOLDS = (3, 4, 5, 6, 8)
FALSE = 0.01
"""Share of unmarked pictures that the threshold may take for marked."""


def tiles(folder: Path, count: int) -> Iterator[Image.Image]:
    """``count`` tiles spread over all photographs."""
    places = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.is_symlink()):
        with Image.open(path) as image:
            places += [(path, left, top) for top in range(0, image.height - SIDE + 1, SIDE) for left in range(0, image.width - SIDE + 1, SIDE)]
    last, opened = None, None
    for path, left, top in places[:: max(1, len(places) // count)][:count]:
        if path != last:
            with Image.open(path) as image:
                last, opened = path, image.convert("RGB")
        yield opened.crop((left, top, left + SIDE, top + SIDE))


def emoji(random: Generator, count: int) -> Iterator[Image.Image]:
    """The twemoji on textures."""
    for record in twemoji_records(TwemojiSource(backgrounds=("white",), limit=count)):
        drawn = record.render(SIDE)
        yield Image.fromarray(np.where(drawn.min(-1, keepdims=True) < 250, drawn, texture(random)))


def texture(random: Generator) -> np.ndarray:
    """Noise of several sizes of grain, uint8 (SIDE, SIDE, 3)."""
    total = np.full((SIDE, SIDE, 3), random.uniform(60, 200, 3))
    for grain in (4, 16, 64, 256, SIDE):
        rough = Image.fromarray(random.integers(0, 256, (grain, grain), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        total += (np.asarray(rough, np.float64)[..., None] - 128) * random.uniform(0, 60 / np.sqrt(grain))
    return np.uint8(np.clip(total, 0, 255))


def patterns(random: Generator, count: int) -> Iterator[Image.Image]:
    """Copies of one emoji side by side, bricks with a grain of their own, and checks."""
    drawn = [record.render(96) for record in twemoji_records(TwemojiSource(backgrounds=("white",), limit=count))]
    for number in range(count):
        ground = texture(random).astype(np.float64)
        step = int(random.integers(48, 128))
        down, across = np.mgrid[0:SIDE, 0:SIDE]
        if number % 3 == 0:
            cell = np.asarray(Image.fromarray(drawn[number % len(drawn)]).resize((step, step)))
            ground = np.tile(cell, (SIDE // step + 1, SIDE // step + 1, 1))[:SIDE, :SIDE].astype(np.float64)
        elif number % 3 == 1:
            row = down // (step // 2)
            joint = (down % (step // 2) < 4) | ((across + row % 2 * step // 2) % step < 4)
            ground = np.where(joint[..., None], 190.0, ground)
        else:
            ground += ((down // step + across // step) % 2 * 60 - 30)[..., None]
        yield Image.fromarray(np.uint8(np.clip(ground, 0, 255)))


def tiled(random: Generator, kind: str) -> np.ndarray:
    """Where the mark is, (SIDE, SIDE), 0 to 1: 3 to 8 copies a side, turned, every other row set off in half of the cases."""
    wide = int(SIDE * random.uniform(1 / 8, 1 / 3))
    high = int(wide * random.uniform(0.5, 1))
    big = int(1.5 * SIDE)
    layer = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(layer)
    if kind == "lines":
        width = int(random.integers(1, 4))
        for start in range(-big, 2 * big, wide):
            draw.line([(start, 0), (start + big, big)], fill=255, width=width)
            draw.line([(start, 0), (start - big, big)], fill=255, width=width)
    else:
        cell = Image.new("L", (wide, high), 0)
        pen = ImageDraw.Draw(cell)
        if kind == "text":
            word = str(random.choice(WORDS))
            font = ImageFont.load_default(max(9, min(int(1.6 * wide / len(word)), high // 2)))
            pen.text((wide / 2, high / 2), word, fill=255, font=font, anchor="mm")
        else:
            radius = 0.4 * high
            box = [wide / 2 - radius, high / 2 - radius, wide / 2 + radius, high / 2 + radius]
            pen.ellipse(box, outline=255, width=max(2, int(0.15 * radius)))
            pen.line([(wide / 2 - radius / 2, high / 2), (wide / 2 + radius / 2, high / 2)], fill=255, width=max(2, int(0.2 * radius)))
        set_off = random.random() < 0.5
        for row, top in enumerate(range(0, big, high)):
            for left in range(-wide, big, wide):
                layer.paste(cell, (left + (wide // 2 if set_off and row % 2 else 0), top))
        layer = layer.rotate(float(random.choice([0, 0, 30, 45, random.uniform(-45, 45)])), Image.Resampling.BICUBIC)
    start = (big - SIDE) // 2
    return np.asarray(layer.crop((start, start, start + SIDE, start + SIDE)), np.float64) / 255


def corner(random: Generator) -> np.ndarray:
    """As above, of a single text at the lower right."""
    layer = Image.new("L", (SIDE, SIDE), 0)
    font = ImageFont.load_default(int(SIDE * random.uniform(0.03, 0.06)))
    ImageDraw.Draw(layer).text((0.97 * SIDE, 0.97 * SIDE), str(random.choice(WORDS)), fill=255, font=font, anchor="rs")
    return np.asarray(layer, np.float64) / 255


def laid(image: Image.Image, mask: np.ndarray, opacity: float, tone: int) -> Image.Image:
    share = (mask * opacity)[..., None]
    return Image.fromarray(np.uint8(np.asarray(image) * (1 - share) + tone * share + 0.5))


def score(image: Image.Image, quality: int) -> float:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return float(picture_of(buffer.getvalue(), None, SETTINGS, "").scores["watermark"])


@dataclass(frozen=True)
class Scored:
    half: int
    """0: the threshold is chosen on it; 1: it is measured."""
    kind: str
    opacity: float | None
    score: float


def scored(images: Iterator[Image.Image], random: Generator, *, marked: bool = True) -> list[Scored]:
    """Each picture as it is, and with its marks; even sky, which curation rejects, is left out."""
    found: list[Scored] = []
    number = 0
    for image in images:
        quality = int(random.choice([60, 75, 90]))
        try:
            rows = [Scored(number % 2, "unmarked", None, score(image, quality))]
            for opacity in OPACITIES if marked else ():
                kind = str(random.choice(KINDS))
                rows.append(Scored(number % 2, kind, opacity, score(laid(image, tiled(random, kind), opacity, int(random.choice(TONES))), quality)))
            if marked:
                rows.append(Scored(number % 2, CORNER, None, score(laid(image, corner(random), 0.5, 255), quality)))
        except Rejected:
            continue
        found += rows
        number += 1
    return found


def row(scores: list[Scored], threshold: int) -> dict[str, float]:
    """Shares above the threshold: of unmarked pictures, of tiled marks by opacity and by kind, of those in a corner; and the precision that follows."""

    def share(chosen: Iterable[Scored]) -> float:
        return round(float(np.mean([each.score > threshold for each in chosen])), 4)

    shares = {"unmarked": share(each for each in scores if each.kind == "unmarked")}
    if any(each.opacity for each in scores):
        shares |= {f"opacity {opacity}": share(each for each in scores if each.opacity == opacity) for opacity in OPACITIES}
        shares |= {kind: share(each for each in scores if each.kind == kind) for kind in (*KINDS, CORNER)}
        recall = share(each for each in scores if each.opacity)
        taken = 0.1 * recall + 0.9 * shares["unmarked"]
        shares["precision at one marked in ten"] = round(0.1 * recall / taken, 4) if taken else 1.0
    return {"threshold": threshold} | shares


def milliseconds(side: int) -> float:
    """CPU time of the score of one picture, the least of several rounds."""
    luma = luma_of(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    spent = []
    for _ in range(10):
        before = time.process_time()
        for _ in range(5):
            tiling(luma)
        spent.append((time.process_time() - before) / 5 * 1000)
    return round(min(spent), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    sets = {
        "photographs": scored(tiles(arguments.photographs, arguments.pictures), random),
        "twemoji on textures": scored(emoji(random, arguments.pictures), random),
        "patterns without a mark": scored(patterns(random, arguments.pictures // 2), random, marked=False),
    }
    clean = [each.score for name in list(sets)[:2] for each in sets[name] if each.kind == "unmarked" and each.half == 0]
    record: dict[str, object] = {
        "machine": machine(),
        "commit": commit(),
        "when": time.strftime("%Y-%m-%d"),
        "milliseconds": {str(side): milliseconds(side) for side in (256, 512, 1024, 2048)},
        "threshold": next(threshold for threshold in range(1, 100) if np.mean(np.array(clean) > threshold) <= FALSE),
        "sets": {},
    }
    for name, scores in sets.items():
        measured = [each for each in scores if each.half == 1]
        rows = [row(measured, threshold) for threshold in THRESHOLDS]
        record["sets"][name] = {"pictures": sum(each.kind == "unmarked" for each in measured), "rows": rows}  # type: ignore[index]
    print(json.dumps(record, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
