"""Any pictures against any others, without prompts, methods or a report: the numbers that need nothing but two sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from selfcascade.config import EvaluationSettings
from selfcascade.evaluation.distances import Kid, fid, kid, too_few
from selfcascade.evaluation.feature_cache import FeatureCache
from selfcascade.evaluation.features import load_features, weights_path, weights_sha256
from selfcascade.evaluation.inception_score import Classified
from selfcascade.evaluation.manifold import manifold
from selfcascade.evaluation.measured import flat
from selfcascade.evaluation.measured_side import SideMeasuring, Size
from selfcascade.evaluation.networks.network import FeatureNetwork
from selfcascade.evaluation.sides import Side, how_made, read_side
from selfcascade.generation.models import resolve_device
from selfcascade.generation.threads import torch_threads
from selfcascade.settings import SettingsError
from selfcascade.storage import Store


@dataclass(frozen=True, slots=True)
class Compared:
    """One set against the reference; None where a number is not defined, because a side has statistics alone or too few pictures."""

    name: str
    count: int | None
    fid: float
    kid: float | None = None
    kid_spread: float | None = None
    """Standard deviation over the subsets."""
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    inception_score: float | None = None
    """Of the set alone; None where the network has no classes."""
    inception_spread: float | None = None
    """Standard deviation over the splits."""
    patch_fid: float | None = None
    patch_kid: float | None = None
    patch_kid_spread: float | None = None
    patches: str = ""
    """Why there is no number of patches; empty where there is one."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every set against the first."""

    reference: str
    reference_count: int | None
    made_with: dict[str, str]
    rows: tuple[Compared, ...]
    notes: tuple[str, ...]
    """What a reader must know: duplicates, too few pictures, statistics that do not say how they were made."""
    statistics: bytes
    """Of the reference, as an ``.npz`` file."""


def compare(settings: EvaluationSettings, names: Sequence[str], store: Callable[[], Store], *, device: str = "auto") -> Comparison:
    """FID, KID, precision, recall, density and coverage of sets of pictures against the first, FID and KID of their patches; by Inception-v3 its score too.

    Patches are cut as in a report: at the same seeded places on both sides, the reference's pictures brought to the size of the other set's first. What the
    network says of pictures is kept in the user's cache.

    Args:
        settings: the network, the crops, the subsets of KID, the seed.
        names: the reference, then what is compared with it: folders, ``.npz`` files, artifacts.
        store: opens the store; called only if an artifact is named.
        device: torch device of the network.

    Raises:
        SettingsError: nothing to compare with, a set that cannot be read, fewer than two pictures, or statistics of another network or rule.
    """
    sha256 = weights_sha256(settings.features, weights_path(settings.features))
    with torch_threads(settings.features.threads):
        chosen = str(resolve_device(device))
        network = load_features(settings.features).to(chosen)
        made_with = how_made(network, sha256)
        measuring = SideMeasuring(settings, network, made_with, device=chosen, cache=FeatureCache.of_user())
        others = [read_side(name, settings, measuring, made_with, store) for name in names[1:]]
        sizes = {side.measured.size: None for side in others if side.measured is not None and side.measured.size is not None}
        reference = read_side(names[0], settings, measuring, made_with, store, sizes)
        sides = [reference, *others]
        for side in sides:
            if side.moments.count is not None and side.moments.count < 2:
                raise SettingsError(f"{side.name} holds 1 picture; at least 2 are needed to compare distributions")
        rows = tuple(_row(settings, reference, side, network) for side in others)
    return Comparison(
        reference=reference.name,
        reference_count=reference.moments.count,
        made_with=made_with,
        rows=rows,
        notes=tuple(dict.fromkeys([*(note for side in sides for note in _notes(side)), *(f"no patches: {row.patches}" for row in rows if row.patches)])),
        statistics=reference.moments.to_npz(),
    )


def _row(settings: EvaluationSettings, reference: Side, side: Side, network: FeatureNetwork) -> Compared:
    row = Compared(side.name, side.moments.count, _frechet(reference, side))
    if side.features is not None and (logits := network.logits(side.features)) is not None:
        scores = Classified.of(logits, seed=settings.seed).scores()
        row = replace(row, inception_score=float(scores.mean()), inception_spread=float(scores.std(correction=0)))
    patches = _patches(settings, reference, side)
    if reference.features is None or side.features is None:
        return replace(row, patches=str(patches))
    kernel = _kid(settings, reference.features, side.features)
    found = manifold(reference.features, side.features)
    row = replace(row, kid=kernel.mean, kid_spread=kernel.spread, **({} if found is None else asdict(found)))
    if isinstance(patches, str):
        return replace(row, patches=patches)
    kernel = _kid(settings, *patches)
    return replace(row, patch_fid=fid(*patches), patch_kid=kernel.mean, patch_kid_spread=kernel.spread)


def _kid(settings: EvaluationSettings, one: Tensor, other: Tensor) -> Kid:
    return kid(one, other, subset=settings.kid_subset, subsets=settings.kid_subsets, seed=settings.seed)


def _patches(settings: EvaluationSettings, reference: Side, side: Side) -> tuple[Tensor, Tensor] | str:
    """Features of the patches of both sides, (n crops, d) and (m crops, d), or why there are none."""
    one, other = reference.measured, side.measured
    if one is None or other is None:
        return f"{(reference if one is None else side).name} has statistics alone, no pictures to cut"
    size = other.size
    if size is None:
        return f"pictures of {side.name} differ in size: from {_px(other.smallest)} to {_px(other.largest)}"
    if settings.crop > min(size):
        return f"pictures of {side.name} have {_px(size)}, evaluation.crop is {settings.crop}; lower it"
    if size not in one.crops:
        return f"{reference.name} has pictures smaller than the {_px(size)} of {side.name}: enlarged they have no detail of their own"
    return flat(one.crops[size]), flat(other.crops[size])


def _px(size: Size) -> str:
    return f"{size[0]} x {size[1]} px"


def _frechet(reference: Side, side: Side) -> float:
    """From the features where they are fewer than their width, which costs little, else from the moments; both to rounding the same."""
    one, other = reference.features, side.features
    if one is None or other is None or max(len(one), len(other)) > other.shape[1]:
        return reference.moments.frechet(side.moments)
    return fid(one, other)


def _notes(side: Side) -> list[str]:
    notes, width = [], len(side.moments.mean)
    if side.measured is not None and side.measured.duplicates:
        notes.append(f"{side.name}: {side.measured.duplicates} of {side.moments.count} pictures equal an earlier one")
    if side.moments.count is None or not side.moments.made_with:
        notes.append(f"{side.name}: the file does not say which network and resize rule it was made with; FID means something only if they are the same")
    if side.moments.count is not None and too_few(side.moments.count, width):
        notes.append(f"{side.name}: {side.moments.count} pictures are few for {width} features; FID is biased upwards, read KID")
    return notes
