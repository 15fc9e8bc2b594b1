"""What each speed setting gains and what it does to the picture: the demo's cascade on prompts of the tune split, every row from the same base latents.

python tests/bench/speed.py [--prompts 128] [--upsampler FOLDER] [--pivot-zero FOLDER] [--out docs/results/speed.json] [--sheet speed.png]

Seconds are compared batch by batch, methods in turn. ``--upsampler`` is a feature upsampler of the demo (``selfcascade pull upsamplers/demo FOLDER``),
``--pivot-zero`` one that was trained with ``adaptation.upsampler.pivot_t=zero``; without them only the tuning-free rows are run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.comparison import Comparison, compare, lines_of
from bench.records import commit, machine

from selfcascade.config import GenerationSettings
from selfcascade.generation.models import load_pipeline
from selfcascade_flows import configuration

METRICS = ("kid_b", "kid_r", "layout_b")
PLAIN, TUNED, ZERO = "tuning-free", "tuned", "tuned, pivot at 0"
FAST = {"later_steps": 15, "guidance_interval": (0.25, 1.0)}
"""The fast profile of the shipped base: few steps in the later stages, and guidance in the first half of them alone."""


def rows_of(generation: GenerationSettings, arguments: argparse.Namespace) -> dict[str, tuple[str, GenerationSettings]]:
    """Of each label the row that it is held against, and its settings."""

    def row(method: str, memory: str = "fast", **cascade: object) -> GenerationSettings:
        return generation.model_copy(update={"method": method, "memory": memory, "cascade": generation.cascade.model_copy(update=cascade)})

    start = generation.cascade.start
    found = {
        "base": (PLAIN, row("base")),
        "direct": (PLAIN, row("direct", eta=1.0)),
        PLAIN: (PLAIN, row("tuning-free")),
        "later_steps 25": (PLAIN, row("tuning-free", later_steps=25)),
        "later_steps 15": (PLAIN, row("tuning-free", later_steps=15)),
        f"guidance_interval [0, {start / 2:g}]": (PLAIN, row("tuning-free", guidance_interval=(0.0, start / 2))),
        f"guidance_interval [{start / 2:g}, 1]": (PLAIN, row("tuning-free", guidance_interval=(start / 2, 1.0))),
        "memory lean": (PLAIN, row("tuning-free", "lean")),
        "fast": (PLAIN, row("tuning-free", **FAST)),
    }
    if arguments.upsampler:
        found |= {
            TUNED: (TUNED, row("tuned")),
            "tuned, pivot_every 2": (TUNED, row("tuned", pivot_every=2)),
            "tuned, pivot_every 5": (TUNED, row("tuned", pivot_every=5)),
            "tuned, fast": (TUNED, row("tuned", pivot_every=2, **FAST)),
        }
    if arguments.pivot_zero:
        found |= {ZERO: (TUNED, row("tuned"))}
    return found


def record_of(comparison: Comparison, rows: dict[str, tuple[str, GenerationSettings]]) -> dict[str, dict[str, float | str | None]]:
    """Of each row its time against direct sampling and against its own reference, the root mean square change of the picture, and its metrics."""
    numbers, found = comparison.numbers(METRICS), {}
    for label, (against, _) in rows.items():
        if label == "base":
            continue
        mine, pictures = comparison.seconds[label], np.stack(comparison.pictures[label]).astype(np.float64)
        change = np.sqrt(np.square(pictures - np.stack(comparison.pictures[against])).mean())

        def ratio(other: str, mine: list[float] = mine) -> float:
            return statistics.median(one / two for one, two in zip(mine, comparison.seconds[other], strict=True))

        found[label] = {
            "against": against,
            "seconds": statistics.median(mine) / 16,
            "over_direct": ratio("direct"),
            "over_reference": ratio(against),
            "change_rms": float(change),
            **{name: value for name, (value, _) in numbers[label].items()},
            **{f"{name}_error": error for name, (_, error) in numbers[label].items()},
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--set", action="append", default=[], help="of the demo, as the command line has it")
    parser.add_argument("--upsampler")
    parser.add_argument("--pivot-zero")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sheet", type=Path, help="picture of the first twelve prompts by every row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Against the cascade of as many steps everywhere: fewer of them in the later stage, as in the demo, is one of the settings that are measured.
    settings = configuration.load("demo", ["generation.cascade.later_steps=null", *arguments.set])
    generation = settings.generation
    rows = rows_of(generation, arguments)
    load = {"base": generation.base, "dtype": generation.compute.dtype, "device": "cpu"}
    plain = load_pipeline(**load)
    tuned = load_pipeline(**load, upsampler=arguments.upsampler) if arguments.upsampler else plain
    zero = load_pipeline(**load, upsampler=arguments.pivot_zero) if arguments.pivot_zero else plain
    pipelines = {label: zero if label == ZERO else tuned if each.method == "tuned" else plain for label, (_, each) in rows.items()}
    comparison = compare(
        pipelines.__getitem__,
        {label: each for label, (_, each) in rows.items()},
        settings.evaluation,
        prompts=arguments.prompts,
        real=10_000,
        backgrounds=settings.curation.source.backgrounds,
    )
    found = record_of(comparison, rows)
    print("\n".join(lines_of(f"{arguments.prompts} tune prompts on {plain.config.base}", "row", found)))
    if arguments.out:
        cascade = generation.cascade.model_dump(mode="json")
        record = {"base": plain.config.base, "prompts": arguments.prompts, "cascade": cascade, "machine": machine(), "commit": commit(), "rows": found}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.sheet:
        size = generation.cascade.height
        cells = [[np.asarray(Image.fromarray(picture).resize((size, size))) for picture in made[:12]] for made in comparison.pictures.values()]
        Image.fromarray(np.concatenate([np.concatenate(line, axis=1) for line in cells])).save(arguments.sheet)


if __name__ == "__main__":
    main()
