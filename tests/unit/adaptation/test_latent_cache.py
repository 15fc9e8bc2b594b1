from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selfcascade.adaptation import cache as module
from selfcascade.adaptation.cache import Encoder, LatentCache, Recipe, missing_shards, shard_key, shards_of
from selfcascade.adaptation.tensorfile import open_tensor_file, written_tensor_file
from selfcascade.bases import load_pipeline, resolve_base
from selfcascade.cascade.pipeline import SelfCascadePipeline
from selfcascade.curation.reading import read_samples
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, IntegrityError, NotFound, Store, resolve


@pytest.fixture(scope="module")
def recipe(tiny_base: Path) -> Recipe:
    return Recipe.here(base=resolve_base(str(tiny_base)).version, size=128, device="cpu")


@pytest.fixture(scope="module")
def encoder(tiny_base: Path, recipe: Recipe) -> Encoder:
    return Encoder(SelfCascadePipeline.from_pipe(load_pipeline(resolve_base(str(tiny_base)))), recipe)


@pytest.fixture
def dataset(world: Store) -> Artifact:
    return resolve(world, "datasets/pictures")


def never() -> Encoder:
    raise AssertionError("a whole cache needs no encoder")


def test_cached_equals_uncached(world: Store, dataset: Artifact, recipe: Recipe, encoder: Encoder) -> None:
    """For each train and tune sample, in any order, the batch is bit for bit what encoding picture and caption now gives; the test split is not there."""
    cache = LatentCache.open(world, dataset, recipe, lambda: encoder)
    samples = {sample.key: sample for sample in read_samples(dataset)}
    keys = [key for key in reversed(samples) if samples[key].split != "test"]
    assert sorted(cache.keys("train") + cache.keys("tune")) == sorted(keys)
    assert len(keys) < len(samples)
    batch = cache.batch(keys)
    for row, key in enumerate(keys):
        now = encoder.latents(samples[key].image) | encoder.text(samples[key].caption)
        assert torch.equal(batch.target[row], now["target"])
        assert torch.equal(batch.pivot[row], now["pivot"])
        assert torch.equal(batch.text.text[row], now["text"])
        assert cache.caption(key) == samples[key].caption
    assert (batch.target.shape[1:], batch.pivot.shape[1:]) == ((4, 16, 16), (4, 8, 8))


def test_latents_are_the_autoencoders_scaled_mean(tiny_base: Path, encoder: Encoder, dataset: Artifact) -> None:
    """E(x) and, of the picture halved in pixels by 2 x 2 means, E(Downsample(x)); by an autoencoder that was loaded apart, to float tolerance."""
    vae = load_pipeline(resolve_base(str(tiny_base))).vae
    image = next(iter(read_samples(dataset))).image
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    halved = pixels.reshape(1, 3, 64, 2, 64, 2).mean((3, 5))
    found = encoder.latents(image)
    with torch.no_grad():
        torch.testing.assert_close(found["target"], vae.encode(pixels).latent_dist.mode()[0] * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["pivot"], vae.encode(halved).latent_dist.mode()[0] * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)


def test_a_whole_cache_is_read_and_a_missing_piece_is_made_again(world: Store, dataset: Artifact, recipe: Recipe, encoder: Encoder) -> None:
    """A second opening encodes nothing. A deleted piece comes back with the same bytes, and the cache has the digest that it had."""
    before = LatentCache.open(world, dataset, recipe, lambda: encoder)
    assert missing_shards(world, dataset, recipe) == []
    assert LatentCache.open(world, dataset, recipe, never).digest == before.digest
    name, sha256 = list(shards_of(dataset).items())[1]
    piece = world.read(shard_key(recipe, sha256))
    world.delete([shard_key(recipe, sha256)])
    assert missing_shards(world, dataset, recipe) == [name]
    assert LatentCache.open(world, dataset, recipe, lambda: encoder).digest == before.digest
    assert world.read(shard_key(recipe, sha256)) == piece


def test_a_piece_of_another_recipe_is_refused(world: Store, dataset: Artifact, recipe: Recipe, encoder: Encoder) -> None:
    """Latents that lie under the address of a recipe by which they were not made are named and refused, and so are those of another shard."""
    LatentCache.open(world, dataset, recipe, lambda: encoder)
    other = replace(recipe, size=64)
    first, second = shards_of(dataset).values()
    world.put_cache(shard_key(other, first), world.read(shard_key(recipe, first)))
    with pytest.raises(IntegrityError, match=rf"{other.digest[:24]}.*holds latents of recipe {recipe.digest[:12]}"):
        LatentCache.open(world, dataset, other, never)
    elsewhere = replace(recipe, threads=3)
    for target, source in ((first, second), (second, first)):
        file = open_tensor_file(world, shard_key(recipe, source))
        with written_tensor_file({key: file.tensor(key) for key in file.names}, file.record | {"recipe": elsewhere.digest}) as path:
            world.put_cache(shard_key(elsewhere, target), path)
    with pytest.raises(IntegrityError, match=rf"shard {second[:12]}, not of"):
        LatentCache.open(world, dataset, elsewhere, never)


def test_a_damaged_piece_is_refused_by_name(world: Store, dataset: Artifact, recipe: Recipe, encoder: Encoder) -> None:
    """One flipped byte of latents, and the message names the object and says that deleting it is safe."""
    LatentCache.open(world, dataset, recipe, lambda: encoder)
    key = shard_key(recipe, next(iter(shards_of(dataset).values())))
    whole = world.read(key)
    world.put_cache(key, whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    try:
        with pytest.raises(IntegrityError, match=rf"{key}.*delete it"):
            LatentCache.open(world, dataset, recipe, never)
    finally:
        world.put_cache(key, whole)


@pytest.mark.parametrize("field", [field.name for field in fields(Recipe)])
def test_whatever_shapes_the_bytes_shapes_the_address(recipe: Recipe, field: str) -> None:
    value: Any = getattr(recipe, field)
    changed = replace(recipe, **{field: value + 1 if isinstance(value, int) else (*value, "x") if isinstance(value, tuple) else value + "x"})
    assert shard_key(changed, "0" * 64) != shard_key(recipe, "0" * 64)


@pytest.mark.parametrize(("height", "width"), [(200, 128), (128, 301), (160, 160)])
def test_a_larger_picture_is_covered_and_cropped(encoder: Encoder, height: int, width: int) -> None:
    """The short side comes to the target and the middle of the long one is kept: a white picture with a black rim keeps its grey-free centre."""
    picture = np.full((height, width, 3), 255, np.uint8)
    covered = module._cover(picture, (128, 128))[0]
    assert covered.shape == (128, 128, 3)
    assert covered.min() == 255
    assert encoder.latents(picture)["target"].shape == (4, 16, 16)


def test_a_smaller_picture_is_refused(encoder: Encoder) -> None:
    with pytest.raises(SettingsError, match=r"100x300 pixels are less than adaptation\.size=128"):
        encoder.latents(np.zeros((300, 100, 3), np.uint8))


def test_only_missing_objects_count_as_missing(world: Store, dataset: Artifact, recipe: Recipe) -> None:
    """An address that nothing was made for is all missing, and reading it says so."""
    other = replace(recipe, format=99)
    assert missing_shards(world, dataset, other) == list(shards_of(dataset))
    with pytest.raises(NotFound):
        open_tensor_file(world, shard_key(other, "0" * 64))
