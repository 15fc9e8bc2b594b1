"""Networks beside the first: one pass over the pictures for all of them, numbers that their definitions give, nothing of the others done twice."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from discs import COUNT
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity, normalize
from torchmetrics.image.fid import FrechetInceptionDistance

from selfcascade.config import EvaluationSettings, FurtherFeatures, GateSettings
from selfcascade.evaluation import measured_set
from selfcascade.evaluation.cmmd import CmmdBlock
from selfcascade.evaluation.embeddings import Embedding, Embeddings
from selfcascade.evaluation.evaluate import evaluate, evaluate_unit, plan_evaluation, publish_evaluation
from selfcascade.evaluation.features import as_batch, load_features
from selfcascade.evaluation.further_metrics import clip_scores
from selfcascade.evaluation.gate import GateFailed, check_gate
from selfcascade.evaluation.intervals import half_samples
from selfcascade.evaluation.published import read_results
from selfcascade.evaluation.report import render_report
from selfcascade.evaluation.sets import read_pictures
from selfcascade.evaluation.tables import Picture
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact

BESIDE = {"clip": ("cmmd_r", "cmmd_b", "clip_score"), "dinov2": ("fd_dinov2_r", "fd_dinov2_b")}


@pytest.fixture(scope="module")
def both(settings, clip_folder, dinov2_folder):
    further = (FurtherFeatures(network="clip", weights=clip_folder, batch=5), FurtherFeatures(network="dinov2", weights=dinov2_folder, batch=4))
    return settings.model_copy(update={"further": further, "name": "further"})


@pytest.fixture(scope="module")
def results(scene, both):
    return read_results(scene.store, evaluate(both, scene.store, scene.dataset, scene.samples))


def embedded(scene, both, which):
    """Features of every set by the plain way: one picture after the other, no cache."""
    network = load_features(both.further[which])
    plan = plan_evaluation(both.model_copy(update={"name": "plain"}), scene.store, scene.dataset, scene.samples)
    pictures = {item.label: sorted(read_pictures(scene.store, item), key=lambda picture: (picture.prompt_id, picture.key)) for item in plan.sets}
    return network, pictures, {label: torch.cat([network(as_batch([picture.image])) for picture in found]) for label, found in pictures.items()}


def naive_cmmd(x, y):
    """The sums of the paper, pair by pair."""
    x, y = (normalize(torch.as_tensor(values).double()).numpy() for values in (x, y))

    def mean(one, other):
        return np.mean([np.exp(-np.square(a - b).sum() / (2 * 10.0**2)) for a in one for b in other])

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_numbers_are_those_of_their_definitions(scene, both, results):
    """CMMD pair by pair, CLIP score as the clipped cosine of picture and prompt, FD-DINOv2 by torchmetrics' FID on DINOv2's features; the rest is unmoved."""
    network, pictures, features = embedded(scene, both, 0)
    value = {(row.label, name): number.value for row in results.rows for name, number in row.numbers.items()}
    texts = network.read([picture.prompt for picture in pictures["tuned"]])
    assert value["tuned", "cmmd_r"] == pytest.approx(naive_cmmd(features["tuned"], features["real"]), rel=1e-4)
    assert value["tuned", "cmmd_b"] == pytest.approx(naive_cmmd(features["tuned"], features["base"]), rel=1e-4)
    assert value["tuned", "clip_score"] == pytest.approx(float(100 * cosine_similarity(features["tuned"], texts).clamp_min(0).mean()), abs=1e-3)
    network, _, features = embedded(scene, both, 1)
    for reference, name in (("real", "fd_dinov2_r"), ("base", "fd_dinov2_b")):
        metric = FrechetInceptionDistance(feature=network)
        for label, real in ((reference, True), ("direct eta 1", False)):
            batch = as_batch([picture.image for picture in embedded_pictures(scene, both, label)])
            metric.update(batch, real=real)
        assert value["direct eta 1", name] == pytest.approx(float(metric.compute()), rel=2e-3)
    plain = read_results(scene.store, scene.report)
    for row, before in zip(results.rows, plain.rows, strict=True):
        assert {name: number for name, number in row.numbers.items() if name in before.numbers} == before.numbers
        assert set(row.numbers) - set(before.numbers) == {*BESIDE["clip"], *BESIDE["dinov2"]}


def embedded_pictures(scene, both, label):
    plan = plan_evaluation(both.model_copy(update={"name": "plain"}), scene.store, scene.dataset, scene.samples)
    return list(read_pictures(scene.store, next(item for item in plan.sets if item.label == label)))


def test_they_have_errors_blanks_a_floor_and_differences_like_the_others(results):
    rows = {row.label: row for row in results.rows}
    for name in (*BESIDE["clip"], *BESIDE["dinov2"]):
        assert rows["tuned"].numbers[name].error > 0, name
        assert [item for item in results.differences if item.metric == name and (item.first, item.second) == ("tuning-free", "tuned")], name
        assert (results.floor.numbers[name].value is None) == name.endswith("_b")
    assert rows["lanczos"].numbers["cmmd_b"].why == rows["lanczos"].numbers["kid_b"].why != ""
    assert rows["base"].numbers["fd_dinov2_b"].why == rows["base"].numbers["fid_b"].why != ""
    assert rows["lanczos"].numbers["clip_score"].value is not None


def test_the_pictures_are_read_once_for_all_networks_and_not_again_for_one_more(store, scene, both, tmp_path, monkeypatch):
    """From nothing: one reading a set for three networks. A network that comes later is one more reading, and the tables that are there stay."""
    from discs import publish_dataset, publish_methods

    dataset, samples = publish_dataset(store, tmp_path), publish_methods(store, tmp_path)
    read, loaded = [], []
    monkeypatch.setattr(measured_set, "read_pictures", lambda where, chosen: read.append(chosen.label) or read_pictures(where, chosen))
    monkeypatch.setattr(measured_set, "load_features", lambda chosen: loaded.append(chosen.network) or load_features(chosen))
    first = both.model_copy(update={"further": both.further[:1]})
    plan = plan_evaluation(first, store, dataset, samples)
    for index in plan.todo:
        evaluate_unit(first, store, plan, index)
    assert sorted(read) == sorted(item.label for item in plan.sets)
    assert sum(info.size for info in store.list("cache/features")) == pytest.approx(plan.bytes_planned, rel=0.1)
    assert plan_evaluation(first, store, dataset, samples).todo == ()
    read.clear()
    loaded.clear()
    plan = plan_evaluation(both, store, dataset, samples)
    assert len(plan.todo) == len(plan.sets)
    for index in plan.todo:
        evaluate_unit(both, store, plan, index)
    assert sorted(read) == sorted(item.label for item in plan.sets)
    assert set(loaded) == {"dinov2"}
    read.clear()
    ref = publish_evaluation(both, store, plan)
    assert read == []
    assert read_results(store, ref).rows == read_results(scene.store, evaluate(both, scene.store, scene.dataset, scene.samples)).rows
    assert set(Artifact(store, ref).manifest().inputs) >= {"further/clip.weights", "further/dinov2.weights"}


def test_a_damaged_table_is_made_again(scene, both, results):
    plan = plan_evaluation(both.model_copy(update={"name": "again"}), scene.store, scene.dataset, scene.samples)
    assert plan.todo == ()
    keys = measured_set._keys(both, plan, 1)
    whole = scene.store.read(keys["clip"])
    scene.store.put_cache(keys["clip"], whole[:-9] + bytes(byte ^ 1 for byte in whole[-9:]))
    found = measured_set.measured_set(both, scene.store, plan, 1)
    assert len(found.further["clip"]) == COUNT
    assert scene.store.read(keys["clip"]) == whole


def test_report_and_tables_have_their_columns_only_where_they_were_asked_for(scene, results):
    plain = read_results(scene.store, scene.report)
    assert [metric.name for metric in results.metrics][-5:] == [*BESIDE["clip"], *BESIDE["dinov2"]]
    for found, there in ((plain, False), (results, True)):
        keys = {line.key for line in (*found.sheet, *found.extremes)}
        page = render_report(found, {row.label: dict.fromkeys(keys, np.zeros((8, 8, 3), np.uint8)) for row in found.rows})
        for words in ("CMMD_r", "CLIP score", "FD-DINOv2_r", "normalised embeddings"):
            assert (words in page) == there, words
        captions = [part.split("</figcaption>")[0] for part in page.split("<figcaption>")[1:]]
        for further in found.protocol.further:
            assert sum(f"weights {further.weights_sha256[:12]}" in caption for caption in captions) == len(captions)
    table = pq.read_table(io.BytesIO(results.to_parquet()))
    assert set(table["metric"].to_pylist()) == {metric.name for metric in results.metrics}


def test_a_gate_holds_them_too(results):
    """A report that got worse in CMMD alone fails; one that was not measured by that network has nothing to be held against."""
    chosen = GateSettings(against="reports/further", worse={"cmmd_r": 0.0})
    worse = [
        row.model_copy(update={"numbers": row.numbers | {"cmmd_r": row.numbers["cmmd_r"].model_copy(update={"value": row.numbers["cmmd_r"].value + 1e4})}})
        for row in results.rows
    ]
    check_gate(chosen, results, results)
    with pytest.raises(GateFailed, match="CMMD_r of tuned"):
        check_gate(chosen, results, results.model_copy(update={"rows": tuple(worse)}))
    without = results.model_copy(update={"protocol": results.protocol.model_copy(update={"further": ()})})
    check_gate(GateSettings(against="reports/x", worse={"kid_r": 0.0}), without, results)
    other = results.protocol.further[0].model_copy(update={"weights_sha256": "0" * 64})
    moved = results.model_copy(update={"protocol": results.protocol.model_copy(update={"further": (other, results.protocol.further[1])})})
    with pytest.raises(SettingsError, match="measured with another weights_sha256"):
        check_gate(chosen, moved, results)


def test_a_network_is_named_once():
    with pytest.raises(ValueError, match="names a network twice"):
        EvaluationSettings(further=(FurtherFeatures(network="clip"), FurtherFeatures(network="clip", batch=2)))


def test_a_picture_is_held_against_its_own_prompt(clip_folder):
    """Pictures that come in any order, several of one prompt: each cosine is that of the picture and its prompt, in the order of prompts and keys."""
    network = load_features(FurtherFeatures(network="clip", weights=clip_folder))
    images = [np.random.default_rng(number).integers(0, 256, (28, 28, 3), dtype=np.uint8) for number in range(5)]
    names = [("p3", "c", "zebra"), ("p1", "a", "cat"), ("p2", "d", "old dog"), ("p1", "b", "cat"), ("p0", "e", "x")]
    embedding = Embedding(network, batch=2)
    for image, (prompt_id, key, prompt) in zip(images, names, strict=True):
        embedding.add(Picture(key, prompt_id, image, prompt))
    found = embedding.result()
    order = [4, 1, 3, 2, 0]
    assert found.keys == tuple(names[place][1] for place in order)
    expected = [float(cosine_similarity(network(as_batch([images[place]])), network.read([names[place][2]]))) for place in order]
    assert np.ptp(expected) > 1e-2
    assert found.agreement.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_picture_that_contradicts_its_prompt_scores_nothing():
    table = Embeddings(("a", "b"), np.zeros((2, 3), np.float32), np.array([-0.5, 0.25], np.float32))
    assert clip_scores(table).tolist() == [0, 25]


@examples(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**31))
def test_cmmd_is_its_sum_over_pairs_and_nothing_for_equal_sets(n, m, d, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=generator), torch.randn(m, d, generator=generator)
    block = CmmdBlock.of(x, y)
    assert float(block.distance()) == pytest.approx(naive_cmmd(x, y), abs=1e-9)
    assert float(CmmdBlock.of(x, x).distance()) == pytest.approx(0, abs=1e-9)
    assert float(CmmdBlock.of(3 * x, x).distance()) == pytest.approx(0, abs=1e-9)


def test_half_samples_of_cmmd_are_cmmd_of_the_halves():
    x, y = torch.randn(10, 4), torch.randn(7, 4)
    rows, columns = half_samples(10, 5, seed=0, side="prompts"), half_samples(7, 5, seed=0, side="real")
    found = CmmdBlock.of(x, y).distance(rows, columns)
    expected = [float(CmmdBlock.of(x[some], y[others]).distance()) for some, others in zip(rows, columns, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
