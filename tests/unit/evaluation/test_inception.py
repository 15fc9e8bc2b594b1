"""Inception-v3 from a state dict, and the Inception score: sums that anyone can do by hand, torchmetrics, and the report."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from inception_weights import picture, save_inception, save_pictures
from torchmetrics.image.inception import InceptionScore

from selfcascade.config import FeatureSettings, FurtherFeatures
from selfcascade.evaluation import measured_set
from selfcascade.evaluation.comparison import compare
from selfcascade.evaluation.evaluate import evaluate, plan_evaluation, read_results
from selfcascade.evaluation.features import as_batch, load_features
from selfcascade.evaluation.inception_score import SPLITS, Classified, splits_of
from selfcascade.evaluation.intervals import half_samples, standard_error
from selfcascade.evaluation.networks.inception_layers import InceptionV3
from selfcascade.evaluation.networks.network import FeatureNetwork
from selfcascade.evaluation.sets import read_pictures
from selfcascade.settings import SettingsError
from selfcascade_flows.cli import main


@pytest.fixture(scope="module")
def network(classifier_file):
    return load_features(FeatureSettings(network="inception-v3", weights=classifier_file))


def logits(count: int, classes: int, seed: int, sharpness: float = 2.0) -> torch.Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)) * sharpness


def by_hand(found: torch.Tensor, parts) -> list[float]:
    """The definition, picture by picture and class by class."""
    scores = []
    for part in parts:
        probabilities = np.exp(found[part].double().numpy())
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        mean = probabilities.mean(axis=0)
        scores.append(float(np.exp(np.mean([sum(p * np.log(p / q) for p, q in zip(row, mean, strict=True)) for row in probabilities]))))
    return scores


@examples(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(2, 9), st.integers(0, 2**31 - 1))
def test_the_score_is_its_definition_over_seeded_splits(count, classes, seed):
    """Splits are the runs of numpy's legacy permutation, as torch-fidelity draws them."""
    found = logits(count, classes, seed)
    order, splits = np.random.RandomState(seed).permutation(count), splits_of(count)
    parts = [order[number * count // splits : (number + 1) * count // splits] for number in range(splits)]
    assert min(map(len, parts)) >= (2 if count > 3 else 1)
    assert Classified.of(found, seed=seed).scores().tolist() == pytest.approx(by_hand(found, parts), rel=1e-9)


def test_one_split_is_torchmetrics():
    """Whose order is drawn from the global state; over one split it does not matter."""
    found = logits(3, 1008, 0)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(found.double())
    assert float(Classified.of(found, seed=0).scores().mean()) == pytest.approx(float(metric.compute()[0]), rel=1e-9)


def test_extremes():
    """Sure and all different: as many as there are pictures in a split. All the same, or never sure: 1. A probability of 0 is no trouble."""
    sure = 2000 * torch.eye(40)
    assert Classified.of(sure, seed=0).scores().tolist() == pytest.approx([4.0] * SPLITS)
    assert Classified.of(sure[:1].expand(40, -1), seed=0).scores().tolist() == pytest.approx([1.0] * SPLITS)
    assert Classified.of(torch.zeros(40, 7), seed=0).scores().tolist() == pytest.approx([1.0] * SPLITS)


def test_half_samples_are_scores_of_the_halves():
    """A half keeps its pictures' places in the order of the splits."""
    found = logits(50, 6, 1)
    rows = half_samples(50, 4, seed=0, side="prompts")
    order = np.random.RandomState(3).permutation(50)
    for value, chosen in zip(Classified.of(found, seed=3).halves(rows).tolist(), rows.tolist(), strict=True):
        kept = [place for place in order if place in chosen]
        parts = [kept[number * 25 // 10 : (number + 1) * 25 // 10] for number in range(10)]
        assert value == pytest.approx(np.mean(by_hand(found, parts)), rel=1e-9)


def test_the_error_is_how_far_scores_of_new_sets_spread():
    """Standard error by half-samples against the deviation over 100 sets of one distribution: within a third."""
    values, errors = [], []
    for seed in range(100):
        classified = Classified.of(logits(240, 8, seed), seed=0)
        values.append(float(classified.scores().mean()))
        errors.append(standard_error(classified.halves(half_samples(240, 40, seed=seed, side="prompts")), 240))
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.33)


@pytest.fixture(scope="module")
def state_file(tmp_path_factory):
    return save_inception(tmp_path_factory.mktemp("weights") / "state.pth")


def test_folding_keeps_the_function_and_a_picture_does_not_depend_on_its_batch(state_file):
    """Batch norms as they are trained, in eval mode, against the network that is used: 1e-3 of the features' spread over pictures."""
    plain = InceptionV3()
    plain.load_state_dict(torch.load(state_file, weights_only=True))
    plain.eval()
    network = load_features(FeatureSettings(network="inception-v3", weights=state_file))
    pictures = as_batch([picture(seed, 299) for seed in range(2)])
    with torch.inference_mode():
        expected = plain(pictures.float())
        found = network(pictures)
        torch.testing.assert_close(network.logits(found), found @ plain.fc.weight.T)
    scale = float(expected.std(dim=0).mean())
    assert scale > 0.005
    assert float((found - expected).abs().max()) < 1e-3 * scale
    assert float((network(pictures[1:]) - found[1:]).abs().max()) < 1e-3 * scale


def test_what_is_no_state_dict_of_it_is_refused(tmp_path, state_file):
    state = torch.load(state_file, weights_only=True)
    del state["Mixed_7c.branch_pool.conv.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(SettingsError, match=r"less\.pth is no state dict of Inception-v3: .*Mixed_7c\.branch_pool\.conv\.weight") as caught:
        load_features(FeatureSettings(network="inception-v3", weights=tmp_path / "less.pth"))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def scored(settings, classifier_file):
    """The stand-in as the network of the report, one with classes beside it."""
    further = (FurtherFeatures(network="inception-v3", weights=classifier_file, batch=8),)
    return settings.model_copy(update={"further": further, "name": "scored"})


@pytest.fixture(scope="module")
def results(scene, scored):
    return read_results(scene.store, evaluate(scored, scene.store, scene.dataset, scene.samples))


def test_a_report_has_the_score_of_each_method_with_error_and_floor(scene, scored, results, network):
    plan = plan_evaluation(scored.model_copy(update={"name": "plain"}), scene.store, scene.dataset, scene.samples)
    chosen = next(item for item in plan.sets if item.label == "tuned")
    pictures = sorted(read_pictures(scene.store, chosen), key=lambda found: (found.prompt_id, found.key))
    expected = Classified.of(network.logits(network(as_batch([found.image for found in pictures]))), seed=scored.seed).scores()
    rows = {row.label: row for row in results.rows}
    number = rows["tuned"].numbers["inception_score"]
    assert number.value == pytest.approx(float(expected.mean()), rel=1e-4)
    assert number.spread == pytest.approx(float(expected.std(correction=0)), rel=1e-2)
    assert number.error > 0
    assert all(row.numbers["inception_score"].value >= 1 for row in results.rows)
    assert results.floor.numbers["inception_score"].value > 1
    assert [item for item in results.differences if item.metric == "inception_score" and (item.first, item.second) == ("tuning-free", "tuned")]
    assert results.metrics[-1].name == "inception_score"
    assert "IS: Inception-v3 (TorchScript of 2015-12-05)" in results.caption()


def test_weights_without_classes_leave_the_column_blank_with_the_reason(scene, settings, inception_file, monkeypatch):
    """The stand-in ends with its features. It is the network of the report too, whose tables are there: no picture is read."""
    monkeypatch.setattr(measured_set, "read_pictures", lambda store, chosen: pytest.fail("pictures were read"))
    further = (FurtherFeatures(network="inception-v3", weights=inception_file, batch=settings.features.batch),)
    chosen = settings.model_copy(update={"further": further, "name": "blank"})
    results = read_results(scene.store, evaluate(chosen, scene.store, scene.dataset, scene.samples))
    for row in (*results.rows, results.floor):
        assert row.numbers["inception_score"].value is None
        assert "file ends with features" in row.numbers["inception_score"].why


def test_the_network_of_the_report_is_not_passed_twice(scene, settings, results, classifier_file, monkeypatch):
    """Each picture passes once, whole and as crops, and the score is that of a pass of its own, to float tolerance; another batch is another pass."""
    features = FeatureSettings(network="inception-v3", weights=classifier_file, batch=3)
    passed = []
    embed = FeatureNetwork.embed
    monkeypatch.setattr(FeatureNetwork, "embed", lambda self, pictures: passed.append(len(pictures)) or embed(self, pictures))
    expected = next(row for row in results.rows if row.label == "tuned").numbers["inception_score"].value
    for batch, passes in ((3, 1 + settings.crops_per_image), (4, 1)):  # the table is there the second time
        further = (FurtherFeatures(network="inception-v3", weights=classifier_file, batch=batch),)
        chosen = settings.model_copy(update={"features": features, "further": further, "name": f"batch{batch}"})
        found = read_results(scene.store, evaluate(chosen, scene.store, scene.dataset, {"tuned": scene.samples["tuned"]}))
        assert sum(passed) == (found.rows[0].pictures + found.real_pictures) * passes
        assert found.rows[0].numbers["inception_score"].value == pytest.approx(expected, rel=1e-4)
        passed.clear()


def test_two_folders_tell_their_scores(classifier_file, tmp_path, capsys):
    """Of each set by itself, in the table too; a network without classes has no such column."""
    one, other = (save_pictures(tmp_path / name, 6, seed=seed, side=40) for name, seed in (("one", 0), ("other", 50)))
    chosen = ["--set", "evaluation.features.network=inception-v3", "--set", f"evaluation.features.weights={classifier_file}"]
    assert main(["evaluate", str(one), str(other), "--config", "demo", *chosen]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[-1] == "IS"
    assert main(["evaluate", str(one), str(other), "--config", "demo"]) == 0
    assert "IS" not in capsys.readouterr().out.splitlines()[1].split()


def no_store():
    raise AssertionError("the store was opened although no artifact is compared")


def test_the_score_of_a_folder_is_that_of_its_pictures(settings, classifier_file, network, tmp_path):
    one, other = (save_pictures(tmp_path / name, 6, seed=seed, side=40) for name, seed in (("one", 0), ("other", 50)))
    chosen = settings.model_copy(update={"features": FeatureSettings(network="inception-v3", weights=classifier_file)})
    (row,) = compare(chosen, [str(one), str(other)], no_store, device="cpu").rows
    expected = Classified.of(network.logits(network(as_batch([picture(50 + number, 40) for number in range(6)]))), seed=chosen.seed).scores()
    assert row.inception_score == pytest.approx(float(expected.mean()), rel=1e-4)
    assert row.inception_spread == pytest.approx(float(expected.std(correction=0)), rel=1e-2)
