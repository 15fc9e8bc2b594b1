"""`selfcascade store …` and `ls|show|look|pull|verify|purge`, as a user types them."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfcascade.config import CurationSettings
from selfcascade.curation.curate import curate
from selfcascade.storage import Artifact, Store, resolve
from selfcascade_flows.cli import main


@pytest.fixture
def run(store, capsys, monkeypatch):
    """Run a command on the test's store: exit code, lines of standard output, standard error."""
    monkeypatch.setattr("selfcascade.storage.embedded.VACUUM_PAUSE", 0)

    def command(*words: str) -> tuple[int, list[str], str]:
        settings = store.settings
        where = [f"store.folder={settings.folder}", f"store.bucket={settings.bucket}", f"store.prefix={settings.prefix}"]
        code = main([*words, *(word for setting in where for word in ("--set", setting))])
        shown = capsys.readouterr()
        return code, shown.out.splitlines(), shown.err

    return command


@pytest.fixture
def dataset(store) -> Artifact:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for key in ("cat", "dog"):
            member = tarfile.TarInfo(f"{key}.png")
            member.size = 3
            archive.addfile(member, io.BytesIO(key.encode()))
    artifact = Artifact.plan(store, "datasets", "pics", CurationSettings(name="pics"), {"source": "ab" * 32})
    artifact.put("00000.tar", sink.getvalue())
    artifact.put("sub/notes.txt", b"notes")
    artifact.publish(counts={"kept": 2})
    return artifact


def test_ls_and_show(run, dataset):
    code, lines, _ = run("ls")
    assert code == 0
    assert len(lines) == 1
    assert lines[0].startswith(f"* {dataset.ref}")
    assert "2 objects" in lines[0]
    assert "kept 2" in lines[0]
    assert run("ls", "datasets/pics") == (0, lines, "")
    assert run("ls", "samples")[1][0].startswith("nothing is published under samples")
    code, lines, _ = run("show", "datasets/pics")
    assert code == 0
    assert f"datasets/pics@{dataset.ref.version}" in lines
    assert any("sub/notes.txt" in line for line in lines)
    code, lines, _ = run("show", "datasets/pics", "--json")
    assert json.loads(lines[0])["version"] == dataset.ref.version


def test_look_writes_a_page_and_refuses_what_is_no_dataset(run, store, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"pictures/{number}.png")
    source = {"kind": "folder", "path": tmp_path / "pictures", "captions": "file-name"}
    ref = curate(CurationSettings(name="photos", source=source, size=32, filters={"min_side": 32}), store)
    page = tmp_path / "page.html"
    assert run("look", "datasets/photos", "--out", str(page), "--pictures", "2") == (0, [f"the page of {ref} is {page}"], "")
    assert page.read_text().count("<img") == 2
    samples_of(store)
    assert run("look", "samples/some", "--out", str(page))[0] == 2
    code, _, said = run("look", "datasets/photos", "--out", str(tmp_path / "no/such/page.html"))
    assert code == 2
    assert "choose another --out" in said


def samples_of(store) -> None:
    artifact = Artifact.plan(store, "samples", "some", CurationSettings(name="some"), {"base": "ab" * 32})
    artifact.put("00000.tar", b"tar")
    artifact.publish(counts={})


def test_pull_then_pull_again(run, dataset, tmp_path):
    folder = tmp_path / "out"
    code, lines, _ = run("pull", "datasets/pics", str(folder))
    assert (code, lines[-1].endswith("2 fetched now")) == (0, True)
    assert (folder / "sub" / "notes.txt").read_bytes() == b"notes"
    assert json.loads((folder / "manifest.json").read_bytes())["version"] == dataset.ref.version
    assert run("pull", "datasets/pics", str(folder))[1][-1].endswith("0 fetched now")


def test_verify_fails_with_exit_code_2_and_names_the_object(run, dataset, store):
    assert run("verify", "datasets/pics")[:2] == (0, [f"{dataset.ref} is sound: 2 objects, 10.0 KiB"])
    store.overwrite(f"{dataset.prefix}/sub/notes.txt", b"motes")
    code, lines, error = run("verify", "datasets/pics")
    assert code == 2
    assert "corrupt  sub/notes.txt" in lines[0]
    assert error == f"selfcascade: {dataset.ref}: 1 of 2 objects are not as committed, first sub/notes.txt; restore them from a copy\n"


def test_purge_shows_first_and_asks(run, dataset, store):
    code, lines, _ = run("purge", "--key", "cat")  # nobody to ask: standard input is no terminal
    assert code == 0
    assert lines[0] == f"rewrite  {dataset.prefix}/00000.tar"
    assert lines[-1].startswith("nothing was removed")
    assert run("purge", "--key", "cat", "--dry-run")[0] == 0
    assert resolve(store, "datasets/pics").manifest().entry("00000.tar").sha256 == dataset.store.entry(f"{dataset.prefix}/00000.tar").sha256
    code, lines, _ = run("purge", "--key", "cat", "--yes", "--reason", "asked")
    assert code == 0
    assert lines[-1].startswith("removed; the record is s3://")
    assert run("verify", "datasets/pics")[1] == [
        "purged   00000.tar  1 samples were removed on request",
        f"{dataset.ref} is sound: 2 objects, 10.0 KiB; 1 rewritten by a purge",
    ]
    code, _, error = run("purge", "--key", "yak", "--yes")
    assert code == 2
    assert "hold yak" in error


def test_gc_shows_its_plan_and_deletes_only_when_told(run, dataset, store):
    half = Artifact.plan(store, "datasets", "pics", CurationSettings(name="pics", size=512), {})
    half.put("00000.tar", b"half")
    assert run("store", "gc")[1][-1].endswith("kept: 1 younger than the grace period")
    code, lines, _ = run("store", "gc", "--grace-hours", "0")
    assert code == 0
    assert lines[0] == f"{half.prefix}  1 objects, 4 B, of an unfinished run"
    assert lines[-1].startswith("nothing was deleted")
    assert run("store", "gc", "--grace-hours", "0", "--dry-run")[0] == 0
    assert half.has("00000.tar")
    code, lines, _ = run("store", "gc", "--grace-hours", "0", "--yes")
    assert lines[-1].startswith("deleted 1 objects, 4 B")
    assert not half.has("00000.tar")
    assert run("verify", "datasets/pics")[0] == 0


def test_status_says_who_uses_the_store(run, store):
    code, lines, _ = run("store", "status")
    assert code == 0
    assert str(store.settings.folder) in lines[0]
    assert "goes with its last user" in lines[1]
    assert str(os.getpid()) in lines[2]


@pytest.mark.parametrize("words", [("ls",), ("store", "status"), ("store", "gc", "--dry-run"), ("show", "datasets/x")])
def test_looking_makes_no_store(tmp_path, capsys, words):
    main([*words, "--set", f"store.folder={tmp_path / 'never'}"])
    assert not (tmp_path / "never").exists()


def test_a_daemon_is_started_and_stopped(tmp_path, capsys):
    where = ("--set", f"store.folder={tmp_path / 'store'}")
    assert main(["store", "start", *where]) == 0
    assert "runs at http://127.0.0.1:" in capsys.readouterr().out
    assert main(["store", "stop", *where]) == 0
    assert "not running" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "pics"), "'pics' is not an artifact; write"),
        (("show", "datasets/none"), "nothing is published as datasets/none"),
        (("ls", "pictures"), "'pictures' is no kind of artifact"),
        (("pull", "datasets/pics", "FILE"), "is not a folder; choose another one"),
        (("store", "start", "--set", "store.endpoint=http://127.0.0.1:9"), "is not ours to start or stop"),
        (("ls", "--set", "store.endpoint=http://127.0.0.1:9", "--set", "store.access_key=a", "--set", "store.secret_key=b"), "does not answer"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(run, dataset, tmp_path, words, message):
    (tmp_path / "file").write_text("x")
    code, _, error = run(*(str(tmp_path / "file") if word == "FILE" else word for word in words))
    assert code == 2
    assert error.startswith("selfcascade: ")
    assert error.count("\n") == 1
    assert message in error


def test_the_store_of_a_config_file_is_used(store, tmp_path: Path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(f"store:\n  folder: {store.settings.folder}\n  bucket: {store.bucket}\n  prefix: {store.settings.prefix}\n")
    assert main(["ls", "--config", str(path)]) == 0
    assert f"s3://{store.bucket}/{store.settings.prefix}" in capsys.readouterr().out
    assert isinstance(store, Store)
