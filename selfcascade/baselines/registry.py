"""All baselines that sample, by name: what generation runs and reports list."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from selfcascade.baselines.attention_scaling import ATTENTION_SCALING
from selfcascade.baselines.baseline import Baseline
from selfcascade.baselines.direct import DIRECT
from selfcascade.baselines.full import FULL
from selfcascade.baselines.hidiffusion import HIDIFFUSION
from selfcascade.baselines.latent_sr import LATENT_SR
from selfcascade.baselines.lora import LORA
from selfcascade.baselines.scalecrafter import SCALECRAFTER
from selfcascade.baselines.upscaler_x4 import X4_UPSCALER

BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {baseline.name: baseline for baseline in (DIRECT, ATTENTION_SCALING, SCALECRAFTER, HIDIFFUSION, LATENT_SR, X4_UPSCALER, LORA, FULL)}
)
