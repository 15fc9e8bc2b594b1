"""Memory tiers: what a call gives up, in order, to fit a smaller device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from selfcascade.cascade.decoding import TILE_ABOVE
from selfcascade.config import Memory


@dataclass(frozen=True)
class Tier:
    """One way to spend memory."""

    joint_branches: bool
    """Whether both branches of guidance, and both of the pivot, share a pass of the UNet."""
    tile_above: int
    """Pixels of a picture above which the autoencoder works in tiles."""
    offload: bool
    """Whether networks wait in the host's memory until their turn comes; needs an accelerator."""


TIERS: Mapping[Memory, Tier] = MappingProxyType(
    {
        "fast": Tier(joint_branches=True, tile_above=TILE_ABOVE, offload=False),
        "lean": Tier(joint_branches=False, tile_above=512 * 512, offload=False),
        "offload": Tier(joint_branches=False, tile_above=512 * 512, offload=True),
    }
)
"""From the fastest to the leanest."""


def next_tier(memory: Memory, *, accelerated: bool) -> Memory | None:
    """The tier below, where there is one: without an accelerator there is nothing to offload from."""
    names = [name for name, tier in TIERS.items() if accelerated or not tier.offload]
    position = names.index(memory) + 1 if memory in names else len(names)
    return names[position] if position < len(names) else None
