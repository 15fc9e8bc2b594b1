"""Recorded training steps: what they compute leaves nothing to the host, a shortened step is a step at a lower rate, a replay is the plain step."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfcascade.adaptation.autoencoder_training import AutoencoderTraining
from selfcascade.adaptation.denoiser_training import DenoiserTraining, build_tokenizer, tokenize
from selfcascade.adaptation.recorded_step import EAGER, RecordedStep, follow, set_rate, shortened_step
from selfcascade.config import AutoencoderSettings, DenoiserSettings

AUTOENCODER = AutoencoderSettings(channels=(8, 8, 8, 8), crop=16, batch=5, steps=30, refine_steps=10, equivariance=0.4)
DENOISER = DenoiserSettings(channels=(16, 16), text_width=16, text_layers=1, batch=8, steps=40, ema=0.9)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def autoencoder(device):
    pictures = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    return AutoencoderTraining(AUTOENCODER, pictures, seed=0, dtype=torch.float32, device=device)


def denoiser(device):
    tokenizer = build_tokenizer(["a cat", "two dogs"], max_tokens=8)
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    tokens, empty = tokenize(tokenizer, ["a cat", "two dogs"] * 4), tokenize(tokenizer, [""])
    return DenoiserTraining(DENOISER, latents, tokens, empty, vocabulary=len(tokenizer), seed=0, dtype=torch.float32)


class HostTensors(TorchDispatchMode):
    """Names of the operations that take or make a tensor of the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in tree_leaves((args, kwargs, made))):
            self.found.append(str(func))
        return made


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("kind", ["denoiser", "crops", "whole", "equivariant"])
def test_a_step_leaves_nothing_to_the_host(kind, monkeypatch):
    """On tensors without values a step that reads one fails, and none of its tensors comes from the host: recorded, both would be the first step's for ever."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no such device
    training = denoiser("meta") if kind == "denoiser" else autoencoder("meta")
    # AdamW keeps its count of steps on the host unless the device is one that it can be recorded on.
    training.optimizers = (*training.optimizers[:-1], torch.optim.SGD(training.optimizers[-1].param_groups[0]["params"], lr=0.1))
    with HostTensors() as host:
        if kind == "denoiser":
            draws = {"chosen": empty(8, dtype=torch.int64), "dropped": empty(8, dtype=torch.bool), "timesteps": empty(8, dtype=torch.int64)}
            reached = training.learn(**draws, noise=empty(8, 4, 8, 8), factor=empty(), decay=empty())
        else:
            count, side = (5, 2) if kind == "crops" else (1, 4)
            places = {"chosen": empty(count, dtype=torch.int64), "corners": empty(2, count, dtype=torch.int64)}
            reached = training.learn(kind, **places, noise=empty(count, 4, side, side), kl=empty(), factor=empty())
    assert reached.shape == ()
    assert host.found == []


def test_a_shortened_step_is_a_step_at_a_lower_rate():
    """Muon's and AdamW's updates are linear in the rate, weight decay included: equal weights along 5 steps of falling rates, to 1e-6."""
    torch.manual_seed(0)
    start = [torch.randn(12, 8), torch.randn(12)]
    gradients = [[torch.randn(12, 8), torch.randn(12)] for _ in range(5)]

    def path(step):
        weights = [torch.nn.Parameter(value.clone()) for value in start]
        optimizers = (torch.optim.Muon(weights[:1], lr=0.1, weight_decay=0.3), torch.optim.AdamW(weights[1:], lr=0.1, weight_decay=0.3))
        for number, now in enumerate(gradients):
            for weight, gradient in zip(weights, now, strict=True):
                weight.grad = gradient.clone()
            step(optimizers, 1 - number / 5)
        return [weight.detach() for weight in weights]

    def plain(optimizers, factor):
        set_rate(optimizers, 0.1 * factor)
        for optimizer in optimizers:
            optimizer.step()

    shortened = path(lambda optimizers, factor: shortened_step(optimizers, 0.1, torch.tensor(factor)))
    for found, expected, first in zip(shortened, path(plain), start, strict=True):
        assert (expected - first).abs().min() > 1e-4
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_an_average_follows_by_its_decay():
    average, weights = [torch.zeros(3, dtype=torch.float64)], [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]
    for _ in range(4):
        follow(average, weights, torch.tensor(0.75, dtype=torch.float64))
    torch.testing.assert_close(average[0], torch.full((3,), 1 - 0.75**4, dtype=torch.float64))


def test_without_cuda_a_step_is_called_as_it_is():
    seen = []
    recorded = RecordedStep(lambda value: seen.append(value) or value * 2, torch.device("cpu"))
    given = torch.tensor(3.0)
    assert [recorded(value=given).item() for _ in range(2 * EAGER)] == [6.0] * 2 * EAGER
    assert all(value is given for value in seen)


@cuda
@pytest.mark.parametrize("build", [autoencoder, denoiser])
def test_a_replay_is_the_plain_step(build):
    """A training that replays ends with the weights and losses of one that does not, to rounding; no loss told before is overwritten."""
    plain, recorded = build("cuda"), build("cuda")
    assert recorded.step == 0
    for step in [plain.recorded] if isinstance(plain.recorded, RecordedStep) else plain.recorded.values():
        step.calls = -(10**6)  # never recorded
    losses = [[training.advance() for _ in range(40)] for training in (plain, recorded)]
    torch.testing.assert_close(torch.stack(losses[1]), torch.stack(losses[0]), atol=1e-3, rtol=1e-2)
    assert len({loss.item() for loss in losses[1]}) > 30
    for one, other in zip(plain.optimizers[-1].param_groups[0]["params"], recorded.optimizers[-1].param_groups[0]["params"], strict=True):
        torch.testing.assert_close(other, one, atol=2e-3, rtol=1e-2)
