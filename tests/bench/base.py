"""Measure a small emoji base: reconstruction, KID against real renders, whether the picture fits its caption, distance to the nearest training picture.

python tests/bench/base.py FOLDER [--prompts 128] [--out bench-base.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from selfcascade.adaptation.autoencoder_training import psnr
from selfcascade.config import FeatureSettings, TwemojiSource
from selfcascade.curation.splits import split_of
from selfcascade.curation.twemoji import TwemojiRecord, twemoji_records
from selfcascade.evaluation.distances import fid, kid
from selfcascade.evaluation.features import as_batch, load_features
from selfcascade.settings import digest_of

BACKGROUNDS = ("white", "pale blue", "yellow", "pink", "green", "navy", "orange", "gray")


def fresh(record: TwemojiRecord) -> TwemojiRecord:
    """The same emoji and background in a view that no dataset holds."""
    return TwemojiRecord(record.key + "-fresh", record.caption, record.codepoints, record.background)


@torch.inference_mode()
def features_of(network, pictures, batch=32):
    return torch.cat([network(as_batch(pictures[start : start + batch])) for start in range(0, len(pictures), batch)])


@torch.inference_mode()
def sample(folder: Path, prompts: list[str], *, steps: int, guidance: float, batch: int = 16):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [
            torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{start + offset} {text}".encode()).digest()[:7], "big"))
            for offset, text in enumerate(part)
        ]
        images = pipeline(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, height=128, width=128).images
        pictures += [np.asarray(image.convert("RGB")) for image in images]
    return pictures, pipeline.vae


def nearest(features, references):
    """Cosine distance of each row to the nearest row of ``references``, and which row it is."""
    unit = torch.nn.functional.normalize
    values, indices = (1 - unit(features) @ unit(references).T).min(dim=1)
    return values, indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--white", action="store_true", help="plain prompts on white only")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    records = [record for record in twemoji_records(TwemojiSource(backgrounds=BACKGROUNDS)) if not arguments.white or record.background == "white"]
    order = sorted(records, key=lambda record: hashlib.sha256(record.key.encode()).digest())
    asked = [record for record in order if arguments.white or split_of(record.key, 0.1, 0.1) == "test"][: arguments.prompts]
    train = [record for record in order if split_of(record.key, 0.1, 0.1) == "train"]
    held_out = [record for record in order if split_of(record.key, 0.1, 0.1) == "tune"][:128]
    pictures, vae = sample(arguments.folder, [record.caption for record in asked], steps=arguments.steps, guidance=arguments.guidance)
    real = [fresh(record).render(128) for record in order[-640:]]
    network = load_features(FeatureSettings())
    generated, reference = features_of(network, pictures), features_of(network, real)
    own = features_of(network, [fresh(record).render(128) for record in asked])
    trained = features_of(network, [record.render(128) for record in train[:2048]])
    subset = min(100, len(pictures) // 2)
    hits = [
        int(nearest(generated[index : index + 1], own[first : first + 100])[1]) == index - first
        for first in range(0, len(own) - 99, 100)
        for index in range(first, first + 100)
    ]
    values = {
        "psnr_db": psnr(vae, np.stack([record.render(256) for record in held_out])),
        "kid_r_x1000": 1000 * kid(reference, generated, subset=subset, subsets=100, seed=0).mean,
        "kid_r_x1000_of_fresh_renders": 1000 * kid(reference, own, subset=subset, subsets=100, seed=0).mean,
        "fid_r": fid(reference, generated),
        "caption_nearest_of_100": float(np.mean(hits)),
        "nearest_training_cosine_samples": float(nearest(generated, trained)[0].mean()),
        "nearest_training_cosine_fresh_renders": float(nearest(own, trained)[0].mean()),
    }
    record = {
        "prompts": len(asked),
        "backgrounds": "white" if arguments.white else "all",
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "real": len(real),
        "network": network.kind.name,
        "prompt_digest": digest_of([record.caption for record in asked])[:12],
        **{key: round(value, 4) for key, value in values.items()},
    }
    print(json.dumps(record, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.sheet:
        cells = [picture for pair in zip(pictures[:32], [fresh(record).render(128) for record in asked[:32]], strict=True) for picture in pair]
        rows = [np.concatenate(cells[start : start + 16], axis=1) for start in range(0, 64, 16)]
        from PIL import Image

        Image.fromarray(np.concatenate(rows)).save(arguments.sheet)


if __name__ == "__main__":
    main()
