"""What the full-size runs cost: operations counted on tensors without content, and the hours that they take at the rate an H200 was seen to sustain.

Two operations a multiply-add, the whole UNet, guidance as two passes, the decoder once a picture. Latents that training reads are made once and are not in
its figures: a picture costs the encoder twice. The rate is that of a training step on SD 2.1 at 1024 px (``docs/results/gpu.json``), counted alike; sampling
runs at no other on a card that it fills. Nothing here was run at full size.

python tests/bench/recipes.py [--out docs/results/recipes.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.records import commit

from selfcascade.cascade.families import spec_of
from selfcascade.cascade.injection import unet_with_pivot
from selfcascade.cascade.published import PUBLISHED, published_unet
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.config import PipelineSettings
from selfcascade_flows.configuration import load

RUNS = ("sd21-1024", "sd21-2048", "sdxl-2048", "sdxl-4096")
GPU = Path(__file__).parents[2] / "docs/results/gpu.json"
MEASURED, MEASURED_BASE, MEASURED_SIDE, MEASURED_BATCH = "gpu/sd-2.1-base/seconds/upsampler C", "sd-2.1-base", 128, 4
"""The training step that was timed on the card: its figure, base, latent side and batch."""
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""Of SD 1.5, SD 2.1 and SDXL alike."""
SHRINK = 8
"""Pixels a latent position."""


def counted(run: Callable[[], Tensor], *, backward: bool = False) -> int:
    """Operations of a pass, with a graph and back through it if asked."""
    with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        result = run()
        if backward:
            torch.autograd.backward(result.mean())
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Base:
    """A published base on the meta device."""

    name: str

    @cached_property
    def parts(self) -> tuple[Any, AutoencoderKL]:
        with torch.device("meta"):
            return published_unet(self.name).requires_grad_(False), AutoencoderKL(**AUTOENCODER)

    def _inputs(self, side: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        unet, _ = self.parts
        with torch.device("meta"):
            z, t, text = torch.empty(1, 4, side, side), torch.zeros(1, dtype=torch.long), torch.empty(1, 77, unet.config.cross_attention_dim)
            more = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)} if unet.config.addition_embed_type == "text_time" else None
        return z, t, text, {} if more is None else {"added_cond_kwargs": more}

    def plain(self, side: int) -> int:
        """One pass at a latent side."""
        z, t, text, more = self._inputs(side)
        return counted(lambda: self.parts[0](z, t, encoder_hidden_states=text, return_dict=False, **more)[0])

    def guided(self, side: int, variant: str, *, backward: bool = False) -> int:
        """One pass with the features of a pivot of half the side added; with the pass back, a training step of one sample."""
        z, t, text, more = self._inputs(side)
        unet, _ = self.parts
        with torch.device("meta"):
            phi = FeatureUpsampler.for_base(spec_of(unet), variant=variant)
        return counted(lambda: unet_with_pivot(unet, z, t, text, pivot=z[..., ::2, ::2], upsampler=phi, **more), backward=backward)

    def decoding(self, side: int) -> int:
        """One picture out of its latent."""
        with torch.device("meta"):
            latent = torch.empty(1, 4, side, side)
        return counted(lambda: self.parts[1].decode(latent).sample)


def recipe(run: PipelineSettings, rate: float) -> dict[str, Any]:
    """Operations and hours of a run's training and of its pictures."""
    base = Base(next(short for short, published in PUBLISHED.items() if published.hub == run.generation.base))
    cascade, training = run.generation.cascade, run.adaptation
    native, target = int(base.parts[0].config.sample_size), cascade.height // SHRINK
    sides = [native]
    while sides[-1] < target:
        sides.append(min(2 * sides[-1], target))
    passes = 2 if cascade.guidance_scale > 1 else 1
    later = round((cascade.later_steps or cascade.steps) * cascade.start)
    step = training.batch * base.guided(training.size // SHRINK, training.upsampler.variant, backward=True)
    below = passes * cascade.steps * base.plain(native)
    picture = {
        "direct": passes * cascade.steps * base.plain(target),
        "tuning-free": below + passes * later * sum(base.plain(side) for side in sides[1:]),
        "tuned": below + passes * later * sum(base.guided(side, training.upsampler.variant) for side in sides[1:]),
    }
    decoding = base.decoding(target)
    return {
        "base": PUBLISHED[base.name].title,
        "side": cascade.height,
        "variant": training.upsampler.variant,
        "steps": training.steps,
        "batch": training.batch,
        "train_at": training.size,
        "training_operations": training.steps * step,
        "training_hours": training.steps * step / rate / 3600,
        "picture_operations": {method: operations + decoding for method, operations in picture.items()},
        "hours_a_thousand": {method: 1000 * (operations + decoding) / rate / 3600 for method, operations in picture.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes.json"))
    out = parser.parse_args().out
    measured = next(record for record in json.loads(GPU.read_bytes()) if record["id"] == MEASURED)
    rate = MEASURED_BATCH * Base(MEASURED_BASE).guided(MEASURED_SIDE, "C", backward=True) / measured["value"]
    found = {}
    for name in RUNS:
        found[name] = recipe(load(name), rate)
        print(name, json.dumps(found[name]), flush=True)
    out.write_text(json.dumps({"rate": rate, "card": measured["machine"], "commit": commit(), "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
