"""Units of work against a real store: same bytes whoever does them, nothing done twice, nothing half done left behind."""

import io
import json
import multiprocessing
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import NATIVE, saved_base

from selfcascade.cascade.upsampler import load_upsampler
from selfcascade.config import CascadeSettings, CurationSettings, PromptSettings
from selfcascade.curation.shards import SCHEMA as DATASET_SCHEMA
from selfcascade.generation import generate
from selfcascade.generation.chunks import lay_out
from selfcascade.generation.generate import generate_unit, part_of, plan_generation, publish_generation
from selfcascade.generation.inputs import relevant
from selfcascade.generation.samples import SCHEMA, read_generated, read_table
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, NotFound, Store, entry_of, resolve


def made(settings, store):
    """The published artifact of these settings, every unit done here."""
    plan = plan_generation(settings, store)
    for index in plan.todo:
        generate_unit(settings, store, plan, index, "cpu")
    publish_generation(settings, store, plan)
    return resolve(store, str(plan.ref.prefix).replace("/" + plan.ref.version, "@" + plan.ref.version))


def digests(artifact):
    return {entry.key: entry.sha256 for entry in artifact.manifest().objects}


def test_a_run_from_plan_to_pictures(store, generation):
    """Two chunks of six prompts become two shards; read back they are the pictures, in key order, and the table says what made each."""
    plan = plan_generation(generation, store)
    assert (plan.units, plan.todo, plan.done, plan.published) == (2, (0, 1), (), False)
    assert list(store.list("samples/")) == []  # planning writes nothing
    reports = [generate_unit(generation, store, part_of(generation, store, plan, [index]), index, "cpu") for index in plan.todo]
    assert [report.count for report in reports] == [4, 2]
    assert all(report.seconds > 0 and report.peak_mb > 50 for report in reports)
    ref = publish_generation(generation, store, plan)
    artifact = resolve(store, "samples/tiny")
    assert artifact.ref == ref == plan.ref
    assert set(digests(artifact)) == {f"0000{unit}.{kind}" for unit in (0, 1) for kind in ("tar", "parquet", "html")} | {"index.html"}
    assert artifact.manifest().counts == {"samples": 6, "prompts": 6, "shards": 2, "method": "tuning-free"}
    samples, table = list(read_generated(artifact)), read_table(artifact)
    assert table.schema == SCHEMA
    assert (
        [sample.key for sample in samples]
        == table.column("key").to_pylist()
        == sorted(spec.key for chunk in lay_out(generation, store).values() for spec in chunk)
    )
    assert all(sample.image.shape == (2 * NATIVE, 2 * NATIVE, 3) for sample in samples)
    assert set(table.column("settings").to_pylist()) == {relevant(generation).digest()}
    assert set(table.column("method").to_pylist()) == {"tuning-free"}
    assert table.column("seed").to_pylist() == [sample.seed for sample in samples]
    again = plan_generation(generation, store)
    assert (again.published, again.todo, again.done) == (True, (), (0, 1))


def test_some_samples_are_read_from_their_own_shards_alone(store, generation, monkeypatch):
    """The same pictures in the same order; a shard without any of them is not fetched."""
    artifact = made(generation, store)
    whole = {sample.key: sample.image for sample in read_generated(artifact)}
    *_, before, last = whole
    fetched = []
    download = type(artifact).download
    monkeypatch.setattr(type(artifact), "download", lambda self, key, path: (fetched.append(key), download(self, key, path)))
    some = list(read_generated(artifact, {last, before}))
    assert [sample.key for sample in some] == [before, last]
    assert all(np.array_equal(sample.image, whole[sample.key]) for sample in some)
    assert fetched == ["00001.tar"]
    assert list(read_generated(artifact, set())) == []


def test_shards_are_what_webdataset_reads(store, generation, tmp_path):
    import webdataset

    artifact = made(generation, store)
    artifact.download("00000.tar", tmp_path / "00000.tar")
    rows = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False).decode("rgb8"))
    table = pq.read_table(io.BytesIO(artifact.read("00000.parquet")))
    assert [row["__key__"] for row in rows] == table.column("key").to_pylist()
    assert [row["json"]["prompt"] for row in rows] == table.column("prompt").to_pylist()
    assert np.array_equal(rows[0]["png"], next(read_generated(artifact)).image)


def test_nothing_of_machine_or_moment_is_in_the_artifact(store, generation, tiny_base, prompt_file):
    artifact = made(generation, store)
    for key in [*digests(artifact), "manifest.json"]:
        data = store.read(f"{artifact.prefix}/{key}")
        assert str(tiny_base.parent).encode() not in data
        assert str(prompt_file.parent).encode() not in data


def _unit(settings, store_settings, index):
    with Store.open(store_settings) as store:
        return generate_unit(settings, store, plan_generation(settings, store), index, "cpu").count


def test_one_and_two_worker_processes_leave_the_same_bytes(store, store_settings, generation, tiny_upsampler):
    """Both chunks in one process, and each in a process of its own with an empty cache: every object has the same SHA-256, and so has the manifest."""
    generation = generation.model_copy(update={"method": "tuned", "upsampler": str(tiny_upsampler)})
    alone = made(generation, store)
    elsewhere = store_settings.model_copy(update={"prefix": store_settings.prefix + "-2"})
    with Store.open(elsewhere) as other:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            counts = list(pool.map(_unit, [generation] * 2, [elsewhere] * 2, [1, 0]))
        assert counts == [2, 4]
        together = made(generation, other)
        assert together.ref.version == alone.ref.version
        assert digests(together) == digests(alone)
        assert other.read(f"{together.prefix}/manifest.json") == store.read(f"{alone.prefix}/manifest.json")


def test_a_rerun_skips_what_is_done(store, generation, monkeypatch):
    plan = plan_generation(generation, store)
    generate_unit(generation, store, plan, 1, "cpu")
    before = {info.key: info.etag for info in store.list("samples/")}
    again = plan_generation(generation, store)
    assert (again.done, again.todo) == ((1,), (0,))
    monkeypatch.setattr(generate, "_sample", lambda *arguments: pytest.fail("sampled again"))
    assert generate_unit(generation, store, again, 1, "cpu").count == 0
    assert {info.key: info.etag for info in store.list("samples/")} == before


def test_a_missing_table_is_made_from_the_tar_that_is_there(store, generation, monkeypatch):
    """Killed between tar and table: the next run completes the shard, samples nothing, and leaves the tar as it was."""
    plan = plan_generation(generation, store)
    generate_unit(generation, store, plan, 0, "cpu")
    table = f"{plan.ref.prefix}/00000.parquet"
    whole, tar = store.read(table), store.head(f"{plan.ref.prefix}/00000.tar")
    store.delete([table])
    assert plan_generation(generation, store).todo == (0, 1)
    monkeypatch.setattr(generate, "_sample", lambda *arguments: pytest.fail("sampled again"))
    assert generate_unit(generation, store, plan, 0, "cpu").count == 0
    assert store.read(table) == whole
    assert store.head(f"{plan.ref.prefix}/00000.tar") == tar


def test_a_tar_that_another_run_stored_meanwhile_is_adopted(store, generation, tmp_path, monkeypatch):
    """A run on another device may be first with other bytes: the table that follows describes the tar that the store holds."""
    plan = plan_generation(generation, store)
    original = generate._sample
    other = generation.model_copy(update={"cascade": generation.cascade.model_copy(update={"steps": 2})})
    original(other, store, plan, 0, "cpu", tmp_path / "first.tar")

    def overtaken(settings, store, plan, index, device, path):
        Artifact(store, plan.ref).put("00000.tar", tmp_path / "first.tar")
        return original(settings, store, plan, index, device, path)

    monkeypatch.setattr(generate, "_sample", overtaken)
    generate_unit(generation, store, plan, 0, "cpu")
    assert store.entry(f"{plan.ref.prefix}/00000.tar").sha256 == entry_of("x", tmp_path / "first.tar").sha256
    table = pq.read_table(io.BytesIO(store.read(f"{plan.ref.prefix}/00000.parquet")))
    assert set(table.column("settings").to_pylist()) == {relevant(other).digest()}


def test_publishing_before_every_unit_is_done_names_the_shard(store, generation):
    plan = plan_generation(generation, store)
    generate_unit(generation, store, plan, 0, "cpu")
    with pytest.raises(NotFound, match=r"00001\.(tar|parquet|html)"):
        publish_generation(generation, store, plan)
    assert not plan_generation(generation, store).published


def test_plans_travel_between_processes(store, generation):
    plan = plan_generation(generation, store)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert generate.GenerationPlan.model_validate(json.loads(plan.model_dump_json())) == plan
    part = part_of(generation, store, plan, [1])
    assert pickle.loads(pickle.dumps(part)) == part
    assert list(part.chunks) == [1]
    assert (plan.chunks, part.done) == ({}, ())


def test_a_method_has_one_version_whatever_only_others_look_at(store, generation):
    """Sweeping K on the tuning-free cascade leaves base and direct where they are; what a method looks at moves it."""

    def version(method, **cascade):
        settings = generation.model_copy(update={"method": method, "cascade": generation.cascade.model_copy(update=cascade)})
        return plan_generation(settings, store).ref.version

    plain = {method: version(method) for method in ("base", "lanczos", "direct", "tuning-free")}
    assert len(set(plain.values())) == 4
    for method in ("base", "lanczos", "direct"):
        assert plain[method] == version(method, start=0.5, upscale="bicubic", t_min=100, strength=0.5)
        assert plain[method] != version(method, guidance_scale=2.0)
    assert plain["tuning-free"] == version("tuning-free", t_min=100, strength=0.5)
    assert plain["tuning-free"] != version("tuning-free", start=0.5)


def test_where_base_and_prompts_lie_does_not_matter_but_what_they_are_does(store, generation, tiny_base, prompt_file, tmp_path):
    version = plan_generation(generation, store).ref.version
    moved = shutil.copytree(tiny_base, tmp_path / "elsewhere" / tiny_base.name)
    shuffled = tmp_path / "other-name.txt"
    shuffled.write_text("\n".join(reversed(prompt_file.read_text().split("\n"))))
    same = generation.model_copy(update={"base": str(moved), "prompts": PromptSettings(file=shuffled)})
    assert plan_generation(same, store).ref.version == version
    shuffled.write_text("a red cat\n")
    assert plan_generation(same, store).ref.version != version
    other = generation.model_copy(update={"base": str(saved_base(tmp_path / tiny_base.name, seed=1))})
    assert plan_generation(other, store).ref.version != version


def test_a_base_that_changes_after_planning_is_refused(store, generation, tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    generation = generation.model_copy(update={"base": str(folder)})
    plan = plan_generation(generation, store)
    saved_base(folder, seed=1)
    with pytest.raises(SettingsError, match=r"base 'base' is now at version .* but was planned as base@.*; run again"):
        generate_unit(generation, store, plan, 0, "cpu")


def test_an_upsampler_that_changes_after_planning_is_refused(store, generation, tiny_upsampler, tmp_path):
    folder = shutil.copytree(tiny_upsampler, tmp_path / "phi")
    settings = generation.model_copy(update={"method": "tuned", "upsampler": str(folder)})
    plan = plan_generation(settings, store)
    assert plan.ref == plan_generation(settings.model_copy(update={"upsampler": str(tiny_upsampler)}), store).ref
    changed = load_upsampler(str(folder))
    next(changed.parameters()).data += 1
    changed.save_pretrained(folder)
    with pytest.raises(SettingsError, match=r"upsampler .*phi' has changed since it was planned as .*; run again"):
        generate_unit(settings, store, plan, 0, "cpu")
    assert plan_generation(settings, store).ref != plan.ref


def test_tuned_without_an_upsampler_is_refused(store, generation):
    with pytest.raises(SettingsError, match=r"method 'tuned' needs an upsampler; set generation\.upsampler"):
        plan_generation(generation.model_copy(update={"method": "tuned"}), store)


def test_an_upsampler_of_another_base_is_refused_before_any_unit(store, generation, tiny_upsampler, tmp_path):
    other = str(saved_base(tmp_path / "stranger", seed=1))
    settings = generation.model_copy(update={"method": "tuned", "upsampler": str(tiny_upsampler), "base": other})
    with pytest.raises(SettingsError, match=r"upsampler .*phi was trained for base 'tiny@.*' but the pipeline holds 'stranger@.*'") as caught:
        plan_generation(settings, store)
    assert "\n" not in str(caught.value)
    assert list(store.list("samples/")) == []


def test_an_upsampler_artifact_is_pinned_to_its_version(store, generation, tiny_upsampler):
    """Planned from the pointer, sampled from that version, though the pointer has moved on since."""
    artifact = _published(store, "upsamplers", "phi", tiny_upsampler, seed=0)
    settings = generation.model_copy(update={"method": "tuned", "upsampler": "upsamplers/phi"})
    plan = plan_generation(settings, store)
    assert plan.upsampler == f"upsamplers/phi@{artifact.ref.version}"
    assert plan.inputs["upsampler"] == f"phi@{artifact.ref.version}"
    _published(store, "upsamplers", "phi", tiny_upsampler, seed=1)
    assert plan_generation(settings, store).ref != plan.ref
    assert generate_unit(settings, store, plan, 1, "cpu").count == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "no-such-base"}, "base 'no-such-base' is neither"),
        ({"method": "tuned", "upsampler": "upsamplers/none"}, "nothing is published as upsamplers/none"),
        ({"method": "tuned", "upsampler": "no-such-folder"}, "upsampler 'no-such-folder' is neither an artifact"),
        ({"prompts": PromptSettings(dataset="datasets/none")}, "nothing is published as datasets/none"),
        ({"prompts": PromptSettings(file=Path("none.txt"))}, r"prompt file none\.txt cannot be read"),
        ({"cascade": CascadeSettings(height=100, width=128)}, "size 100x128 must have sides that are multiples of 32"),
        ({"cascade": CascadeSettings(height=32, width=64)}, "size 32x64 is smaller than the base's own 64x64"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(store, generation, change, message):
    with pytest.raises(SettingsError, match=message) as caught:
        plan_generation(generation.model_copy(update=change), store)
    assert "\n" not in str(caught.value)
    assert list(store.list("samples/")) == []


def test_prompts_come_from_the_split_of_a_dataset(store, generation):
    rows = [
        {"key": "k1", "caption": "a red cat", "split": "train", "kept": True},
        {"key": "k3", "caption": "red cat", "split": "test", "kept": True},
        {"key": "k2", "caption": "a cat", "split": "test", "kept": True},
        {"key": "k4", "caption": "a zebra", "split": "test", "kept": True},
    ]
    artifact = Artifact.plan(store, "datasets", "few", CurationSettings(), {"source": "none"})
    for index in range(2):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows[2 * index : 2 * index + 2], schema=DATASET_SCHEMA), buffer)
        artifact.put(f"{index:05d}.parquet", buffer.getvalue())
    artifact.publish(counts={})

    def prompts(**changes):
        chunks = lay_out(generation.model_copy(update={"prompts": PromptSettings(dataset="datasets/few", **changes)}), store)
        return [(spec.prompt_id, spec.index) for chunk in chunks.values() for spec in chunk]

    assert prompts() == [("k2", 0), ("k3", 0)]
    assert prompts(known_words=False) == [("k2", 0), ("k3", 0), ("k4", 0)]
    assert prompts(count=1, per_prompt=2) == [("k2", 0), ("k2", 1)]
    with pytest.raises(SettingsError, match=r"split 'test' of datasets/few@\w{12}, known words only has 2 prompts but prompts\.count asks for 5"):
        prompts(count=5)
    with pytest.raises(SettingsError, match=r"split 'tune' of datasets/few@.*: no prompt is left"):
        prompts(split="tune")


def _published(store, kind, name, folder, *, seed):
    """An artifact of a folder's files; another seed, another version."""
    artifact = Artifact.plan(store, kind, name, CurationSettings(), {"seed": str(seed)})
    for path in sorted(folder.iterdir()):
        artifact.put(path.name, path)
    artifact.publish(counts={})
    return artifact
