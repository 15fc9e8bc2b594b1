"""The baselines as methods of generation: planned, refused, sampled and told apart by what each looks at."""

from __future__ import annotations

import shutil

import models
import numpy as np
import pytest
from models import NATIVE, x4_upscaler

from selfcascade.config import BaselineSettings, ScaleCrafterSettings, X4Settings
from selfcascade.generation.generate import generate_unit, plan_generation, publish_generation
from selfcascade.generation.inputs import check_method
from selfcascade.generation.samples import read_generated
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact


@pytest.fixture(scope="session")
def x4_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("x4") / "upscaler"
    x4_upscaler().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(generation, x4_folder):
    """Two prompts, two steps; the upscaler is the narrow one."""
    return generation.model_copy(
        update={
            "baselines": BaselineSettings(x4=X4Settings(model=str(x4_folder), steps=2)),
            "cascade": generation.cascade.model_copy(update={"steps": 2}),
            "prompts": generation.prompts.model_copy(update={"count": 2}),
        }
    )


def by(settings, method, **baselines):
    return settings.model_copy(update={"method": method, "baselines": settings.baselines.model_copy(update=baselines)})


def made(settings, store):
    plan = plan_generation(settings, store)
    for index in plan.todo:
        generate_unit(settings, store, plan, index, "cpu")
    return {sample.key: sample.image for sample in read_generated(Artifact(store, publish_generation(settings, store, plan)))}


def test_every_baseline_makes_pictures_of_its_own(store, settings):
    """Of the target's size, paired by key with the other methods'; the baselines' eta is their own, and with it set to the cascade's they still differ."""
    found = {method: made(by(settings, method, eta=0.0), store) for method in ("direct", "attention-scaling", "scalecrafter", "x4-upscaler")}
    assert len({tuple(pictures) for pictures in found.values()}) == 1
    for key in found["direct"]:
        pictures = [pictures[key] for pictures in found.values()]
        assert {picture.shape for picture in pictures} == {(2 * NATIVE, 2 * NATIVE, 3)}
        assert len({picture.tobytes() for picture in pictures}) == 4
    ancestral = made(by(settings, "attention-scaling", eta=1.0), store)
    assert all(not np.array_equal(ancestral[key], found["attention-scaling"][key]) for key in ancestral)


def test_a_version_moves_with_what_the_method_looks_at(store, settings):
    def version(method, *, cascade=None, **baselines):
        changed = by(settings, method, **baselines)
        return plan_generation(changed.model_copy(update={"cascade": changed.cascade.model_copy(update=cascade or {})}), store).ref.version

    other = ScaleCrafterSettings(tau=3)
    upscaler = settings.baselines.x4.model_copy(update={"steps": 3})
    plain = {method: version(method) for method in ("direct", "tuning-free", "attention-scaling", "scalecrafter", "x4-upscaler")}
    assert len(set(plain.values())) == 5
    for method, before in plain.items():
        noisy = method in ("attention-scaling", "scalecrafter")
        assert (version(method, scalecrafter=other) != before) == (method == "scalecrafter")
        assert (version(method, x4=upscaler) != before) == (method == "x4-upscaler")
        assert (version(method, eta=0.5) != before) == noisy
        assert (version(method, cascade={"eta": 0.5}) != before) == (not noisy)
        assert (version(method, cascade={"start": 0.5}) != before) == (method == "tuning-free")


def test_where_the_upscaler_lies_does_not_matter_but_what_it_is_does(store, settings, x4_folder, tmp_path):
    def version(folder):
        x4 = settings.baselines.x4.model_copy(update={"model": str(folder)})
        return plan_generation(by(settings, "x4-upscaler", x4=x4), store).ref.version

    moved = shutil.copytree(x4_folder, tmp_path / "moved")
    assert version(moved) == version(x4_folder)
    x4_upscaler(seed=1).save_pretrained(tmp_path / "other")
    assert version(tmp_path / "other") != version(x4_folder)


def test_an_upscaler_that_changes_after_planning_is_refused(store, settings, x4_folder, tmp_path):
    folder = shutil.copytree(x4_folder, tmp_path / "upscaler")
    settings = by(settings, "x4-upscaler", x4=settings.baselines.x4.model_copy(update={"model": str(folder)}))
    plan = plan_generation(settings, store)
    x4_upscaler(seed=1).save_pretrained(folder)
    with pytest.raises(SettingsError, match=r"x4 upscaler '.*' is now at version .* but was planned as .*; run again"):
        generate_unit(settings, store, plan, 0, "cpu")


def test_a_method_that_does_not_apply_is_refused_when_it_is_planned(store, settings, tmp_path):
    """One line that names method, base and reason, before any unit."""
    with pytest.raises(SettingsError, match="method 'hidiffusion' does not apply to base 'tiny': not applicable to a base of family 'small'") as caught:
        plan_generation(by(settings, "hidiffusion"), store)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match="method 'hidiffusion' does not apply to base 'tiny'"):
        check_method(by(settings, "hidiffusion"), store)
    check_method(by(settings, "scalecrafter"), store)
    check_method(settings.model_copy(update={"method": "direct", "base": "bases/not-made-yet"}), store)
    large = settings.model_copy(update={"cascade": settings.cascade.model_copy(update={"height": 8 * NATIVE, "width": 8 * NATIVE})})
    for method, reason in (("scalecrafter", "no dilation table for 512x512"), ("x4-upscaler", "more than four times the base's 64x64 a side")):
        with pytest.raises(SettingsError, match=f"method '{method}' does not apply to base 'tiny': .*{reason}"):
            plan_generation(by(large, method), store)
    sd = settings.model_copy(update={"base": str(models.saved_base(tmp_path / "sd", "sd21"))})
    with pytest.raises(SettingsError, match="method 'attention-scaling' does not apply to base 'sd': the base's deepest level has 1 tokens"):
        plan_generation(by(sd, "attention-scaling"), store)
