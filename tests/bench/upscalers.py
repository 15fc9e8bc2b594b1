"""Compare the four inter-stage upscalers on a small emoji base: how near their latents come to E(x), and what the tuning-free cascade makes of each.

python tests/bench/upscalers.py FOLDER [--upscaler upscalers/NAME or folder] [--pictures 128] [--prompts 128] [--start 0.5] [--out bench-upscalers.json]

Part (a) takes pictures of the tune split, which neither the base nor the latent upscaler was trained on, from half the target's size to the target, and to
one and a half times instead of twice. Part (b) samples tune prompts; every method starts from the same base latents. Without ``--upscaler`` the learned
upscaler is left out: ``selfcascade adapt --config demo --set adaptation.trainable=latent-upscaler`` trains one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.comparison import Numbers, compare, held_out, lines_of

from selfcascade.cascade.decoding import decode
from selfcascade.cascade.encoding import encode_pictures
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.cascade.upscaling import NAMES, upscale_of
from selfcascade.config import CascadeSettings, EvaluationSettings, GenerationSettings
from selfcascade.curation.twemoji import TwemojiRecord
from selfcascade.generation.models import load_pipeline

BACKGROUNDS = ("white", "pale blue", "yellow", "pink", "green", "navy", "orange", "gray")
METRICS = ("kid_r", "kid_b", "pkid_r", "layout_b")
Upscale = Callable[[Tensor, tuple[int, int]], Tensor]


def psnr(found: Tensor, wanted: Tensor) -> float:
    """In dB, of 8-bit pictures, (1, 3, H, W) in [-1, 1]."""
    error = ((found.clamp(-1, 1) - wanted.clamp(-1, 1)) * 127.5).round().square().mean()
    return float(10 * torch.log10(255**2 / error.clamp_min(1e-3)))


@torch.inference_mode()
def latent_quality(pipeline: SelfCascadePipeline, records: list[TwemojiRecord], upscalers: dict[str, Upscale], *, growth: float, size: int) -> dict[str, dict]:
    """Of each upscaler root mean square error of latents against E(x), PSNR of its decoded latent against D(E(x)) and against x, and ms a picture."""
    vae, sums = pipeline.vae, {name: np.zeros(4) for name in upscalers}
    side = round(size // 2 * growth)
    for record in records:
        whole = torch.from_numpy(np.array(record.render(size))).permute(2, 0, 1)[None].float() / 127.5 - 1
        picture = whole if side == size else interpolate(whole, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        target, pivot = encode_pictures(vae, picture), encode_pictures(vae, avg_pool2d(whole, 2))
        reference = decode(vae, target)
        for name, upscale in upscalers.items():
            started = time.perf_counter()
            grown = upscale(pivot, (target.shape[-2], target.shape[-1]))
            seconds = time.perf_counter() - started
            pixels = decode(vae, grown)
            sums[name] += [float((grown - target).square().mean()), psnr(pixels, reference), psnr(pixels, picture), 1000 * seconds]
    means = {name: total / len(records) for name, total in sums.items()}
    return {
        name: {"latent_rmse": float(mean[0]) ** 0.5, "psnr_to_decoded_db": float(mean[1]), "psnr_to_picture_db": float(mean[2]), "ms": float(mean[3])}
        for name, mean in means.items()
    }


def cascade_quality(pipeline: SelfCascadePipeline, upscalers: dict[str, Upscale], arguments: argparse.Namespace) -> tuple[Numbers, list[dict[str, object]]]:
    """Value and standard error of each metric by method, and differences from bilinear."""
    size = arguments.size
    cascade = CascadeSettings(height=size, width=size, steps=arguments.steps, start=arguments.start, guidance_scale=arguments.guidance)
    settings = {"base": GenerationSettings(method="base", cascade=cascade)}
    settings |= {"latent-sr": GenerationSettings(method="latent-sr", cascade=cascade)} if "learned" in upscalers else {}
    settings |= {name: GenerationSettings(method="tuning-free", cascade=cascade.model_copy(update={"upscale": name})) for name in upscalers}
    evaluation = EvaluationSettings(crop=arguments.crop)
    comparison = compare(pipeline, settings, evaluation, prompts=arguments.prompts, real=arguments.real, backgrounds=BACKGROUNDS)
    return comparison.numbers(METRICS), comparison.differences("bilinear", METRICS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="base, as generation.base takes it")
    parser.add_argument("--upscaler", help="latent upscaler: artifact or folder")
    parser.add_argument("--pictures", type=int, default=128, help="of part (a); 0 leaves it out")
    parser.add_argument("--prompts", type=int, default=128, help="of part (b); 0 leaves it out")
    parser.add_argument("--real", type=int, default=640, help="pictures of the tune split that part (b) is compared with")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--start", type=float, default=0.5)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.folder, upscaler=arguments.upscaler, device="cpu")
    names = [name for name in NAMES if name != "learned" or arguments.upscaler]
    upscalers = {name: upscale_of(name, vae=pipeline.vae, learned=pipeline.latent_upscaler) for name in names}
    records = held_out(BACKGROUNDS)
    record: dict[str, object] = {"base": pipeline.config.base, "arguments": {key: str(value) for key, value in vars(arguments).items() if key != "out"}}
    lines: list[str] = []
    if pipeline.latent_upscaler is not None:
        record["parameters"] = sum(parameter.numel() for parameter in pipeline.latent_upscaler.parameters())
    if arguments.pictures:
        for growth in (2.0, 1.5):
            title = f"latents of {arguments.pictures} held-out pictures, {arguments.size // 2} px to {growth:g} times that"
            record[f"latents x{growth:g}"] = table = latent_quality(pipeline, records[: arguments.pictures], upscalers, growth=growth, size=arguments.size)
            lines += lines_of(title, "upscaler", table)
    if arguments.prompts:
        numbers, record["differences from bilinear"] = cascade_quality(pipeline, upscalers, arguments)
        record["cascade"] = numbers
        lines += lines_of(f"tuning-free cascade on {arguments.prompts} tune prompts, start {arguments.start:g}: value ± standard error", "upscaler", numbers)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text("\n".join(lines).lstrip() + "\n")


if __name__ == "__main__":
    main()
