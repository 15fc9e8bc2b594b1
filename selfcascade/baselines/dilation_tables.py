"""ScaleCrafter's tables: which convolutions are dilated, how much, and for how long (arXiv 2310.07702; method section 11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, sqrt
from types import MappingProxyType
from typing import Any

from torch.nn import Conv2d

from selfcascade.baselines.baseline import pixel_ratio
from selfcascade.cascade.families import BaseSpec
from selfcascade.config import ScaleCrafterSettings
from selfcascade.settings import SettingsError

Table = Mapping[str, float]
"""Module of the UNet to the dilation of the 3x3 convolutions inside it; of two that hold a convolution the longer name counts."""
STEPS = 50
"""Steps that ``tau`` counts in; a call with another number of steps keeps the shares."""


@dataclass(frozen=True)
class DilationRecipe:
    """One setting of ScaleCrafter."""

    dilations: Table
    tau: int = 20
    """The first steps, of 50, that are dilated."""
    tau_damped: int = 0
    """The first steps, of 50, with noise-damped guidance."""
    damped: Table = field(default_factory=dict)
    """The milder table of noise-damped guidance."""
    progressive: bool = False
    """Whether dilations shrink towards 2 while the dilated steps pass."""
    dispersed: tuple[str, ...] = ()
    """Modules whose 3x3 kernels are enlarged to 5x5 while others are dilated."""

    def dilation(self, full: float, step: float) -> float:
        """Dilation at a step of 50, counted from 0: the table's, or with ``progressive`` ``max(ceil(d (tau - i) / tau), 2)``; 1, that is none, from tau on."""
        if step >= self.tau:
            return 1
        return max(ceil(full * (self.tau - step) / self.tau), 2) if self.progressive else full

    def damps(self, step: float) -> bool:
        """Whether a step of 50 has noise-damped guidance; where nothing is dilated the two tables agree and there is none."""
        return step < min(self.tau, self.tau_damped)


def _all(names: str, dilation: float) -> dict[str, float]:
    return dict.fromkeys(names.split(), dilation)


_SD_16X = _all("down_blocks.2", 3) | _all("down_blocks.2.downsamplers down_blocks.3 mid_block up_blocks.0 up_blocks.1", 4) | _all("up_blocks.2", 3)
_SMALL_16X = _all("down_blocks.1", 3) | _all("down_blocks.1.downsamplers down_blocks.2 mid_block up_blocks.0", 4) | _all("up_blocks.1", 3)
RECIPES: Mapping[tuple[str, int], DilationRecipe] = MappingProxyType(
    {
        ("sd", 2): DilationRecipe(_all("down_blocks.1 down_blocks.2 down_blocks.3 mid_block up_blocks.0 up_blocks.1 up_blocks.2", 2)),
        ("sd", 4): DilationRecipe(
            _SD_16X | {"up_blocks.3": 2},
            tau=37,
            tau_damped=37,
            damped=_SD_16X,
            progressive=True,
            dispersed=("down_blocks.2.downsamplers", "down_blocks.3", "mid_block", "up_blocks.0", "up_blocks.1"),
        ),
        ("sdxl", 2): DilationRecipe(_all("mid_block up_blocks.0", 2), tau=30),
        ("sdxl", 4): DilationRecipe(
            _all("down_blocks.2 mid_block up_blocks.0", 4) | {"up_blocks.1": 3, "up_blocks.2": 2},
            tau=35,
            tau_damped=35,
            damped=_all("mid_block up_blocks.0", 2),
            progressive=True,
        ),
        # Our own, for three levels: SD's, with the levels counted from the deepest up; the outermost level is left alone at 4x, as there.
        ("small", 2): DilationRecipe(_all("down_blocks.1 down_blocks.2 mid_block up_blocks.0 up_blocks.1", 2)),
        ("small", 4): DilationRecipe(
            _SMALL_16X | {"up_blocks.2": 2},
            tau=37,
            tau_damped=37,
            damped=_SMALL_16X,
            progressive=True,
            dispersed=("down_blocks.1.downsamplers", "down_blocks.2", "mid_block", "up_blocks.0"),
        ),
    }
)
"""By family and factor per side. The paper's are those of SD 2.1 at 1024 and 2048 pixels and of SDXL at 2048 and 4096."""


def recipe_for(spec: BaseSpec, height: int, width: int, settings: ScaleCrafterSettings) -> DilationRecipe:
    """The recipe of a base for a picture of that size, with whatever the settings set in its place.

    Sizes between two tables take the larger one, its dilations moved towards 1 in proportion, which makes them fractions.

    Raises:
        SettingsError: there is no table for this base or size, and the settings hold none.
    """
    reason = missing_table(spec, height, width, settings)
    if reason is not None:
        raise SettingsError(f"scalecrafter does not apply: {reason}")
    own = {name: value for name, value in settings if value is not None}
    if settings.dilations is not None:
        found = _table(spec, height, width) or DilationRecipe({})
        return replace(found, **own)
    factor = sqrt(pixel_ratio(spec, height, width))
    if factor <= 1:
        return replace(DilationRecipe({}), **own)
    recipe = _table(spec, height, width)
    assert recipe is not None
    share = (factor - 1) / (_factor(factor) - 1)
    shrunk = {name: {module: 1 + (d - 1) * share for module, d in getattr(recipe, name).items()} for name in ("dilations", "damped")}
    return replace(recipe, **shrunk | own)


def missing_table(spec: BaseSpec, height: int, width: int, settings: ScaleCrafterSettings) -> str | None:
    """Why there is no table for this base and size, or None where there is one, in the settings or here."""
    if settings.dilations is not None:
        return None
    if not any(family == spec.family.name for family, _ in RECIPES):
        known = ", ".join(sorted({family for family, _ in RECIPES}))
        return f"no dilation table for a base of family {spec.family.name!r} (there are {known}); set baselines.scalecrafter.dilations"
    if pixel_ratio(spec, height, width) > 16:
        return (
            f"no dilation table for {height}x{width}, more than 16 times the base's own {spec.native[0]}x{spec.native[1]}; set baselines.scalecrafter.dilations"
        )
    return None


def resolve_table(unet: Any, table: Table) -> dict[str, float]:
    """The dilation of every 3x3 convolution that a table names, by the convolution's own name.

    Raises:
        SettingsError: an entry holds no 3x3 convolution of this UNet; the message lists where there are some.
    """
    convolutions = convolutions_of(unet)
    for entry in table:
        if not any(_inside(name, entry) for name in convolutions):
            found = sorted({".".join(name.split(".")[: 1 if name.startswith("mid_block") else 2]) for name in convolutions})
            raise SettingsError(f"the dilation table names {entry!r}, but this UNet has 3x3 convolutions in {', '.join(found)} only; change the table")
    chosen = {name: max((entry for entry in table if _inside(name, entry)), key=len, default=None) for name in convolutions}
    return {name: table[entry] for name, entry in chosen.items() if entry is not None}


def convolutions_of(unet: Any) -> dict[str, tuple[Any, int]]:
    """The 3x3 convolutions inside the UNet's blocks by name, each with its stride. Where an adapter wraps one, it is the wrapper that is named."""
    found = {}
    for name, module in unet.named_modules():
        if name.split(".")[0] in ("down_blocks", "mid_block", "up_blocks") and ".lora_" not in name and _is_plain_3x3(module):
            outer = name.removesuffix(".base_layer")
            found[outer] = (unet.get_submodule(outer), module.stride[0])
    return found


def _is_plain_3x3(module: Any) -> bool:
    return isinstance(module, Conv2d) and (module.kernel_size, module.padding, module.dilation) == ((3, 3), (1, 1), (1, 1))


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _factor(factor: float) -> int:
    """Factor per side of the smallest table that reaches ``factor``."""
    return 2 if factor <= 2 else 4


def _table(spec: BaseSpec, height: int, width: int) -> DilationRecipe | None:
    return RECIPES.get((spec.family.name, _factor(sqrt(pixel_ratio(spec, height, width)))))
