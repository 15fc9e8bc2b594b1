"""`selfcascade upsamplers compare` on small published artifacts: what differs, what can be compared, and what not."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from selfcascade.config import AdaptationSettings, UpsamplerSettings
from selfcascade.storage import Artifact
from selfcascade_flows.cli import main

VALIDATION = {"validation": 0.2, "validation_t0_79": 0.3, "validation_t80_159": 0.2, "validation_t160_199": 0.1}
COUNTS = {"parameters": 123456, "fitted": 0, "steps": 400, "samples": 6400, "train_samples": 99, "loss": 0.25}


@pytest.fixture
def publish(store):
    """Publishes an upsampler as adaptation does, without weights."""

    def made(name, *, base="b" * 64, dataset="d" * 64, counts=None, **changes):
        settings = AdaptationSettings(name=name, **changes)
        artifact = Artifact.plan(store, "upsamplers", name, settings, {"dataset": dataset, "base": base})
        with artifact.writing():
            artifact.put("config.json", json.dumps({"variant": settings.upsampler.variant, "base": f"tiny@{base}"}).encode())
            return artifact.publish(counts=COUNTS | (VALIDATION if counts is None else counts))

    return made


@pytest.fixture
def compare(weed, store_settings, capsys):
    """The command; exit code, output, what it said."""

    def run(*arguments):
        where = {"store.folder": weed, "store.bucket": store_settings.bucket, "store.prefix": store_settings.prefix}
        code = main(["upsamplers", "compare", *arguments, *(part for key, value in where.items() for part in ("--set", f"{key}={value}"))])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def rows(output):
    """Cells by the first of a row."""
    return {cells[0]: cells[1:] for line in output.splitlines() if len(cells := re.split(r" {2,}", line.strip())) > 1}


def test_what_differs_and_the_losses_are_told(publish, compare):
    """Of the same base and data: sizes, differing settings alone, losses by bin in their order."""
    publish("a")
    publish("b", upsampler=UpsamplerSettings(variant="C"), lr=1e-3, counts=VALIDATION | {"validation": 0.1234567, "parameters": 1824, "best_step": 300})
    code, output, said = compare("a", "b")
    assert (code, said) == (0, "")
    found = rows(output)
    assert found["variant"] == ["A", "C"]
    assert found["parameters"] == ["123,456", "1,824"]
    assert found["base"] == ["tiny@bbbbbbbbbbbb"] * 2
    assert found["published step"] == ["400", "300"]
    assert found["lr"] == ["0.0003", "0.001"]
    assert "batch" not in found
    assert found["loss"] == ["0.25000", "0.25000"]
    assert found["validation"] == ["0.20000", "0.12346"]
    assert found["validation, t 0 to 79"] == ["0.30000", "0.30000"]
    assert list(found)[-3:] == ["validation, t 0 to 79", "validation, t 80 to 159", "validation, t 160 to 199"]
    assert "cannot be compared" not in output


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": "e" * 64}, f"losses cannot be compared: their bases are tiny@{'b' * 64} and tiny@{'e' * 64}"),
        ({"dataset": "e" * 64}, "losses cannot be compared: their data are versions dddddddddddd and eeeeeeeeeeee"),
        ({"size": 512}, "losses cannot be compared: size is 256 and 512"),
        ({"start": 0.5}, "losses cannot be compared: start is 0.7 and 0.5"),
        ({"validation_samples": 4}, "validation losses cannot be compared: validation_samples is 16 and 4"),
        ({"caption_dropout": 0.5}, "losses in training cannot be compared: caption_dropout is 0.1 and 0.5"),
        ({"counts": {}, "validation_steps": None}, "validation losses cannot be compared: upsamplers/b@"),
    ],
)
def test_what_cannot_be_compared_is_not_shown_and_the_reason_is(publish, compare, changes, reason):
    publish("a")
    publish("b", **changes)
    code, output, _ = compare("a", "b")
    assert code == 0
    assert reason in output
    of_loss, of_validation = not reason.startswith("validation"), not reason.startswith("losses in")
    assert ("loss" in rows(output), "validation" in rows(output)) == (not of_loss, not of_validation)


def test_the_json_holds_it_all(publish, compare):
    """Three at once, the numbers also where they cannot be compared, which it says."""
    refs = [publish("a"), publish("b", lr=1e-3), publish("c", dataset="e" * 64)]
    code, output, _ = compare("a", f"b@{refs[1].short}", refs[2].uri, "--json")
    assert code == 0
    found = json.loads(output)
    assert [side["version"] for side in found["upsamplers"]] == [ref.version for ref in refs]
    assert found["upsamplers"][0] == {
        "artifact": str(refs[0]), "version": refs[0].version, "variant": "A", "parameters": 123456, "fitted": 0, "base": f"tiny@{'b' * 64}",
        "dataset": "d" * 64, "steps": 400, "best_step": None, "loss": 0.25, "validation": VALIDATION,
    }  # fmt: skip
    assert found["differing_settings"] == {"lr": [0.0003, 0.001, 0.0003]}
    assert found["obstacles"]["loss"] == found["obstacles"]["validation"] == ["their data are versions dddddddddddd and eeeeeeeeeeee"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "a comparison takes two upsamplers or more"),
        (["a", "nobody"], "nothing is published as upsamplers/nobody"),
        (["a", "samples/a"], "'samples/a' is not an artifact; write upsamplers/NAME"),
        (["a", "a@0000"], "no published version of upsamplers/a begins with 0000"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_code_2(publish, compare, names, message):
    publish("a")
    code, output, said = compare(*names)
    assert (code, output) == (2, "")
    assert message in said
    assert len(said.splitlines()) == 1


def test_it_needs_no_networks():
    """Manifests are enough: torch is not imported."""
    code = "import sys; import selfcascade.adaptation.comparison; print([name for name in ('torch', 'diffusers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
