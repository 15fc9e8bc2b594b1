"""Kinds of the artifacts that training makes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from selfcascade.baselines.finetune import KINDS as FINETUNES
from selfcascade.storage import Kind

KINDS: Mapping[str, Kind] = MappingProxyType({"upsampler": "upsamplers", "latent-upscaler": "upscalers", "lora": FINETUNES["lora"], "full": FINETUNES["full"]})
"""By ``adaptation.trainable``."""
