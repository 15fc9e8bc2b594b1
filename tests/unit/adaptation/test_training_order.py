from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import synthetic_latents, tiny_settings, tiny_trainer

from selfcascade.adaptation.cache import EMPTY, LatentCache
from selfcascade.adaptation.dataset import TrainingOrder
from selfcascade.adaptation.tensorfile import TensorFile, written_tensor_file
from selfcascade.config import UpsamplerSettings
from selfcascade.settings import SettingsError

KEYS = st.lists(st.from_regex(r"[a-z0-9]{1,6}", fullmatch=True), min_size=1, max_size=20, unique=True)


@given(keys=KEYS, seed=st.integers(0, 2**31), epochs=st.integers(1, 3))
def test_an_epoch_visits_every_sample_once(keys: list[str], seed: int, epochs: int) -> None:
    """Positions e * n .. (e + 1) * n - 1 hold each key exactly once, whatever the batch size."""
    order = TrainingOrder([keys], seed=seed, batch=1)
    for epoch in range(epochs):
        assert sorted(order.batch(epoch * len(keys), len(keys))) == sorted(keys)


@given(keys=KEYS, seed=st.integers(0, 2**31), position=st.integers(0, 60), count=st.integers(1, 30), cut=st.integers(0, 30))
def test_a_position_is_the_whole_state(keys: list[str], seed: int, position: int, count: int, cut: int) -> None:
    """Reading n keys at once, in two parts, from a fresh object or from keys in another order gives the same sequence."""
    order = TrainingOrder([keys], seed=seed, batch=1)
    whole = order.batch(position, count)
    cut = min(cut, count)
    assert order.batch(position, cut) + order.batch(position + cut, count - cut) == whole
    assert TrainingOrder([keys[::-1]], seed=seed, batch=1).batch(position, count) == whole


def test_epochs_and_seeds_differ() -> None:
    """The order is shuffled anew in each epoch and for each seed."""
    keys = [f"k{index}" for index in range(50)]
    order = TrainingOrder([keys], seed=0, batch=1)
    assert len({tuple(order.batch(0, 50)), tuple(order.batch(50, 50)), tuple(TrainingOrder([keys], seed=1, batch=1).batch(0, 50)), tuple(keys)}) == 4


def test_fewer_samples_than_a_batch_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"adaptation\.batch=4 is more than the 3 training samples"):
        TrainingOrder([["a", "b"], ["c"]], seed=0, batch=4)


def test_a_shuffled_cache_trains_on_the_same_captions() -> None:
    """Nothing is matched by position: stored in other orders each key has its own latents and caption, and the losses are the same bits."""
    settings = tiny_settings("tiny", upsampler=UpsamplerSettings(variant="C"), caption_dropout=0.2)
    stored = synthetic_latents()
    shuffled = in_other_order(stored, seed=1)
    assert list(shuffled._samples) != list(stored._samples)
    keys = ["s05", "s00", "s03"]
    for index, key in enumerate(keys):
        assert shuffled.caption(key) == f"caption {int(key[1:])}"
        assert torch.equal(shuffled.batch(keys).text.text[index], stored.batch([key]).text.text[0])
        assert torch.equal(shuffled.batch(keys).target[index], stored.batch([key]).target[0])
    logs = []
    for latents in (stored, shuffled):
        trainer = tiny_trainer(latents, settings)
        for _ in range(4):
            trainer.advance()
        logs.append(trainer.log())
    assert logs[0] == logs[1]


def in_other_order(latents: LatentCache, *, seed: int) -> LatentCache:
    """The same samples in two files instead of one, mixed."""
    keys = [*latents.keys("train"), *latents.keys("tune")]
    random.Random(seed).shuffle(keys)
    files = []
    for part in (keys[1::2], keys[::2]):
        tensors = {f"{EMPTY}/text": latents.empty().text[0]}
        for key in part:
            batch = latents.batch([key])
            tensors |= {f"{key}/text": batch.text.text[0], f"{key}/pivot": batch.pivot[0], f"{key}/target": batch.target[0]}
        with written_tensor_file(tensors, {"recipe": "r", "shard": "s", "samples": {key: latents._samples[key] for key in part}}) as path:
            files.append(TensorFile(path, name="synthetic"))
    return LatentCache(files, digest="0" * 64)
