"""What a set's numbers are made from: the references and half-samples that all methods share, and the values, errors and replicates of one set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfcascade.config import EvaluationSettings
from selfcascade.evaluation.distances import fid
from selfcascade.evaluation.embeddings import Embeddings
from selfcascade.evaluation.intervals import GramBlock, extrapolated, half_samples, standard_error, widen
from selfcascade.evaluation.results import Number
from selfcascade.evaluation.spectrum import detail
from selfcascade.evaluation.tables import FeatureTable

LARGEST_GRAM = 6000
"""Pictures (or crops) of a side up to which inner products of all pairs are kept for the errors; 6,000 take 288 MB."""

LIMIT_DRAWS = 10
"""Subsets a size behind the extrapolated FID."""


@dataclass(slots=True)
class Measured:
    """What is known of one set: its numbers, their exact values over all pairs, and their half-samples' values."""

    numbers: dict[str, Number] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    replicates: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Halves:
    """The half-samples, the same for every method; None where a side is too small to be halved."""

    prompts: int
    rows: Tensor | None
    crop_rows: Tensor | None
    columns: Tensor | None
    crop_columns: Tensor | None
    real: int

    @classmethod
    def of(cls, settings: EvaluationSettings, *, prompts: int, each: int, real: int) -> Halves:
        """Of ``prompts`` with ``each`` rows a prompt, and of ``real`` pictures, as the settings seed and count them."""
        if prompts < 4 or real < 4:
            return cls(prompts, None, None, None, None, real)
        rows = widen(half_samples(prompts, settings.half_samples, seed=settings.seed, side="prompts"), each)
        columns = half_samples(real, settings.half_samples, seed=settings.seed, side="real")
        crops = settings.crops_per_image
        return cls(prompts, rows, widen(rows, crops), columns, widen(columns, crops), real)

    def error(self, replicates: Tensor) -> float:
        """Standard error of the whole value from its half-samples' values, (draws,)."""
        return standard_error(replicates, self.prompts)


@dataclass(frozen=True, slots=True)
class Further:
    """What a further network says of every set, and of the references that all methods share."""

    tables: Mapping[str, Embeddings]
    """By label."""
    real: Tensor
    base: Tensor | None

    @classmethod
    def of(cls, tables: Mapping[str, Embeddings], real: str, base: str | None) -> Further:
        """With the labels of the two references."""
        return cls(tables, torch.from_numpy(tables[real].features), torch.from_numpy(tables[base].features) if base is not None else None)


class Shared:
    """References and the inner products within them, made once."""

    def __init__(
        self,
        settings: EvaluationSettings,
        real: FeatureTable,
        base: FeatureTable | None,
        halves: Halves,
        further: Mapping[str, Further] | None = None,
    ) -> None:
        self.settings, self.halves = settings, halves
        self.further = further or {}
        self.real = torch.from_numpy(real.features)
        self.real_crops = None if real.crops is None else flat(real.crops)
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


def frechet_number(
    shared: Shared,
    measured: Measured,
    name: str,
    block: GramBlock | None,
    features: Tensor,
    reference: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
) -> None:
    """The Fréchet distance under ``name``, with error and extrapolation where there are enough pictures, and not too many."""
    number = Number(value=fid(reference, features))
    measured.values[name] = value_of(number)
    if block is not None and rows is not None and columns is not None:
        measured.replicates[name] = block.fid(rows, columns)
        number = number.model_copy(update={"error": shared.halves.error(measured.replicates[name])})
    if block is not None and shared.halves.prompts >= 8:
        each = len(features) // shared.halves.prompts
        number = number.model_copy(update={"limit": extrapolated(block, shared.halves.prompts, each, draws=LIMIT_DRAWS, seed=shared.settings.seed)})
    measured.numbers[name] = number


def put(shared: Shared, measured: Measured, name: str, value: float, replicates: Tensor | None, *, spread: float | None = None) -> None:
    """A value under ``name``, with its error where its half-samples' values, (draws,), are known."""
    measured.values[name], error = value, None
    if replicates is not None:
        measured.replicates[name], error = replicates, shared.halves.error(replicates)
    measured.numbers[name] = Number(value=value, error=error, spread=spread)


def mean_number(shared: Shared, measured: Measured, name: str, values: NDArray[Any]) -> None:
    """The mean of one value a picture, (n,), under ``name``, with its error."""
    rows = shared.halves.rows
    put(shared, measured, name, float(values.mean()), None if rows is None else torch.from_numpy(values).double()[rows].mean(dim=1))


def blank(measured: Measured, why: str, *names: str) -> None:
    """No value under ``names``, and the reason."""
    measured.numbers |= {name: Number(why=why) for name in names}


def value_of(number: Number) -> float:
    """The value of a number that has one."""
    assert number.value is not None
    return number.value


def flat(crops: NDArray[np.float32]) -> Tensor:
    """Features of crops, (n, crops, d), as rows, (n * crops, d)."""
    return torch.from_numpy(crops).flatten(0, 1)
