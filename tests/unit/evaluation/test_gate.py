"""The gate fires on what is worse, by more than is allowed and more than chance, and stays quiet otherwise."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from selfcascade.config import GateSettings, Judged
from selfcascade.evaluation.evaluate import gate_of
from selfcascade.evaluation.gate import GateFailed, breaches_of, check_gate
from selfcascade.evaluation.published import read_results
from selfcascade.evaluation.results import METRICS
from selfcascade.settings import SettingsError


@pytest.fixture
def results(scene):
    return read_results(scene.store, scene.report)


def changed(results, label, metric, by, error=None):
    """The same report with one number moved."""

    def row_of(row):
        if row.label != label:
            return row
        number = row.numbers[metric]
        update = {"value": number.value + by} | ({} if error is None else {"error": error})
        return row.model_copy(update={"numbers": row.numbers | {metric: number.model_copy(update=update)}})

    return results.model_copy(update={"rows": tuple(map(row_of, results.rows))})


def gate(**worse):
    return GateSettings(against="reports/small", worse=worse)


def test_the_metrics_of_the_settings_are_those_that_can_be_better():
    assert set(get_args(Judged)) == {metric.name for metric in METRICS if metric.judged}


def test_a_report_passes_against_itself(results):
    check_gate(gate(**dict.fromkeys(get_args(Judged), 0.0)), results, results)


@pytest.mark.parametrize(("metric", "sign"), [("kid_r", 1), ("fid_b", 1), ("recall_r", -1), ("coverage_r", -1)])
def test_what_is_worse_fails_by_name_and_what_is_better_does_not(results, metric, sign):
    worse = changed(results, "tuned", metric, 1000 * sign)
    with pytest.raises(GateFailed, match=r"small is worse than reports/small: .* of tuned went from"):
        check_gate(gate(**{metric: 0.5}), results, worse)
    check_gate(gate(**{metric: 0.5}), results, changed(results, "tuned", metric, -1000 * sign))
    check_gate(gate(**{metric: 1001}), results, worse)
    check_gate(gate(layout_b=0), results, worse)


def test_a_change_within_its_interval_is_no_failure(results):
    """Two errors of 3 make one of 4.24: 8.3 is the 95 % bound of the change."""
    before = changed(results, "tuned", "fid_r", 0, error=3.0)
    for by, fails in ((8.2, False), (8.4, True)):
        assert bool(breaches_of(gate(fid_r=0), before, changed(before, "tuned", "fid_r", by, error=3.0))) == fails
    assert not breaches_of(gate(fid_r=1), before, changed(before, "tuned", "fid_r", 9.2, error=3.0))


def test_reseeded_reports_fail_at_the_rate_of_their_interval():
    """Values that differ by their own errors alone: one gate in forty fires (one side of a 95 % interval)."""
    generator = np.random.default_rng(0)
    changes = generator.normal(0, 1, 20_000) - generator.normal(0, 1, 20_000)
    from selfcascade.evaluation.intervals import Interval

    fired = np.mean([Interval(change, np.hypot(1, 1)).low > 0 for change in changes])
    assert fired == pytest.approx(0.025, abs=0.004)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"pictures": 7}, "has 7 pictures"),
        ({"rows": ()}, "has no method of small"),
    ],
)
def test_what_cannot_be_compared_is_refused(results, update, message):
    with pytest.raises(SettingsError, match=message):
        check_gate(gate(kid_r=0), results.model_copy(update=update), results)


def test_another_network_is_refused(results):
    other = results.model_copy(update={"protocol": results.protocol.model_copy(update={"weights_sha256": "0" * 64})})
    with pytest.raises(SettingsError, match="measured with another weights_sha256"):
        check_gate(gate(kid_r=0), other, results)


def test_what_a_report_is_held_against(scene, settings):
    """Nothing without a gate, nothing while there is no other report, never itself; a version that is not there is an error."""

    def found(against):
        return gate_of(settings.model_copy(update={"gate": GateSettings(against=against)}), scene.store, scene.report)

    assert found(None) is None
    assert found("reports/never") is None
    assert found(f"reports/small@{scene.report.version[:12]}") is None
    with pytest.raises(Exception, match="no published version"):
        found("reports/small@0123456789ab")


@pytest.mark.parametrize("worse", [{"objects": 0.1}, {"kid_r": -0.1}, {"fid": 1}])
def test_a_gate_on_what_cannot_be_worse_is_refused(worse):
    with pytest.raises(ValueError, match="worse"):
        GateSettings(worse=worse)
