"""How far an upscaler's latents are from those of the big pictures, on the tune split that it was not trained on."""

from __future__ import annotations

import torch

from selfcascade.adaptation.cache import LatentCache
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.cascade.pivot import bilinear

BATCH = 8


@torch.no_grad()
def latent_errors(upscaler: LatentUpscaler, latents: LatentCache) -> dict[str, float]:
    """Root mean square error against E(x), over the pictures of the tune split: of the upscaler, and of bilinear enlargement; empty where the split is.

    Args:
        upscaler: on any device.
        latents: cached E(x) and E(Downsample(x)).
    """
    squares = {"learned": 0.0, "bilinear": 0.0}
    count = 0
    for keys in (bucket[start : start + BATCH] for bucket in latents.buckets(latents.keys("tune")) for start in range(0, len(bucket), BATCH)):
        batch = latents.batch(keys).to(upscaler.device)
        size = (batch.target.shape[-2], batch.target.shape[-1])
        for name, grown in (("learned", upscaler(batch.pivot, size)), ("bilinear", bilinear(batch.pivot, size))):
            squares[name] += float((grown.double() - batch.target.double()).square().sum())
        count += batch.target.numel()
    return {name: round((square / count) ** 0.5, 6) for name, square in squares.items()} if count else {}
