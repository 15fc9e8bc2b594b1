"""The sets of pictures that an evaluation compares, and how each is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from itertools import islice
from typing import Literal, get_args

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from selfcascade.config import EvaluationSettings, Method
from selfcascade.curation.reading import read_samples
from selfcascade.evaluation.tables import Picture
from selfcascade.generation.samples import read_generated, read_table
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, ArtifactRef, Store

METHODS = get_args(Method)
"""The order of every table."""


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


def sample_sets(store: Store, samples: Mapping[str, ArtifactRef]) -> list[PictureSet]:
    """The samples of each method, in the order of every table; from the manifests and tables, not the pictures.

    Raises:
        SettingsError: a set has fewer than two samples, or mixes sizes, or the sets are not of the same prompts.
    """
    tables = {label: read_table(Artifact(store, ref)) for label, ref in samples.items()}
    sets = [_sample_set(label, Artifact(store, ref), tables[label]) for label, ref in samples.items()]
    _check_pairs(tables)
    return sorted(sets, key=lambda item: (METHODS.index(item.method), item.label))


def _sample_set(label: str, artifact: Artifact, table: pa.Table) -> PictureSet:
    if len(table) < 2:
        raise SettingsError(f"{artifact} has {len(table)} pictures; at least 2 are needed to compare distributions")
    sizes = sorted({(row["height"], row["width"]) for row in table.select(["height", "width"]).to_pylist()})
    if len(sizes) > 1:
        raise SettingsError(f"{artifact} mixes pictures of {' and '.join(f'{height} x {width}' for height, width in sizes[:3])} px; sizes cannot be mixed")
    settings = artifact.manifest().settings
    eta = float(settings["cascade"]["eta"]) if settings["method"] == "direct" else None
    return PictureSet(label=label, method=settings["method"], ref=artifact.ref, eta=eta, height=sizes[0][0], width=sizes[0][1], count=len(table))


def _check_pairs(tables: Mapping[str, pa.Table]) -> None:
    """Every set holds the same samples of the same prompts, and every prompt has as many samples as the others."""
    keys = {label: set(table["key"].to_pylist()) for label, table in tables.items()}
    first = next(iter(keys))
    for label in keys:
        only = sorted(keys[label] ^ keys[first])
        if only:
            raise SettingsError(
                f"samples {first!r} ({len(keys[first])}) and {label!r} ({len(keys[label])}) are not of the same prompts (only one has {only[0]!r}); "
                "generate them with equal prompt settings"
            )
    counts = Counter(tables[first]["prompt_id"].to_pylist())
    (most, many), (least, few) = counts.most_common(1)[0], counts.most_common()[-1]
    if many != few:
        raise SettingsError(f"samples {first!r}: prompt {most!r} has {many} samples but {least!r} has {few}; errors need equal numbers")


def read_pictures(store: Store, chosen: PictureSet, keys: Set[str] | None = None) -> Iterator[Picture]:
    """The pictures of a set in the order of their keys, one shard on disk at a time, every object verified; of samples, with ``keys``, only these.

    Raises:
        IntegrityError: stored bytes are not the committed ones; names the object.
        SettingsError: a picture has another size than the set.
    """
    artifact = Artifact(store, chosen.ref)
    if chosen.method == "real":
        found = (Picture(sample.key, sample.key, sample.image, sample.caption) for sample in read_samples(artifact, chosen.split))
    else:
        found = (Picture(sample.key, sample.spec.prompt_id, sample.image, sample.prompt) for sample in read_generated(artifact, keys))
    for picture in islice(found, chosen.count):
        height, width = picture.image.shape[:2]
        if (height, width) != (chosen.height, chosen.width):
            raise SettingsError(
                f"{chosen.ref}: picture {picture.key!r} has {height} x {width} px, others {chosen.height} x {chosen.width}; sizes cannot be mixed"
            )
        yield picture
