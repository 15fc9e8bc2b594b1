"""The ladder of parameter counts: what each way of adapting one base trains, from its configuration alone (paper table 1, column "#param")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import nn

from selfcascade.cascade.families import spec_of
from selfcascade.cascade.residual_upsampler import BLOCKS
from selfcascade.cascade.upsampler import FeatureUpsampler

CLAIM = 2_000
"""Parameters that the paper states for its four upsamplers together: 0.002M."""
RANKS = (4, 32)
"""Of LoRA in the paper's tables."""
C_SMALL = (8, 8, 8, 8)
"""Channel groups of a smaller variant C."""


@dataclass(frozen=True)
class Rung:
    """One way of adapting a base."""

    name: str
    trained: int
    """Numbers that gradients change."""
    fitted: int = 0
    """Numbers that are fitted to features of the base and then kept fixed."""

    @property
    def against_the_claim(self) -> float:
        """``trained`` over what the paper states."""
        return self.trained / CLAIM


def ladder(unet: ModelMixin) -> tuple[Rung, ...]:
    """Every rung for a base, from the most numbers to the fewest.

    Args:
        unet: of the base; on the meta device nothing is allocated.

    Raises:
        SettingsError: the base is of no known family.
    """
    spec = spec_of(unet)
    with torch.device("meta"):
        layers = FeatureUpsampler.for_base(spec, variant="A")
        released = FeatureUpsampler.for_base(spec, variant="B", inject="main", final="identity")
        shared = FeatureUpsampler.for_base(spec, variant="C")
        fewer_groups = FeatureUpsampler(spec.channels("skip"), spec.time_width, spec.norm_groups, variant="C", groups=C_SMALL)
        subspace = FeatureUpsampler.for_base(spec, variant="D")
    channels = sum(spec.channels("skip"))
    rungs = [
        Rung("full fine-tuning", sum(parameter.numel() for parameter in unet.parameters())),
        Rung("A, the paper's layers", layers.count().trained),
        Rung("B, the released code", released.count().trained),
        Rung("A without time linears", layers.count().trained - _count_named(layers, "time")),
        *(Rung(f"LoRA rank {rank}, every linear layer", lora_parameters(unet, rank)) for rank in reversed(RANKS)),
        Rung("A with depthwise convolutions alone", 2 * BLOCKS * 9 * channels),
        Rung("norm scales and offsets of A alone", _count_named(layers, "norm1", "norm2")),
        Rung("one scale a channel, nothing else", channels),
        Rung("C, group-shared", shared.count().trained),
        Rung("D, fixed subspace", *subspace.count()),
        Rung("C with fewer groups", fewer_groups.count().trained),
    ]
    return tuple(sorted(rungs, key=lambda rung: -rung.trained))


def lora_parameters(unet: nn.Module, rank: int) -> int:
    """Parameters of LoRA on every ``nn.Linear``: a layer from m to n takes ``rank * (m + n)``."""
    return sum(rank * (module.in_features + module.out_features) for module in unet.modules() if isinstance(module, nn.Linear))


def _count_named(module: nn.Module, *names: str) -> int:
    """Parameters of the submodules that are called so."""
    return sum(parameter.numel() for name, parameter in module.named_parameters() if name.split(".")[-2] in names)
