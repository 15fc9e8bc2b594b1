"""The whole stage on a real store: planned, cached, resumed, published with bytes that depend on nothing but the pictures and settings."""

from __future__ import annotations

import io
import json
import time

import pyarrow.parquet as pq
import pytest
import torch
from discs import COUNT, disc, publish_dataset, publish_methods, publish_samples
from PIL import Image

from selfcascade.config import FeatureSettings
from selfcascade.evaluation.evaluate import evaluate, evaluate_unit, plan_evaluation, publish_evaluation, timed_report
from selfcascade.evaluation.manifold import realism
from selfcascade.evaluation.measured_set import measured_set
from selfcascade.evaluation.published import history_of, read_replicates, read_results
from selfcascade.evaluation.report import Cost, Times
from selfcascade.evaluation.results import Number, metrics_with
from selfcascade.generation.samples import read_generated
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, IntegrityError, NotFound


def test_the_report_says_what_was_planted(scene):
    """Layout and objects see the repeated discs, the better eta is compared, base and Lanczos are blank where they mean nothing, and pairs are compared."""
    results = read_results(scene.store, scene.report)
    rows = {row.label: row for row in results.rows}
    assert [row.label for row in results.shown()] == ["base", "lanczos", "direct eta 1", "tuning-free", "tuned"]
    assert "better by KID_r" in rows["direct eta 1"].note
    assert "worse by KID_r" in rows["direct eta 0"].note
    value = {(label, name): number.value for label, row in rows.items() for name, number in row.numbers.items()}
    assert value["direct eta 1", "objects"] == 4
    assert value["tuned", "objects"] == value["base", "objects"] == 1
    assert value["direct eta 1", "objects_b"] == 3
    assert value["tuned", "layout_b"] < value["tuning-free", "layout_b"] < value["direct eta 1", "layout_b"]
    assert value["tuned", "kid_r"] < value["direct eta 0", "kid_r"]
    assert {name for name, number in rows["base"].numbers.items() if number.value is None} == {
        *("pkid_r", "pfid_r", "detail_r"),
        *("kid_b", "fid_b", "layout_b", "objects_b"),
    }
    assert {name for name, number in rows["lanczos"].numbers.items() if number.value is None} == {"kid_b", "fid_b", "layout_b", "objects_b"}
    assert "by construction" in rows["lanczos"].numbers["kid_b"].why
    assert {name for name, number in rows["tuned"].numbers.items() if number.error is None} == {"precision_r", "recall_r", "density_r", "coverage_r"}
    assert results.floor.reference + results.floor.pictures == results.real_pictures
    assert (results.real_split, results.chosen_on, results.prompts_from) == ("test", "tune", "not of this dataset")
    assert {item.role for item in results.lineage} == {"real pictures", *scene.samples}


def test_differences_are_of_the_shown_methods_over_the_same_prompts(scene):
    results = read_results(scene.store, scene.report)
    value = {(row.label, name): number.value for row in results.rows for name, number in row.numbers.items()}
    found = {(item.first, item.second, item.metric): item for item in results.differences}
    layout, frechet = found["direct eta 1", "tuned", "layout_b"], found["direct eta 1", "tuned", "fid_r"]
    assert layout.value == pytest.approx(value["tuned", "layout_b"] - value["direct eta 1", "layout_b"])
    assert layout.interval.high < 0
    assert frechet.value == pytest.approx(value["tuned", "fid_r"] - value["direct eta 1", "fid_r"])
    assert {label for item in results.differences for label in (item.first, item.second)} == {"lanczos", "direct eta 1", "tuning-free", "tuned"}
    assert not [item for item in results.differences if item.first == "lanczos" and item.metric.endswith("_b")]


def test_what_the_artifact_holds(scene):
    """metrics.json, a long table, a sheet that opens, a page that names the protocol under every table of numbers, counts that lead with KID."""
    artifact = Artifact(scene.store, scene.report)
    manifest = artifact.manifest()
    names = ["metrics.json", "metrics.parquet", "replicates.parquet", "report.html", "sheet.png", "table.md", "table.tex"]
    assert [entry.key for entry in manifest.objects] == names
    assert manifest.counts["prompts"] == COUNT
    assert "KID_r x 1000, tuned" in manifest.counts
    assert set(manifest.inputs) == {"dataset", "features.weights", *(f"samples/{label}" for label in scene.samples)}
    table = pq.read_table(io.BytesIO(artifact.read("metrics.parquet"))).to_pylist()
    assert len(table) == (len(scene.samples) + 1) * len(metrics_with(()))
    assert Image.open(io.BytesIO(artifact.read("sheet.png"))).size[0] > 5 * 128
    page = artifact.read("report.html").decode()
    protocol = json.loads(artifact.read("metrics.json"))["protocol"]
    captions = [part.split("</figcaption>")[0] for part in page.split("<figcaption>")[1:]]
    assert len(captions) == 4
    for words in (protocol["network"], protocol["weights_sha256"][:12], protocol["resize"], protocol["crop"].split(",")[0], "8 pictures of 8 prompts"):
        assert all(words in caption for caption in captions), words
    assert "&lt;b&gt;disc&lt;/b&gt; &amp; p000" in page
    assert "<b>disc" not in page


def test_times_stay_out_of_the_artifact(scene):
    """The page with times differs from the artifact's only in its section on time and cost."""
    plain = Artifact(scene.store, scene.report).read("report.html").decode()
    costs = {"tuned": Cost(seconds=16.0, pictures=COUNT, peak_bytes=2**30, parameters=1824), "direct eta 1": Cost(seconds=8.0, pictures=COUNT)}
    timed = timed_report(scene.store, scene.report, Times(methods=costs, stages={"adapt": 61.2}, machine="2 cores", run="run-1"))
    cut = [page[: page.index('id="cost"')] + page[page.index('id="lineage"') :] for page in (plain, timed)]
    assert cut[0] == cut[1]
    for words in ("2.00 s", "2.00×", "1,024 MiB", "1,824", "adapt 61 s", "2 cores", "run-1"):
        assert words in timed
        assert words not in plain


def test_a_published_report_is_left_alone(scene, settings):
    """Nothing is planned, read or cached again."""
    plan = plan_evaluation(settings, scene.store, scene.dataset, scene.samples)
    assert (plan.published, plan.units, plan.todo) == (True, 0, ())
    before = {info.key: info.modified for info in scene.store.list("")}
    assert evaluate(settings, scene.store, scene.dataset, scene.samples) == scene.report == publish_evaluation(settings, scene.store, plan)
    assert {info.key: info.modified for info in scene.store.list("")} == before


def test_other_settings_share_features_where_they_may(scene, settings):
    """Other subsets need no other features; other crops do."""
    subsets, crops = settings.model_copy(update={"kid_subset": 3, "half_samples": 10}), settings.model_copy(update={"crop": 20})
    assert plan_evaluation(subsets, scene.store, scene.dataset, scene.samples).todo == ()
    # The base has no crops: its features stay.
    assert plan_evaluation(crops, scene.store, scene.dataset, scene.samples).done == ()


def test_an_equal_run_elsewhere_gives_equal_bytes(scene, settings, store, tmp_path):
    """Everything anew in another store, unit by unit in another order, with labels in another order and a damaged cache: the same SHA-256 of every object."""
    dataset, samples = publish_dataset(store, tmp_path), publish_methods(store, tmp_path)
    plan = plan_evaluation(settings, store, str(dataset), dict(reversed(samples.items())))
    assert [item.label for item in plan.sets] == ["real", "base", "lanczos", "direct eta 0", "direct eta 1", "tuning-free", "tuned"]
    assert (plan.todo, plan.target, plan.small) == (tuple(range(7)), (48, 48), (24, 24))
    for index in reversed(plan.todo):
        assert evaluate_unit(settings, store, plan, index) == plan.sets[index].count
    assert plan_evaluation(settings, store, dataset, samples).todo == ()
    whole = {info.key: store.read(info.key) for info in store.list("cache/features")}
    assert sum(map(len, whole.values())) == pytest.approx(plan.bytes_planned, rel=0.05)
    for key in sorted(whole)[::2]:
        store.put_cache(key, whole[key][:-100] + bytes(byte ^ 1 for byte in whole[key][-100:]))
    ref = publish_evaluation(settings, store, plan)
    assert ref.version == scene.report.version
    objects, expected = (Artifact(where, found).manifest().objects for where, found in ((store, ref), (scene.store, scene.report)))
    assert objects == expected
    assert {key: store.read(key) for key in whole} == whole


def test_only_some_methods(scene, settings):
    """Without the base nothing is measured against it, and the table says so; one method alone has no pair."""
    ref = evaluate(settings.model_copy(update={"name": "alone"}), scene.store, scene.dataset, {"tuned": scene.samples["tuned"]})
    results = read_results(scene.store, ref)
    (row,) = results.rows
    assert row.numbers["kid_b"].why == "no samples of the base are compared"
    assert row.numbers["kid_r"].value is not None
    assert results.differences == ()
    assert results.layout_chance is None


def test_two_pictures_are_enough_for_numbers_but_not_for_intervals(scene, settings, tmp_path):
    two = publish_samples(scene.store, tmp_path, "base", [disc(0, 24), disc(1, 24)], name="two")
    number = (
        read_results(scene.store, evaluate(settings.model_copy(update={"name": "two"}), scene.store, scene.dataset, {"base": two})).rows[0].numbers["kid_r"]
    )
    assert number.value is not None
    assert number.error is None


def test_a_flipped_byte_is_refused_by_name(store, settings, tmp_path):
    dataset, samples = publish_dataset(store, tmp_path), publish_methods(store, tmp_path)
    key = f"{samples['direct eta 1'].prefix}/00000.tar"
    data = bytearray(store.read(key))
    data[1500] ^= 1
    store.overwrite(key, bytes(data))
    with pytest.raises(IntegrityError, match=r"samples/direct-eta-1/.*/00000\.tar"):
        evaluate(settings, store, dataset, samples)
    assert not [info for info in store.list("reports/") if info.key.endswith("manifest.json")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"real_count": 1000}, "has .* pictures but evaluation.real_count asks for 1000"),
        ({"real_split": "tune"}, "split 'tune' of datasets/discs@.* has 0 pictures; at least 2 are needed"),
        ({"crop": 64}, "evaluation.crop is 64 px but the pictures have 48 x 48 px"),
        ({"features": FeatureSettings(network="inception-v3")}, "needs weights"),
    ],
)
def test_settings_that_do_not_fit(scene, settings, change, message):
    """Before a single picture is read, in one line."""
    with pytest.raises(SettingsError, match=message) as caught:
        plan_evaluation(settings.model_copy(update=change), scene.store, scene.dataset, scene.samples)
    assert "\n" not in str(caught.value)


def test_samples_that_cannot_be_compared(scene, settings, tmp_path):
    def planned(**samples):
        return plan_evaluation(settings, scene.store, scene.dataset, samples)

    def tuned(name, pictures, prompts=None):
        return publish_samples(scene.store, tmp_path, "tuned", pictures, name=name, prompts=prompts)

    with pytest.raises(SettingsError, match=r"samples/one@.* has 1 pictures; at least 2"):
        planned(tuned=tuned("one", [disc(0, 48)]))
    others = tuned("other", [disc(seed, 48) for seed in range(COUNT)], [f"q{number}" for number in range(COUNT)])
    with pytest.raises(SettingsError, match=r"'base' .* and 'tuned' .* are not of the same prompts .*only one has 'p000-0000'"):
        planned(base=scene.samples["base"], tuned=others)
    with pytest.raises(SettingsError, match=r"different sizes cannot be compared .*lanczos 48 x 48, tuned 40 x 40"):
        planned(lanczos=scene.samples["lanczos"], tuned=tuned("small", [disc(seed, 40) for seed in range(COUNT)]))
    with pytest.raises(SettingsError, match="mixes pictures of 40 x 40 and 48 x 48 px"):
        planned(tuned=tuned("mixed", [disc(seed, 48 - 8 * (seed % 2)) for seed in range(COUNT)]))
    with pytest.raises(SettingsError, match="no samples to evaluate"):
        planned()
    with pytest.raises(NotFound):
        planned(tuned="samples/nowhere")
    with pytest.raises(SettingsError, match="no artifact of kind samples"):
        planned(tuned=scene.dataset)


def test_the_numbers_of_the_run_that_was_first_are_the_reports(scene, settings):
    """Another machine may round otherwise: table, page and counts are made from the stored numbers, not from those of this run."""
    chosen = settings.model_copy(update={"kid_subsets": 7})
    plan = plan_evaluation(chosen, scene.store, scene.dataset, scene.samples)
    results = read_results(scene.store, scene.report)
    rows = tuple(row.model_copy(update={"numbers": row.numbers | {"kid_r": Number(value=0.123456)}}) for row in results.rows)
    replicates = Artifact(scene.store, scene.report).read("replicates.parquet")
    scene.store.put_new(f"{plan.ref.prefix}/replicates.parquet", replicates)
    scene.store.put_new(f"{plan.ref.prefix}/metrics.json", results.model_copy(update={"rows": rows}).to_bytes())
    artifact = Artifact(scene.store, publish_evaluation(chosen, scene.store, plan))
    assert artifact.manifest().counts["KID_r x 1000, tuned"] == 123.456
    assert artifact.read("replicates.parquet") == replicates
    assert artifact.read("report.html").decode().count(">123.5") >= 5
    table = pq.read_table(io.BytesIO(artifact.read("metrics.parquet"))).to_pylist()
    assert {row["value"] for row in table if row["metric"] == "kid_r" and row["method"] != "real"} == {0.123456}


def test_a_run_that_ended_between_halves_and_numbers_goes_on(scene, settings, monkeypatch):
    """The next one takes the halves that are there, which are those that its own numbers rest on."""
    chosen = settings.model_copy(update={"kid_subsets": 9})
    plan = plan_evaluation(chosen, scene.store, scene.dataset, scene.samples)
    put = Artifact.put

    def dies(artifact, key, data):
        if key == "metrics.json":
            raise KeyboardInterrupt
        return put(artifact, key, data)

    monkeypatch.setattr(Artifact, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        publish_evaluation(chosen, scene.store, plan)
    monkeypatch.undo()
    left = scene.store.read(f"{plan.ref.prefix}/replicates.parquet")
    artifact = Artifact(scene.store, publish_evaluation(chosen, scene.store, plan))
    assert artifact.read("replicates.parquet") == left
    replicates = read_replicates(scene.store, artifact.ref)
    for item in read_results(scene.store, artifact.ref).differences:
        assert replicates.difference(item.first, item.second, item.metric) == item


def test_the_least_and_the_most_real_pictures_of_each_method_are_shown(scene, settings):
    """By the realism of their features, each with its own prompt; none on both sides, and none where none are asked for."""
    results = read_results(scene.store, scene.report)
    plan = plan_evaluation(settings.model_copy(update={"kid_subsets": 11}), scene.store, scene.dataset, scene.samples)
    tables = {item.label: measured_set(settings, scene.store, plan, place).table for place, item in enumerate(plan.sets)}
    for row in results.shown():
        own = [each for each in results.extremes if each.label == row.label]
        assert [each.side for each in own] == ["least"] * 3 + ["most"] * 3
        scores = realism(torch.from_numpy(tables["real"].features), torch.from_numpy(tables[row.label].features))
        known = dict(zip(tables[row.label].keys, scores.tolist(), strict=True))
        assert [each.realism for each in own] == pytest.approx(sorted(known.values())[:3] + sorted(known.values())[-3:], rel=1e-5)
        assert [each.realism for each in own] == pytest.approx([known[each.key] for each in own], rel=1e-5)
        prompts = {sample.key: sample.prompt for sample in read_generated(Artifact(scene.store, scene.samples[row.label]))}
        assert [each.prompt for each in own] == [prompts[each.key] for each in own]
        assert {each.key for each in own[:3]}.isdisjoint(each.key for each in own[3:])
    assert {row.label for row in results.shown()} == {each.label for each in results.extremes}


def test_a_history_holds_what_was_measured_alike(scene, settings):
    """Versions in the order in which they came, up to the one that is asked for; other subsets are another protocol, and other names another report."""

    def published(**change):
        time.sleep(1.1)  # the store's clock counts seconds
        return evaluate(settings.model_copy(update={"name": "history"} | change), scene.store, scene.dataset, scene.samples)

    first, other, second, third = published(), published(kid_subsets=7), published(sheet_prompts=2), published(sheet_prompts=1)
    assert [past.version for past in history_of(scene.store, third)] == [first.version, second.version, third.version]
    assert [past.version for past in history_of(scene.store, second)] == [first.version, second.version]
    assert [past.version for past in history_of(scene.store, other)] == [other.version]
    timed = timed_report(scene.store, third, Times())
    assert timed.count('class="curve history"') == 4
    for page in (timed_report(scene.store, first, Times()), Artifact(scene.store, third).read("report.html").decode()):
        assert 'class="curve history"' not in page
