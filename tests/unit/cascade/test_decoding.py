"""Decoding: alone, in fp32, in tiles above an area, and the autoencoder as it was afterwards."""

from __future__ import annotations

import models
import pytest
import torch

from selfcascade.cascade.decoding import decode


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch():
    vae, latents = models.vae(), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = decode(vae, latents)
    assert together.shape == (3, 3, 64, 64)
    assert all(torch.equal(together[n : n + 1], decode(vae, latents[n : n + 1])) for n in range(3))
    torch.testing.assert_close(together, vae.decode(latents / vae.config.scaling_factor).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tiling", [False, True])
@torch.no_grad()
def test_big_pictures_are_decoded_in_tiles_and_small_ones_whole(tiling):
    vae, latents = models.vae(), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    vae.use_tiling = tiling
    sides = []
    handle = vae.decoder.register_forward_hook(lambda _, args, out: sides.append(args[0].shape[-1]))
    tiled = decode(vae, latents, tile_above=127 * 128)
    assert max(sides) == 8
    sides.clear()
    whole = decode(vae, latents, tile_above=128 * 128)
    assert sides == [16] or tiling
    handle.remove()
    assert vae.use_tiling is tiling
    assert tiled.shape == whole.shape == (1, 3, 128, 128)
    assert (tiled - whole).abs().mean() < 0.5 * whole.std()  # a tile's own group statistics keep it from being equal


@pytest.mark.parametrize("upcast", [True, False])
@torch.no_grad()
def test_a_half_precision_autoencoder_that_overflows_decodes_in_fp32(upcast):
    vae, latents = models.vae().to(torch.bfloat16), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    vae.register_to_config(force_upcast=upcast)
    used = []
    handle = vae.decoder.register_forward_hook(lambda module, args, out: used.append(out.dtype))
    out = decode(vae, latents)
    handle.remove()
    assert used == [torch.float32 if upcast else torch.bfloat16]
    assert out.dtype == torch.float32
    assert vae.dtype == torch.bfloat16


@torch.no_grad()
def test_an_error_leaves_the_autoencoder_as_it_was():
    vae = models.vae().to(torch.bfloat16)
    with pytest.raises(RuntimeError):
        decode(vae, torch.zeros(1, 3, 64, 64), tile_above=1)
    assert not vae.use_tiling
    assert vae.dtype == torch.bfloat16
