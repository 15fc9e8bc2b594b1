"""What a consumer needs: an address, keys that may read, and two lines; or a link and no keys at all."""

import csv
import hashlib
import io
import json
import subprocess
import sys
import time
from datetime import datetime, timedelta

import httpx
import pytest
import torch
from models import saved_base
from small_artifacts import make, planned, shard, table
from torch.utils.data import DataLoader

import selfcascade
from selfcascade.bases import folder_version, resolve_base
from selfcascade.cascade.upsampler import FeatureUpsampler
from selfcascade.config import StoreSettings
from selfcascade.generation.models import outline
from selfcascade.settings import Settings, SettingsError
from selfcascade.storage import Artifact, NotFound, embedded, located, resolve
from selfcascade.storage.links import links
from selfcascade.storage.purge import plan_purge, purge
from selfcascade_flows.cli import main


@pytest.fixture
def elsewhere(store, weed, tmp_path, monkeypatch):
    """A consumer's machine: endpoint and keys in its environment, settings that name another bucket and no prefix, an empty cache."""
    keys = json.loads((weed / "credentials.json").read_text())
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", embedded.status(weed).url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys["access_key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys["secret_key"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures(store) -> Artifact:
    artifact = planned(store)
    for unit, keys in enumerate((["cat", "catfish", "dog"], ["emu", "fox"])):
        artifact.put(f"{unit:05d}.tar", shard(keys))
        artifact.put(f"{unit:05d}.parquet", table(keys))
    artifact.publish(counts={"kept": 5})
    return artifact


def test_a_dataset_is_open_in_two_lines(pictures, elsewhere):
    """By URI with and without version, from bucket and prefix of the URI: torch's loader hands out each sample once, bytes as stored."""
    for uri in (pictures.ref.uri, pictures.ref.uri.rpartition("/")[0], pictures.ref.uri + "/"):
        dataset = selfcascade.open_dataset(uri, split=None, decode="bytes", shuffle=False)
        batches = list(DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn"))
        assert {sample["__key__"]: sample["png"] for sample in batches} == {key: f"picture {key}".encode() for key in ("cat", "catfish", "dog", "emu", "fox")}
        assert len(batches) == len(dataset) == 5


def test_an_upsampler_is_loaded_in_two_lines(store, elsewhere, tmp_path):
    """The weights are those that were stored, to the bit, and go on being found in the cache."""
    resolved = resolve_base(str(saved_base(tmp_path / "tiny")))
    torch.manual_seed(3)
    made = FeatureUpsampler.for_base(outline(resolved)[0], variant="A", base=str(resolved))
    made.save_pretrained(tmp_path / "phi")
    artifact = Artifact.plan(store, "upsamplers", "phi", Settings(), {"files": folder_version(tmp_path / "phi")})
    for path in sorted((tmp_path / "phi").iterdir()):
        artifact.put(path.name, path)
    artifact.publish(counts={})
    upsampler = selfcascade.load_upsampler(artifact.ref.uri)
    assert isinstance(upsampler, FeatureUpsampler)
    assert upsampler.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in upsampler.state_dict().items())


def test_a_consumer_writes_nothing(pictures, elsewhere, store):
    """Keys that may only read are enough: not even the probe of conditional writes is made."""
    store.delete([info.key for info in store.list("probe/")])
    before = {info.key for info in store.list("")}
    selfcascade.open_dataset(pictures.ref.uri, split=None)
    assert {info.key for info in store.list("")} == before


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("s3://tests", "is no artifact; write s3://BUCKET/PREFIX/KIND/NAME/VERSION"),
        ("s3://tests/pictures/2026", "is no artifact"),
        ("s3://{bucket}/{prefix}/datasets/none", "nothing is published as datasets/none"),
        ("s3://{bucket}/{prefix}/datasets/pics/0000", "no published version of datasets/pics begins with 0000"),
        ("s3://not-a-bucket/datasets/pics", "bucket 'not-a-bucket' does not exist"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(pictures, elsewhere, store, reference, said):
    with pytest.raises(SettingsError, match=said) as refused:
        selfcascade.open_dataset(reference.format(bucket=store.bucket, prefix=store.settings.prefix))
    assert "\n" not in str(refused.value)


def test_a_uri_says_where_its_store_is():
    """Bucket and prefix of the URI, however deep and even where a prefix has the name of a kind; the rest is the settings'."""
    settings = StoreSettings(endpoint="http://there", bucket="mine", prefix="a")
    for prefix in ("", "a", "a/b", "datasets", "samples/old"):
        for tail in ("", "@12ab", f"/{'0' * 64}"):
            found = located("/".join(part for part in ("s3://yours", prefix, "upsamplers/phi") if part) + tail, settings)
            assert (found.endpoint, found.bucket, found.prefix) == ("http://there", "yours", prefix)
    assert located("datasets/pics", settings) == settings


def test_importing_the_package_is_light():
    code = "import sys, selfcascade; print([name for name in ('torch', 'diffusers', 'boto3', 'pyarrow') if name in sys.modules], len(selfcascade.__all__))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")[0] == "[] 4"
    for name in selfcascade.__all__:
        assert getattr(selfcascade, name).__name__ == name


# Links


def test_a_link_gives_the_bytes_until_it_expires(store):
    """Plain HTTP without keys reads every object, the shared one and the manifest too; after the expiry, and with one letter changed, the store refuses."""
    first = planned(store, 256)
    make(first)
    second = planned(store, 512)
    second.put("00009.tar", b"own")
    second.publish(counts={}, shared=[first.share("00000.tar")])
    found = links(second, timedelta(hours=1))
    assert [link.key for link in found] == ["00000.tar", "00009.tar", "manifest.json"]
    for link in found:
        reply = httpx.get(link.url)
        assert (reply.status_code, len(reply.content), hashlib.sha256(reply.content).hexdigest()) == (200, link.size, link.sha256)
        assert 3000 <= (datetime.fromisoformat(link.expires) - store.now()).total_seconds() <= 3601
    assert httpx.get(found[0].url.replace("00000.tar", "00001.tar")).status_code == 403
    assert httpx.put(found[0].url, content=b"other").status_code == 403
    brief = links(second, timedelta(seconds=1))
    time.sleep(max(0.0, (datetime.fromisoformat(brief[-1].expires) - store.now()).total_seconds()) + 2)
    assert [httpx.get(link.url).status_code for link in brief] == [403] * 3


def test_a_rewritten_object_is_linked_with_its_digest_of_now(pictures, store, monkeypatch):
    monkeypatch.setattr("selfcascade.storage.embedded.VACUUM_PAUSE", 0)
    purge(store, plan_purge(store, ["cat"]), reason="asked")
    for link in links(resolve(store, str(pictures.ref)), timedelta(hours=1)):
        assert hashlib.sha256(httpx.get(link.url).content).hexdigest() == link.sha256


def test_the_command_writes_text_csv_and_json(pictures, store, capsys):
    settings = store.settings
    where = [word for name in ("folder", "bucket", "prefix") for word in ("--set", f"store.{name}={getattr(settings, name)}")]
    objects = {entry.key: (entry.size, entry.sha256) for entry in pictures.manifest().objects}

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["links", "datasets/pics", *words, *where])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    code, text, told = run()
    assert code == 0
    assert [hashlib.sha256(httpx.get(url).content).hexdigest() for url in text.splitlines()[:-1]] == [sha256 for _, sha256 in objects.values()]
    assert "store start" in told
    rows = list(csv.DictReader(io.StringIO(run("--format", "csv", "--expires", "30m")[1])))
    assert {row["key"]: (int(row["size"]), row["sha256"]) for row in rows[:-1]} == objects
    tree = json.loads(run("--format", "json", "--expires", "7d")[1])
    assert tree["artifact"] == f"datasets/pics@{pictures.ref.version}"
    assert {row["key"]: (row["size"], row["sha256"]) for row in tree["objects"][:-1]} == objects
    assert 6.9 < (datetime.fromisoformat(tree["objects"][0]["expires"]) - store.now()).total_seconds() / 86400 < 7.1
    for wrong, said in (("8d", "S3 signs them for 1s to 7d"), ("0h", "S3 signs them"), ("soon", "is no time"), ("604801s", "S3 signs them")):
        code, text, told = run("--expires", wrong)
        assert (code, text) == (2, "")
        assert said in told
    with pytest.raises(SettingsError, match="S3 signs them"):
        links(pictures, timedelta(days=8))
    with pytest.raises(NotFound):
        links(Artifact(store, planned(store, 1024).ref), timedelta(hours=1))
