"""What every network says of one set of pictures: from the cache, or by one pass over the pictures for all that is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from selfcascade.config import EvaluationSettings, FeatureSettings, FurtherFeatures
from selfcascade.curation.ahead import PICTURES, mapped
from selfcascade.evaluation.embeddings import Embedding, Embeddings
from selfcascade.evaluation.features import load_features, weights_path, weights_sha256
from selfcascade.evaluation.networks.network import FeatureNetwork
from selfcascade.evaluation.sets import PictureSet, read_pictures
from selfcascade.evaluation.tables import CropPlan, Extraction, FeatureTable, Look, Picture
from selfcascade.generation.threads import torch_threads
from selfcascade.settings import SettingsError, digest_of
from selfcascade.storage import Store

if TYPE_CHECKING:
    from selfcascade.evaluation.evaluate import EvaluationPlan

TABLE = ""
"""Name of the table that every report needs, among the names of further networks."""


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredSet:
    """A set as its networks see it."""

    table: FeatureTable
    further: Mapping[str, Embeddings]
    """By network."""


def measured_set(settings: EvaluationSettings, store: Store, plan: EvaluationPlan, index: int) -> MeasuredSet:
    """Set ``index`` of ``plan``. What is cached is read; for the rest the pictures are read once, and what comes out is cached.

    Raises:
        IntegrityError: stored bytes of a picture are not the committed ones; names the object.
        SettingsError: sizes are mixed, or the weights of a network are not those that were planned with.
    """
    keys = _keys(settings, plan, index)
    table = FeatureTable.from_bytes(store.read(keys[TABLE])) if store.head(keys[TABLE]) is not None else None
    further = {
        name: found
        for name, key in keys.items()
        if name != TABLE and store.head(key) is not None and (found := Embeddings.from_bytes(store.read(key))) is not None
    }
    if table is not None and len(further) == len(settings.further):
        return MeasuredSet(table, further)
    chosen = plan.sets[index]
    with torch_threads(settings.features.threads):
        extraction = None
        if table is None:
            crops = CropPlan(plan.target, settings.crop, settings.crops_per_image, settings.seed) if _has_crops(plan, chosen) else None
            network = _network(settings.features, plan, plan.weights)
            extraction = Extraction(network, small=plan.small, crops=crops, batch=settings.features.batch, device=plan.device)
        missing = {each.network: each for each in settings.further if each.network not in further}
        networks = {name: _network(each, plan, plan.further_weights[name]) for name, each in missing.items()}
        embeddings = {
            name: Embedding(networks[name], batch=each.batch, device=plan.device) for name, each in missing.items() if not _shares_pass(settings, plan, each)
        }
        if extraction is not None or embeddings:
            _pass(read_pictures(store, chosen), extraction, list(embeddings.values()))
        if extraction is not None:
            table = extraction.result()
            store.put_cache(keys[TABLE], table.to_bytes())
        assert table is not None
        made = {name: embeddings[name].result() if name in embeddings else Embeddings.beside(table, networks[name]) for name in missing}
    for name, embedded in made.items():
        store.put_cache(keys[name], embedded.to_bytes())
    return MeasuredSet(table, {each.network: (further | made)[each.network] for each in settings.further})


def _pass(pictures: Iterator[Picture], extraction: Extraction | None, embeddings: Sequence[Embedding]) -> None:
    """Every picture through every network; what needs none is done by threads ahead of them."""

    def look(numbered: tuple[int, Picture]) -> tuple[Picture, Look | None, list[Tensor]]:
        place, picture = numbered
        return picture, None if extraction is None else extraction.look(place, picture), [embedding.look(picture) for embedding in embeddings]

    for picture, own, others in mapped(look, enumerate(pictures), ahead=PICTURES):
        if extraction is not None and own is not None:
            extraction.take(own)
        for embedding, other in zip(embeddings, others, strict=True):
            embedding.take(picture, other)


def is_cached(settings: EvaluationSettings, store: Store, plan: EvaluationPlan, index: int) -> bool:
    """Whether nothing of set ``index`` is left to do; reads no table."""
    return all(store.head(key) is not None for key in _keys(settings, plan, index).values())


def bytes_of(settings: EvaluationSettings, plan: EvaluationPlan, chosen: PictureSet) -> int:
    """About what the tables of a set take."""
    assert plan.protocol is not None
    passes = 1 + (settings.crops_per_image if _has_crops(plan, chosen) else 0)
    width = plan.protocol.num_features * passes + sum(each.num_features + each.classes for each in plan.protocol.further)
    return chosen.count * (4 * width + 3 * plan.small[0] * plan.small[1])


def _network(settings: FeatureSettings, plan: EvaluationPlan, sha256: str) -> FeatureNetwork:
    if weights_sha256(settings, weights_path(settings)) != sha256:
        raise SettingsError(f"the weights of {settings.network} are not those that {plan.ref} was planned with; give every worker the same file")
    return load_features(settings).to(plan.device)


def _shares_pass(settings: EvaluationSettings, plan: EvaluationPlan, each: FurtherFeatures) -> bool:
    """Whether the table has what ``each`` would give: the network of the report itself, which is not passed twice. Prompts are in no table."""
    return each.network != "clip" and each.what() == settings.features.what() and plan.further_weights[each.network] == plan.weights


def _has_crops(plan: EvaluationPlan, chosen: PictureSet) -> bool:
    """Real pictures are brought to the target size first; a base's smaller pictures have no native-scale crops to compare."""
    return chosen.method == "real" or (chosen.height, chosen.width) == plan.target


def _keys(settings: EvaluationSettings, plan: EvaluationPlan, index: int) -> dict[str, str]:
    """Where the table and each further network's embeddings of set ``index`` lie in the cache."""
    assert plan.protocol is not None
    chosen = plan.sets[index]
    same = {"format": settings.FORMAT, "set": [chosen.ref.version, chosen.split, chosen.count]}
    shape = {"target": plan.target if _has_crops(plan, chosen) else None, "small": plan.small}
    table = same | {"features": plan.protocol.feature_digest()} | shape
    further = {each.setting: same | {"further": each.feature_digest(plan.protocol.device)} for each in plan.protocol.further}
    return {name: f"cache/features/{digest_of(what)}" for name, what in ({TABLE: table} | further).items()}
