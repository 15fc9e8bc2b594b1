"""Lineage: every way back from a report to its sources, and what is gone is said."""

import json
import re
import shutil
import subprocess

import pytest

from selfcascade.config import CurationSettings
from selfcascade.storage import Artifact
from selfcascade.storage.drawing import drawn
from selfcascade.storage.lineage import walk
from selfcascade_flows.cli import main


def publish(store, kind, name, inputs, **counts):
    artifact = Artifact.plan(store, kind, name, CurationSettings(name=name), inputs)
    artifact.put("data", name.encode())
    artifact.publish(counts=counts)
    return artifact


@pytest.fixture
def chain(store):
    """Two versions of a dataset, a base and an upsampler of the second, samples by two methods, a report: inputs named in every way that the stages use."""
    old = publish(store, "datasets", "pics", {"source": "0" * 64}, kept=3)
    new = publish(store, "datasets", "pics", {"source": "1" * 64, "before": old.ref.version}, kept=5)
    base = publish(store, "bases", "small", {"dataset": new.ref.version}, steps=9)
    phi = publish(store, "upsamplers", "phi", {"dataset": new.ref.version, "base": base.ref.version}, steps=4)
    tuned = publish(store, "samples", "tuned", {"base": f"small@{base.ref.version}", "prompts": "2" * 64, "upsampler": f"phi@{phi.ref.version}"}, samples=8)
    direct = publish(store, "samples", "direct", {"base": f"tiny-emoji@{'3' * 64}", "prompts": "2" * 64}, samples=8)
    samples = {"samples/direct eta 0": f"samples/direct@{direct.ref.version}", "samples/tuned": f"samples/tuned@{tuned.ref.version}"}
    report = publish(store, "reports", "demo", {"dataset": f"datasets/pics@{new.ref.version}", "features.weights": "4" * 64} | samples)
    return {"old": old, "new": new, "base": base, "phi": phi, "tuned": tuned, "direct": direct, "report": report}


def test_the_walk_reaches_every_artifact_once(store, chain):
    """By full name, by name without kind, by version alone; nearest first. What is no artifact of the store is told from what should be."""
    steps = walk(store, {"report": chain["report"].ref})
    assert [step.ref for step in steps] == [chain[name].ref for name in ("report", "new", "direct", "tuned", "old", "base", "phi")]
    assert [(step.role, step.manifest) for step in steps[:2]] == [("report", chain["report"].manifest()), ("dataset", chain["new"].manifest())]
    states = {(step.ref.name, source.role): source.state for step in steps for source in step.sources}
    assert {place for place, state in states.items() if state == "outside"} == {
        ("demo", "features.weights"), ("pics", "source"), ("direct", "base"), ("direct", "prompts"), ("tuned", "prompts"),
    }  # fmt: skip
    assert "missing" not in states.values()


def test_the_tree_shows_versions_and_counts(store, chain):
    text = drawn(walk(store, {"report": chain["report"].ref}), "text")
    short = {name: str(artifact.ref) for name, artifact in chain.items()}
    assert text.splitlines() == [
        short["report"],
        f"├─ dataset: {short['new']}  kept 5",
        f"│  ├─ before: {short['old']}  kept 3",
        "│  │  └─ source: 000000000000 (outside of the store)",
        "│  └─ source: 111111111111 (outside of the store)",
        "├─ features.weights: 444444444444 (outside of the store)",
        f"├─ samples/direct eta 0: {short['direct']}  samples 8",
        "│  ├─ base: tiny-emoji@333333333333 (outside of the store)",
        "│  └─ prompts: 222222222222 (outside of the store)",
        f"└─ samples/tuned: {short['tuned']}  samples 8",
        f"   ├─ base: {short['base']}  steps 9",
        f"   │  └─ dataset: {short['new']}  kept 5 (above)",
        "   ├─ prompts: 222222222222 (outside of the store)",
        f"   └─ upsampler: {short['phi']}  steps 4",
        f"      ├─ base: {short['base']}  steps 9 (above)",
        f"      └─ dataset: {short['new']}  kept 5 (above)",
    ]


@pytest.mark.parametrize("gone", ["new", "phi", "tuned"])
def test_what_is_gone_is_said(store, chain, gone):
    """A manifest that was deleted by hand: its artifact is missing wherever it was used, the rest is shown as before."""
    store.delete([f"{chain[gone].prefix}/manifest.json"])
    steps = walk(store, {"report": chain["report"].ref})
    assert chain[gone].ref not in [step.ref for step in steps]
    users = {(step.ref.name, source.role) for step in steps for source in step.sources if source.state == "missing"}
    expected = {"new": {("demo", "dataset"), ("small", "dataset"), ("phi", "dataset")}, "phi": {("tuned", "upsampler")}, "tuned": {("demo", "samples/tuned")}}
    assert users == expected[gone]
    for form in ("text", "mermaid", "dot"):
        assert drawn(steps, form).count("missing: deleted, or of another store") >= 1


def test_graphs_have_a_node_an_artifact_and_an_edge_an_input(store, chain):
    """Counted in both languages; where Graphviz is installed, its own parser takes the text and finds the same graph."""
    steps = walk(store, {"report": chain["report"].ref})
    inputs = sum(len(step.sources) for step in steps)
    leaves = len({source.value for step in steps for source in step.sources if source.ref is None})
    mermaid, dot = drawn(steps, "mermaid").splitlines(), drawn(steps, "dot")
    assert mermaid[0] == "graph LR"
    assert sum("-->" in line for line in mermaid) == dot.count(" -> ") == inputs
    assert sum(bool(re.match(r"  [ax]\d+\[", line)) for line in mermaid) == len(re.findall(r"^  [ax]\d+ \[", dot, re.MULTILINE)) == len(steps) + leaves
    if shutil.which("dot"):
        found = json.loads(subprocess.run(["dot", "-Tjson0"], input=dot, capture_output=True, text=True, check=True).stdout)
        assert (len(found["objects"]), len(found["edges"])) == (len(steps) + leaves, inputs)


def test_labels_from_outside_cannot_leave_their_place(store):
    """Quotes, brackets, escapes of terminals and line breaks of a label and of a count stay text."""
    nasty = 'samples/"]; click a0 "javascript:alert(1)" \x1b[2J\n--> <script>\\'
    report = publish(store, "reports", "demo", {nasty: f"samples/none@{'5' * 64}"}, **{"<b>": "\x1b[31m"})
    steps = walk(store, {"report": report.ref})
    text, mermaid, dot = (drawn(steps, form) for form in ("text", "mermaid", "dot"))
    assert not any(letter in text + mermaid + dot for letter in "\x1b\r")
    assert (text.count("\n"), mermaid.count("\n"), dot.count("\n")) == (2, 6, 6)
    assert "<script>" not in mermaid
    assert '"]; click' not in mermaid
    assert re.fullmatch(r'  x0 -> a0 \[label="(?:[^"\\]|\\.)*"\];', dot.splitlines()[4])


def test_the_command_shows_it(store, chain, capsys):
    settings = store.settings
    where = [word for name in ("folder", "bucket", "prefix") for word in ("--set", f"store.{name}={getattr(settings, name)}")]
    for form in ("text", "mermaid", "dot"):
        assert main(["lineage", "reports/demo", "--format", form, *where]) == 0
        assert capsys.readouterr().out == drawn(walk(store, {"reports": chain["report"].ref}), form)
    assert main(["lineage", "reports/none", *where]) == 2
    assert "nothing is published as reports/none" in capsys.readouterr().err
