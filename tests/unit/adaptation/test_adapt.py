from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import models
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_run import SIDE, tiny_settings

from selfcascade import SelfCascadePipeline
from selfcascade.adaptation.adapt import adapt, encode_unit, plan_adaptation, publish_adaptation, train_upsampler
from selfcascade.adaptation.checkpoint import Checkpoint, CheckpointFolder, newest_step
from selfcascade.adaptation.kinds import KINDS
from selfcascade.adaptation.trainer import Diverged, Trainer
from selfcascade.adaptation.training_run import TrainingStep
from selfcascade.cascade.upsampler import load_upsampler
from selfcascade.config import AdaptationSettings, ComputeSettings, CurationSettings, FolderSource, UpsamplerSettings
from selfcascade.curation.curate import curate
from selfcascade.generation import precision
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, Store, resolve

FILES = {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "loss.parquet", "previews/sheet.png"}


def bytes_of(store: Store, settings: AdaptationSettings) -> bytes:
    """The manifest of what was published: it holds the SHA-256 of every object."""
    return store.read(resolve(store, f"{KINDS[settings.trainable]}/{settings.name}").ref.prefix + "/manifest.json")


def test_the_folder_holds_what_others_read(world: Store, tiny_base: Path) -> None:
    """diffusers loads the upsampler and the pipeline takes it; the table has every step, the card names base and data; nothing tells the machine."""
    settings = tiny_settings(tiny_base, name="seen", previews=1)
    steps: list[TrainingStep] = []
    ref = adapt(settings, world, progress=steps.append)
    artifact = resolve(world, "upsamplers/seen")
    dataset = resolve(world, "datasets/pictures")
    names = {entry.key for entry in artifact.manifest().objects}
    assert artifact.ref == ref
    assert names > FILES
    assert len(names - FILES) == settings.previews
    assert set(artifact.manifest().inputs) == {"dataset", "base"}
    assert artifact.manifest().inputs["dataset"] == dataset.ref.version
    assert artifact.manifest().counts["steps"] == 6

    upsampler = load_upsampler(str(ref.uri), world)
    assert sum(p.detach().abs().sum().item() for name, p in upsampler.named_parameters() if "conv2" in name) > 0
    pipe = SelfCascadePipeline.from_pretrained(settings.base, upsampler=upsampler)
    assert pipe("a red cat", SIDE, SIDE, num_inference_steps=2, output_type="pt").images.shape == (1, 3, SIDE, SIDE)

    table = pq.read_table(io.BytesIO(artifact.read("loss.parquet")))
    bins = ["t0_139", "t140_279", "t280_419", "t420_559", "t560_699"]
    assert table.column_names == ["step", "loss", "lr", "grad_norm", "validation", *(f"validation_{name}" for name in bins)]
    assert table["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert table["lr"].to_pylist() == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2])
    validations = table["validation"].to_pylist()
    assert validations[:5] == [None] * 5
    counts = artifact.manifest().counts
    assert counts["validation"] == pytest.approx(validations[5], abs=1e-6)
    assert counts["validation"] == pytest.approx(sum(counts[f"validation_{name}"] for name in bins) / 5, abs=1e-5)
    with Image.open(io.BytesIO(artifact.read("previews/sheet.png"))) as sheet:
        assert sheet.width > 3 * SIDE

    card = artifact.read("README.md").decode()
    for told in (
        upsampler.config.base,
        str(dataset.ref),
        "| steps | loss | learning rate |",
        "| 6 to 6 |",
        "| t = 560 to 699 |",
        "own licence applies",
        "previews/sheet.png",
    ):
        assert told in card
    text = card + artifact.read("config.json").decode()
    assert str(Path(settings.base).parent) not in text
    assert os.uname().nodename not in text

    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.validation for step in steps] == [None] * 5 + validations[5:]
    assert steps[-1].seconds_left == 0
    assert all(step.memory_bytes > 50 * 2**20 and step.samples_per_second > 0 for step in steps)
    assert [step.step for step in steps if step.preview is not None] == [4]
    assert list(world.list(f"cache/checkpoints/{ref.version}")) == []
    assert list(world.list(f"cache/previews/{ref.version}")) == []


def test_run_again_does_nothing(world: Store, settings: AdaptationSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same settings find the same artifact published, without a step of training or an encoded shard."""
    ref = adapt(settings, world)
    monkeypatch.setattr(Trainer, "advance", lambda self: pytest.fail("trained again"))
    plan = plan_adaptation(settings, world)
    assert (plan.published, plan.todo, plan.ref) == (True, (), ref)
    assert adapt(settings, world) == ref


def test_a_slow_precision_is_told_once(world: Store, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """When the run trains, not when it is run again."""
    monkeypatch.setattr(precision, "slowdown", lambda dtype: 3.0)
    settings = tiny_settings(tiny_base, name="slow", steps=1, compute=ComputeSettings(dtype="bfloat16", threads=1))
    with caplog.at_level("WARNING"):
        adapt(settings, world, device="cpu")
        adapt(settings, world, device="cpu")
    line = "adaptation.compute.dtype=bfloat16 is 3.0 times slower than float32 on this CPU; set it to float32, or use a GPU"
    assert caplog.messages.count(line) == 1


def test_two_equal_runs_write_equal_manifests(fresh: Callable[[], Store], tiny_base: Path) -> None:
    """In two empty stores, with other checkpoints, previews and log intervals, and in the second store interrupted by hand: every byte is equal."""
    settings = tiny_settings(tiny_base, upsampler=UpsamplerSettings(variant="C"), previews=1, preview_steps=100, validation_steps=2)
    first = fresh()
    adapt(settings, first)
    second = fresh()
    other = settings.model_copy(update={"checkpoint_steps": 1, "preview_steps": 3, "log_steps": 3})
    with pytest.raises(KeyboardInterrupt):
        adapt(other, second, progress=_interrupt_at(3))
    assert newest_step(second, plan_adaptation(settings, second).ref.version) == 3
    adapt(other, second)
    assert bytes_of(second, settings) == bytes_of(first, settings)


def test_a_run_that_becomes_worse_publishes_its_best(fresh: Callable[[], Store], tiny_base: Path) -> None:
    """At a learning rate that is far too high: it ends two validations after the best one, of which weights and counts are, interrupted or not."""
    settings = tiny_settings(tiny_base, upsampler=UpsamplerSettings(variant="C"), steps=40, lr=0.5, warmup=8, validation_steps=2, early_stop=2, ema=0.5)
    first, second = fresh(), fresh()
    artifact = Artifact(first, adapt(settings, first))
    counts = artifact.manifest().counts
    best, table = counts["best_step"], pq.read_table(io.BytesIO(artifact.read("loss.parquet"))).to_pylist()
    losses = {row["step"]: row["validation"] for row in table if row["validation"] is not None}
    assert counts["steps"] == len(table) == best + 4 < 40
    assert counts["validation"] == pytest.approx(min(losses.values()), abs=1e-6)
    assert losses[best] == min(losses.values()) < losses[best + 4]
    card = artifact.read("README.md").decode()
    assert f"Training ended early, 2 validations after the best one. The published weights are the moving average at step {best}, the best validation." in card
    assert f"{best + 4} steps of 4 samples" in card
    with pytest.raises(KeyboardInterrupt):
        adapt(settings, second, progress=_interrupt_at(int(best) + 3))
    adapt(settings, second)
    assert bytes_of(second, settings) == bytes_of(first, settings)
    whole = settings.model_copy(update={"steps": int(best), "early_stop": None, "name": "whole"})
    assert Artifact(first, adapt(whole, first)).read("diffusion_pytorch_model.safetensors") == artifact.read("diffusion_pytorch_model.safetensors")


def _interrupt_at(step: int) -> Callable[[TrainingStep], None]:
    def progress(report: TrainingStep) -> None:
        if report.step >= step:
            raise KeyboardInterrupt

    return progress


KILLED = """
import json, os, signal, sys
from selfcascade.adaptation import adapt as stage
from selfcascade.adaptation.trainer import Trainer
from selfcascade.config import AdaptationSettings, StoreSettings
from selfcascade.storage import Artifact, Store

settings, store, moment, number = json.loads(sys.argv[1])
target, name = {"step": (Trainer, "advance"), "checkpoint": (Store, "put_cache"), "object": (Artifact, "put")}[moment]
inner, calls = getattr(target, name), [0]

def counted(self, *args):
    result = inner(self, *args)
    if moment != "checkpoint" or "/step-" in args[0]:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(target, name, counted)
stage.adapt(AdaptationSettings(**settings), Store.open(StoreSettings(**store)))
"""


@pytest.mark.parametrize(
    ("moment", "number", "reached"),
    [
        pytest.param("step", 3, 2, id="between two checkpoints"),
        pytest.param("checkpoint", 2, 4, id="before old checkpoints go", marks=pytest.mark.full),
        pytest.param("object", 2, 6, id="between two objects of the folder", marks=pytest.mark.full),
    ],
)
def test_a_killed_run_leaves_the_same_bytes(fresh: Callable[[], Store], tiny_base: Path, moment: str, number: int, reached: int) -> None:
    """SIGKILL, then the same command again: it goes on from the last checkpoint and every object has the SHA-256 of an undisturbed run."""
    settings = tiny_settings(tiny_base)
    whole, killed = fresh(), fresh()
    adapt(settings, whole)
    arguments = json.dumps([json.loads(settings.model_dump_json()), json.loads(killed.settings.model_dump_json()), moment, number])
    run = subprocess.run([sys.executable, "-c", KILLED, arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert newest_step(killed, plan_adaptation(settings, killed).ref.version) == reached
    adapt(settings, killed)
    assert bytes_of(killed, settings) == bytes_of(whole, settings)


def test_units_make_the_latents_side_by_side(fresh: Callable[[], Store], settings: AdaptationSettings) -> None:
    """The plan lists a unit a shard and one for the training; a unit done twice is done once; training finds them and encodes nothing."""
    store = fresh()
    plan = plan_adaptation(settings, store)
    assert (plan.units, plan.todo, plan.shards_todo, plan.training_todo) == (3, (0, 1, 2), (0, 1), True)
    for unit in (1, 1, 0):
        encode_unit(settings, store, plan, unit)
    plan = plan_adaptation(settings, store)
    assert (plan.todo, plan.shards_todo) == ((2,), ())
    with Artifact(store, plan.ref).writing():
        with pytest.raises(SettingsError, match="is trained to step 0 of 6; run `selfcascade adapt` again"):
            publish_adaptation(settings, store, plan)
        assert train_upsampler(settings, store, plan) == 6
        assert train_upsampler(settings, store, plan) == 0
        plan = plan_adaptation(settings, store)
        assert (plan.todo, plan.training_todo, plan.step, plan.published) == ((), False, 6, False)
        assert publish_adaptation(settings, store, plan) == plan.ref
    assert plan_adaptation(settings, store).published


def test_a_second_run_publishes_while_the_first_is_about_to(fresh: Callable[[], Store], settings: AdaptationSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has found nothing published and loads the base; the second then publishes and drops the checkpoints: the first takes what is there."""
    store = fresh()
    plan = plan_adaptation(settings, store)
    train_upsampler(settings, store, plan)
    newest, published = CheckpointFolder.newest, []

    def overtaken(self: CheckpointFolder) -> Checkpoint | None:
        if not published:
            published.append(plan.ref)
            assert publish_adaptation(settings, store, plan) == plan.ref
        return newest(self)

    monkeypatch.setattr(CheckpointFolder, "newest", overtaken)
    assert publish_adaptation(settings, store, plan) == plan.ref
    assert published
    assert newest_step(store, plan.ref.version) == 0
    other = fresh()
    adapt(settings, other)
    assert bytes_of(store, settings) == bytes_of(other, settings)


def test_a_diverging_run_keeps_its_last_good_checkpoint(fresh: Callable[[], Store], settings: AdaptationSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that become NaN after step 4 stop the run at step 5; the checkpoint of step 4 is there, and without the defect the run ends from it."""
    store = fresh()
    inner = Trainer.advance

    def poisoned(self: Trainer) -> None:
        if self.step == 4:
            with torch.no_grad():
                next(self.trained.parameters()).fill_(float("nan"))
        inner(self)

    monkeypatch.setattr(Trainer, "advance", poisoned)
    with pytest.raises(Diverged, match="stopped at step 5"):
        adapt(settings, store)
    monkeypatch.undo()
    plan = plan_adaptation(settings, store)
    assert plan.step == 4
    assert train_upsampler(settings, store, plan) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "no-such-base"}, r"base 'no-such-base' is neither shipped"),
        ({"dataset": "datasets/none"}, r"nothing is published as datasets/none"),
        ({"batch": 400}, r"datasets/pictures@\w+ has \d+ pictures in its train split but adaptation\.batch=400"),
        ({"size": 256}, r"pictures of datasets/pictures@\w+ have 128 pixels a side, less than adaptation\.size=256; lower it, or curate"),
        ({"size": 64}, r"adaptation\.size=64 must be a multiple of 64 and above 64, the own size of base tiny; try 128"),
        ({"size": 120}, r"adaptation\.size=120 must be a multiple of 64"),
        ({"compute": ComputeSettings(dtype="float16")}, r"compute\.dtype=float16 has too small a range for gradients; use bfloat16"),
    ],
)
def test_what_cannot_be_trained_is_refused_when_it_is_planned(world: Store, tiny_base: Path, changes: dict[str, object], message: str) -> None:
    """One line that names the setting and the way out, before anything is written."""
    before = {info.key for info in world.list("")}
    with pytest.raises(SettingsError, match=message) as error:
        plan_adaptation(tiny_settings(tiny_base, **changes), world)
    assert "\n" not in str(error.value)
    assert {info.key for info in world.list("")} == before


def test_a_dataset_without_captions_is_refused(store: Store, tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    for picture in sorted(pictures.glob("*.png"))[:12]:
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    curation = CurationSettings(name="silent", source=FolderSource(path=tmp_path), size=SIDE, tune=0.1, test=0.1)
    curate(curation.model_copy(update={"filters": curation.filters.model_copy(update={"min_side": 32, "min_caption_chars": 0})}), store)
    with pytest.raises(SettingsError, match=r"datasets/silent@\w+ has no captions; adaptation needs them"):
        plan_adaptation(tiny_settings(tiny_base, dataset="datasets/silent"), store)


def test_stopping_by_an_empty_split_is_refused(world: Store, tiny_base: Path, curation: CurationSettings) -> None:
    unsplit = curation.model_copy(update={"name": "unsplit", "tune": 0.0, "filters": curation.filters.model_copy(update={"min_side": 32})})
    curate(unsplit, world)
    with pytest.raises(SettingsError, match=r"datasets/unsplit@\w+ has no tune split, which adaptation\.early_stop looks at; unset it, or curate with"):
        plan_adaptation(tiny_settings(tiny_base, dataset="datasets/unsplit", early_stop=1), world)


def test_a_base_that_changed_since_the_plan_is_refused(world: Store, tiny_base: Path, tmp_path: Path) -> None:
    """A worker that finds another base than was planned stops instead of mixing two."""
    copy = tmp_path / "tiny"
    subprocess.run(["cp", "-r", str(tiny_base), str(copy)], check=True)
    settings = tiny_settings(copy)
    plan = plan_adaptation(settings, world)
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-4}))
    with pytest.raises(SettingsError, match="when the run was planned; run the command again"):
        encode_unit(settings, world, plan, 0)


def test_exhausted_memory_is_one_line(world: Store, settings: AdaptationSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raises when an allocation fails names the batch and the size."""
    monkeypatch.setattr(Trainer, "advance", lambda self: torch.empty(2**60))
    with pytest.raises(SettingsError, match=r"out of memory with adaptation\.size=128 and adaptation\.batch=4; lower the batch"):
        train_upsampler(settings.model_copy(update={"seed": 77}), world, plan_adaptation(settings.model_copy(update={"seed": 77}), world))


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_other_families_adapt_too(world: Store, tmp_path: Path, kind: models.Kind) -> None:
    """A base in the shape of SD 2.1 or SDXL (pooled text, size ids, an Euler scheduler) trains, publishes and is sampled with what was trained."""
    base = models.saved_base(tmp_path / kind, kind)
    settings = tiny_settings(base, name=kind, steps=2, upsampler=UpsamplerSettings(variant="C"))
    ref = adapt(settings, world)
    config = json.loads(resolve(world, f"upsamplers/{kind}").read("config.json"))
    assert (config["size"], config["stage"], config["base"].partition("@")[0]) == ([SIDE, SIDE], 1, kind)
    pipe = SelfCascadePipeline.from_pretrained(str(base), upsampler=ref.uri, store=world)
    assert pipe.upsampler.config.base == config["base"]
