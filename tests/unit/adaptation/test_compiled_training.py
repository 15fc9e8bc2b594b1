"""Training with the UNet's transformer blocks compiled: the same steps to float tolerance, and exactly again after an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from test_finetuning import tuner
from test_trainer import state
from tiny_run import synthetic_latents, tiny_settings

from selfcascade.adaptation import start
from selfcascade.adaptation.cache import LatentCache
from selfcascade.adaptation.requirements import enough_memory
from selfcascade.adaptation.trainer import Trainer
from selfcascade.cascade.compilation import compile_blocks, is_compiled
from selfcascade.config import UpsamplerSettings
from selfcascade.settings import SettingsError

WHAT = {
    "upsampler": {"upsampler": UpsamplerSettings(inject="main"), "gradient_checkpointing": True},
    "lora": {"trainable": "lora"},
    "full": {"trainable": "full"},
}


@pytest.fixture(scope="module")
def latents() -> LatentCache:
    return synthetic_latents()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What is compiled, by a backend that runs what torch traced as it is."""
    torch.compiler.reset()
    traced: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(start, "compile_blocks", partial(compile_blocks, backend=backend))
    yield traced
    torch.compiler.reset()


def gradient(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of the next step."""
    with trainer.objective.held():
        loss = trainer._gradient()
    return loss, torch.cat([parameter.grad.flatten() for _, parameter in trainer.trainable])


@pytest.mark.parametrize("changes", WHAT.values(), ids=WHAT)
def test_steps_are_the_same_to_float_tolerance(latents: LatentCache, tiny_base: Path, graphs: list[object], changes: dict[str, object]) -> None:
    """Loss and gradients. The copy with the moving average runs its own blocks, not those that train."""
    settings = tiny_settings(tiny_base, **changes)
    loss, expected = gradient(tuner(latents, settings)[0])
    assert not graphs
    trainer, _ = tuner(latents, settings.model_copy(update={"compiled": True}))
    found, compiled = gradient(trainer)
    assert graphs
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()))
    assert all(module.forward.__self__ is module for module in trainer.averaged().modules())


def test_interrupted_equals_uninterrupted(latents: LatentCache, tiny_base: Path, graphs: list[object]) -> None:
    """Also from a network that is compiled anew, as by another process."""
    settings = tiny_settings(tiny_base, trainable="lora", compiled=True, steps=3)
    whole, _ = tuner(latents, settings)
    whole.advance()
    tensors, record = whole.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    while whole.step < settings.steps:
        whole.advance()
    torch.compiler.reset()
    resumed, _ = tuner(latents, settings)
    resumed.restore(saved, record)
    while resumed.step < settings.steps:
        resumed.advance()
    assert state(resumed) == state(whole)


def test_compiled_is_another_version_and_no_part_of_the_latent_upscaler(latents: LatentCache, tiny_base: Path, graphs: list[object]) -> None:
    settings = tiny_settings(tiny_base, trainable="latent-upscaler", compiled=True)
    assert settings.digest() != settings.model_copy(update={"compiled": False}).digest()
    trainer, pipeline = tuner(latents, settings)
    trainer.advance()
    assert not graphs
    assert not is_compiled(pipeline.unet)


def test_what_does_not_compile_is_one_line(latents: LatentCache, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> object:
        raise RuntimeError("no compiler")

    torch.compiler.reset()
    monkeypatch.setattr(start, "compile_blocks", partial(compile_blocks, backend=broken))
    settings = tiny_settings(tiny_base, trainable="lora", compiled=True)
    trainer, _ = tuner(latents, settings)
    with (
        pytest.raises(SettingsError, match=r"do not compile here: .*no compiler.*set adaptation\.compiled to false") as error,
        enough_memory(settings, remedy=""),
    ):
        trainer.advance()
    assert "\n" not in str(error.value)


@pytest.mark.full
def test_a_real_backend_makes_the_same_step(latents: LatentCache, tiny_base: Path) -> None:
    """By torch's own, inductor, with forward and backward pass compiled."""
    torch.compiler.reset()
    settings = tiny_settings(tiny_base, **WHAT["upsampler"])
    loss, expected = gradient(tuner(latents, settings)[0])
    found, compiled = gradient(tuner(latents, settings.model_copy(update={"compiled": True}))[0])
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    torch.compiler.reset()
