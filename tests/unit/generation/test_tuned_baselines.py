"""LoRA and full fine-tuning as methods of generation: found, pinned, refused, told apart; each samples the target size with its own UNet."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import pytest
import torch
from models import NATIVE
from test_baseline_methods import made

from selfcascade.baselines import full, lora
from selfcascade.baselines.finetune import KINDS, Record
from selfcascade.bases import resolve_base
from selfcascade.config import BaselineSettings, CurationSettings, GenerationSettings
from selfcascade.generation.chunks import lay_out
from selfcascade.generation.generate import generate_unit, plan_generation
from selfcascade.generation.models import load_pipeline
from selfcascade.generation.seeds import sample_generator
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, Store

WAYS = pytest.mark.parametrize("way", ["lora", "full"])


def tuned_in(folder: Path, way: str, base: Path | str, *, seed: int = 3) -> Path:
    """Weights of a tuned baseline that change the picture, saved."""
    known = str(resolve_base(str(base)))
    if way == "full":
        models.unet("small", seed=seed).save_pretrained(folder)
        Record(way="full", base=known, size=(2 * NATIVE, 2 * NATIVE)).save(folder)
        return folder
    torch.manual_seed(seed)
    adapter = lora.Lora.on(models.unet("small"), 4, base=known, size=(2 * NATIVE, 2 * NATIVE))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    adapter.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuned(tiny_base, tmp_path_factory) -> dict[str, Path]:
    return {way: tuned_in(tmp_path_factory.mktemp(way) / "w", way, tiny_base) for way in ("lora", "full")}


@pytest.fixture
def settings(generation: GenerationSettings) -> GenerationSettings:
    """Two prompts, two steps."""
    prompts, cascade = generation.prompts.model_copy(update={"count": 2}), generation.cascade.model_copy(update={"steps": 2})
    return generation.model_copy(update={"prompts": prompts, "cascade": cascade})


def by(settings: GenerationSettings, way: str, finetuned: object, **changes: object) -> GenerationSettings:
    return settings.model_copy(update={"method": way, "finetuned": None if finetuned is None else str(finetuned), **changes})


def test_each_samples_the_target_by_its_own_unet(store: Store, settings: GenerationSettings, tuned: dict[str, Path]) -> None:
    """Paired by key with direct sampling, other pictures; equal to the baseline called by hand; what the base draws afterwards is what it drew before."""
    plain = settings.model_copy(update={"baselines": BaselineSettings(eta=1.0)})
    direct = plain.model_copy(update={"method": "direct", "name": "before"})
    found = {"direct": made(direct, store)} | {way: made(by(plain, way, folder, name=way), store) for way, folder in tuned.items()}
    assert len({tuple(pictures) for pictures in found.values()}) == 1
    for key in found["direct"]:
        assert {pictures[key].shape for pictures in found.values()} == {(2 * NATIVE, 2 * NATIVE, 3)}
        assert len({pictures[key].tobytes() for pictures in found.values()}) == 3
    again = made(direct.model_copy(update={"name": "after"}), store)
    assert all(np.array_equal(again[key], found["direct"][key]) for key in again)
    pipeline = load_pipeline(settings.base, device="cpu")
    for spec in lay_out(plain, store)[0]:
        for way, sample, given in (("lora", lora.sample, {"adapter": tuned["lora"]}), ("full", full.sample, {"unet": tuned["full"]})):
            call = {"num_inference_steps": 2, "guidance_scale": 3.0, "eta": 1.0, "generator": sample_generator(spec.seed), "output_type": "np", **given}
            picture = sample(pipeline, spec.prompt, height=2 * NATIVE, width=2 * NATIVE, **call).images[0]
            np.testing.assert_allclose(found[way][spec.key] / 255, picture, atol=1.5 / 255)


@WAYS
def test_lora_shares_the_weights_of_the_base(settings: GenerationSettings, tuned: dict[str, Path], way: str) -> None:
    """A pipeline with a LoRA holds the base's weights once; one with a fine-tuned UNet has all of its own. The base's own pipeline is not touched."""
    pipeline = load_pipeline(settings.base, device="cpu")
    own = load_pipeline(settings.base, finetuned=(way, str(tuned[way])), device="cpu")
    assert own.vae is pipeline.vae
    assert own.unet is not pipeline.unet
    shared = pipeline.unet.conv_in.weight.data_ptr() == own.unet.conv_in.weight.data_ptr()
    assert shared == (way == "lora")
    assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())
    assert load_pipeline(settings.base, finetuned=(way, str(tuned[way])), device="cpu").unet is own.unet
    assert own.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@WAYS
def test_a_version_moves_with_what_the_method_looks_at(store: Store, settings: GenerationSettings, tuned: dict[str, Path], tmp_path: Path, way: str) -> None:
    """Weights and the baselines' eta; neither K nor the cascade's eta, nor where the folder lies."""

    def version(folder: Path = tuned[way], *, eta: float = 1.0, **cascade: object) -> str:
        changed = {"baselines": BaselineSettings(eta=eta), "cascade": settings.cascade.model_copy(update=cascade)}
        plan = plan_generation(by(settings, way, folder, **changed), store)
        assert set(plan.inputs) == {"base", "prompts", {"lora": "adapter", "full": "unet"}[way]}
        return plan.ref.version

    plain = version()
    assert version(tuned_in(tmp_path / "same", way, settings.base)) == plain == version(start=0.3) == version(eta=1.0, upscale="bicubic")
    assert version(tuned_in(tmp_path / "other", way, settings.base, seed=4)) != plain
    assert version(eta=0.5) != plain


@WAYS
def test_an_artifact_is_pinned_to_its_version(store: Store, settings: GenerationSettings, tuned: dict[str, Path], way: str) -> None:
    """What was planned with the latest version is sampled with that one."""
    artifact = Artifact.plan(store, KINDS[way], "w", CurationSettings(size=8), {})
    with artifact.writing():
        for path in sorted(tuned[way].iterdir()):
            artifact.put(path.name, path)
        artifact.publish(counts={"parameters": 1})
    plan = plan_generation(by(settings, way, f"{KINDS[way]}/w"), store)
    assert plan.finetuned == f"{KINDS[way]}/w@{artifact.ref.version}"
    assert plan.inputs[{"lora": "adapter", "full": "unet"}[way]] == f"w@{artifact.ref.version}"
    pinned, folder = made(by(settings, way, f"{KINDS[way]}/w"), store), made(by(settings, way, tuned[way], name="folder"), store)
    assert all(np.array_equal(pinned[key], folder[key]) for key in folder)


@WAYS
def test_weights_that_change_after_planning_are_refused(store: Store, settings: GenerationSettings, tmp_path: Path, way: str) -> None:
    settings = by(settings, way, tuned_in(tmp_path / "w", way, settings.base))
    plan = plan_generation(settings, store)
    tuned_in(tmp_path / "w", way, settings.base, seed=4)
    with pytest.raises(SettingsError, match=r"has changed since it was planned as .*; run again"):
        generate_unit(settings, store, plan, 0, "cpu")


def test_what_cannot_be_sampled_is_refused_when_it_is_planned(store: Store, settings: GenerationSettings, tuned: dict[str, Path], tmp_path: Path) -> None:
    """One line, before anything is written."""
    other = tuned_in(tmp_path / "other", "lora", models.saved_base(tmp_path / "elsewhere", seed=9))
    for way, finetuned, message in (
        (
            "lora",
            None,
            r"^method 'lora' needs a LoRA; train one by `selfcascade adapt --set adaptation\.trainable=lora` and set generation\.finetuned \(adapters/",
        ),
        ("full", None, r"^method 'full' needs a fine-tuned UNet; train one by `selfcascade adapt --set adaptation\.trainable=full`"),
        ("lora", "adapters/none", "nothing is published as adapters/none"),
        ("full", "no such folder", r"^fine-tuned UNet 'no such folder' is neither a folder nor an artifact \(unets/NAME\)$"),
        ("lora", tuned["full"], "it holds a fine-tuned UNet: use method 'full'"),
        ("full", tuned["lora"], "it holds a LoRA: use method 'lora'"),
        ("lora", other, r"was trained for base 'elsewhere@\w{12}' but the pipeline holds 'tiny@\w{12}'"),
    ):
        with pytest.raises(SettingsError, match=message) as error:
            plan_generation(by(settings, way, finetuned), store)
        assert "\n" not in str(error.value)
    assert list(store.list("samples/")) == []
    with pytest.raises(ValueError, match="finetuned is set but method is 'direct'"):
        GenerationSettings(method="direct", finetuned="adapters/x")
