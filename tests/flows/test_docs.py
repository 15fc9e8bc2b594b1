"""Pages that are made by script are as the script makes them."""

import importlib
import re
import shlex
from typing import get_args

import yaml
from conftest import ROOT, script

from selfcascade.adaptation.trainer import COLUMNS
from selfcascade.config import AdaptationSettings, PipelineSettings
from selfcascade_flows import configuration
from selfcascade_flows.desired import Deployment
from selfcascade_flows.variants import variants


def test_the_list_of_modules_is_current():
    modules = script("docs/modules.py")
    text = modules.PAGE.read_text()
    assert modules.filled(text) == text, "run `make docs`"


def test_files_that_the_pages_name_exist():
    for page in ("CONTRIBUTING.md", "docs/architecture.md", "NOTICE"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"(?:selfcascade|flows|tasks|tests|docs)/[\w/.-]*\w\.(?:py|md|png|yaml)", text):
            assert (ROOT / name).is_file(), f"{page} names {name}"


def test_pictures_of_the_pages_exist_and_are_light():
    """Those that a page shows, and no others in `docs/ui`."""
    shown = {
        (page.parent / name).resolve()
        for page in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"!\[[^\]]+\]\(([^):]+)\)", page.read_text(encoding="utf-8"))
    }
    taken = set((ROOT / "docs/ui").iterdir())
    assert taken <= shown
    assert all(path.is_file() for path in shown)
    sizes = [path.stat().st_size for path in taken]
    assert max(sizes) <= 90 * 1024
    assert sum(sizes) <= 400 * 1024


def test_code_that_the_method_page_names_exists():
    """`module:name` below selfcascade, every one of them."""
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    names = re.findall(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+):(\w+)`", text)
    assert len(names) > 30
    for module, name in names:
        assert hasattr(importlib.import_module(f"selfcascade.{module}"), name), f"docs/method.md names {module}:{name}"


def test_settings_that_the_page_on_training_names_exist():
    """Every `name=value`, below adaptation unless it says curation, is one that a run takes; every column of its tables and lists is a setting or says so."""
    text = (ROOT / "docs/adaptation.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_.]+=[^`]+)`", text)
    assert len(named) > 12
    for setting in named:
        PipelineSettings.from_tree({}, [setting if setting.startswith("curation.") else f"adaptation.{setting}"])
    for name in re.findall(r"^[|*] `(\w+)`", text, re.MULTILINE):
        assert name in {*AdaptationSettings.model_fields, *get_args(AdaptationSettings.model_fields["trainable"].annotation), *COLUMNS, "validation"}


def test_the_table_of_methods_is_current():
    tables = script("docs/tables.py")
    text = tables.README.read_text()
    assert tables.between(text, "methods", tables.methods()) == text, "run `make docs`"


def test_commands_of_the_pages_have_settings_that_a_run_takes():
    """Each stage's command of a page, its ``--set`` and ``--config`` as they stand there."""
    seen = 0
    for page in sorted((ROOT / "docs").glob("*.md")):
        for line in re.findall(r"^(?:\.venv/bin/)?selfcascade (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            words = shlex.split(line, comments=True)
            if words[0] not in ("run", "curate", "pretrain", "adapt", "generate", "evaluate"):
                continue
            given = {name: [words[place + 1] for place, word in enumerate(words) if word == name] for name in ("--config", "--set")}
            config = next((name for name in given["--config"] if name in configuration.shipped()), "demo")
            configuration.load(config, given["--set"])
            seen += 1
    assert seen >= 4


def test_every_planted_defect_still_has_its_text_and_its_test():
    """`make mutants` takes long; that a list no longer fits the code is told here."""
    found = script("tests/mutants.py").mutants("")
    assert len(found) > 200
    for mutant in found:
        assert (ROOT / "selfcascade" / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant.name
        file, _, name = mutant.test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), mutant.name


def test_settings_that_a_page_shows_as_yaml_are_settings():
    """Those of a run load, rows and all; those of deployments are what `deploy` reads."""
    kinds = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for text in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            tree = yaml.safe_load(text)
            if isinstance(tree, dict):
                variants(PipelineSettings.from_tree(tree, origin=str(page)))
            else:
                Deployment.model_validate(tree[0])
            kinds.append(type(tree))
    assert {dict, list} <= set(kinds)
