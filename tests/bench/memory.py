"""Peak memory of one tuned step and of the decoding of a picture, by base, size and memory tier, on networks of full width in bfloat16.

Computed from the shapes alone: the passes run on tensors without content, and the most bytes that live at once are counted, as torch's allocator would give
them out. What a kernel takes for its own work, and what an allocator keeps, are not in it. ``--measured`` runs the same passes on this machine instead, each
in a process of its own, with random weights: on a CPU the growth of resident memory over the loaded networks, on CUDA the largest allocation.

python tests/bench/memory.py [--only sd-2.1-base] [--side 1024] [--measured] [--out memory.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.records import commit, machine

from selfcascade.cascade.decoding import decode
from selfcascade.cascade.families import spec_of
from selfcascade.cascade.injection import unet_with_pivot
from selfcascade.cascade.memory import TIERS
from selfcascade.cascade.published import published_unet
from selfcascade.cascade.upsampler import FeatureUpsampler

CASES = [("sd-1.5", 1024), ("sd-1.5", 2048), ("sd-2.1-base", 1024), ("sd-2.1-base", 2048), ("sdxl", 2048), ("sdxl", 4096)]
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""The published bases' autoencoder."""
MIB = 2**20


class Subject:
    """UNet, upsampler of variant C and autoencoder of a base, and the two passes in which a call's memory is largest."""

    def __init__(self, name: str, side: int, tier: str, device: str) -> None:
        self.tier, self.side, self.device = TIERS[tier], side, device
        xl = name == "sdxl"
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            self.unet: UNet2DConditionModel = published_unet(name).eval()
            # SDXL's overflows in half precision and is widened for the pass.
            torch.set_default_dtype(torch.float32 if xl else torch.bfloat16)
            self.vae = AutoencoderKL(**VAE, sample_size=1024 if xl else 512, force_upcast=False).eval()
            torch.set_default_dtype(torch.bfloat16)
            self.spec = spec_of(self.unet, self.vae)
            self.phi = FeatureUpsampler.for_base(self.spec, variant="C", shared=True)
            torch.set_default_dtype(torch.float32)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.device)

    @torch.no_grad()
    def step(self) -> Tensor:
        """The UNet on a latent of the target size, guided by the features of its pivot; with both branches of guidance, or one of them."""
        branches, latent = 2 if self.tier.joint_branches else 1, self.side // self.spec.pixels
        conditioning: dict[str, Any] = {}
        if self.spec.family.size_ids:
            conditioning["added_cond_kwargs"] = {"text_embeds": self.random(branches, 1280), "time_ids": self.random(branches, 6)}
        return unet_with_pivot(
            self.unet,
            self.random(branches, 4, latent, latent),
            500.0,
            self.random(branches, 77, self.unet.config.cross_attention_dim),
            pivot=self.random(branches, 4, latent // 2, latent // 2),
            upsampler=self.phi,
            **conditioning,
        )

    @torch.no_grad()
    def decoding(self) -> Tensor:
        """The autoencoder on the result."""
        latent = self.side // self.spec.pixels
        return decode(self.vae, self.random(1, 4, latent, latent), tile_above=self.tier.tile_above)


def bytes_of(*networks: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for network in networks for parameter in network.parameters())


def computed(name: str, side: int, tier: str) -> dict[str, int]:
    """The networks, and the largest sum of what is held; where networks are offloaded, that of the pass that holds more with its own network alone."""
    with FakeTensorMode():
        subject = Subject(name, side, tier, "cpu")
        denoiser, decoder = bytes_of(subject.unet, subject.phi), bytes_of(subject.vae)
        step, decoding = grown(subject.step), grown(subject.decoding)
    peak = max(denoiser + step, decoder + decoding) if TIERS[tier].offload else denoiser + decoder + max(step, decoding)
    return {"networks_mib": round((denoiser + decoder) / MIB), "peak_mib": round(peak / MIB)}


class Live(TorchDispatchMode):
    """Counts the bytes of storages that come into being while it is on, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), known)
        return result

    def _count(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        if id(storage) in known or id(storage) in self._seen:
            return
        self._seen.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, id(storage), storage.nbytes())

    def _gone(self, name: int, size: int) -> None:
        self._seen.discard(name)
        self.now -= size


def grown(run: Callable[[], Tensor]) -> int:
    """The most bytes of tensors that a pass makes and holds at once."""
    with Live() as live:
        run()
    return live.peak


def measured(name: str, side: int, tier: str) -> dict[str, int]:
    """As :func:`computed`, on this machine; offloading is left to diffusers in a call, and is not measured here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject = Subject(name, side, tier, device)
    networks = bytes_of(subject.unet, subject.phi, subject.vae)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.cuda.device(device) if device == "cuda" else nullcontext():
        subject.step()
        subject.decoding()
    grown_by = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else networks + grown_by
    return {"networks_mib": round(networks / MIB), "peak_mib": round(peak / MIB)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=sorted({name for name, _ in CASES}))
    parser.add_argument("--side", type=int, action="append", choices=sorted({side for _, side in CASES}))
    parser.add_argument("--measured", action="store_true", help="on this machine: minutes a step on a CPU")
    parser.add_argument("--case", help="base:side:tier, one case in this process")
    parser.add_argument("--out", type=Path, default=Path("memory.json"))
    arguments = parser.parse_args()
    how = measured if arguments.measured else computed
    if arguments.case:
        name, side, tier = arguments.case.split(":")
        print(json.dumps(how(name, int(side), tier)))
        return
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if arguments.measured else "computed"
    records = []
    for name, side in CASES:
        if side not in (arguments.side or [side]) or name not in (arguments.only or [name]):
            continue
        for tier in TIERS:
            if arguments.measured and TIERS[tier].offload:
                continue
            command = [sys.executable, __file__, "--case", f"{name}:{side}:{tier}", *(["--measured"] if arguments.measured else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            records.append({"base": name, "side": side, "tier": tier, "device": kind, "machine": machine(), "commit": commit()} | found)
            print(records[-1], file=sys.stderr, flush=True)
            arguments.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
