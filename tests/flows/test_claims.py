"""The measured claims: what is kept of a piece, when it is measured again, and what follows from its numbers."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, copied, environment, script

from selfcascade.evaluation.replicates import Replicates
from selfcascade.evaluation.results import Difference
from selfcascade_flows.claims import is_on_record, read_piece
from selfcascade_flows.configuration import dump, load


@pytest.fixture(scope="module")
def claims():
    """The script that fills the page."""
    script("docs/tables.py")
    return script("docs/claims.py")


def difference(value, error):
    return Difference(first="a", second="b", metric="fid_r", value=value, error=error)


def test_a_piece_is_measured_once_and_leaves_its_tables(home, tmp_path, claims, monkeypatch):
    """By the command, on a run that is published: numbers, half-samples and costs are those of its report; the page is made from them."""
    cwd = copied(home, tmp_path / "home")
    settings = load("demo", [f"{name}={value}" for name, value in SMALL.items()])
    (cwd / "shipped").mkdir()
    (cwd / "shipped/claims-4x-small.yaml").write_text(dump(settings))
    code = (
        "import pathlib, sys; from selfcascade_flows import cli, configuration; configuration.FOLDER = pathlib.Path('shipped'); "
        "sys.exit(cli.main(['claims', *sys.argv[1:], '--folder', 'kept']))"
    )

    def run(*words):
        return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, check=False)

    first, second, wrong = run(), run("claims-4x-small"), run("demo")
    assert (first.returncode, second.returncode, wrong.returncode) == (0, 0, 2), first.stderr
    assert "Tables:  kept/claims-4x-small" in first.stdout
    assert (second.stdout, second.stderr.strip()) == ("", "claims-4x-small is on record: kept/claims-4x-small")
    assert wrong.stderr == "selfcascade: 'demo' is no piece; there are claims-4x-small\n"
    piece = read_piece(cwd / "kept", "claims-4x-small")
    assert [row.method for row in piece.results.shown()] == ["base", "lanczos", "direct", "tuning-free", "tuned"]
    for item in piece.results.differences:
        assert piece.replicates.difference(item.first, item.second, item.metric) == item
    assert {label: training["steps"] for label, training in piece.training.items()} == {"tuned": SMALL["adaptation.steps"]}
    assert piece.training["tuned"]["cpu_seconds"] > 1
    assert piece.costs["tuned"]["parameters"] > 1000
    assert all(cost["cpu_seconds"] > 0 and cost["pictures"] == 4 for cost in piece.costs.values())
    assert is_on_record(cwd / "kept", "claims-4x-small", settings)
    assert not is_on_record(cwd / "kept", "claims-4x-small", settings.model_copy(update={"direct_etas": (0.0,)}))

    monkeypatch.setattr(claims, "FOLDER", cwd / "kept")
    monkeypatch.setattr(claims, "pieces", lambda: ["claims-4x-small"])
    rows = [line.split(" | ") for line in claims.table("4x").splitlines() if line.startswith("| ")]
    direct, tuned = rows[3], rows[5]
    assert (direct[4], tuned[2]) == ("1.00×", "4")
    own, base, whole = (piece.costs[label]["cpu_seconds"] for label in ("tuned", "base", direct[0][2:]))
    assert float(tuned[4][:-1]) == pytest.approx((own + base) / whole, abs=0.006)
    wanted = next(item for item in piece.results.differences if (item.first, item.second, item.metric) == ("tuning-free", "tuned", "fid_b"))
    line = next(line for line in claims.verdicts().splitlines() if line.startswith("| tuned is better than tuning-free in patches"))
    assert f"FID_b {'−' if wanted.value < 0 else '+'}{abs(wanted.value):.0f} (" in line
    assert "| not measured yet | – |" in claims.verdicts()


def test_a_piece_that_is_cut_short_is_none(tmp_path):
    assert read_piece(tmp_path, "claims-4x") is None
    (tmp_path / "claims-4x").mkdir()
    (tmp_path / "claims-4x/metrics.json").write_text(json.dumps({}))
    assert read_piece(tmp_path, "claims-4x") is None
    assert not is_on_record(tmp_path, "claims-4x", load("claims-4x"))


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ([difference(-5, 1)], "holds"),
        ([difference(-5, 1), difference(-1, 1)], "holds in part"),
        ([difference(-5, 1), difference(5, 1)], "holds in part"),
        ([difference(5, 1), difference(-1, 1)], "does not hold here"),
        ([difference(-1, 1), difference(1, 1), difference(-5, None)], "not decided"),
        ([], "–"),
    ],
)
def test_a_verdict_follows_from_the_intervals(claims, differences, says):
    assert claims.verdict(differences).split(":")[0].strip("*") == says


def test_the_share_of_a_gain_has_the_interval_of_a_ratio(claims):
    """A method that gains half of it everywhere keeps exactly half; noise of its own gives the error of the mean over the gain; no clear gain, no share."""
    generator = torch.Generator().manual_seed(0)
    tuned = -8 + torch.randn(400, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, generator=generator, dtype=torch.float64)
    drawn = {"tuning-free": torch.zeros(400, dtype=torch.float64), "tuned": tuned, "tuned C": tuned / 2, "tuned D": tuned / 2 + noise}
    values = {"tuning-free": 0.0, "tuned": -8.0, "tuned C": -4.0, "tuned D": -4.0}
    replicates = Replicates(200, {label: {"fid_b": value} for label, value in values.items()}, {label: {"fid_b": halves} for label, halves in drawn.items()})
    half, noisy = (claims.share_kept(replicates, "tuned", label, "fid_b") for label in ("tuned C", "tuned D"))
    assert (half.value, half.error) == (0.5, pytest.approx(0, abs=1e-12))
    assert (noisy.value, noisy.error) == (0.5, pytest.approx(float(noise.std()) / 8))
    assert claims.share_kept(replicates, "tuning-free", "tuned", "fid_b") is None


def test_the_page_is_that_of_the_committed_pieces(claims):
    text = claims.PAGE.read_text(encoding="utf-8")
    assert claims.filled(text) == text, "run `make docs`"
