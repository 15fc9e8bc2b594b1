"""Dilated and dispersed convolutions against their formulas."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Conv2d
from torch.nn import functional as F

from selfcascade.baselines.dilation import DispersedRedilation, Redilation
from selfcascade.baselines.dispersion import dispersed, dispersion_map, dispersion_system


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolution(stride: int = 1) -> Conv2d:
    conv = Conv2d(3, 2, 3, stride=stride, padding=1).double().requires_grad_(False)
    conv.weight.copy_(normal(2, 3, 3, 3, seed=8))
    conv.bias.copy_(normal(2, seed=9))
    return conv


def redilated(conv, x: torch.Tensor, dilation: float) -> torch.Tensor:
    plan = Redilation((x.shape[-2], x.shape[-1]), dilation, conv.stride[0])
    return plan.after(conv(plan.before(x)))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_an_integer_dilation_is_torchs_own(height, width, dilation, stride):
    """Any size, the sizes that are no multiple of the dilation among them, borders included, in float64."""
    conv, x = convolution(stride), normal(2, 3, height, width)
    expected = F.conv2d(x, conv.weight, conv.bias, stride=stride, padding=dilation, dilation=dilation)
    torch.testing.assert_close(redilated(conv, x, dilation), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dilation", [2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_on_a_periodic_input_the_interior_is_the_formula(dilation, stride):
    """``y(p) = b + sum_k w(k) x(s p + d k)`` with the input wrapped around, wherever no tap leaves the picture."""
    conv, period = convolution(stride), 6
    x = normal(1, 3, period, period).repeat(1, 1, 4, 4)
    expected = conv.bias[:, None, None] + sum(
        torch.einsum("oi,bihw->bohw", conv.weight[:, :, 1 + dy, 1 + dx], x.roll((-dilation * dy, -dilation * dx), (2, 3)))
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    )
    inside = slice(ceil(dilation / stride), (x.shape[-1] - dilation - 1) // stride + 1)
    found, wanted = redilated(conv, x, dilation)[..., inside, inside], expected[..., ::stride, ::stride][..., inside, inside]
    assert found.shape[-1] >= 6
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dilation", [1.5, 2.5, 4 / 3])
def test_a_fractional_dilation_reaches_that_far(dilation):
    """On an affine input, which bilinear stretching keeps, the interior is exactly ``sum_k w(k) x(p + d k)`` for the fraction itself."""
    conv = convolution()
    rows, columns = torch.meshgrid(torch.arange(30, dtype=torch.float64), torch.arange(30, dtype=torch.float64), indexing="ij")
    planes = normal(3, 3, seed=4)

    def picture(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([a * y + b * x + c for a, b, c in planes])[None]

    expected = conv.bias[:, None, None] + sum(
        torch.einsum("oi,bihw->bohw", conv.weight[:, :, 1 + dy, 1 + dx], picture(rows + dilation * dy, columns + dilation * dx))
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    )
    found = redilated(conv, picture(rows, columns), dilation)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[..., 6:-6, 6:-6], expected[..., 6:-6, 6:-6], atol=1e-9, rtol=1e-9)


@given(st.integers(4, 24), st.integers(4, 24), st.floats(1.01, 4), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_a_fractional_dilation_is_stretch_dilate_shrink(height, width, dilation, stride):
    conv, x = convolution(stride), normal(1, 3, height, width)
    d = ceil(dilation)
    stretched = F.interpolate(x, size=(round(height * d / dilation), round(width * d / dilation)), mode="bilinear")
    dilated = F.conv2d(stretched, conv.weight, conv.bias, stride=stride, padding=d, dilation=d)
    expected = F.interpolate(dilated, size=conv(x).shape[-2:], mode="bilinear")
    torch.testing.assert_close(redilated(conv, x, dilation), expected, atol=1e-12, rtol=1e-12)


def test_layout_and_precision_are_the_inputs():
    for dtype in (torch.float32, torch.bfloat16):
        conv = convolution().to(dtype)
        x = normal(2, 3, 9, 8).to(dtype, memory_format=torch.channels_last)
        found = redilated(conv.to(memory_format=torch.channels_last), x, 2)
        assert found.dtype == dtype
        torch.testing.assert_close(found, F.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2), atol=1e-5, rtol=1e-2)
    assert redilated(conv, x[..., :8, :], 2).is_contiguous(memory_format=torch.channels_last)


def test_gradients_pass_through():
    conv, x = convolution(), normal(1, 3, 8, 8).requires_grad_()
    (mine,) = torch.autograd.grad(redilated(conv, x, 2).square().sum(), x)
    (torchs,) = torch.autograd.grad(F.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2).square().sum(), x)
    torch.testing.assert_close(mine, torchs)


def test_the_map_of_dispersed_convolution_has_the_published_column_sums():
    """Method section 11: 0.954, 0.977 and 1.000 for corner, edge and centre taps."""
    sums = dispersion_map().sum(0).view(3, 3)
    expected = torch.tensor([[0.954, 0.977, 0.954], [0.977, 1.0, 0.977], [0.954, 0.977, 0.954]], dtype=torch.float64)
    assert torch.equal((sums * 1000).round(), expected * 1000)


def test_the_map_solves_the_least_squares():
    """Against torch's own solver by orthogonal factorisation; the residual is orthogonal to every column."""
    coefficients, targets = dispersion_system()
    assert coefficients.shape == (49 * 14 * 14 + 49 * 7 * 7, 25)
    found = dispersion_map()
    torch.testing.assert_close(found, torch.linalg.lstsq(coefficients, targets).solution, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(coefficients.T @ (coefficients @ found - targets), torch.zeros(25, 9, dtype=torch.float64), atol=1e-11, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_enlarged_kernel_is_the_best_for_any_kernel(seed):
    """The objective written out with convolutions over all unit inputs has no slope at ``R k``, for a random k: no system of ours is involved."""
    kernel = normal(1, 1, 3, 3, seed=seed)
    enlarged = dispersed(kernel).requires_grad_()
    inputs = torch.eye(49, dtype=torch.float64).view(49, 1, 7, 7)

    def up(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, size=(14, 14), mode="bilinear", align_corners=True)

    small = F.conv2d(inputs, kernel, padding=1)
    structure = up(small) - F.conv2d(up(inputs), enlarged, padding=2)
    pixels = small - F.conv2d(inputs, enlarged, padding=2)
    (slope,) = torch.autograd.grad(structure.square().sum() + 0.05**2 * pixels.square().sum(), enlarged)
    assert slope.abs().max() < 1e-10


def test_kernels_are_enlarged_each_by_itself():
    weight = normal(4, 3, 3, 3)
    enlarged = dispersed(weight)
    assert enlarged.shape == (4, 3, 5, 5)
    torch.testing.assert_close(enlarged[2, 1].flatten(), dispersion_map() @ weight[2, 1].flatten())
    assert dispersed(weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 3])
def test_a_dispersed_convolution_is_dilated_with_its_padding(stride, dilation):
    conv, x = convolution(stride), normal(2, 3, 14, 11)
    plan = DispersedRedilation(conv, dilation)
    found = plan.after(conv(plan.before(x)))
    expected = F.conv2d(x, dispersed(conv.weight), conv.bias, stride=stride, padding=2 * dilation, dilation=dilation)
    assert found.shape == conv(x).shape
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_a_fractional_dispersed_convolution_is_stretched_too():
    conv, x = convolution(), normal(2, 3, 12, 9)
    plan = DispersedRedilation(conv, 1.5)
    found = plan.after(conv(plan.before(x)))
    stretched = F.interpolate(x, size=(16, 12), mode="bilinear")
    expected = F.interpolate(F.conv2d(stretched, dispersed(conv.weight), conv.bias, padding=4, dilation=2), size=(12, 9), mode="bilinear")
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
