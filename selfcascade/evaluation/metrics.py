"""All numbers of an evaluation, from the feature tables of its sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcascade.config import EvaluationSettings
from selfcascade.evaluation.distances import fid, kid
from selfcascade.evaluation.embeddings import Embeddings
from selfcascade.evaluation.further_metrics import further_floor, measure_further
from selfcascade.evaluation.layout import layout_distances
from selfcascade.evaluation.manifold import NAMES, manifold, manifold_replicates
from selfcascade.evaluation.measured import Further, Halves, Measured, Shared, blank, flat, frechet_number, mean_number, put, value_of
from selfcascade.evaluation.replicates import Replicates
from selfcascade.evaluation.results import Difference, Number, Row, metrics_with
from selfcascade.evaluation.sets import PictureSet
from selfcascade.evaluation.spectrum import detail
from selfcascade.evaluation.tables import FeatureTable

_IS_THE_REFERENCE = "the base's own pictures are the reference"
_TRIVIAL = "about zero by construction: an enlarged base picture is the base's picture"
_NATIVE = "smaller than the target: no native-scale crops to compare"


@dataclass(frozen=True, slots=True)
class Measurement:
    """All numbers of the methods of a report."""

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    replicates: Replicates


def measure(
    settings: EvaluationSettings,
    sets: Sequence[PictureSet],
    tables: Mapping[str, FeatureTable],
    further: Mapping[str, Mapping[str, Embeddings]] | None = None,
) -> Measurement:
    """Rows of the table, the differences of every two shown methods at the target size, and what they rest on.

    Args:
        settings: counts and seeds.
        sets: the real set first, then one for each method, all of the same prompts.
        tables: their feature tables by label.
        further: what further networks say of them, by network and label.
    """
    real, *methods = sets
    ids = tables[methods[0].label].prompt_ids
    prompts = len(set(ids))
    halves = Halves.of(settings, prompts=prompts, each=len(ids) // prompts, real=len(tables[real.label]))
    base = next((item for item in methods if item.method == "base"), None)
    others = {name: Further.of(found, real.label, base.label if base else None) for name, found in (further or {}).items()}
    shared = Shared(settings, tables[real.label], tables[base.label] if base else None, halves, others)
    measured = {item.label: _measure_one(shared, item, tables[item.label]) for item in methods}
    shown = _shown(methods, measured)
    rows = tuple(
        Row(
            label=item.label,
            method=item.method,
            artifact=item.artifact,
            eta=item.eta,
            height=item.height,
            width=item.width,
            pictures=len(tables[item.label]),
            reference=len(tables[real.label]),
            shown=item.label in shown,
            note=_note(item, methods, shown),
            numbers=measured[item.label].numbers,
        )
        for item in methods
    )
    replicates = Replicates(prompts, {label: each.values for label, each in measured.items()}, {label: each.replicates for label, each in measured.items()})
    compared = [row.label for row in rows if row.shown and row.method != "base"]
    return Measurement(rows, tuple(replicates.differences(compared)), replicates)


def floor_of(settings: EvaluationSettings, real: PictureSet, table: FeatureTable, count: int, further: Mapping[str, Embeddings] | None = None) -> Row | None:
    """Real pictures against the other real pictures: what no method can be expected to go below at this count. None for fewer than 4."""
    count = min(count, len(table) // 2)
    if count < 2:
        return None
    order = half_order(len(table), settings.seed)
    some, others = order[:count], order[count:]
    whole, rest = torch.from_numpy(table.features[some]), torch.from_numpy(table.features[others])
    numbers = {"kid_r": _kid_number(settings, rest, whole), "fid_r": Number(value=fid(rest, whole))}
    if table.crops is not None:
        whole, rest = flat(table.crops[some]), flat(table.crops[others])
        numbers |= {"pkid_r": _kid_number(settings, rest, whole), "pfid_r": Number(value=fid(rest, whole))}
    numbers["objects"] = Number(value=float(table.objects.mean()))
    if (found := manifold(torch.from_numpy(table.features[others]), torch.from_numpy(table.features[some]))) is not None:
        numbers |= {f"{name}_r": Number(value=getattr(found, name)) for name in NAMES}
    if table.spectra is not None:
        numbers["detail_r"] = Number(value=float(detail(table.spectra[some]).mean() / detail(table.spectra[others]).mean()))
    for name, embedded in (further or {}).items():
        numbers |= further_floor(name, embedded, some, others, seed=settings.seed)
    return Row(
        label="real pictures",
        method="real",
        artifact=real.artifact,
        height=real.height,
        width=real.width,
        pictures=count,
        reference=len(table) - count,
        note="real against other real pictures: the value that no method can be expected to go below",
        numbers={metric.name: numbers.get(metric.name, Number(why="not defined for real pictures")) for metric in metrics_with(further or ())},
    )


def layout_chance(base: FeatureTable) -> float | None:
    """Layout distance of the base's pictures from those of the next prompt: what a method gets that keeps nothing of the composition."""
    prompts = base.prompt_ids
    each = len(prompts) // len(set(prompts))
    if len(set(prompts)) < 2:
        return None
    return float(layout_distances(base.small, np.roll(base.small, each, axis=0)).mean())


def half_order(count: int, seed: int) -> NDArray[np.int64]:
    """A seeded order of ``count`` things."""
    return np.random.Generator(np.random.PCG64([seed, count])).permutation(count)


def _measure_one(shared: Shared, item: PictureSet, table: FeatureTable) -> Measured:
    measured = Measured()
    halves = shared.halves
    features = torch.from_numpy(table.features)
    _distance(shared, measured, "kid_r", "fid_r", features, shared.real, halves.rows, halves.columns)
    if table.crops is None or shared.real_crops is None:
        blank(measured, _NATIVE, "pkid_r", "pfid_r")
    else:
        _distance(shared, measured, "pkid_r", "pfid_r", flat(table.crops), shared.real_crops, halves.crop_rows, halves.crop_columns)
    mean_number(shared, measured, "objects", table.objects)
    _manifold(shared, measured, features)
    _detail(shared, measured, table)
    why = _why_not_against_base(shared, item)
    measure_further(shared, measured, item.label, why)
    if why or shared.base is None or shared.base_features is None:
        blank(measured, why, "kid_b", "fid_b", "layout_b", "objects_b")
    else:
        _distance(shared, measured, "kid_b", "fid_b", features, shared.base_features, halves.rows, halves.rows)
        mean_number(shared, measured, "layout_b", layout_distances(table.small, shared.base.small))
        mean_number(shared, measured, "objects_b", np.abs(table.objects - shared.base.objects))
    measured.numbers = {metric.name: measured.numbers[metric.name] for metric in metrics_with(shared.further)}
    return measured


def _why_not_against_base(shared: Shared, item: PictureSet) -> str:
    """Empty where the set is compared with the base's own pictures."""
    if item.method in ("base", "lanczos", "latent-sr", "x4-upscaler"):
        return _IS_THE_REFERENCE if item.method == "base" else _TRIVIAL
    return "no samples of the base are compared" if shared.base is None else ""


def _distance(
    shared: Shared, measured: Measured, kid_name: str, fid_name: str, features: Tensor, reference: Tensor, rows: Tensor | None, columns: Tensor | None
) -> None:
    number = _kid_number(shared.settings, reference, features)
    measured.values[kid_name] = value_of(number)
    block = shared.block(features, reference)
    if block is not None:
        # Over all pairs: the limit of many subsets, without the noise of drawing them.
        measured.values[kid_name] = float(block.kid())
    if block is not None and rows is not None and columns is not None:
        measured.replicates[kid_name] = block.kid(rows, columns)
        number = number.model_copy(update={"error": shared.halves.error(measured.replicates[kid_name])})
    measured.numbers[kid_name] = number
    frechet_number(shared, measured, fid_name, block, features, reference, rows, columns)


def _manifold(shared: Shared, measured: Measured, features: Tensor) -> None:
    found = manifold(shared.real, features)
    if found is None:
        blank(measured, "too few pictures to have neighbours", *(f"{name}_r" for name in NAMES))
        return
    rows, columns = shared.halves.rows, shared.halves.columns
    drawn = None if rows is None or columns is None else manifold_replicates(shared.real, features, columns, rows)
    for name in NAMES:
        put(shared, measured, f"{name}_r", getattr(found, name), None if drawn is None else drawn[name])


def _detail(shared: Shared, measured: Measured, table: FeatureTable) -> None:
    """Mean power of detail over that of the real pictures, with the error of a ratio of means."""
    if table.spectra is None or shared.real_detail is None:
        blank(measured, _NATIVE, "detail_r")
        return
    own, real = torch.from_numpy(detail(table.spectra)), shared.real_detail
    if real.mean() < 1e-9:
        blank(measured, "the real pictures have no detail", "detail_r")
        return
    value, error = float(own.mean() / real.mean()), None
    if shared.halves.rows is not None and shared.halves.columns is not None:
        error = shared.halves.error(own[shared.halves.rows].mean(dim=1) / real[shared.halves.columns].mean(dim=1))
    measured.numbers["detail_r"] = Number(value=value, error=error)


def _kid_number(settings: EvaluationSettings, reference: Tensor, features: Tensor) -> Number:
    found = kid(reference, features, subset=settings.kid_subset, subsets=settings.kid_subsets, seed=settings.seed)
    return Number(value=found.mean, spread=found.spread)


def _shown(methods: Sequence[PictureSet], measured: Mapping[str, Measured]) -> set[str]:
    """Every label, but of several direct ones only that with the lowest KID_r: the strongest form of what the cascade is compared with."""
    direct = [item.label for item in methods if item.method == "direct"]
    best = min(direct, key=lambda label: (value_of(measured[label].numbers["kid_r"]), label)) if direct else None
    return {item.label for item in methods if item.method != "direct" or item.label == best}


def _note(item: PictureSet, methods: Sequence[PictureSet], shown: set[str]) -> str:
    others = [other for other in methods if other.method == "direct" and other.label != item.label]
    if item.method != "direct" or not others:
        return ""
    etas = ", ".join(f"{other.eta:g}" for other in others if other.eta is not None)
    return f"the better by KID_r; also sampled with eta {etas}" if item.label in shown else "the worse by KID_r; not compared further"
