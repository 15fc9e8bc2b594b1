"""Precision, recall, density and coverage by loops and on clouds whose answer is known; power by frequency against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfcascade.evaluation import manifold as module
from selfcascade.evaluation.intervals import half_samples, standard_error
from selfcascade.evaluation.manifold import DENSITY_NEIGHBOURS, NAMES, PRECISION_NEIGHBOURS, manifold, manifold_replicates, realism
from selfcascade.evaluation.resize import resize
from selfcascade.evaluation.spectrum import BINS, detail, spectrum


def cloud(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def by_loops(real, generated):
    """The definitions, word by word."""

    def distance(a, b):
        return float((a - b).norm())

    def radius(points, place, k):
        return sorted(distance(points[place], other) for number, other in enumerate(points) if number != place)[k - 1]

    def within(point, points, k):
        return [place for place in range(len(points)) if distance(point, points[place]) <= radius(points, place, k)]

    precision = np.mean([bool(within(point, real, PRECISION_NEIGHBOURS)) for point in generated])
    recall = np.mean([bool(within(point, generated, PRECISION_NEIGHBOURS)) for point in real])
    held = [within(point, real, DENSITY_NEIGHBOURS) for point in generated]
    density = np.mean([len(places) for places in held]) / DENSITY_NEIGHBOURS
    coverage = len({place for places in held for place in places}) / len(real)
    return precision, recall, density, coverage


@settings(max_examples=15, deadline=None)
@given(st.integers(6, 14), st.integers(6, 14), st.integers(1, 4), st.integers(0, 99), st.floats(0, 3), st.integers(2, 20))
def test_the_four_numbers_are_their_definitions(n, m, d, seed, shift, rows):
    """However many real pictures are held at once."""
    real, generated = cloud(n, d, seed), cloud(m, d, seed + 100, shift)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS", rows)
        found = manifold(real, generated)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(by_loops(real, generated))


def test_half_samples_have_the_numbers_of_their_halves():
    """A draw is the four numbers of the chosen features alone; a side without neighbours, or too large to be kept, has none."""
    real, generated = cloud(30, 3, 0), cloud(24, 3, 1, 0.7)
    columns, rows = half_samples(30, 5, seed=0, side="real"), half_samples(24, 5, seed=0, side="prompts")
    found = manifold_replicates(real, generated, columns, rows)
    for draw in range(5):
        alone = manifold(real[columns[draw]], generated[rows[draw]])
        assert [float(found[name][draw]) for name in NAMES] == pytest.approx([getattr(alone, name) for name in NAMES])
    assert manifold_replicates(real, generated, columns[:, :5], rows) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LARGEST_REPLICATED", 29)
        assert manifold_replicates(real, generated, columns, rows) is None


def test_their_errors_are_what_new_samples_spread():
    """Over 100 draws of both clouds the four numbers spread by what half-samples of one draw say, to a fifth."""
    columns, rows = half_samples(120, 40, seed=0, side="real"), half_samples(100, 40, seed=0, side="prompts")
    values, errors = {name: [] for name in NAMES}, {name: [] for name in NAMES}
    for seed in range(100):
        real, generated = cloud(120, 6, seed), cloud(100, 6, seed + 1000, 0.5)
        found, drawn = manifold(real, generated), manifold_replicates(real, generated, columns, rows)
        for name in NAMES:
            values[name].append(getattr(found, name))
            errors[name].append(standard_error(drawn[name], 100))
    for name in NAMES:
        assert np.mean(errors[name]) == pytest.approx(np.std(values[name]), rel=0.2), name


def realism_by_loops(real, generated):
    """Equation 3 of Kynkäänniemi et al. (2019), with the spheres above the median left out."""
    radii = [sorted(float((point - other).norm()) for place, other in enumerate(real) if place != number)[2] for number, point in enumerate(real)]
    median = sorted(radii)[(len(radii) - 1) // 2]
    return [
        max(radius / max(float((point - centre).norm()), 1e-6) for centre, radius in zip(real, radii, strict=True) if radius <= median) for point in generated
    ]


@settings(max_examples=15, deadline=None)
@given(st.integers(6, 14), st.integers(1, 8), st.integers(1, 4), st.integers(0, 99), st.floats(0, 3), st.integers(2, 20))
def test_realism_is_its_definition(n, m, d, seed, shift, rows):
    real, generated = cloud(n, d, seed), cloud(m, d, seed + 100, shift)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS", rows)
        assert realism(real, generated).tolist() == pytest.approx(realism_by_loops(real, generated), rel=1e-6)
    assert realism(real[:5], generated) is None


def test_realism_tells_what_lies_among_the_real_from_what_does_not():
    """A copy of an ordinary picture is as real as can be, a point of the same cloud about 1, a far one little, whatever an odd real picture near it says."""
    real = torch.cat([cloud(200, 4, 0), torch.full((1, 4), 30.0, dtype=torch.float64)])
    copy = real[real.norm(dim=1).argmin()]
    found = realism(real, torch.stack([copy, *cloud(3, 4, 1), torch.full((4,), 25.0, dtype=torch.float64)]))
    assert found[0] > 1e3
    assert (found[1:4] > 0.5).all()
    assert found[4] < 0.1


def test_equal_clouds_are_covered_and_far_ones_are_not():
    real = cloud(200, 8, 0)
    same = manifold(real, real)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = manifold(real, real + 100)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_one_mode_of_two_is_precise_and_covers_half():
    """What is real lies in two places and what is generated in one of them: everything looks real, and half of what is real is reached."""
    real = torch.cat([cloud(150, 6, 0), cloud(150, 6, 1, 40.0)])
    found = manifold(real, cloud(300, 6, 2))
    assert found.precision > 0.8
    assert found.recall == pytest.approx(0.45, abs=0.06)
    assert found.coverage == pytest.approx(0.5, abs=0.05)
    twice = manifold(real, torch.cat([cloud(150, 6, 2), cloud(150, 6, 3, 40.0)]))
    assert twice.coverage > 0.9


def test_one_odd_real_point_raises_precision_but_not_density():
    """Naeem et al., figure 2: an outlier's sphere is huge, and generated points in nowhere fall into it."""
    real = torch.cat([cloud(200, 4, 0), torch.full((1, 4), 30.0, dtype=torch.float64)])
    found = manifold(real, cloud(100, 4, 1, 15.0))
    assert found.precision > 0.9
    assert found.density < 0.25


def test_too_few_points_have_no_neighbours():
    assert manifold(cloud(5, 3, 0), cloud(20, 3, 1)) is None
    assert manifold(cloud(20, 3, 0), cloud(5, 3, 1)) is None


def picture(values):
    return np.repeat(np.clip(values, 0, 255).round().astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("cycles", [0.05, 0.1, 0.2, 0.3, 0.45])
@pytest.mark.parametrize("angle", [0, 45, 90])
def test_a_wave_lies_in_its_ring_with_the_power_of_a_wave(cycles, angle):
    """A sine of amplitude a has power a^2 / 2; the window spreads it over neighbouring rings only."""
    y, x = np.mgrid[:128, :128]
    phase = 2 * np.pi * cycles * (x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle)))
    found = spectrum(picture(128 + 60 * np.sin(phase)))
    ring = int(cycles * 2 * BINS)
    assert found.sum() == pytest.approx(60**2 / 2, rel=0.03)
    assert found[max(0, ring - 1) : ring + 2].sum() > 0.97 * found.sum()
    assert (float(detail(found[None])[0]) > 0.5 * found.sum()) == (cycles > 0.25)


def test_noise_is_white_and_a_plain_picture_has_no_power():
    """Of white noise every frequency has the same power, so rings have what their areas have."""
    noise = np.random.default_rng(0).normal(128, 20, (256, 256))
    found = spectrum(picture(noise))
    areas = np.pi * (np.arange(1, BINS + 1) ** 2 - np.arange(BINS) ** 2) / (2 * BINS) ** 2
    np.testing.assert_allclose(found.reshape(4, 8).sum(axis=1)[1:], (20**2 * areas).reshape(4, 8).sum(axis=1)[1:], rtol=0.05)
    assert spectrum(np.full((64, 48, 3), 77, np.uint8)).max() < 1e-20


def test_enlarging_makes_no_detail():
    """A picture of half the side, enlarged, has a hundredth of the detail of the whole."""
    whole = picture(np.random.default_rng(1).normal(128, 30, (128, 128)))
    tensor = torch.from_numpy(whole).permute(2, 0, 1)[None]
    small = resize(tensor, (64, 64)).round().to(torch.uint8)
    large = resize(small, (128, 128))[0].round().to(torch.uint8).permute(1, 2, 0).numpy()
    sharp, soft = (float(detail(spectrum(each)[None])[0]) for each in (whole, large))
    assert soft < 0.05 * sharp
