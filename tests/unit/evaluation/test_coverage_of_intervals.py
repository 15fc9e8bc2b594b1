"""Intervals hold the truth about as often as they say, and a gate fires where a set got worse: a few of the studies that the docs give the rates of."""

from __future__ import annotations

import pytest
import torch
from studies import WIDTH, Study, fid_truth, fires, held, kid_truth, many, mean_of, normal, pictures

from selfcascade.evaluation.intervals import GramBlock
from selfcascade.evaluation.statistics import frechet

COUNT = 60


def test_the_truths_are_what_large_sets_have():
    """Of 2,000 pictures a side: KID and FID of the simulated sets within 8 % of their closed forms."""
    real, method = normal(2000, 1), pictures(normal(2000, 2), 3, away=0.5, scale=1.2)
    assert float(GramBlock.of(method, real).kid()) == pytest.approx(kid_truth(scale=1.2), rel=0.08)
    assert float(frechet(method, real)) == pytest.approx(fid_truth(), rel=0.08)


def test_intervals_of_kid_hold_the_truth():
    """100 studies of 60 prompts: between 89 and 99 % for 95."""
    assert 0.89 <= held(many(100, lambda seed: Study(seed, COUNT).kid()), kid_truth()) <= 0.99


@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_intervals_of_paired_differences_hold_the_truth(gain):
    truth = kid_truth(0.5 - gain) - kid_truth()
    found = many(100, lambda seed: Study(seed, COUNT).difference(gain=gain))
    assert 0.89 <= held(found, truth) <= 0.995
    paired, alone = (sum(each.error for each in several) for several in (found, many(20, lambda seed: Study(seed, COUNT).kid())))
    assert paired / 100 < 0.6 * 2**0.5 * alone / 20, "prompts that both share are what makes a difference sure"


def test_intervals_of_fid_hold_what_this_count_gives_on_average():
    """n at ten times the width: FID of as many pictures on average, which is above the truth, is held; the bias is told apart."""
    found = many(60, lambda seed: Study(seed, 10 * WIDTH).fid())
    assert held(found, mean_of(found)) >= 0.88
    assert mean_of(found) > fid_truth()


def test_a_gate_fires_on_a_worse_set_and_not_on_another_draw():
    with torch.random.fork_rng(devices=[]):
        assert sum(fires(seed, COUNT, worse=0.35) for seed in range(30)) >= 27
        assert sum(fires(seed, COUNT, worse=0.0) for seed in range(60)) <= 5
