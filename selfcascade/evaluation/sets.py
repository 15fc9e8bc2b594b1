"""The sets of pictures that an evaluation compares, and how each is read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Literal

from pydantic import BaseModel, ConfigDict

from selfcascade.config import EvaluationSettings, Method
from selfcascade.curation.reading import read_samples
from selfcascade.evaluation.tables import Picture
from selfcascade.generation.samples import read_generated, read_table
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, ArtifactRef, Store


class PictureSet(BaseModel):
    """One set: the real pictures of a split, or the samples of a method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    method: Method | Literal["real"]
    ref: ArtifactRef
    eta: float | None = None
    height: int
    width: int
    count: int
    split: Literal["train", "tune", "test"] | None = None

    @property
    def artifact(self) -> str:
        """``kind/name@version``."""
        return str(self.ref)


def real_set(store: Store, dataset: ArtifactRef, settings: EvaluationSettings) -> PictureSet:
    """The real pictures that ``settings`` ask for; from the manifest alone.

    Raises:
        SettingsError: fewer than two are there, or fewer than ``real_count``.
    """
    manifest = Artifact(store, dataset).manifest()
    split = settings.real_split
    there = int(manifest.counts.get(split, 0))
    if settings.real_count is not None and settings.real_count > there:
        raise SettingsError(f"split {split!r} of {dataset} has {there} pictures but evaluation.real_count asks for {settings.real_count}; lower it")
    count = settings.real_count or there
    if count < 2:
        raise SettingsError(f"split {split!r} of {dataset} has {count} pictures; at least 2 are needed. Choose another evaluation.real_split")
    size = int(manifest.settings["size"])
    return PictureSet(label="real", method="real", ref=dataset, height=size, width=size, count=count, split=split)


def sample_set(store: Store, label: str, samples: ArtifactRef) -> PictureSet:
    """The samples of a method; from the manifest and the tables, not the pictures.

    Raises:
        SettingsError: fewer than two samples, or sizes are mixed.
    """
    artifact = Artifact(store, samples)
    manifest = artifact.manifest()
    table = read_table(artifact)
    if len(table) < 2:
        raise SettingsError(f"{samples} has {len(table)} pictures; at least 2 are needed to compare distributions")
    sizes = sorted({(row["height"], row["width"]) for row in table.select(["height", "width"]).to_pylist()})
    if len(sizes) > 1:
        raise SettingsError(f"{samples} mixes pictures of {' and '.join(f'{height} x {width}' for height, width in sizes[:3])} px; sizes cannot be mixed")
    method = manifest.settings["method"]
    eta = float(manifest.settings["cascade"]["eta"]) if method == "direct" else None
    return PictureSet(label=label, method=method, ref=samples, eta=eta, height=sizes[0][0], width=sizes[0][1], count=len(table))


def read_pictures(store: Store, chosen: PictureSet) -> Iterator[Picture]:
    """The pictures of a set in the order of their keys, one shard on disk at a time, every object verified.

    Raises:
        IntegrityError: stored bytes are not the committed ones; names the object.
        SettingsError: a picture has another size than the set.
    """
    artifact = Artifact(store, chosen.ref)
    if chosen.method == "real":
        found = (Picture(sample.key, sample.key, sample.image) for sample in read_samples(artifact, chosen.split))
    else:
        found = (Picture(sample.key, sample.spec.prompt_id, sample.image) for sample in read_generated(artifact))
    for picture in islice(found, chosen.count):
        height, width = picture.image.shape[:2]
        if (height, width) != (chosen.height, chosen.width):
            raise SettingsError(
                f"{chosen.ref}: picture {picture.key!r} has {height} x {width} px, others {chosen.height} x {chosen.width}; sizes cannot be mixed"
            )
        yield picture
