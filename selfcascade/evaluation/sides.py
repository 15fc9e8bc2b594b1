"""What can be compared by hand: a folder of pictures, a published artifact, or the statistics of another tool."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcascade.config import EvaluationSettings
from selfcascade.curation.ahead import PICTURES, mapped
from selfcascade.curation.decoding import format_of_name, open_picture
from selfcascade.curation.reading import read_samples
from selfcascade.curation.record import Rejected
from selfcascade.evaluation.measured_side import MeasuredSide, PictureSource, SideMeasuring, Size
from selfcascade.evaluation.moments import Moments
from selfcascade.evaluation.networks.network import FeatureNetwork
from selfcascade.evaluation.networks.weights import sha256_of
from selfcascade.evaluation.resize import RULES
from selfcascade.generation.samples import read_generated
from selfcascade.settings import SettingsError, digest_of
from selfcascade.storage import Artifact, Store, resolve

MAX_PIXELS = 1 << 28
"""Of a picture in a folder; a larger one is refused before it is decoded."""


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One side of a comparison."""

    name: str
    moments: Moments
    measured: MeasuredSide | None = None
    """None for statistics, from which FID alone can be had."""

    @property
    def features(self) -> Tensor | None:
        """(n, d) float32."""
        return None if self.measured is None else torch.from_numpy(self.measured.features)


def read_side(
    text: str,
    settings: EvaluationSettings,
    measuring: SideMeasuring,
    made_with: dict[str, str],
    store: Callable[[], Store],
    sizes: Iterable[Size] | None = None,
) -> Side:
    """The side that ``text`` names: an ``.npz`` file, a folder, or else an artifact of kind samples or datasets.

    Args:
        text: path, ``samples/name``, ``datasets/name@version`` or an ``s3://`` URI.
        settings: ``real_split`` and ``real_count`` for datasets.
        measuring: the network, with its cache.
        made_with: network, weights and resize rule, which statistics must share where they tell theirs.
        store: opens the store, called for artifacts only.
        sizes: that the pictures are brought to before they are cut; unset: their own.

    Raises:
        SettingsError: there is no such thing, it holds no picture, or a picture of it cannot be read; names it.
        NotFound: the artifact is not published, or not whole.
        IntegrityError: stored bytes are not the committed ones; names the object.
    """
    path = Path(text)
    if path.suffix == ".npz":
        return Side(text, Moments.from_npz(path))
    source = _folder(text, path) if path.is_dir() else _artifact(text, settings, store)
    measured = measuring.measure(source, sizes)
    return Side(text, Moments.of(torch.from_numpy(measured.features), made_with), measured)


def how_made(network: FeatureNetwork, weights_sha256: str) -> dict[str, str]:
    """What two statistics must share to be comparable."""
    return {"network": network.kind.name, "weights": weights_sha256, "resize": RULES[network.rule]}


def _folder(text: str, folder: Path) -> PictureSource:
    """Pictures of a folder and those below it, by name, decoded ahead of the network."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".") and format_of_name(path.name) is not None)
    return PictureSource(text, digest_of(list(mapped(file_digest, paths))), partial(mapped, read_picture, paths, ahead=PICTURES))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        SettingsError: it cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise unreadable(path, error) from None


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Pixels, (H, W, 3), of a file.

    Raises:
        SettingsError: it cannot be decoded, or must not be.
    """
    try:
        with open_picture(path.read_bytes(), None, max_pixels=MAX_PIXELS) as image:
            return np.asarray(image.convert("RGB"))
    except (Rejected, OSError, ValueError, SyntaxError) as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception | str) -> SettingsError:
    """What to raise where the file at ``path`` cannot be part of a set."""
    return SettingsError(f"{path} cannot be compared: {' '.join(str(error).split())}; remove it or mend it")


def _artifact(text: str, settings: EvaluationSettings, store: Callable[[], Store]) -> PictureSource:
    if not text.startswith(("samples/", "datasets/", "s3://")):
        raise SettingsError(f"{text} is no folder, no .npz file and no artifact of kind samples or datasets; give one of these")
    artifact: Artifact = resolve(store(), text)
    if artifact.ref.kind == "samples":
        return PictureSource(text, digest_of(["samples", artifact.ref.version]), lambda: (sample.image for sample in read_generated(artifact)))
    if artifact.ref.kind == "datasets":
        split, count = settings.real_split, settings.real_count
        chosen = digest_of(["datasets", artifact.ref.version, split, count])
        return PictureSource(text, chosen, lambda: (sample.image for sample in islice(read_samples(artifact, split), count)))
    raise SettingsError(f"{text} is an artifact of kind {artifact.ref.kind}; only samples and datasets have pictures")
