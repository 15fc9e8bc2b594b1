"""All numbers of an evaluation, from the feature tables of its sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcascade.config import EvaluationSettings
from selfcascade.evaluation.distances import fid, kid
from selfcascade.evaluation.intervals import GramBlock, extrapolated, half_samples, standard_error, widen
from selfcascade.evaluation.layout import layout_distances
from selfcascade.evaluation.manifold import manifold
from selfcascade.evaluation.results import METRICS, Difference, Number, Row
from selfcascade.evaluation.sets import PictureSet
from selfcascade.evaluation.spectrum import detail
from selfcascade.evaluation.tables import FeatureTable

LARGEST_GRAM = 6000
"""Pictures (or crops) of a side up to which inner products of all pairs are kept for the errors; 6,000 take 288 MB."""

LIMIT_DRAWS = 10
"""Subsets a size behind the extrapolated FID."""

_IS_THE_REFERENCE = "the base's own pictures are the reference"
_TRIVIAL = "about zero by construction: an enlarged base picture is the base's picture"
_NATIVE = "smaller than the target: no native-scale crops to compare"


@dataclass(slots=True)
class _Measured:
    """What is known of one set: its numbers, their exact values over all pairs, and their half-samples' values."""

    numbers: dict[str, Number] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    replicates: dict[str, Tensor] = field(default_factory=dict)


def measure(settings: EvaluationSettings, sets: Sequence[PictureSet], tables: Mapping[str, FeatureTable]) -> tuple[tuple[Row, ...], tuple[Difference, ...]]:
    """Rows of the table, and the differences of every two shown methods at the target size.

    Args:
        settings: counts and seeds.
        sets: the real set first, then one for each method, all of the same prompts.
        tables: their feature tables by label.
    """
    real, *methods = sets
    ids = tables[methods[0].label].prompt_ids
    prompts = len(set(ids))
    halves = _Halves.of(settings, prompts=prompts, each=len(ids) // prompts, real=len(tables[real.label]))
    base = next((item for item in methods if item.method == "base"), None)
    shared = _Shared(settings, tables[real.label], tables[base.label] if base else None, halves)
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
    compared = [row.label for row in rows if row.shown and row.method != "base"]
    return rows, tuple(_differences(compared, measured, halves))


def floor_of(settings: EvaluationSettings, real: PictureSet, table: FeatureTable, count: int) -> Row | None:
    """Real pictures against the other real pictures: what no method can be expected to go below at this count. None for fewer than 4."""
    count = min(count, len(table) // 2)
    if count < 2:
        return None
    order = half_order(len(table), settings.seed)
    some, others = order[:count], order[count:]
    whole, rest = torch.from_numpy(table.features[some]), torch.from_numpy(table.features[others])
    numbers = {"kid_r": _kid_number(settings, rest, whole), "fid_r": Number(value=fid(rest, whole))}
    if table.crops is not None:
        whole, rest = _flat(table.crops[some]), _flat(table.crops[others])
        numbers |= {"pkid_r": _kid_number(settings, rest, whole), "pfid_r": Number(value=fid(rest, whole))}
    numbers["objects"] = Number(value=float(table.objects.mean()))
    if (found := manifold(torch.from_numpy(table.features[others]), torch.from_numpy(table.features[some]))) is not None:
        numbers |= {f"{name}_r": Number(value=getattr(found, name)) for name in ("precision", "recall", "density", "coverage")}
    if table.spectra is not None:
        numbers["detail_r"] = Number(value=float(detail(table.spectra[some]).mean() / detail(table.spectra[others]).mean()))
    return Row(
        label="real pictures",
        method="real",
        artifact=real.artifact,
        height=real.height,
        width=real.width,
        pictures=count,
        reference=len(table) - count,
        note="real against other real pictures: the value that no method can be expected to go below",
        numbers={metric.name: numbers.get(metric.name, Number(why="not defined for real pictures")) for metric in METRICS},
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


@dataclass(frozen=True, slots=True)
class _Halves:
    """The half-samples, the same for every method; None where a side is too small to be halved."""

    prompts: int
    rows: Tensor | None
    crop_rows: Tensor | None
    columns: Tensor | None
    crop_columns: Tensor | None
    real: int

    @classmethod
    def of(cls, settings: EvaluationSettings, *, prompts: int, each: int, real: int) -> _Halves:
        if prompts < 4 or real < 4:
            return cls(prompts, None, None, None, None, real)
        rows = widen(half_samples(prompts, settings.half_samples, seed=settings.seed, side="prompts"), each)
        columns = half_samples(real, settings.half_samples, seed=settings.seed, side="real")
        crops = settings.crops_per_image
        return cls(prompts, rows, widen(rows, crops), columns, widen(columns, crops), real)

    def error(self, replicates: Tensor) -> float:
        return standard_error(replicates, self.prompts)


class _Shared:
    """References and the inner products within them, made once."""

    def __init__(self, settings: EvaluationSettings, real: FeatureTable, base: FeatureTable | None, halves: _Halves) -> None:
        self.settings, self.halves = settings, halves
        self.real = torch.from_numpy(real.features)
        self.real_crops = None if real.crops is None else _flat(real.crops)
        self.real_detail = None if real.spectra is None else torch.from_numpy(detail(real.spectra))
        self.base = base
        self.base_features = None if base is None else torch.from_numpy(base.features)
        self._within: dict[int, Tensor] = {}

    def block(self, features: Tensor, reference: Tensor) -> GramBlock | None:
        """Inner products of a set with a reference, None where they would take too much memory."""
        if max(len(features), len(reference)) > LARGEST_GRAM:
            return None
        block = GramBlock.of(features, reference, self._within.get(id(reference)))
        self._within[id(reference)] = block.yy
        return block


def _measure_one(shared: _Shared, item: PictureSet, table: FeatureTable) -> _Measured:
    measured = _Measured()
    halves = shared.halves
    features = torch.from_numpy(table.features)
    _distance(shared, measured, "kid_r", "fid_r", features, shared.real, halves.rows, halves.columns)
    if table.crops is None or shared.real_crops is None:
        _blank(measured, _NATIVE, "pkid_r", "pfid_r")
    else:
        _distance(shared, measured, "pkid_r", "pfid_r", _flat(table.crops), shared.real_crops, halves.crop_rows, halves.crop_columns)
    _mean(shared, measured, "objects", table.objects)
    _manifold(measured, features, shared.real)
    _detail(shared, measured, table)
    if item.method in ("base", "lanczos", "latent-sr", "x4-upscaler"):
        _blank(measured, _IS_THE_REFERENCE if item.method == "base" else _TRIVIAL, "kid_b", "fid_b", "layout_b", "objects_b")
    elif shared.base is None or shared.base_features is None:
        _blank(measured, "no samples of the base are compared", "kid_b", "fid_b", "layout_b", "objects_b")
    else:
        _distance(shared, measured, "kid_b", "fid_b", features, shared.base_features, halves.rows, halves.rows)
        _mean(shared, measured, "layout_b", layout_distances(table.small, shared.base.small))
        _mean(shared, measured, "objects_b", np.abs(table.objects - shared.base.objects))
    measured.numbers = {metric.name: measured.numbers[metric.name] for metric in METRICS}
    return measured


def _distance(
    shared: _Shared, measured: _Measured, kid_name: str, fid_name: str, features: Tensor, reference: Tensor, rows: Tensor | None, columns: Tensor | None
) -> None:
    number = _kid_number(shared.settings, reference, features)
    frechet = Number(value=fid(reference, features))
    measured.values |= {kid_name: _value(number), fid_name: _value(frechet)}
    block = shared.block(features, reference)
    if block is not None:
        # Over all pairs: the limit of many subsets, without the noise of drawing them.
        measured.values[kid_name] = float(block.kid())
    if block is not None and rows is not None and columns is not None:
        measured.replicates |= {kid_name: block.kid(rows, columns), fid_name: block.fid(rows, columns)}
        number = number.model_copy(update={"error": shared.halves.error(measured.replicates[kid_name])})
        frechet = frechet.model_copy(update={"error": shared.halves.error(measured.replicates[fid_name])})
    if block is not None and shared.halves.prompts >= 8:
        each = len(features) // shared.halves.prompts
        limit = extrapolated(block, shared.halves.prompts, each, draws=LIMIT_DRAWS, seed=shared.settings.seed)
        frechet = frechet.model_copy(update={"limit": limit})
    measured.numbers |= {kid_name: number, fid_name: frechet}


def _manifold(measured: _Measured, features: Tensor, real: Tensor) -> None:
    found = manifold(real, features)
    for name in ("precision", "recall", "density", "coverage"):
        if found is None:
            _blank(measured, "too few pictures to have neighbours", f"{name}_r")
        else:
            measured.values[f"{name}_r"] = getattr(found, name)
            measured.numbers[f"{name}_r"] = Number(value=measured.values[f"{name}_r"])


def _detail(shared: _Shared, measured: _Measured, table: FeatureTable) -> None:
    """Mean power of detail over that of the real pictures, with the error of a ratio of means."""
    if table.spectra is None or shared.real_detail is None:
        _blank(measured, _NATIVE, "detail_r")
        return
    own, real = torch.from_numpy(detail(table.spectra)), shared.real_detail
    if real.mean() < 1e-9:
        _blank(measured, "the real pictures have no detail", "detail_r")
        return
    value, error = float(own.mean() / real.mean()), None
    if shared.halves.rows is not None and shared.halves.columns is not None:
        error = shared.halves.error(own[shared.halves.rows].mean(dim=1) / real[shared.halves.columns].mean(dim=1))
    measured.numbers["detail_r"] = Number(value=value, error=error)


def _mean(shared: _Shared, measured: _Measured, name: str, values: NDArray[Any]) -> None:
    measured.values[name] = float(values.mean())
    rows = shared.halves.rows
    error = None
    if rows is not None:
        measured.replicates[name] = torch.from_numpy(values).double()[rows].mean(dim=1)
        error = shared.halves.error(measured.replicates[name])
    measured.numbers[name] = Number(value=measured.values[name], error=error)


def _blank(measured: _Measured, why: str, *names: str) -> None:
    measured.numbers |= {name: Number(why=why) for name in names}


def _kid_number(settings: EvaluationSettings, reference: Tensor, features: Tensor) -> Number:
    found = kid(reference, features, subset=settings.kid_subset, subsets=settings.kid_subsets, seed=settings.seed)
    return Number(value=found.mean, spread=found.spread)


def _value(number: Number) -> float:
    assert number.value is not None
    return number.value


def _flat(crops: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(crops).flatten(0, 1)


def _shown(methods: Sequence[PictureSet], measured: Mapping[str, _Measured]) -> set[str]:
    """Every label, but of several direct ones only that with the lowest KID_r: the strongest form of what the cascade is compared with."""
    direct = [item.label for item in methods if item.method == "direct"]
    best = min(direct, key=lambda label: (_value(measured[label].numbers["kid_r"]), label)) if direct else None
    return {item.label for item in methods if item.method != "direct" or item.label == best}


def _note(item: PictureSet, methods: Sequence[PictureSet], shown: set[str]) -> str:
    others = [other for other in methods if other.method == "direct" and other.label != item.label]
    if item.method != "direct" or not others:
        return ""
    etas = ", ".join(f"{other.eta:g}" for other in others if other.eta is not None)
    return f"the better by KID_r; also sampled with eta {etas}" if item.label in shown else "the worse by KID_r; not compared further"


def _differences(labels: Sequence[str], measured: Mapping[str, _Measured], halves: _Halves) -> list[Difference]:
    found = []
    for first, second in combinations(labels, 2):
        one, two = measured[first], measured[second]
        for metric in METRICS:
            if metric.judged and metric.name in one.values and metric.name in two.values:
                both = metric.name in one.replicates and metric.name in two.replicates
                error = halves.error(two.replicates[metric.name] - one.replicates[metric.name]) if both else None
                found.append(Difference(first=first, second=second, metric=metric.name, value=two.values[metric.name] - one.values[metric.name], error=error))
    return found
