"""Blocks that are computed again in the backward pass: the same gradients, less kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_finetuning import tuner
from test_trainer import state
from tiny_run import synthetic_latents, tiny_settings, tiny_trainer

from selfcascade.adaptation.cache import LatentCache
from selfcascade.adaptation.trainer import Trainer
from selfcascade.config import AdaptationSettings, ComputeSettings, UpsamplerSettings

WHAT = {
    "A": {"upsampler": UpsamplerSettings()},
    "C": {"upsampler": UpsamplerSettings(variant="C")},
    "main": {"upsampler": UpsamplerSettings(variant="C", inject="main")},
    "lora": {"trainable": "lora"},
    "full": {"trainable": "full"},
}


@pytest.fixture(scope="module")
def latents() -> LatentCache:
    return synthetic_latents()


def trainer_for(latents: LatentCache, settings: AdaptationSettings) -> Trainer:
    return tiny_trainer(latents, settings) if settings.trainable == "upsampler" else tuner(latents, settings)[0]


def kept_bytes(trainer: Trainer) -> int:
    """Of a step's forward pass, what autograd keeps for the backward pass besides weights."""
    weights = {parameter.untyped_storage().data_ptr() for module in (trainer.objective.unet, trainer.trained) for parameter in module.parameters()}
    storages: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    draws = trainer.objective.draw((4, *trainer.latents.shape("s00")), trainer.generator)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.objective.loss(trainer.latents.batch(trainer.order.batch(0, 4)), *draws)
    return sum(storages.values())


@pytest.mark.parametrize("changes", WHAT.values(), ids=WHAT)
def test_less_is_kept_for_the_backward_pass(latents: LatentCache, tiny_base: Path, changes: dict[str, object]) -> None:
    """Under 0.3 of the bytes, of a frozen UNet and what is added to it and of one that trains."""
    kept = [kept_bytes(trainer_for(latents, tiny_settings(tiny_base, gradient_checkpointing=on, **changes))) for on in (False, True)]
    assert 0 < kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", WHAT.values(), ids=WHAT)
def test_steps_are_the_same_bit_for_bit(latents: LatentCache, tiny_base: Path, changes: dict[str, object], dtype: str) -> None:
    """Which is why it is no part of a version: a run may go on with it where it ran out of memory without."""
    settings = tiny_settings(tiny_base, compute=ComputeSettings(dtype=dtype, threads=1), **changes)
    recomputing = settings.model_copy(update={"gradient_checkpointing": True})
    assert recomputing.digest() == settings.digest()
    trainers = [trainer_for(latents, each) for each in (settings, recomputing)]
    for trainer in trainers:
        for _ in range(2):
            trainer.advance()
    assert state(trainers[1]) == state(trainers[0])
