"""Bases: what a name stands for, at which version, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import models
import pytest
import torch

from selfcascade import SelfCascadePipeline
from selfcascade.bases import folder_version, load_pipeline, refuse_videos, resolve_base
from selfcascade.cascade.upsampler import FeatureUpsampler, load_upsampler
from selfcascade.generation.models import load_pipeline as sampling_pipeline
from selfcascade.generation.models import outline
from selfcascade.settings import Settings, SettingsError
from selfcascade.storage import Artifact, IntegrityError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return models.saved_base(tmp_path_factory.mktemp("bases") / "mine")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache" / "selfcascade"


def publish(store, kind: str, name: str, source: Path):
    artifact = Artifact.plan(store, kind, name, Settings(), {"files": folder_version(source)})
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        artifact.put(path.relative_to(source).as_posix(), path)
    return artifact.publish(counts={})


def test_a_folder_is_named_by_its_last_part_and_versioned_by_its_bytes(folder, tmp_path):
    """Moved, copied, and given another model card it is the same base; one other byte makes another."""
    resolved = resolve_base(str(folder))
    assert resolved.name == "mine"
    assert len(resolved.version) == 64
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("a card")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "lock").write_text("")
    assert resolve_base(str(copy)).version == resolved.version
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve_base(str(copy)).version != resolved.version


def test_a_loaded_base_samples_and_knows_its_name(folder):
    resolved = resolve_base(str(folder))
    stock = load_pipeline(resolved, torch.bfloat16)
    assert (stock.unet.dtype, stock.text_encoder.dtype, stock.vae.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert load_pipeline(resolved).unet.dtype == torch.float32
    pipeline = SelfCascadePipeline.from_pipe(stock)
    assert pipeline.config.base == str(resolved) == f"mine@{resolved.version}"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red cat", 128, 128, num_inference_steps=2).images[0].size == (128, 128)


def test_an_artifact_is_pulled_once_and_checked(folder, store, cache):
    """By latest pointer, version, and URI; a damaged copy in the cache is replaced."""
    ref = publish(store, "bases", "tiny", folder)
    resolved = resolve_base("bases/tiny", store)
    assert (resolved.name, resolved.version) == ("tiny", ref.version)
    assert Path(resolved.location).is_relative_to(cache)
    assert resolve_base(f"bases/tiny@{ref.version[:12]}", store) == resolve_base(ref.uri, store) == resolved
    assert folder_version(Path(resolved.location)) == folder_version(folder)
    damaged = Path(resolved.location) / "unet" / "diffusion_pytorch_model.safetensors"
    damaged.write_bytes(b"x")
    resolve_base("bases/tiny", store)
    assert damaged.read_bytes() == (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    load_pipeline(resolved)


def test_an_upsampler_comes_from_the_store_and_fits_its_base_alone(folder, store, tmp_path):
    publish(store, "bases", "tiny", folder)
    pipeline = SelfCascadePipeline.from_pretrained("bases/tiny", store=store)
    upsampler = FeatureUpsampler.for_base(pipeline.spec, variant="C", base=pipeline.config.base, size=(128, 128), stage=1)
    upsampler.save_pretrained(tmp_path / "phi")
    ref = publish(store, "upsamplers", "phi-c", tmp_path / "phi")
    loaded = load_upsampler("upsamplers/phi-c", store)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in upsampler.state_dict().items())
    SelfCascadePipeline.from_pretrained("bases/tiny", upsampler=ref.uri, store=store)
    with pytest.raises(
        SettingsError, match=r"upsampler upsamplers/phi-c was trained for base 'tiny@\w{12}' but the pipeline holds 'mine@\w{12}'; .*--base tiny"
    ):
        SelfCascadePipeline.from_pretrained(folder, upsampler="upsamplers/phi-c", store=store)


def test_damaged_bytes_in_the_store_are_refused_by_name(folder, store):
    ref = publish(store, "bases", "tiny", folder)
    store.delete([f"{ref.prefix}/vae/config.json"])
    store.put_new(f"{ref.prefix}/vae/config.json", b"{}")
    with pytest.raises(IntegrityError, match=r"vae/config\.json"):
        resolve_base("bases/tiny", store)


def test_a_base_of_another_kind_is_refused(tmp_path):
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SettingsError, match=r"is a FluxPipeline \(transformer\); the cascade needs a UNet2DConditionModel"):
        resolve_base(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-base", "base 'no-such-base' is neither shipped"),
        ("bases/no-such", "no-such"),
        ("nobody/no-such-model", r"base 'nobody/no-such-model' is not on this machine and cannot be fetched from the hub: .*give a local folder"),
    ],
)
def test_an_unknown_base_is_refused_in_one_line(store, name, message):
    with pytest.raises(SettingsError, match=message) as error:
        resolve_base(name, store)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_base_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"has no model_index\.json"):
        resolve_base(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(SettingsError, match=r"damaged model_index\.json"):
        resolve_base(str(tmp_path))


def test_a_base_with_a_missing_part_is_refused_by_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "unet")
    with pytest.raises(SettingsError, match="base 'half' does not load"):
        load_pipeline(resolve_base(str(tmp_path / "half")))


def test_a_video_base_is_loaded_but_no_run_makes_pictures_with_it(tmp_path):
    resolved = resolve_base(str(models.saved_base(tmp_path / "clips", "video")))
    assert type(load_pipeline(resolved)).__name__ == "TextToVideoSDPipeline"
    for refused in (lambda: refuse_videos(resolved), lambda: outline(resolved), lambda: sampling_pipeline(str(tmp_path / "clips"), device="cpu")):
        with pytest.raises(SettingsError, match=r"base 'clips' makes videos, but runs train on pictures .*SelfCascadePipeline") as error:
            refused()
        assert "\n" not in str(error.value)
    refuse_videos(resolve_base(str(models.saved_base(tmp_path / "pictures"))))
