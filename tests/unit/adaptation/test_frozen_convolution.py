"""Frozen convolutions that keep no input: the same numbers, to the bit, from less memory; a convolution that trains is as torch has it."""

import copy

import pytest
import torch
from test_gradient_checkpointing import WHAT, kept_bytes, trainer_for
from test_trainer import state
from tiny_run import synthetic_latents, tiny_settings
from torch import nn

from selfcascade.adaptation.frozen_convolution import keep_no_inputs
from selfcascade.config import ComputeSettings

HOW = [{}, {"padding": 1}, {"stride": 2, "padding": 1, "bias": False}, {"dilation": 2, "padding": 2}, {"groups": 4, "padding": (1, 0)}]


def passed(network, x, **autocast):
    """Output, and gradient of the input, (B, C, H, W), and of what trains."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", **autocast):
        found = network(x)
    (found.float() ** 2).sum().backward()
    return [found.detach(), x.grad, *(parameter.grad for parameter in network.parameters() if parameter.grad is not None)]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("autocast", [{"enabled": False}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [False, True])
def test_output_and_gradients_are_those_of_torch(how, autocast, weights, trains):
    if weights == torch.bfloat16 and not autocast.get("enabled", True):
        autocast = {"dtype": torch.bfloat16}
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, 3, **how).to(weights).requires_grad_(trains)
    ours = copy.deepcopy(plain)
    keep_no_inputs(ours)
    x = torch.randn(2, 8, 9, 7)
    assert same(passed(plain, x, **autocast), passed(ours, x, **autocast))


def test_inputs_of_frozen_convolutions_are_not_kept():
    """Between two activations that keep theirs; where the weights train, or nothing has a gradient, all is as before."""

    def kept(network, x):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: shapes.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor):
            network(x)
        return [shape for shape in shapes if shape[0] == len(x)]

    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    network = nn.Sequential(nn.SiLU(), nn.Conv2d(4, 5, 3), nn.SiLU(), nn.Conv2d(5, 6, 3)).requires_grad_(False)
    before = kept(network, x)
    keep_no_inputs(network)
    keep_no_inputs(network)  # again changes nothing
    assert (len(before), len(kept(network, x))) == (4, 2)
    assert len(kept(network.requires_grad_(True), x)) == 4
    assert kept(network.requires_grad_(False), x.detach()) == []


def test_a_copy_has_its_own_weights():
    """Such as the one that previews or LoRA take of a UNet."""
    network = nn.Conv2d(2, 2, 1, bias=False).requires_grad_(False)
    keep_no_inputs(network)
    other = copy.deepcopy(network)
    nn.init.zeros_(other.weight)
    x = torch.ones(1, 2, 3, 3, requires_grad=True)
    assert not other(x).any()
    assert network(x).any()
    assert set(other.state_dict()) == {"weight"}


@pytest.mark.parametrize("changes", [WHAT["C"], WHAT["main"], WHAT["lora"], WHAT["full"]], ids=["C", "main", "lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_the_same_bit_for_bit_and_holds_less(tiny_base, monkeypatch, changes, dtype):
    """Three steps of what passes through a frozen UNet; of a UNet that trains nothing changes."""
    latents = synthetic_latents()
    settings = tiny_settings(tiny_base, compute=ComputeSettings(dtype=dtype), **changes)
    ours = trainer_for(latents, settings)
    with monkeypatch.context() as patch:
        patch.setattr("selfcascade.adaptation.objective.keep_no_inputs", lambda network: None)
        plain = trainer_for(latents, settings)
    with torch.autocast("cpu", ours.dtype, enabled=dtype != "float32"):
        kept, before = kept_bytes(ours), kept_bytes(plain)
    assert kept == before if settings.trainable == "full" else kept < 0.93 * before
    for trainer in (ours, plain):
        for _ in range(3):
            trainer.advance()
    assert state(ours) == state(plain)
