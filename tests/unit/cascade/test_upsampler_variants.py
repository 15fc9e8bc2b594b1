"""The four variants of the feature upsampler, each against its formula written a second time: float64, einsum over unfolded patches, no torch layer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_upsampler import CONFIGS, TINY, fresh, inputs, randomised
from torch import Tensor

from selfcascade.cascade.upsampler import FeatureUpsampler

LEVEL = 1


def enlarged(h: Tensor, size: tuple[int, int], *, weights: str) -> Tensor:
    """Enlargement as two matrices, one a side, by pixel centres: ``weights`` is "linear" or "nearest"."""

    def matrix(small: int, large: int) -> Tensor:
        m = torch.zeros(large, small, dtype=torch.float64)
        for i in range(large):
            centre = (i + 0.5) * small / large - 0.5
            if weights == "nearest":
                m[i, min(small - 1, math.floor(centre + 0.5))] = 1
                continue
            low = math.floor(max(centre, 0))
            share = max(centre, 0) - low
            m[i, low] += 1 - share
            m[i, min(low + 1, small - 1)] += share
        return m

    return torch.einsum("yh,bchw,xw->bcyx", matrix(h.shape[2], size[0]), h, matrix(h.shape[3], size[1]))


def convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """A 3x3 convolution with zero padding: nine shifted copies. ``kernel`` is (O, C, 3, 3)."""
    padded = torch.zeros(x.shape[0], x.shape[1], x.shape[2] + 2, x.shape[3] + 2, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    patches = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # (B, C, H, W, 3, 3)
    return torch.einsum("bchwij,ocij->bohw", patches, kernel)


def activated(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def normalised(x: Tensor, groups: int = 16, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    parts = x.reshape(x.shape[0], groups, -1)
    parts = (parts - parts.mean(-1, keepdim=True)) / torch.sqrt(parts.var(-1, unbiased=False, keepdim=True) + 1e-5)
    out = parts.reshape(x.shape)
    return out if scale is None else torch.einsum("bchw,c->bchw", out, scale) + offset[None, :, None, None]


def tau_of(t: Tensor) -> Tensor:
    return torch.tensor([[1, x, math.cos(math.pi * x), math.sin(math.pi * x)] for x in (t.double() / 1000).tolist()], dtype=torch.float64)


def residual(w: dict[str, Tensor], block: int, activation: Tensor, emb: Tensor) -> Tensor:
    """What a block of variants A and B adds, from the activated and normalised feature on."""
    p = f"blocks.{block}."
    v = convolved(activation, w[p + "conv1.weight"]) + w[p + "conv1.bias"][None, :, None, None]
    v = v + (torch.einsum("bt,ct->bc", activated(emb), w[p + "time.weight"]) + w[p + "time.bias"])[:, :, None, None]
    v = activated(normalised(v, 16, w[p + "norm2.weight"], w[p + "norm2.bias"]))
    return convolved(v, w[p + "conv2.weight"]) + w[p + "conv2.bias"][None, :, None, None]


def first_activation(w: dict[str, Tensor], block: int, u: Tensor) -> Tensor:
    return activated(normalised(u, 16, w[f"blocks.{block}.norm1.weight"], w[f"blocks.{block}.norm1.bias"]))


def variant_a(w: dict[str, Tensor], h: Tensor, t: Tensor, emb: Tensor, size: tuple[int, int], final: str) -> Tensor:
    grown = u = enlarged(h, size, weights="linear")
    for block in range(2):
        u = u + residual(w, block, first_activation(w, block, u), emb)
    return {"residual": u - grown, "identity": u, "gate": w.get("gate", torch.tensor(0.0)) * u}[final]


def variant_b(w: dict[str, Tensor], h: Tensor, t: Tensor, emb: Tensor, size: tuple[int, int], final: str) -> Tensor:
    u = enlarged(h, size, weights="nearest") + residual(w, 0, enlarged(first_activation(w, 0, h), size, weights="nearest"), emb)
    return u + residual(w, 1, first_activation(w, 1, u), emb)


def variant_c(w: dict[str, Tensor], h: Tensor, t: Tensor, emb: Tensor, size: tuple[int, int], final: str) -> Tensor:
    tau, u = tau_of(t), enlarged(h, size, weights="linear")
    groups = w["gamma"].shape[0]
    member = torch.nn.functional.one_hot(torch.arange(h.shape[1]) * groups // h.shape[1], groups).double()  # (C, G): which group a channel is in
    for b in range(2):
        kernels = torch.diag_embed(torch.einsum("cg,gij->ijc", member, w["kernels"][b])).permute(2, 3, 0, 1)  # a full kernel, diagonal in its channels
        scale = 1 + torch.einsum("cg,gk,bk->bc", member, w["scale"][b], tau)
        offset = torch.einsum("cg,gk,bk->bc", member, w["offset"][b], tau)
        u = u + torch.einsum("bc,bchw->bchw", scale, convolved(activated(normalised(u)), kernels)) + offset[:, :, None, None]
    return torch.einsum("cg,gk,bk,bchw->bchw", member, w["gamma"], tau, u)


def variant_d(w: dict[str, Tensor], h: Tensor, t: Tensor, emb: Tensor, size: tuple[int, int], final: str) -> Tensor:
    tau, u = tau_of(t), enlarged(h, size, weights="linear")
    z = torch.einsum("cd,bchw->bdhw", w["basis"], u)
    for b in range(2):
        v = convolved(activated(z), w["kernels"][b])
        z = z + torch.einsum("bd,bdhw->bdhw", 1 + tau @ w["scale"][b].T, v) + (tau @ w["offset"][b].T)[:, :, None, None]
    return torch.einsum("k,bk,bchw->bchw", w["gamma"], tau, u) + torch.einsum("cd,dk,bk,bdhw->bchw", w["basis"], w["mixed_gamma"], tau, z)


FORMULAS = {"A": variant_a, "B": variant_b, "C": variant_c, "D": variant_d}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@settings(max_examples=8, deadline=None)
@given(
    small=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    more=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    t=st.tuples(st.integers(0, 999), st.integers(0, 999)),
    seed=st.integers(0, 99),
)
def test_a_variant_is_its_formula(config, small, more, t, seed):
    """Method 7.2 to 7.5 to 1e-5, at any size of pivot and target feature and any timesteps, for weights as after training."""
    phi = randomised(fresh(**config), seed).levels[LEVEL]
    generator = torch.Generator().manual_seed(seed)
    feature, emb = torch.randn(2, TINY["channels"][LEVEL], *small, generator=generator), torch.randn(2, 24, generator=generator)
    size = (small[0] + more[0], small[1] + more[1])
    weights = {name: tensor.double() for name, tensor in phi.state_dict().items()}
    with torch.no_grad():
        out = phi(feature, t=torch.tensor(t), emb=emb, size=size)
    expected = FORMULAS[config["variant"]](weights, feature.double(), torch.tensor(t), emb.double(), size, config.get("final", "residual"))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_released_code_enlarges_twice_over():
    """At a factor of 2 a fresh variant B is the feature with every element repeated 2 x 2."""
    case = inputs(0) | {"size": (12, 8)}
    out = fresh(variant="B", inject="main", final="identity")(0, **case)
    assert torch.equal(out, case["feature"].repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_identity_start_is_the_enlarged_feature():
    case = inputs(0)
    expected = enlarged(case["feature"].double(), case["size"], weights="linear")
    torch.testing.assert_close(fresh(variant="A", final="identity")(0, **case).double(), expected, atol=1e-6, rtol=1e-6)


def test_variant_c_treats_the_channels_of_a_group_alike():
    """Exchanging two channels that share both groups exchanges them in the result."""
    case = inputs(2)
    phi = randomised(fresh(variant="C")).levels[2]
    swapped = case["feature"].clone()
    swapped[:, [0, 1]] = case["feature"][:, [1, 0]]
    out = phi(**case)
    out[:, [0, 1]] = out[:, [1, 0]]
    torch.testing.assert_close(phi(**case | {"feature": swapped}), out, atol=1e-5, rtol=1e-5)


def test_variant_d_mixes_channels_inside_its_subspace_alone():
    """A change of the feature inside the span of P changes the result inside that span alone."""
    case = inputs(1)
    upsampler = randomised(fresh(variant="D"))
    basis = upsampler.levels[1].basis
    outside = torch.eye(48) - basis @ basis.T
    without = case | {"feature": torch.einsum("dc,bchw->bdhw", outside, case["feature"])}
    change = (upsampler(1, **without) - upsampler(1, **case)).detach()
    assert change.abs().max() > 0.1
    left = torch.einsum("dc,bchw->bdhw", outside, change)
    torch.testing.assert_close(left, torch.zeros_like(left), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("config", "sees"), [(config, "emb" if config["variant"] in "AB" else "t") for config in CONFIGS], ids=str)
def test_an_upsampler_is_aware_of_time(config, sees):
    case = inputs(0)
    upsampler = randomised(fresh(**config))
    other = case | {sees: case[sees].flip(0)}
    assert not torch.allclose(upsampler(0, **case), upsampler(0, **other), atol=1e-3)
    unseen = "t" if sees == "emb" else "emb"
    assert torch.equal(upsampler(0, **case), upsampler(0, **case | {unseen: case[unseen].flip(0)}))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_sample_does_not_see_its_neighbours(config):
    case = inputs(0)
    upsampler = randomised(fresh(**config))
    alone = upsampler(0, case["feature"][1:], t=case["t"][1:], emb=case["emb"][1:], size=case["size"])
    torch.testing.assert_close(upsampler(0, **case)[1:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_half_precision_upsampler_takes_features_of_any_precision(config):
    case = inputs(0)
    upsampler: FeatureUpsampler = randomised(fresh(**config))
    expected = upsampler(0, **case)
    out = upsampler.to(torch.bfloat16)(0, **case)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)
