"""What can be compared by hand: a folder of pictures, a published artifact, or the statistics of another tool."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcascade.config import EvaluationSettings
from selfcascade.curation.ahead import mapped
from selfcascade.curation.decoding import format_of_name, open_picture
from selfcascade.curation.reading import read_samples
from selfcascade.curation.record import Rejected
from selfcascade.evaluation.features import as_batch
from selfcascade.evaluation.moments import Moments
from selfcascade.evaluation.networks.network import FeatureNetwork
from selfcascade.evaluation.resize import RULES
from selfcascade.evaluation.tables import Batches
from selfcascade.generation.samples import read_generated
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, Store, resolve

MAX_PIXELS = 1 << 28
"""Of a picture in a folder; a larger one is refused before it is decoded."""
AHEAD = 8
"""Pictures decoded before the network asks for them: at 4096 px they take 50 MB each."""


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One side of a comparison."""

    name: str
    moments: Moments
    features: Tensor | None
    """(n, d) float32; None for statistics, from which FID alone can be had."""
    duplicates: int
    """Pictures that equal an earlier one, pixel by pixel."""


def read_side(text: str, settings: EvaluationSettings, network: FeatureNetwork, made_with: dict[str, str], store: Callable[[], Store], *, device: str) -> Side:
    """The side that ``text`` names: an ``.npz`` file, a folder, or else an artifact of kind samples or datasets.

    Args:
        text: path, ``samples/name``, ``datasets/name@version`` or an ``s3://`` URI.
        settings: ``features.batch``, and ``real_split`` and ``real_count`` for datasets.
        network: on ``device`` already.
        made_with: network, weights and resize rule, which statistics must share where they tell theirs.
        store: opens the store, called for artifacts only.
        device: where the network is.

    Raises:
        SettingsError: there is no such thing, it holds no picture, or a picture of it cannot be read; names it.
        NotFound: the artifact is not published, or not whole.
        IntegrityError: stored bytes are not the committed ones; names the object.
    """
    path = Path(text)
    if path.suffix == ".npz":
        return Side(text, Moments.from_npz(path), None, 0)
    pictures = _folder(path) if path.is_dir() else _artifact(text, settings, store)
    batches = Batches(network.embed, settings.features.batch, device)
    seen: set[bytes] = set()
    count = 0
    for image in pictures:
        count += 1
        seen.add(hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest())
        batches.add(network.resized(as_batch([image])))
    if not count:
        raise SettingsError(f"{text} holds no picture; there is nothing to compare")
    features = torch.from_numpy(batches.result())
    return Side(text, Moments.of(features, made_with), features, count - len(seen))


def how_made(network: FeatureNetwork, weights_sha256: str) -> dict[str, str]:
    """What two statistics must share to be comparable."""
    return {"network": network.kind.name, "weights": weights_sha256, "resize": RULES[network.rule]}


def _folder(folder: Path) -> Iterator[NDArray[np.uint8]]:
    """Pictures of a folder and those below it, by name, decoded ahead of the network."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".") and format_of_name(path.name) is not None)
    return mapped(_decoded, paths, ahead=AHEAD)


def _decoded(path: Path) -> NDArray[np.uint8]:
    try:
        with open_picture(path.read_bytes(), None, max_pixels=MAX_PIXELS) as image:
            return np.asarray(image.convert("RGB"))
    except (Rejected, OSError, ValueError, SyntaxError) as error:
        raise SettingsError(f"{path} cannot be compared: {' '.join(str(error).split())}; remove it or mend it") from None


def _artifact(text: str, settings: EvaluationSettings, store: Callable[[], Store]) -> Iterator[NDArray[np.uint8]]:
    if not text.startswith(("samples/", "datasets/", "s3://")):
        raise SettingsError(f"{text} is no folder, no .npz file and no artifact of kind samples or datasets; give one of these")
    artifact: Artifact = resolve(store(), text)
    if artifact.ref.kind == "samples":
        return (sample.image for sample in read_generated(artifact))
    if artifact.ref.kind == "datasets":
        return (sample.image for sample in islice(read_samples(artifact, settings.real_split), settings.real_count))
    raise SettingsError(f"{text} is an artifact of kind {artifact.ref.kind}; only samples and datasets have pictures")
