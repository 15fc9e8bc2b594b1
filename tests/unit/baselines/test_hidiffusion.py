"""HiDiffusion as the peer package: it takes effect, and nothing of it stays. Skipped where the extra ``peers`` is not installed."""

from __future__ import annotations

import copy
import os
import sys
from importlib.util import find_spec

import models
import pytest
import torch
from diffusers import DDIMScheduler

from selfcascade import SelfCascadePipeline
from selfcascade.baselines import direct, hidiffusion
from selfcascade.baselines.hidiffusion import hidiffused
from selfcascade.config import BaselineSettings
from selfcascade.settings import SettingsError

pytestmark = pytest.mark.skipif(find_spec("hidiffusion") is None and "CI" not in os.environ, reason="the extra peers is not installed")
CALL = {"height": 256, "width": 256, "num_inference_steps": 4, "output_type": "latent"}


def pipeline_of(kind: models.Kind) -> SelfCascadePipeline:
    stock = models.base(kind)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    made = SelfCascadePipeline.from_pipe(stock)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_it_changes_the_pictures_and_leaves_the_unet_as_it_was(kind):
    """Classes, attributes, hooks, weights and output bits, after a call and after one that fails in the middle."""
    pipeline = pipeline_of(kind)
    unet = pipeline.unet
    before = {name: (type(module), sorted(vars(module))) for name, module in unet.named_modules()}
    upsamplers, hooks = unet.num_upsamplers, [list(module._forward_pre_hooks) for module in unet.modules()]
    weights, plain = copy.deepcopy(unet.state_dict()), direct.sample(pipeline, "a red cat", generator=[torch.Generator().manual_seed(0)], **CALL).images
    found = hidiffusion.sample(pipeline, "a red cat", eta=0.0, generator=[torch.Generator().manual_seed(0)], **CALL).images
    assert found.shape == plain.shape
    assert not torch.allclose(found, plain, atol=1e-2)

    def fail(*_):
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        hidiffusion.sample(pipeline, "a red cat", callback_on_step_end=fail, **CALL)
    assert {name: (type(module), sorted(vars(module))) for name, module in unet.named_modules()} == before
    assert [list(module._forward_pre_hooks) for module in unet.modules()] == hooks
    assert unet.num_upsamplers == upsamplers
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert "diffusers.pipelines.controlnet.multicontrolnet" not in sys.modules
    assert torch.equal(direct.sample(pipeline, "a red cat", generator=[torch.Generator().manual_seed(0)], **CALL).images, plain)


def test_it_is_the_package_on_a_stock_pipeline():
    """Bit for bit the stock pipeline under the package's own switch, seeded alike."""
    stock = models.base("sd21")
    stock.set_progress_bar_config(disable=True)
    ours = hidiffusion.sample(pipeline_of("sd21"), "a red cat", eta=0.0, generator=torch.Generator().manual_seed(0), **CALL).images
    with hidiffused(stock), torch.random.fork_rng(devices=[]):
        torch.manual_seed(hidiffusion.WINDOW_SEED)
        assert torch.equal(ours, stock("a red cat", generator=torch.Generator().manual_seed(0), **CALL).images)


def test_a_sample_of_a_batch_of_two_is_the_sample_alone():
    """The package shifts windows by torch's default generator; ours is seeded, and left where it was."""
    pipeline, prompts = pipeline_of("sd21"), ["a red cat", "sun"]
    state = torch.get_rng_state()
    together = hidiffusion.sample(pipeline, prompts, generator=[torch.Generator().manual_seed(seed) for seed in range(2)], **CALL).images
    assert torch.equal(torch.get_rng_state(), state)
    for seed, prompt in enumerate(prompts):
        torch.rand(1)  # somebody else draws from the default generator
        alone = hidiffusion.sample(pipeline, prompt, generator=[torch.Generator().manual_seed(seed)], **CALL).images
        torch.testing.assert_close(together[seed : seed + 1], alone, atol=1e-3, rtol=1e-3)


def test_a_base_it_does_not_know_is_refused():
    pipeline = pipeline_of("small")
    with pytest.raises(SettingsError, match=r"not applicable to a base of family 'small'; the package knows SD 1.5, SD 2.1 and SDXL only"):
        hidiffusion.sample(pipeline, "a cat", height=128, width=128)
    assert hidiffusion.refusal(pipeline_of("sd21").spec, 128, 128, BaselineSettings()) is None
