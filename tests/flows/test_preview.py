"""The look ahead on a machine that has nothing yet, and budgets."""

import re

import pytest
from conftest import small


def test_on_an_empty_machine_everything_is_planned_and_nothing_is_written(selfcascade, tmp_path):
    result = selfcascade("run", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())
    rows = re.findall(r"^(curate|adapt|generate|evaluate) .*?  (\d+) +(\d+) .*$", result.stdout, re.M)
    assert [stage for stage, _, _ in rows] == ["curate", "adapt", *["generate"] * 6, "evaluate"]
    assert all(int(units) > 0 and done == "0" for _, units, done in rows)
    assert re.search(r"^all .*\d+ MiB +\d+ min$", result.stdout, re.M)
    assert "secret_key: null" in result.stdout


def test_a_missing_input_of_a_single_stage_is_named_with_its_remedy(selfcascade, tmp_path):
    result = selfcascade("adapt", "--dry-run")
    assert result.returncode == 2
    assert "datasets/twemoji" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (["--max-hours", "0.0001"], "more than --max-hours 0.0001"),
        (["--max-bytes", "1000"], "more than --max-bytes 1000"),
    ],
)
def test_a_plan_beyond_its_budget_does_not_start(selfcascade, tmp_path, budget, expected):
    result = selfcascade("run", *small(), *budget)
    assert result.returncode == 2
    assert expected in result.stderr
    assert not list(tmp_path.iterdir())


def test_hours_are_not_promised_where_nothing_was_measured(selfcascade, tmp_path):
    (tmp_path / "base").mkdir()
    result = selfcascade("run", *small(adaptation__base="base", generation__base="base"), "--max-hours", "1")
    assert result.returncode == 2
    assert "the time is unknown before a first run" in result.stderr
