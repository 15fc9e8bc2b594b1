from __future__ import annotations

import torch
from torch import nn

from selfcascade.adaptation.ema import MovingAverage


def test_average_equals_its_closed_form() -> None:
    """After n updates: prod(d) p_0 + sum_i (1 - d_i) prod_{j > i} d_j p_i, with d_i = min(decay, i / (i + 9)), to float32 rounding."""
    values = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(values[0].float().clone())
    average = MovingAverage([("p", parameter)], decay=0.6)
    expected = values[0].float().double()
    for index in range(1, len(values)):
        with torch.no_grad():
            parameter.copy_(values[index])
        average.update([("p", parameter)])
    decays = [min(0.6, index / (index + 9)) for index in range(1, len(values))]
    expected = values[0] * torch.tensor(decays, dtype=torch.float64).prod()
    for index, decay in enumerate(decays, start=1):
        expected = expected + (1 - decay) * torch.tensor(decays[index:], dtype=torch.float64).prod() * values[index]
    torch.testing.assert_close(average.values["p"].double(), expected, rtol=0, atol=1e-6)


def test_average_starts_apart_from_the_parameter() -> None:
    """The average is a copy: what happens to the parameter before the next update does not reach it."""
    parameter = nn.Parameter(torch.ones(3))
    average = MovingAverage([("p", parameter)], decay=0.9)
    with torch.no_grad():
        parameter.add_(1)
    assert average.values["p"].tolist() == [1, 1, 1]
