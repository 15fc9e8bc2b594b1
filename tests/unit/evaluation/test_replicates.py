"""Half-samples on file: what was written is read, and methods of two reports compare as those of one."""

import pytest
import torch

from selfcascade.evaluation.evaluate import evaluate
from selfcascade.evaluation.published import read_replicates, read_results
from selfcascade.evaluation.replicates import Replicates


def test_the_differences_of_a_report_follow_from_its_file(scene):
    results, replicates = read_results(scene.store, scene.report), read_replicates(scene.store, scene.report)
    assert replicates.prompts == results.prompts
    assert len(results.differences) > 50
    for item in results.differences:
        found = replicates.difference(item.first, item.second, item.metric)
        assert (found.value, found.error) == (item.value, item.error)


def test_methods_of_two_reports_are_paired_as_those_of_one(scene, settings):
    """Each has the base's samples and one method; joined they say of the two what the whole report says, to the bit."""
    base = {"base": scene.samples["base"]}
    parts = [
        read_replicates(scene.store, evaluate(settings, scene.store, scene.dataset, base | {label: scene.samples[label]})) for label in ("tuning-free", "tuned")
    ]
    joined, whole = parts[0].joined(parts[1]), read_replicates(scene.store, scene.report)
    assert set(joined.values) == {"base", "tuning-free", "tuned"}
    assert joined.difference("tuning-free", "tuned", "kid_r").error > 0
    for metric in ("kid_r", "pkid_r", "kid_b", "layout_b", "objects_b", "fid_r", "fid_b"):
        assert joined.difference("tuning-free", "tuned", metric) == whole.difference("tuning-free", "tuned", metric), metric


def test_a_difference_is_paired_half_by_half():
    """What both methods share of a half-sample's luck cancels; what one has alone stays, as the error of its own mean."""
    generator = torch.Generator().manual_seed(2)
    luck, own = (torch.randn(300, generator=generator, dtype=torch.float64) for _ in range(2))
    drawn = {"a": {"fid_r": luck}, "b": {"fid_r": luck + 3}, "c": {"fid_r": luck + own}}
    replicates = Replicates(8, {label: {"fid_r": 1.0} for label in drawn}, drawn)
    assert replicates.difference("a", "b", "fid_r").error == pytest.approx(0, abs=1e-12)
    assert replicates.difference("a", "c", "fid_r").error == pytest.approx(float(own.std()))


def test_what_is_not_there_is_no_difference():
    """A number without halves has no error; one that only one side has gives nothing."""
    halves = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    replicates = Replicates(8, {"a": {"fid_r": 2.0, "precision_r": 0.5}, "b": {"precision_r": 0.75}}, {"a": {"fid_r": halves}, "b": {}})
    again = Replicates.of_parquet(replicates.to_parquet())
    assert again.difference("a", "b", "fid_r") is None
    assert again.difference("a", "c", "fid_r") is None
    assert (again.difference("a", "b", "precision_r").value, again.difference("a", "b", "precision_r").error) == (0.25, None)
    assert torch.equal(again.drawn["a"]["fid_r"], halves)


def test_other_counts_of_prompts_are_not_joined():
    one, other = (Replicates(count, {}, {}) for count in (8, 9))
    with pytest.raises(ValueError, match="half-samples of 8 and of 9 prompts"):
        one.joined(other)
