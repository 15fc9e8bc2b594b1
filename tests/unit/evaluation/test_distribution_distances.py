"""FID against torchmetrics, KID by torchmetrics against a closed form of our own, and the half-samples against both."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from selfcascade.evaluation.distances import fid, kid, kid_subset
from selfcascade.evaluation.intervals import GramBlock, Interval, extrapolated, half_samples, standard_error, widen
from selfcascade.evaluation.statistics import frechet, mmd2, polynomial_kernel, root_trace
from selfcascade.settings import SettingsError


def normal(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def with_moments(n: int, d: int, seed: int, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Points whose sample mean and unbiased sample covariance are exactly ``mean`` and ``root root'``."""
    x = normal(n, d, seed)
    x = x - x.mean(dim=0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1)))
    return x @ whitening.T @ root.T + mean


@pytest.mark.parametrize("d", [1, 3, 8])
def test_frechet_distance_of_known_gaussians(d):
    """Commuting covariances have a closed form, |m|^2 + sum (s - t)^2: ours gives it to 1e-6."""
    s, t = torch.linspace(0.5, 2, d, dtype=torch.float64), torch.linspace(1.5, 0.25, d, dtype=torch.float64)
    rotation = torch.linalg.qr(normal(d, d, 3)).Q
    mean = torch.linspace(-1, 1, d, dtype=torch.float64)
    x = with_moments(40, d, 1, mean, rotation @ torch.diag(s))
    y = with_moments(60, d, 2, torch.zeros_like(mean), rotation @ torch.diag(t))
    expected = float(mean.square().sum() + (s - t).square().sum())
    assert float(frechet(x, y)) == pytest.approx(expected, rel=1e-8)
    assert fid(x, y) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(7, 9, 4), (12, 5, 30), (6, 40, 16), (20, 20, 128)])
def test_our_frechet_is_torchmetrics(n, m, d):
    """Fewer points than features (no d x d matrix) or more (QR): 1e-5 relative of its d x d matrices."""
    x, y = normal(n, d, 1, 0.3), normal(m, d, 2, scale=1.4)
    through = nn.Identity()
    through.num_features = d
    metric = FrechetInceptionDistance(feature=through)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert fid(x, y) == pytest.approx(float(metric.compute()), rel=1e-5)


def naive_mmd2(x: torch.Tensor, y: torch.Tensor) -> float:
    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_is_the_unbiased_mmd_by_its_formula():
    """Over all pairs by loops; and torchmetrics on one subset that is the whole set."""
    x, y = normal(6, 5, 1), normal(6, 5, 2, 0.5)
    expected = naive_mmd2(x, y)
    assert float(GramBlock.of(x, y).kid()) == pytest.approx(expected, rel=1e-10)
    from torchmetrics.image.kid import poly_mmd

    assert float(poly_mmd(x, y)) == pytest.approx(expected, rel=1e-10)


def test_kid_over_subsets_estimates_kid_over_all_pairs():
    """The mean over seeded subsets lies within four standard errors of the complete estimate."""
    x, y = normal(60, 16, 1), normal(80, 16, 2, 0.2)
    found = kid(x, y, subset=1000, subsets=200, seed=0)
    assert found.subset == 30 == kid_subset(1000, 60, 80)
    assert abs(found.mean - float(GramBlock.of(x, y).kid())) < 4 * found.spread / 200**0.5


def test_kid_is_unbiased_and_fid_is_not():
    """Two samples of one distribution: the mean KID over 200 pairs covers 0, the mean FID is far above it and falls with the count."""
    pairs = [(normal(24, 32, 2 * seed), normal(24, 32, 2 * seed + 1)) for seed in range(200)]
    kids = torch.stack([GramBlock.of(x, y).kid() for x, y in pairs])
    assert abs(float(kids.mean())) < 3 * float(kids.std()) / 200**0.5
    fids = [float(frechet(normal(n, 32, 7), normal(n, 32, 8))) for n in (16, 64, 256, 1024)]
    assert fids == sorted(fids, reverse=True)
    assert fids[0] > 10 * fids[-1] > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 12), st.integers(4, 12), st.integers(1, 20), st.integers(0, 1000))
def test_neither_order_nor_side_matters(n, m, d, seed):
    """A permutation of either set changes nothing but rounding, and both distances are symmetric."""
    x, y = normal(n, d, seed), normal(m, d, seed + 1, 1.0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert fid(x[order], y) == pytest.approx(fid(x, y), rel=1e-5, abs=1e-5)
    assert fid(y, x) == pytest.approx(fid(x, y), rel=1e-5, abs=1e-5)
    block, swapped = GramBlock.of(x, y), GramBlock.of(y, x[order])
    assert float(swapped.kid()) == pytest.approx(float(block.kid()), rel=1e-9, abs=1e-12)


def test_the_same_set_twice_is_at_distance_zero():
    x = normal(40, 100, 1).relu()
    assert abs(fid(x, x)) < 1e-4
    assert kid(x, x, subset=20, subsets=50, seed=0).mean < 2 * kid(x, x, subset=20, subsets=50, seed=0).spread


def test_kid_is_seeded_and_leaves_the_global_generator_alone():
    x, y = normal(20, 8, 1), normal(20, 8, 2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = kid(x, y, subset=10, subsets=20, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert kid(x, y, subset=10, subsets=20, seed=1) == first
    assert kid(x, y, subset=10, subsets=20, seed=2) != first


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pictures_are_refused(count):
    with pytest.raises(SettingsError, match=f"{count} generated pictures are too few"):
        fid(normal(4, 3, 1), normal(count, 3, 2))
    with pytest.raises(SettingsError, match="too few"):
        kid(normal(4, 3, 1), normal(count, 3, 2), subset=2, subsets=1, seed=0)


def test_half_samples_never_draw_twice_and_sides_are_independent():
    halves = half_samples(21, 50, seed=0, side="prompts")
    assert halves.shape == (50, 10)
    assert all(len(set(half.tolist())) == 10 for half in halves)
    assert torch.equal(halves, half_samples(21, 50, seed=0, side="prompts"))
    assert not torch.equal(halves, half_samples(21, 50, seed=0, side="real"))
    assert widen(torch.tensor([[0, 2]]), 3).tolist() == [[0, 1, 2, 6, 7, 8]]


@pytest.mark.parametrize(("n", "m", "d"), [(12, 20, 64), (30, 12, 7), (16, 16, 16)])
def test_half_samples_by_gram_matrices_are_the_plain_formulas(n, m, d):
    """KID and FID of every half from inner products alone equal the formulas on the half's features: 1e-8, below, at and above n = d."""
    x, y = normal(n, d, 1), normal(m, d, 2, 0.4, 1.2)
    rows, columns = half_samples(n, 9, seed=0, side="prompts"), half_samples(m, 9, seed=0, side="real")
    block = GramBlock.of(x, y)
    for index, (kid_value, fid_value) in enumerate(zip(block.kid(rows, columns), block.fid(rows, columns), strict=True)):
        some, others = x[rows[index]], y[columns[index]]
        kernels = (polynomial_kernel(a @ b.T, d) for a, b in ((some, some), (some, others), (others, others)))
        assert float(kid_value) == pytest.approx(float(mmd2(*kernels)), rel=1e-9)
        assert float(fid_value) == pytest.approx(float(frechet(some, others)), rel=1e-6)


def test_root_trace_is_the_trace_of_the_root():
    """tr((S T)^{1/2}) by the eigenvalues of the d x d product."""
    x, y = normal(30, 6, 1), normal(25, 6, 2)
    expected = torch.linalg.eigvals(x.T.cov() @ y.T.cov()).sqrt().real.sum()
    assert float(root_trace(x @ y.T)) == pytest.approx(float(expected), rel=1e-6)
    assert float(root_trace(y @ x.T)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("count", [40, 41])
def test_half_samples_of_a_mean_give_its_standard_error(count):
    """For a mean the delete-half jackknife is exact in expectation: s / sqrt(n), within the noise of 4000 draws, for an odd count too."""
    values = normal(count, 1, 3)[:, 0]
    replicates = values[half_samples(count, 4000, seed=0, side="prompts")].mean(dim=1)
    assert standard_error(replicates, count) == pytest.approx(float(values.std()) / count**0.5, rel=0.05)


@pytest.mark.parametrize("gain", [0.0, 0.2])
def test_intervals_of_paired_kid_differences_cover_the_truth(gain):
    """Two methods that share their prompts, both away from the reference as a small model is: over 150 simulated studies the 95 % interval holds the true
    difference of KID in about 95 % of them, where there is none and where there is one."""
    found = studies(150, away=1.0, gain=gain)
    # KID is unbiased, so the mean over studies is the truth, but for an error that is small beside the intervals.
    truth = sum(interval.value for interval in found) / len(found) if gain else 0.0
    assert 0.89 <= covered(found, truth) <= 0.995


def test_intervals_are_too_wide_rather_than_too_narrow_at_the_reference():
    """Where both methods are at the reference KID has no linear term, and a half-sample spreads more than its share: the interval is careful."""
    assert covered(studies(80, away=0.0, gain=0.0), 0.0) >= 0.95


def studies(count: int, *, away: float, gain: float) -> list[Interval]:
    d, n, m = 8, 40, 80
    rows, columns = half_samples(n, 200, seed=0, side="prompts"), half_samples(m, 200, seed=0, side="real")
    found = []
    for seed in range(count):
        real, prompts = normal(m, d, 3 * seed), normal(n, d, 3 * seed + 1, away)
        blocks = [GramBlock.of(prompts + 0.6 * normal(n, d, 1_000_000 + 2 * seed + which) - which * gain, real) for which in (0, 1)]
        replicates = blocks[1].kid(rows, columns) - blocks[0].kid(rows, columns)
        found.append(Interval(float(blocks[1].kid() - blocks[0].kid()), standard_error(replicates, n)))
    return found


def covered(found: list[Interval], truth: float) -> float:
    return sum(interval.low <= truth <= interval.high for interval in found) / len(found)


def test_the_extrapolated_distance_is_closer_to_the_truth():
    """Gaussians of one distribution, whose distance is 0: the bias of 64 points against many is mostly gone, and what is fitted is a line in 1 / n."""
    d, plain, limits = 16, [], []
    for seed in range(12):
        block = GramBlock.of(normal(64, d, seed), normal(3000, d, 1000 + seed))
        plain.append(float(block.fid()))
        limits.append(extrapolated(block, 64, 1, draws=10, seed=0))
    mean_plain, mean_limit = sum(plain) / 12, sum(limits) / 12
    assert mean_plain > 1
    assert abs(mean_limit) < 0.3 * mean_plain


def test_the_extrapolation_takes_prompts_whole_and_is_seeded():
    x, y = normal(40, 6, 0, 0.5), normal(50, 6, 1)
    block = GramBlock.of(x, y)
    assert extrapolated(block, 20, 2, draws=5, seed=3) == extrapolated(block, 20, 2, draws=5, seed=3)
    assert extrapolated(block, 20, 2, draws=5, seed=3) != extrapolated(block, 20, 2, draws=5, seed=4)
