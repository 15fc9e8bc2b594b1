"""Pictures from anywhere, compared: a folder is as good as an artifact, and what cannot be compared is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfcascade.evaluation.comparison import compare
from selfcascade.evaluation.distances import fid, kid
from selfcascade.evaluation.features import as_batch, load_features
from selfcascade.evaluation.manifold import manifold
from selfcascade.evaluation.moments import Moments
from selfcascade.generation.samples import read_generated
from selfcascade.settings import SettingsError
from selfcascade.storage import Artifact, NotFound
from selfcascade_flows.cli import main


def pictures(folder: Path, count: int, *, seed: int, shift: int = 0) -> list[np.ndarray]:
    """Noise of sizes that differ, written as PNG; some below the folder."""
    generator = np.random.default_rng(seed)
    (folder / "below").mkdir(parents=True)
    made = []
    for index in range(count):
        made.append(generator.integers(shift, shift + 100, (20 + index % 5, 30, 3)).astype(np.uint8))
        Image.fromarray(made[-1]).save(folder / ("below" if index >= count - 3 else "") / f"{index:03d}.png")
    return made


def no_store():
    raise AssertionError("the store was opened although no artifact is compared")


def test_numbers_are_those_of_the_features(settings, tmp_path):
    """Mixed sizes, folders in folders: what each picture alone gives, whatever the batch."""
    one, other = pictures(tmp_path / "one", 12, seed=1), pictures(tmp_path / "other", 9, seed=2, shift=60)
    found = compare(settings, [str(tmp_path / "one"), str(tmp_path / "other")], no_store, device="cpu")
    network = load_features(settings.features)
    x, y = (torch.cat([network(as_batch([image])) for image in images]) for images in (one, other))
    (row,) = found.rows
    kernel, shares = kid(x, y, subset=settings.kid_subset, subsets=settings.kid_subsets, seed=settings.seed), manifold(x, y)
    assert (found.reference_count, row.count) == (12, 9)
    assert row.fid == pytest.approx(fid(x, y), rel=1e-4)
    assert (row.kid, row.kid_spread) == (pytest.approx(kernel.mean, rel=1e-4), pytest.approx(kernel.spread, rel=1e-4))
    assert [row.precision, row.recall, row.density, row.coverage] == pytest.approx([shares.precision, shares.recall, shares.density, shares.coverage])
    assert row.fid > 0


def test_a_folder_is_the_artifact_that_it_came_from(scene, settings, tmp_path):
    artifact = Artifact(scene.store, scene.samples["tuned"])
    for place, sample in enumerate(read_generated(artifact)):
        Image.fromarray(sample.image).save(tmp_path / f"{place:03d}.png")
    found = compare(
        settings, [str(scene.samples["tuning-free"]), str(scene.samples["tuned"]), str(tmp_path), str(scene.dataset)], lambda: scene.store, device="cpu"
    )
    by_artifact, by_folder, real = found.rows
    assert by_folder.fid == by_artifact.fid
    assert by_folder.kid == by_artifact.kid
    assert real.count == 36


def test_statistics_stand_for_their_pictures(settings, tmp_path):
    """FID from the file is FID from the pictures; KID and the shares need the pictures."""
    pictures(tmp_path / "one", 8, seed=1)
    pictures(tmp_path / "other", 8, seed=2)
    plain = compare(settings, [str(tmp_path / "one"), str(tmp_path / "other")], no_store, device="cpu")
    (tmp_path / "one.npz").write_bytes(plain.statistics)
    found = compare(settings, [str(tmp_path / "one.npz"), str(tmp_path / "other")], no_store, device="cpu")
    assert found.rows[0].fid == pytest.approx(plain.rows[0].fid, rel=1e-6)
    assert (found.reference_count, found.rows[0].kid, found.rows[0].precision) == (8, None, None)


def test_statistics_of_another_rule_are_refused(settings, tmp_path):
    pictures(tmp_path / "one", 4, seed=1)
    plain = compare(settings, [str(tmp_path / "one")], no_store, device="cpu")
    (tmp_path / "one.npz").write_bytes(plain.statistics)
    moments = Moments.from_npz(tmp_path / "one.npz")
    for name in ("network", "weights", "resize"):
        other = Moments(moments.count, moments.mean, moments.covariance, moments.made_with | {name: "another"})
        (tmp_path / "other.npz").write_bytes(other.to_npz())
        with pytest.raises(SettingsError, match=f"different {name} cannot be compared"):
            compare(settings, [str(tmp_path / "other.npz"), str(tmp_path / "one")], no_store, device="cpu")


def test_what_a_reader_must_know_is_said(settings, tmp_path):
    """Equal pictures under other names, few pictures, statistics that do not tell how they were made."""
    pictures(tmp_path / "one", 5, seed=1)
    Image.open(tmp_path / "one" / "000.png").save(tmp_path / "one" / "copy.bmp")
    width = load_features(settings.features).num_features
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(width), sigma=np.eye(width))
    notes = compare(settings, [str(tmp_path / "foreign.npz"), str(tmp_path / "one")], no_store, device="cpu").notes
    assert any("1 of 6 pictures equal an earlier one" in note for note in notes)
    assert any("does not say which network" in note for note in notes)
    assert any("6 pictures are few" in note for note in notes)


def test_what_cannot_be_compared_is_named(scene, settings, tmp_path):
    pictures(tmp_path / "good", 4, seed=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "half.png").write_bytes((tmp_path / "good" / "000.png").read_bytes()[:200])
    (tmp_path / "single").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "single" / "a.png")
    for name, said in (("empty", "empty holds no picture"), ("torn", r"half\.png cannot be compared"), ("single", "single holds 1 picture")):
        with pytest.raises(SettingsError, match=said) as caught:
            compare(settings, [str(tmp_path / "good"), str(tmp_path / name)], no_store, device="cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match=r"no folder, no \.npz file and no artifact"):
        compare(settings, [str(tmp_path / "nowhere")], no_store, device="cpu")
    with pytest.raises(SettingsError, match="artifact of kind reports"):
        compare(settings, [scene.store.uri(f"reports/{scene.report.name}")], lambda: scene.store, device="cpu")
    with pytest.raises(NotFound):
        compare(settings, ["samples/absent"], lambda: scene.store, device="cpu")


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    pictures(tmp_path / "one", 7, seed=1)
    pictures(tmp_path / "other", 7, seed=2, shift=100)
    sets = [str(tmp_path / "one"), str(tmp_path / "other")]
    assert main(["evaluate", *sets, "--statistics", str(tmp_path / "new" / "one.npz")]) == 0
    shown = capsys.readouterr().out
    assert "KID x 1000" in shown
    assert sets[1] in shown
    assert Moments.from_npz(tmp_path / "new" / "one.npz").count == 7
    assert main(["evaluate", *sets, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"{told['rows'][0]['fid']:.3f}" in shown
    for wrong, said in (([sets[0]], "alone cannot be compared"), ([*sets, "--statistics", "a.json"], "must end in .npz"), (["nowhere", sets[0]], "no folder")):
        assert main(["evaluate", *wrong]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("given", [["SET", "--dry-run"], ["SET", "--max-hours", "0"], ["SET", "--max-bytes", "0"], ["--json"], ["--statistics", "a.npz"]])
def test_an_option_that_would_do_nothing_is_refused(tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "SET", 7, seed=1)
    assert main(["evaluate", *given]) == 2
    said = capsys.readouterr().err
    assert next(word for word in given if word.startswith("--")) in said
    assert len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["SET"]
