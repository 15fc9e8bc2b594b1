"""How many numbers the networks of a run hold: the frozen base, and what an upsampler of each variant would train."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from selfcascade.config import AdaptationSettings
from selfcascade.settings import SettingsError
from selfcascade.storage import Store


def parameter_counts(settings: AdaptationSettings, store: Store) -> dict[str, int]:
    """Parameters by network. Reads configurations and headers of weight files; loads no weight.

    Raises:
        SettingsError: there is no such base.
    """
    from selfcascade.bases import resolve_base
    from selfcascade.cascade.upsampler import count_parameters
    from selfcascade.generation.models import outline

    base = resolve_base(settings.base, store)
    spec, _ = outline(base)
    chosen = settings.upsampler
    counts = {f"base {folder.name}": stored_numbers(folder) for folder in sorted(Path(base.location).iterdir()) if any(folder.glob("*.safetensors"))}
    for variant in ("A", "C"):
        counts[f"upsampler {variant} ({chosen.inject})"] = count_parameters(
            channels=spec.channels(chosen.inject),
            time_width=spec.time_width,
            norm_groups=spec.norm_groups,
            variant=variant,
            inject=chosen.inject,
            pivot_t=chosen.pivot_t,
            final=chosen.final,
        )
    return counts


def stored_numbers(folder: Path) -> int:
    """Elements of all tensors in the safetensors files of ``folder``; of files of several precisions, one counts.

    Raises:
        SettingsError: a file is no safetensors file; names it.
    """
    files = sorted(folder.glob("*.safetensors"))
    plain = [path for path in files if len(path.suffixes) == 1] or files
    return sum(_numbers(path) for path in plain)


def _numbers(path: Path) -> int:
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (struct.error, ValueError):
        raise SettingsError(f"{path} is not a safetensors file; fetch the base again") from None
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
