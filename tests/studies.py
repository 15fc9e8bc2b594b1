"""Simulated evaluations, whose truth is known: how often a 95 % interval holds it, and how often a gate fires.

Features are Gaussian. A real picture is drawn from N(0, 1), a method's from N(away, scale^2) in every coordinate; pictures of one prompt share most of what
they are, as they do where methods start from one seed. Each study draws its own sets and its own half-samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from selfcascade.config import GateSettings
from selfcascade.evaluation.gate import breaches_of
from selfcascade.evaluation.intervals import GramBlock, Interval, half_samples, standard_error
from selfcascade.evaluation.results import Number

WIDTH, DRAWS = 8, 200
SHARED = 0.8
"""Of a picture's variance, what its prompt decides."""


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(prompts: Tensor, seed: int, *, away: float, scale: float) -> Tensor:
    """One for each prompt, (n, WIDTH)."""
    return away + scale * (math.sqrt(SHARED) * prompts + math.sqrt(1 - SHARED) * normal(len(prompts), seed))


class Study:
    """``count`` prompts and twice as many real pictures."""

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = 1000 * seed, count
        self.real, self.prompts = normal(2 * count, self.seed), normal(count, self.seed + 1)
        self.rows, self.columns = (half_samples(size, DRAWS, seed=seed, side=side) for size, side in ((count, "prompts"), (2 * count, "real")))

    def block(self, method: int, *, away: float, scale: float) -> GramBlock:
        return GramBlock.of(pictures(self.prompts, self.seed + 2 + method, away=away, scale=scale), self.real)

    def interval(self, value: Tensor, replicates: Tensor) -> Interval:
        return Interval(float(value), standard_error(replicates, self.count))

    def kid(self, *, away: float = 0.5, scale: float = 1.0) -> Interval:
        block = self.block(0, away=away, scale=scale)
        return self.interval(block.kid(), block.kid(self.rows, self.columns))

    def difference(self, *, away: float = 0.5, gain: float = 0.0) -> Interval:
        """KID of a second method, nearer by ``gain``, minus that of the first, over the same prompts."""
        blocks = [self.block(method, away=away - method * gain, scale=1.0) for method in (0, 1)]
        return self.interval(blocks[1].kid() - blocks[0].kid(), blocks[1].kid(self.rows, self.columns) - blocks[0].kid(self.rows, self.columns))

    def fid(self, *, away: float = 0.5, scale: float = 1.2) -> Interval:
        block = self.block(0, away=away, scale=scale)
        return self.interval(block.fid(), block.fid(self.rows, self.columns))


def kid_truth(away: float = 0.5, scale: float = 1.0) -> float:
    """Squared MMD of N(0, 1) and N(away, scale^2) under ``(x.y / d + 1)^3``, from the moments of the inner products, which are sums over coordinates."""

    def mean(one: tuple[float, float], two: tuple[float, float]) -> float:
        first, second, third = one[0] * two[0], _second(one) * _second(two), _third(one) * _third(two)
        d = WIDTH
        square = d * second + d * (d - 1) * first**2
        cube = d * third + 3 * d * (d - 1) * second * first + d * (d - 1) * (d - 2) * first**3
        return cube / d**3 + 3 * square / d**2 + 3 * first + 1

    real, method = (0.0, 1.0), (away, scale)
    return mean(real, real) + mean(method, method) - 2 * mean(real, method)


def _second(gaussian: tuple[float, float]) -> float:
    return gaussian[0] ** 2 + gaussian[1] ** 2


def _third(gaussian: tuple[float, float]) -> float:
    return gaussian[0] ** 3 + 3 * gaussian[0] * gaussian[1] ** 2


def fid_truth(away: float = 0.5, scale: float = 1.2) -> float:
    return WIDTH * (away**2 + (scale - 1) ** 2)


def held(found: list[Interval], truth: float) -> float:
    """Share of intervals that hold ``truth``."""
    return sum(interval.low <= truth <= interval.high for interval in found) / len(found)


def mean_of(found: list[Interval]) -> float:
    return sum(interval.value for interval in found) / len(found)


def fires(seed: int, count: int, *, worse: float) -> bool:
    """Whether a gate that allows no change fires on a method that moved away by ``worse``, drawn anew on other prompts."""
    studies = Study(2 * seed, count), Study(2 * seed + 1, count)
    reports = [_report(study.kid(away=0.5 + moved)) for study, moved in zip(studies, (0.0, worse), strict=True)]
    return bool(breaches_of(GateSettings(against="reports/before", worse={"kid_r": 0.0}), *reports))


def _report(found: Interval) -> SimpleNamespace:
    return SimpleNamespace(rows=[SimpleNamespace(label="tuned", numbers={"kid_r": Number(value=found.value, error=found.error)})])


def many(count: int, study: Callable[[int], Interval]) -> list[Interval]:
    return [study(seed) for seed in range(count)]
