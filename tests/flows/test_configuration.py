"""Shipped runs: each loads, each key carries the meaning that its model gives it, and their parts agree."""

import json
from pathlib import Path

import pytest
import yaml

from selfcascade.config import PipelineSettings
from selfcascade.settings import SettingsError
from selfcascade_flows.configuration import FOLDER, annotated, dump, find, load, shipped


def test_what_ships():
    assert {"demo", "sd21-1024", "sd21-2048", "sdxl-2048", "sdxl-4096"} <= set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_run_loads_and_its_comments_are_those_of_the_models(name):
    assert isinstance(load(name), PipelineSettings)
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert annotated(text) == text, "run `make configs`"


@pytest.mark.parametrize("name", shipped())
def test_the_stages_of_a_shipped_run_name_the_same_artifacts(name):
    run = load(name)
    dataset = f"datasets/{run.curation.name}"
    assert run.adaptation.dataset == dataset
    assert run.generation.prompts.dataset == dataset
    assert run.evaluation.dataset == dataset
    assert run.adaptation.base == run.generation.base


def test_a_run_is_found_by_name_and_by_path(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("name: own\n")
    assert load(str(own)).name == "own"
    assert load("demo").name == "demo"
    with pytest.raises(SettingsError, match=r"'nothing' is neither a file nor a shipped run; shipped: .*demo"):
        find("nothing")


def test_overrides_reach_nested_settings_and_replace_groups():
    run = load("demo", ["adaptation.steps=7", "adaptation.lr=2e-4", "curation.source={kind: folder, path: photos}"])
    assert run.adaptation.steps == 7
    assert run.adaptation.lr == 2e-4
    assert run.curation.source.kind == "folder"


def test_resolved_settings_are_yaml_that_gives_the_same_run_and_hide_secrets(tmp_path):
    run = load("demo", ["store.secret_key=hush", "store.access_key=me"])
    text = dump(run)
    assert "hush" not in text
    again = tmp_path / "again.yaml"
    tree = yaml.safe_load(text)
    tree["store"] |= {"secret_key": None, "access_key": None}
    again.write_text(yaml.safe_dump(tree))
    assert load(str(again)).digest() == run.digest()


def test_the_demo_starts_where_the_sweep_says():
    """The largest start of which both KID_r and FID_r lie within one standard error of the best row of the sweep on the tune split."""
    rows = json.loads((Path(__file__).parents[2] / "docs/results/sweep.json").read_text())["rows"]
    cascade = load("demo").generation.cascade
    swept = {label: row for label, row in rows.items() if label.endswith(f"eta {cascade.eta:g}") and "K/T" in label}
    best = {metric: min(row[metric] for label, row in rows.items() if "K/T" in label) for metric in ("kid_r", "fid_r")}
    near = [label for label, row in swept.items() if all(row[metric][0] <= best[metric][0] + best[metric][1] for metric in best)]
    chosen = max(near, key=lambda label: float(label.split()[2]))
    assert chosen == f"{cascade.upscale} K/T {cascade.start:g} eta {cascade.eta:g}"


def test_another_kind_drops_what_was_said_of_the_one_before():
    """In whatever order the two are given; the same kind keeps it."""
    for words in (["kind=urls", "path=pictures.csv"], ["path=pictures.csv", "kind=urls"]):
        run = load("demo", [f"curation.source.{word}" for word in words])
        assert (run.curation.source.kind, run.curation.source.path) == ("urls", "pictures.csv")
    assert load("demo", ["curation.source.kind=twemoji"]).curation == load("demo").curation
