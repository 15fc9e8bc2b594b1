"""Choose where the demo's stage starts, how its pivot grows and its eta: the tuning-free cascade on prompts of the tune split, beside direct sampling.

python tests/bench/sweep.py [--prompts 128] [--starts 0.1 0.2 0.3 0.5] [--upscale pixel bilinear] [--etas 0 1] [--out sweep.json] [--sheet sweep.png]

Everything that is not swept is as the configuration has it. ± is a standard error; every row starts from the same base latents.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.comparison import compare, lines_of

from selfcascade.config import GenerationSettings
from selfcascade.generation.models import load_pipeline
from selfcascade_flows import configuration

METRICS = ("kid_r", "fid_r", "pkid_r", "kid_b", "fid_b", "layout_b")


def rows_of(generation: GenerationSettings, arguments: argparse.Namespace) -> dict[str, GenerationSettings]:
    """Settings by label: the base, its enlargement, direct sampling by eta, and the cascade by upscaler, start and eta."""

    def row(method: str, **cascade: object) -> GenerationSettings:
        return generation.model_copy(update={"method": method, "cascade": generation.cascade.model_copy(update=cascade)})

    rows = {"base": row("base"), "lanczos": row("lanczos")} | {f"direct eta {eta:g}": row("direct", eta=eta) for eta in arguments.direct_etas}
    return rows | {
        f"{upscale} K/T {start:g} eta {eta:g}": row("tuning-free", upscale=upscale, start=start, eta=eta)
        for upscale in arguments.upscale
        for start in arguments.starts
        for eta in arguments.etas
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--set", action="append", default=[], help="as the command line has it, such as generation.base=FOLDER")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--starts", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--upscale", nargs="+", default=["pixel", "bilinear"])
    parser.add_argument("--etas", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--direct-etas", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sheet", type=Path, help="picture of the first twelve prompts by every row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = configuration.load(arguments.config, arguments.set)
    generation = settings.generation
    pipeline = load_pipeline(generation.base, dtype=generation.compute.dtype, device="cpu")
    backgrounds = settings.curation.source.backgrounds
    comparison = compare(pipeline, rows_of(generation, arguments), settings.evaluation, prompts=arguments.prompts, real=10_000, backgrounds=backgrounds)
    numbers = comparison.numbers(METRICS)
    print("\n".join(lines_of(f"{arguments.prompts} tune prompts on {pipeline.config.base}: value ± standard error", "row", numbers)))
    if arguments.out:
        arguments.out.write_text(json.dumps({"base": pipeline.config.base, "prompts": arguments.prompts, "rows": numbers}, indent=1) + "\n")
    if arguments.sheet:
        size = generation.cascade.height
        lines = [
            np.concatenate([np.asarray(Image.fromarray(picture).resize((size, size))) for picture in made[:12]], axis=1)
            for made in comparison.pictures.values()
        ]
        Image.fromarray(np.concatenate(lines)).save(arguments.sheet)


if __name__ == "__main__":
    main()
