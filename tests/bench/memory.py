"""Peak memory of one step and the decoding of a picture, by base, size and memory tier, on models of full width and random weights.

Each case runs in a process of its own: on a CPU its figure is the growth of resident memory over the loaded networks, on CUDA the largest allocation.

python tests/bench/memory.py [--only sd-2.1-base] [--out memory.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

sys.path.insert(0, str(Path(__file__).parents[1]))
import models

from selfcascade import SelfCascadePipeline
from selfcascade.cascade.memory import TIERS
from selfcascade.cascade.published import published_unet
from selfcascade.cascade.upsampler import FeatureUpsampler

CASES = [("sd-2.1-base", 1024), ("sd-2.1-base", 2048), ("sdxl", 2048)]
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
"""The published bases' autoencoder."""


def pipeline_of(name: str, device: str) -> tuple[SelfCascadePipeline, dict[str, torch.Tensor]]:
    """A base of full width in bfloat16, random weights, with embedded text."""
    xl = name == "sdxl"
    torch.set_default_dtype(torch.bfloat16)
    unet = published_unet(name).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    noise = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    small = models.base("sdxl" if xl else "sd21")
    parts = {key: value for key, value in small.components.items() if key not in ("unet", "scheduler", "vae")}
    for key in ("text_encoder", "text_encoder_2"):
        if parts.get(key) is not None:
            parts[key].to(torch.bfloat16)
    parts |= {"unet": unet, "scheduler": noise, "vae": AutoencoderKL(**VAE).eval().requires_grad_(False)}
    stock = StableDiffusionXLPipeline(**parts) if xl else StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline = SelfCascadePipeline.from_pipe(stock).to(device)
    phi = FeatureUpsampler.for_base(pipeline.spec, variant="C", shared=True)
    pipeline = SelfCascadePipeline.from_pipe(pipeline, upsampler=phi.to(device, torch.bfloat16))
    width = unet.config.cross_attention_dim
    text = {key: torch.randn(1, 77, width) for key in ("prompt_embeds", "negative_prompt_embeds")}
    if xl:
        text |= {key: torch.randn(1, 1280) for key in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    return pipeline, text


def measure(name: str, side: int, tier: str) -> dict[str, float | str | int]:
    """One step of the last stage, tuned, and the decoding."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline, text = pipeline_of(name, device)
    pipeline.set_progress_bar_config(disable=True)
    if TIERS[tier].offload:
        pipeline.to("cpu")
        pipeline.enable_model_cpu_offload(device=device)
    pivot = torch.randn(1, 4, side // 16, side // 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    pipeline(
        sizes=[(side // 2, side // 2), (side, side)],
        pivot=pivot,
        num_inference_steps=1,
        start=1.0,
        joint_branches=TIERS[tier].joint_branches,
        tile_above=TIERS[tier].tile_above,
        output_type="pt",
        **text,
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    networks = sum(p.numel() * p.element_size() for module in pipeline.components.values() if isinstance(module, torch.nn.Module) for p in module.parameters())
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else grown + networks / 2**20
    return {"base": name, "side": side, "tier": tier, "device": device, "networks_mib": round(networks / 2**20), "peak_mib": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append")
    parser.add_argument("--case", help="base:side:tier, one case in this process")
    parser.add_argument("--out", type=Path, default=Path("memory.json"))
    arguments = parser.parse_args()
    if arguments.case:
        name, side, tier = arguments.case.split(":")
        print(json.dumps(measure(name, int(side), tier)))
        return
    tiers = [name for name, tier in TIERS.items() if torch.cuda.is_available() or not tier.offload]
    records = []
    for name, side in CASES:
        if arguments.only and name not in arguments.only:
            continue
        for tier in tiers:
            done = subprocess.run([sys.executable, __file__, "--case", f"{name}:{side}:{tier}"], capture_output=True, text=True, check=True)
            records.append(json.loads(done.stdout.splitlines()[-1]))
            print(records[-1], file=sys.stderr, flush=True)
            arguments.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
