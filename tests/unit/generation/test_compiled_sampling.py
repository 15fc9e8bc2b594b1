"""``generation.compiled``: the same pictures to float tolerance under another version, and not for methods that reach into the blocks."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from test_baseline_methods import made
from test_tuned_baselines import by, tuned_in

from selfcascade.cascade.compilation import compile_blocks, is_compiled
from selfcascade.config import GenerationSettings
from selfcascade.generation import models
from selfcascade.generation.chunks import lay_out
from selfcascade.generation.generate import plan_generation
from selfcascade.generation.inputs import relevant
from selfcascade.generation.models import load_pipeline
from selfcascade.generation.sampling import samples
from selfcascade.settings import SettingsError


@pytest.fixture
def settings(generation: GenerationSettings) -> GenerationSettings:
    """Two prompts, two steps, compiled."""
    prompts, cascade = generation.prompts.model_copy(update={"count": 2}), generation.cascade.model_copy(update={"steps": 2})
    return generation.model_copy(update={"prompts": prompts, "cascade": cascade, "compiled": True})


@pytest.fixture
def compilations(monkeypatch) -> list[object]:
    """What is compiled, by a backend that runs what torch traced as it is."""
    torch.compiler.reset()
    graphs: list[object] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(models, "compile_blocks", partial(compile_blocks, backend=backend))
    models._held.clear()
    yield graphs
    models._held.clear()
    torch.compiler.reset()


def off(settings: GenerationSettings, **changes: object) -> GenerationSettings:
    return settings.model_copy(update={"compiled": False, "name": "off", **changes})


@pytest.mark.parametrize("method", ["base", "direct", "tuning-free", "tuned"])
def test_compiled_is_the_same_picture_under_another_version(store, settings, compilations, tiny_upsampler, method):
    settings = settings.model_copy(update={"method": method, "upsampler": str(tiny_upsampler) if method == "tuned" else None})
    plain = made(off(settings), store)
    assert not compilations
    compiled = made(settings, store)
    assert compilations
    assert plan_generation(settings, store).ref.version != plan_generation(off(settings, name=settings.name), store).ref.version
    assert all(np.abs(compiled[key].astype(int) - plain[key]).max() <= 1 for key in plain)


@pytest.mark.parametrize("way", ["lora", "full"])
def test_the_unet_of_a_tuned_baseline_is_compiled(store, settings, compilations, tmp_path, way):
    """In place of the base's, which stays as it was."""
    settings = by(settings, way, tuned_in(tmp_path / "w", way, settings.base))
    plain = made(off(settings), store)
    assert not compilations
    compiled = made(settings, store)
    assert compilations
    assert all(np.abs(compiled[key].astype(int) - plain[key]).max() <= 1 for key in plain)
    own = load_pipeline(settings.base, finetuned=(way, settings.finetuned), compiled=True, device="cpu")
    assert is_compiled(own.unet)
    assert not is_compiled(load_pipeline(settings.base, finetuned=(way, settings.finetuned), device="cpu").unet)


@pytest.mark.parametrize("method", ["scalecrafter", "attention-scaling", "hidiffusion"])
def test_methods_that_reach_into_the_blocks_are_not_compiled(settings, method):
    """One artifact, with the setting and without."""
    asked = settings.model_copy(update={"method": method})
    assert not relevant(asked).compiled
    assert relevant(asked).digest() == relevant(off(asked)).digest()
    assert relevant(settings).digest() != relevant(off(settings)).digest()


def test_scalecrafter_samples_in_a_compiled_run(store, settings, compilations):
    """After a method whose UNet was compiled, the very artifact of a run without the setting."""
    made(settings, store)
    assert compilations
    done = len(compilations)
    dilated = settings.model_copy(update={"method": "scalecrafter", "name": "dilated"})
    made(dilated, store)
    assert len(compilations) == done
    assert plan_generation(off(dilated, name="dilated"), store).published


def test_compiled_and_plain_pipelines_are_held_apart(settings, compilations):
    plain = load_pipeline(settings.base, device="cpu")
    compiled = load_pipeline(settings.base, compiled=True, device="cpu")
    assert (is_compiled(plain.unet), is_compiled(compiled.unet)) == (False, True)
    assert load_pipeline(settings.base, compiled=True, device="cpu") is compiled
    assert not is_compiled(load_pipeline(settings.base, device="cpu").unet)


def test_blocks_that_do_not_compile_are_one_line(store, settings):
    """Such as where there is no C++ compiler; the line names the setting."""

    def backend(graph, inputs):
        raise RuntimeError("no working C++ compiler found\nand more")

    torch.compiler.reset()
    models._held.clear()
    pipeline = load_pipeline(settings.base, device="cpu")
    models._held.clear()
    compile_blocks(pipeline.unet, backend=backend)
    specs = lay_out(settings, store)[0]
    with pytest.raises(SettingsError, match=r"^the blocks of the UNet do not compile here: .*no working C.* set generation\.compiled to false$") as caught:
        list(samples(pipeline, specs, settings))
    assert "\n" not in str(caught.value)
    torch.compiler.reset()
