"""The latent upscaler in bulk sampling: as method latent-sr and as the cascade's upscale; found, pinned, refused, told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import NATIVE
from test_baseline_methods import made

from selfcascade.baselines import latent_sr
from selfcascade.bases import resolve_base
from selfcascade.cascade.latent_upscaler import LatentUpscaler
from selfcascade.config import CurationSettings, GenerationSettings
from selfcascade.generation.chunks import lay_out
from selfcascade.generation.generate import plan_generation
from selfcascade.generation.models import load_pipeline, outline
from selfcascade.generation.seeds import sample_generator
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, Store


def upscaler_in(folder: Path, base: Path | str, *, seed: int = 3, channels: int | None = None) -> Path:
    """A latent upscaler that adds something, saved."""
    resolved = resolve_base(str(base))
    torch.manual_seed(seed)
    spec = outline(resolved)[0]
    upscaler = LatentUpscaler(channels or spec.latent_channels, width=4, blocks=1, base=None if channels else str(resolved))
    for parameter in upscaler.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    upscaler.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_upscaler(tiny_base, tmp_path_factory) -> Path:
    return upscaler_in(tmp_path_factory.mktemp("upscalers") / "f", tiny_base)


@pytest.fixture
def settings(generation: GenerationSettings) -> GenerationSettings:
    """Two prompts, two steps."""
    prompts, cascade = generation.prompts.model_copy(update={"count": 2}), generation.cascade.model_copy(update={"steps": 2})
    return generation.model_copy(update={"prompts": prompts, "cascade": cascade})


def learned(settings: GenerationSettings, upscaler: object, upscale: str = "learned", **changes: object) -> GenerationSettings:
    reference = None if upscaler is None else str(upscaler)
    return settings.model_copy(update={"cascade": settings.cascade.model_copy(update={"upscale": upscale}), "upscaler": reference, **changes})


def test_each_way_makes_pictures_of_its_own(store: Store, settings: GenerationSettings, tiny_upscaler: Path) -> None:
    """Four upscalers of the cascade and latent-sr: the same keys and sizes, other pictures; latent-sr's are those of the baseline called by hand."""
    found = {upscale: made(learned(settings, tiny_upscaler, upscale), store) for upscale in ("bilinear", "bicubic", "pixel", "learned")}
    found["latent-sr"] = made(learned(settings, tiny_upscaler, "bilinear", method="latent-sr"), store)
    assert len({tuple(pictures) for pictures in found.values()}) == 1
    for key in found["bilinear"]:
        assert {pictures[key].shape for pictures in found.values()} == {(2 * NATIVE, 2 * NATIVE, 3)}
        assert len({pictures[key].tobytes() for pictures in found.values()}) == 5
    pipeline = load_pipeline(settings.base, upscaler=str(tiny_upscaler), device="cpu")
    for spec in lay_out(settings, store)[0]:
        call = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": sample_generator(spec.seed)}
        picture = latent_sr.sample(pipeline, spec.prompt, height=2 * NATIVE, width=2 * NATIVE, output_type="np", **call).images[0]
        np.testing.assert_allclose(found["latent-sr"][spec.key] / 255, picture, atol=1.5 / 255)


def test_only_what_the_upscaler_has_a_part_in_depends_on_it(store: Store, settings: GenerationSettings, tiny_upscaler: Path, tmp_path: Path) -> None:
    """Another upscaler is another version of latent-sr and of the cascade with upscale learned; nothing else takes notice of one."""
    other = upscaler_in(tmp_path / "g", settings.base, seed=4)
    for method, upscale, depends in (
        ("latent-sr", "bilinear", True),
        ("tuning-free", "learned", True),
        ("tuning-free", "pixel", False),
        ("base", "learned", False),
        ("direct", "learned", False),
    ):
        plans = [plan_generation(learned(settings, folder, upscale, method=method), store) for folder in (tiny_upscaler, other)]
        assert (plans[0].ref.version != plans[1].ref.version) == depends, method
        assert all(("upscaler" in plan.inputs) == depends for plan in plans)
    versions = {plan_generation(learned(settings, tiny_upscaler, upscale), store).ref.version for upscale in ("bilinear", "bicubic", "pixel", "learned")}
    assert len(versions) == 4
    assert len({plan_generation(learned(settings, tiny_upscaler, upscale, method="latent-sr"), store).ref.version for upscale in ("pixel", "learned")}) == 1


def test_an_artifact_is_pinned_to_its_version(store: Store, settings: GenerationSettings, tiny_upscaler: Path) -> None:
    """What was planned with the latest version is sampled with that one."""
    artifact = Artifact.plan(store, "upscalers", "f", CurationSettings(size=8), {})
    with artifact.writing():
        for path in sorted(tiny_upscaler.iterdir()):
            artifact.put(path.name, path)
        artifact.publish(counts={"parameters": 1})
    plan = plan_generation(learned(settings, "upscalers/f"), store)
    assert plan.upscaler == f"upscalers/f@{artifact.ref.version}"
    assert plan.inputs["upscaler"] == f"f@{artifact.ref.version}"
    assert made(learned(settings, "upscalers/f"), store).keys() == made(settings, store).keys()


def test_what_cannot_be_sampled_is_refused_when_it_is_planned(store: Store, settings: GenerationSettings, tiny_base: Path, tmp_path: Path) -> None:
    """One line, before anything is written."""
    wide = upscaler_in(tmp_path / "wide", tiny_base, channels=16)
    for upscaler, changes, message in (
        (None, {"method": "latent-sr"}, r"^method 'latent-sr' needs a latent upscaler; set generation\.upscaler \(upscalers/NAME.*, or use method 'lanczos'$"),
        (None, {}, r"^cascade\.upscale 'learned' needs a latent upscaler; .*, or use 'bilinear'$"),
        ("upscalers/none", {}, "nothing is published as upscalers/none"),
        ("no such folder", {}, r"^latent upscaler 'no such folder' is neither an artifact \(upscalers/NAME\)"),
        (wide, {}, "was made for latents of 16 channels, but those of the base have 4"),
    ):
        with pytest.raises(SettingsError, match=message) as error:
            plan_generation(learned(settings, upscaler, **changes), store)
        assert "\n" not in str(error.value)
    assert list(store.list("samples/")) == []
