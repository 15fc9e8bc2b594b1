"""The command beside a row: read back as the command line reads it, it gives the settings and inputs of the samples."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfcascade.config import BaselineSettings, CascadeSettings, ComputeSettings, GenerationSettings, PipelineSettings, PromptSettings
from selfcascade.evaluation.published import read_results
from selfcascade.evaluation.reproduction import command_of
from selfcascade.evaluation.results import Lineage
from selfcascade.storage import Artifact, Manifest, artifact_version
from selfcascade.storage.manifest import plain_settings

PHI = "a" * 64


def manifest(settings: GenerationSettings, **inputs: str) -> Manifest:
    inputs = {"base": "tiny@" + "0" * 64, "prompts": "1" * 64} | inputs
    version = artifact_version(settings, inputs)
    return Manifest(kind="samples", name=settings.name, version=version, settings=plain_settings(settings), inputs=inputs, objects=(), counts={})


def read_back(command: str) -> GenerationSettings:
    program, stage, option, config, *rest = shlex.split(command)
    assert (program, stage, option, config) == ("selfcascade", "generate", "--config", "defaults")
    assert set(rest[::2]) == {"--set"}
    return PipelineSettings.from_tree({}, rest[1::2]).generation


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)


@given(
    st.sampled_from(["base", "direct", "tuning-free", "tuned", "scalecrafter"]),
    st.one_of(texts, st.sampled_from(["yes", "007", "1e3", "null", "a: b", "{x}", "'", '"', "# no", " lead", "$HOME `id` \\"])),
    st.floats(0.01, 1),
    st.booleans(),
    st.sampled_from([None, {"mid_block": 2.0}]),
)
def test_it_is_the_settings_that_made_the_samples(method, negative, start, compiled, dilations):
    """Whatever differs from the defaults, in whatever characters."""
    settings = GenerationSettings(
        name="x1",
        method=method,
        negative_prompt=negative,
        compiled=compiled,
        cascade=CascadeSettings(start=start, guidance_interval=(0.0, start), upscale="pixel", later_steps=7),
        baselines=BaselineSettings(scalecrafter={"dilations": dilations, "dispersed": ("mid_block",)}),
        prompts=PromptSettings(count=3, dataset="datasets/y@abcd"),
        compute=ComputeSettings(dtype="bfloat16", threads=3),
    )
    found = read_back(command_of(manifest(settings), (), "datasets/y@abcd"))
    assert found.what() == settings.what()
    assert (found.name, found.base, found.prompts.dataset) == ("x1", "tiny", "datasets/y@abcd")


def test_what_is_at_its_default_is_not_said():
    assert command_of(manifest(GenerationSettings(name="x", method="direct")), (), "datasets/y") == (
        "selfcascade generate --config defaults --set generation.name=x --set generation.method=direct --set generation.base=tiny "
        "--set generation.prompts.dataset=datasets/y"
    )


@pytest.mark.parametrize(
    ("role", "kind", "setting", "method"),
    [
        ("upsampler", "upsamplers", "upsampler", "tuned"),
        ("upscaler", "upscalers", "upscaler", "latent-sr"),
        ("adapter", "adapters", "finetuned", "lora"),
        ("unet", "unets", "finetuned", "full"),
    ],
)
def test_inputs_that_are_artifacts_have_their_version_and_others_their_name(role, kind, setting, method):
    stored = Lineage(role=role, artifact=f"{kind}/phi@{PHI[:12]}", version=PHI)
    made = manifest(GenerationSettings(method=method), **{role: f"phi@{PHI}", "base": f"bases/own@{PHI}"})
    found = read_back(command_of(made, (stored, Lineage(role="base", artifact=f"bases/own@{PHI[:12]}", version=PHI)), None).replace("PROMPTS", "mine.txt"))
    assert (getattr(found, setting), found.base, str(found.prompts.file)) == (f"{kind}/phi@{PHI[:12]}", f"bases/own@{PHI[:12]}", "mine.txt")
    assert getattr(read_back(command_of(made, (), "datasets/y")), setting) == "phi"


def test_every_row_of_a_report_has_its_own(scene):
    results = read_results(scene.store, scene.report)
    for row in results.rows:
        made = Artifact(scene.store, scene.samples[row.label]).manifest()
        found = read_back(row.command.replace("PROMPTS", "mine.txt"))
        assert made.name.startswith(found.name)
        assert plain_settings(found) == made.settings
    assert f"<code>{results.rows[0].command}</code>" in Artifact(scene.store, scene.report).read("report.html").decode()
