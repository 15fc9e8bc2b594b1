"""Any pictures against any others, without prompts, methods or a report: the numbers that need nothing but two sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from selfcascade.config import EvaluationSettings
from selfcascade.evaluation.distances import fid, kid, too_few
from selfcascade.evaluation.features import load_features, weights_path, weights_sha256
from selfcascade.evaluation.inception_score import Classified
from selfcascade.evaluation.manifold import manifold
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
    """FID, KID, precision, recall, density and coverage of sets of pictures against the first; of Inception-v3 the Inception score too.

    Args:
        settings: the network, the subsets of KID, the seed.
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
        sides = [read_side(name, settings, network, made_with, store, device=chosen) for name in names]
        for side in sides:
            if side.moments.count is not None and side.moments.count < 2:
                raise SettingsError(f"{side.name} holds 1 picture; at least 2 are needed to compare distributions")
        reference, *others = sides
        rows = tuple(_row(settings, reference, side, network) for side in others)
    return Comparison(
        reference=reference.name,
        reference_count=reference.moments.count,
        made_with=made_with,
        rows=rows,
        notes=tuple(dict.fromkeys(note for side in sides for note in _notes(side))),
        statistics=reference.moments.to_npz(),
    )


def _row(settings: EvaluationSettings, reference: Side, side: Side, network: FeatureNetwork) -> Compared:
    distance = _frechet(reference, side)
    logits = None if side.features is None else network.logits(side.features)
    scores = None if logits is None else Classified.of(logits, seed=settings.seed).scores()
    alone = {} if scores is None else {"inception_score": float(scores.mean()), "inception_spread": float(scores.std(correction=0))}
    if reference.features is None or side.features is None:
        return Compared(side.name, side.moments.count, distance, **alone)
    kernel = kid(reference.features, side.features, subset=settings.kid_subset, subsets=settings.kid_subsets, seed=settings.seed)
    found = manifold(reference.features, side.features)
    shares = {} if found is None else asdict(found)
    return Compared(side.name, side.moments.count, distance, kernel.mean, kernel.spread, **shares, **alone)


def _frechet(reference: Side, side: Side) -> float:
    """From the features where they are fewer than their width, which costs little, else from the moments; both to rounding the same."""
    if reference.features is None or side.features is None or max(len(reference.features), len(side.features)) > side.features.shape[1]:
        return reference.moments.frechet(side.moments)
    return fid(reference.features, side.features)


def _notes(side: Side) -> list[str]:
    notes, width = [], len(side.moments.mean)
    if side.duplicates:
        notes.append(f"{side.name}: {side.duplicates} of {side.moments.count} pictures equal an earlier one")
    if side.moments.count is None or not side.moments.made_with:
        notes.append(f"{side.name}: the file does not say which network and resize rule it was made with; FID means something only if they are the same")
    if side.moments.count is not None and too_few(side.moments.count, width):
        notes.append(f"{side.name}: {side.moments.count} pictures are few for {width} features; FID is biased upwards, read KID")
    return notes
