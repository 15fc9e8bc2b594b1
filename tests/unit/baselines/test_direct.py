"""Direct inference is what diffusers does when it is asked for the target size."""

from __future__ import annotations

import models
import pytest
import torch

from selfcascade import SelfCascadePipeline
from selfcascade.baselines import direct
from selfcascade.settings import SettingsError


@pytest.fixture(scope="module")
def stock():
    pipeline = models.base("small")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_direct_is_the_stock_pipeline_at_the_target_size(stock):
    call = {"height": 128, "width": 192, "num_inference_steps": 3, "output_type": "latent"}
    pipeline = SelfCascadePipeline.from_pipe(stock)
    pipeline.set_progress_bar_config(disable=True)
    ours = direct.sample(pipeline, "a red cat", generator=torch.Generator().manual_seed(0), **call).images
    assert torch.equal(ours, stock("a red cat", generator=torch.Generator().manual_seed(0), **call).images)
    noisy = direct.sample(pipeline, "a red cat", generator=torch.Generator().manual_seed(0), eta=1.0, **call).images
    again = direct.sample(pipeline, "a red cat", generator=torch.Generator().manual_seed(0), eta=1.0, **call).images
    assert torch.equal(noisy, again)
    assert not torch.allclose(noisy, ours, atol=0.1)


def test_direct_refuses_a_size_that_the_base_cannot_take(stock):
    with pytest.raises(SettingsError, match="multiples of 32"):
        direct.sample(SelfCascadePipeline.from_pipe(stock), "a cat", height=100, width=128)
