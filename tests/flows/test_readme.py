"""Every command of the README runs as written; stages are made small, and what wants a hub or a GPU only looks ahead."""

import re
import shlex
import subprocess
import sys

import boto3
import pytest
from conftest import ROOT, SMALL, command, environment, script
from PIL import Image, ImageDraw

from selfcascade.storage import embedded

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHAPES, COLOURS = ("circle", "square", "bar"), ("red", "blue", "green", "black", "orange", "purple", "brown", "gray")
AHEAD = ("sd21", "sdxl")
"""Runs that want a hub or a GPU."""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands():
    return [line for block in blocks("sh") for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def reader(home, weed):
    """The folder of a reader who ran the demo and has pictures and prompts, and the variables of a bucket of theirs."""
    photos = home / "photos"
    photos.mkdir()
    for shape in SHAPES:
        for number, colour in enumerate(COLOURS):
            picture = Image.new("RGB", (300, 280), "white")
            draw = ImageDraw.Draw(picture)
            box = (40 + 5 * number, 40, 240, 200 + 5 * number)
            (draw.ellipse if shape == "circle" else draw.rectangle)(box if shape != "bar" else (box[0], 100, box[2], 140), fill=colour)
            picture.save(photos / f"{colour}-{shape}.png")
            (photos / f"{colour}-{shape}.txt").write_text(f"{colour} {shape}")
    (home / "prompts.txt").write_text("red circle\nblue square\n")
    return home


def selfcascade(arguments, home, weed, variables):
    """Run a command of the README, small where it is a stage."""
    stage = arguments[0] in ("curate", "adapt", "generate", "evaluate", "run", "pretrain")
    if any(word.startswith(AHEAD) for word in arguments):
        arguments = [*arguments, "--dry-run"]
    elif stage:
        config = arguments[arguments.index("--config") + 1]
        changes = {key: value for key, value in SMALL.items() if config == "demo" or (not key.startswith("curation.") and key != "generation.prompts.count")}
        changes = {key: value for key, value in changes.items() if not any(word.startswith(f"{key}=") for word in arguments)}
        changes["execution.workers"] = 1  # of few pictures each would do little but import the networks
        arguments = [*arguments, *(part for key, value in changes.items() for part in ("--set", f"{key}={value}"))]
    return subprocess.run(command(*arguments), cwd=home, env=environment() | variables, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.timeout(2400)
def test_every_command_runs_in_order(reader, weed):
    found = embedded.attach(weed)
    keys = {"aws_access_key_id": found.access_key, "aws_secret_access_key": found.secret_key}
    boto3.client("s3", endpoint_url=found.url, region_name="us-east-1", **keys).create_bucket(Bucket="pictures")
    variables: dict[str, str] = {}
    ran = []
    for line in commands():
        words = shlex.split(line.replace("https://s3.example.com", found.url))
        if words[0] == "export":
            assert words[1:] == ["AWS_ACCESS_KEY_ID=...", "AWS_SECRET_ACCESS_KEY=..."]
            variables = {"AWS_ACCESS_KEY_ID": found.access_key, "AWS_SECRET_ACCESS_KEY": found.secret_key}
            continue
        if words[0] == "make" or "serve" in words:
            continue  # below
        assert words[0] == ".venv/bin/selfcascade"
        result = selfcascade(words[1:], reader, weed, variables)
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        variables = {}
        ran.append(line)
    embedded.release(weed)
    assert len(ran) >= 12
    assert list((reader / "out/samples").glob("*.tar"))


def test_make_knows_its_targets():
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    assert targets[:2] == ["demo", "test"]
    for target in targets:
        result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def test_the_python_of_the_readme_draws_a_picture(reader):
    [code] = blocks("python")
    small = code.replace("width=256)", "width=256, num_inference_steps=4)")
    assert small != code
    if not (reader / "out/upsampler").exists():
        subprocess.run(command("pull", "upsamplers/demo", "out/upsampler"), cwd=reader, env=environment(), check=True, capture_output=True)
    result = subprocess.run([sys.executable, "-c", small], cwd=reader, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    with Image.open(reader / "apple.png") as picture:
        assert picture.size == (256, 256)


def test_its_tables_are_those_of_the_committed_results():
    tables = script("docs/tables.py")
    pages = [(tables.README.read_text(), tables.filled), *((page.read_text(), tables.filled_page) for page in tables.PAGES)]
    for text, fill in pages:
        assert fill(text) == text, "run `make docs`"


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
