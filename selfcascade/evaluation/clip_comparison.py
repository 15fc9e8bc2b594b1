"""Clips against clips: FVD (Unterthiner et al., "Towards accurate generative models of video", 2018) and KVD, which see time, as FID cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selfcascade.config import EvaluationSettings
from selfcascade.evaluation.clips import ClipSource, clip_source
from selfcascade.evaluation.distances import too_few
from selfcascade.evaluation.feature_cache import FeatureCache
from selfcascade.evaluation.heap import Heap
from selfcascade.evaluation.intervals import GramBlock, half_samples, standard_error
from selfcascade.evaluation.measured import LARGEST_GRAM
from selfcascade.evaluation.networks import i3d
from selfcascade.evaluation.networks.weights import sha256_of
from selfcascade.evaluation.tables import Batches
from selfcascade.generation.models import resolve_device
from selfcascade.generation.threads import torch_threads
from selfcascade.settings import SettingsError


@dataclass(frozen=True, slots=True)
class ComparedClips:
    """One set against the reference."""

    name: str
    count: int
    fvd: float
    kvd: float
    """Unbiased squared MMD over all pairs, kernel ``(x.y / 400 + 1) ** 3``; may be negative."""
    fvd_error: float | None
    """Standard error by half-samples of both sets; None for fewer than 4 clips, or more than inner products of all pairs are kept for."""
    kvd_error: float | None


@dataclass(frozen=True, slots=True)
class ClipComparison:
    """Every set of clips against the first."""

    reference: str
    reference_count: int
    frames: int
    """Of every clip."""
    made_with: dict[str, str]
    rows: tuple[ComparedClips, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    name: str
    features: NDArray[np.float32]
    """(n, 400)"""
    frames: int


def compare_clips(settings: EvaluationSettings, names: Sequence[str], *, device: str = "auto") -> ClipComparison:
    """FVD and KVD of sets of clips against the first.

    Args:
        settings: ``clips``, the network; ``half_samples`` and ``seed`` of the errors.
        names: the reference, then what is compared with it, as :func:`selfcascade.evaluation.clips.clip_source` reads them.
        device: torch device of the network.

    Raises:
        SettingsError: fewer than two sets, or than two clips in one; weights that are missing or others; a clip that cannot be read, that is too short,
            or that has another length than the rest; names it.
    """
    if len(names) < 2:
        raise SettingsError(f"{names[0]} alone cannot be compared; give a second set of clips")
    chosen = settings.clips
    path = i3d.locate(chosen)
    sha256 = sha256_of(path)
    if chosen.sha256 is not None and sha256 != chosen.sha256:
        raise SettingsError(f"evaluation.clips.sha256: {path} has {sha256}, not {chosen.sha256}; these are other weights")
    made_with = {"network": i3d.KIND.name, "weights": sha256, "resize": f"{i3d.KIND.side} x {i3d.KIND.side}, {i3d.SCALING}"}
    where = resolve_device(device)
    shared = {"batch": chosen.batch, "threads": chosen.threads, "device": where.type, "torch": torch.__version__}
    with torch_threads(chosen.threads):
        network = i3d.load(path).to(where)
        sides: list[_Side] = []
        for name in names:
            side = _measured(clip_source(name), network, made_with | shared, chosen.batch, str(where), sides[0] if sides else None)
            if len(side.features) < 2:
                raise SettingsError(f"{name} holds {len(side.features)} clip; at least 2 are needed to compare distributions")
            sides.append(side)
        rows = tuple(_row(settings, sides[0], side) for side in sides[1:])
    few = [side for side in sides if too_few(len(side.features), i3d.KIND.num_features)]
    notes = tuple(dict.fromkeys(f"{side.name}: {len(side.features)} clips are few for 400 features; FVD is biased upwards, read KVD" for side in few))
    return ClipComparison(sides[0].name, len(sides[0].features), sides[0].frames, made_with, rows, notes)


def _measured(source: ClipSource, network: i3d.ClipNetwork, how: dict[str, Any], batch: int, device: str, like: _Side | None) -> _Side:
    """Features of all clips, from the cache or by one pass; all clips are as long as those of ``like``."""
    cache, what = FeatureCache.of_user(), how | {"clips": source.digest}
    if (kept := cache.get(what)) is not None:
        side = _Side(source.name, kept[0]["features"], kept[1])
        _check_length(source.name, side.frames, None if like is None else (like.name, like.frames))
        return side
    batches = Batches(network, batch, device)
    first = None if like is None else (like.name, like.frames)
    count, heap = 0, Heap()
    for name, frames in source.read():
        _check_length(name, len(frames), first)
        first = first or (name, len(frames))
        batches.add(network.resized(torch.from_numpy(frames).permute(0, 3, 1, 2))[None])
        heap.passed(frames.nbytes)
        count += 1
    if first is None or not count:
        raise SettingsError(f"{source.name} holds no clip; there is nothing to compare")
    side = _Side(source.name, batches.result(), first[1])
    cache.put(what, {"features": side.features}, side.frames)
    return side


def _check_length(name: str, frames: int, first: tuple[str, int] | None) -> None:
    if frames < i3d.SHORTEST:
        raise SettingsError(f"{name} has {frames} frames; I3D needs at least {i3d.SHORTEST}")
    if first is not None and frames != first[1]:
        raise SettingsError(f"{name} has {frames} frames, {first[0]} {first[1]}; FVD compares clips of one length, so cut the longer ones")


def _row(settings: EvaluationSettings, reference: _Side, side: _Side) -> ComparedClips:
    n, m = len(side.features), len(reference.features)
    block = GramBlock.of(torch.from_numpy(side.features), torch.from_numpy(reference.features))
    fvd, kvd = max(0.0, float(block.fid())), float(block.kid())
    if min(n, m) < 4 or max(n, m) > LARGEST_GRAM:
        return ComparedClips(side.name, n, fvd, kvd, None, None)
    halves = [half_samples(count, settings.half_samples, seed=settings.seed, side=name) for count, name in ((n, "prompts"), (m, "real"))]
    errors = [standard_error(replicates, min(n, m)) for replicates in (block.fid(*halves), block.kid(*halves))]
    return ComparedClips(side.name, n, fvd, kvd, *errors)
