"""Configurations of published bases: whole UNets on the meta device, counted."""

from __future__ import annotations

import pytest
import torch

from selfcascade.cascade.published import PUBLISHED, published_unet
from selfcascade.settings import SettingsError


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_unet_has_the_published_size(name):
    """865,910,724 numbers for SD 2.1 and 2,567,463,684 for SDXL; four-channel latents and time width 1,280 everywhere."""
    with torch.device("meta"):
        unet = published_unet(name)
    assert sum(parameter.numel() for parameter in unet.parameters()) == PUBLISHED[name].parameters
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}
    assert (unet.config.in_channels, unet.config.out_channels, unet.time_embedding.linear_2.out_features) == (4, 4, 1280)


def test_an_unknown_published_base_is_refused_with_those_that_there_are():
    with pytest.raises(SettingsError, match=r"'sd-3' is not known; choose sd-1\.5, sd-2\.1-base, sd-2\.1, sdxl, text-to-video$"):
        published_unet("sd-3")
