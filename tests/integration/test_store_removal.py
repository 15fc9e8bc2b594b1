"""A removal request reaches all versions and caches, and leaves a record."""

import hashlib
import io
import json
import os
import signal
import tarfile

import pyarrow.parquet as pq
import pytest
from small_artifacts import dataset, in_child, members, planned, shard

from selfcascade.config import CurationSettings
from selfcascade.storage import Artifact, IntegrityError, NotFound, Store, Withdrawn, resolve, withdrawn
from selfcascade.storage.leases import COLLECTOR
from selfcascade.storage.objects import Objects
from selfcascade.storage.purge import plan_purge, purge
from selfcascade.storage.tombstone import tombstone
from selfcascade.storage.verification import verify


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(request, monkeypatch):
    if "disk" not in request.node.name:
        monkeypatch.setattr("selfcascade.storage.embedded.VACUUM_PAUSE", 0)


def test_a_removed_sample_is_gone_from_all_versions_and_caches_and_only_that(store):
    first, second, unfinished = dataset(store, 256), dataset(store, 512), dataset(store, 1024, publish=False)
    upsampler = Artifact.plan(store, "upsamplers", "up", CurationSettings(size=8), {"dataset": first.ref.version})
    upsampler.put("model.safetensors", b"weights")
    upsampler.publish(counts={})
    store.put_cache("cache/latents/1", b"latents of cat")
    manifests = [store.read(f"{artifact.prefix}/manifest.json") for artifact in (first, second)]

    plan = plan_purge(store, ["cat"])
    assert plan.rewritten == tuple(sorted(f"{artifact.prefix}/00000.{suffix}" for artifact in (first, second) for suffix in ("tar", "parquet")))
    assert plan.derived == (str(upsampler.ref),)
    record = purge(store, plan, reason="asked for by the author")

    everything = b"".join(store.read(info.key) for kind in ("datasets/", "cache/") for info in store.list(kind))
    assert b"picture cat\0" not in everything
    assert b"latents of cat" not in everything
    for artifact in (resolve(store, str(first.ref)), resolve(store, str(second.ref))):
        assert sorted({name.partition(".")[0] for name in members(artifact.read("00000.tar"))}) == ["catfish", "dog"]
        assert pq.read_table(io.BytesIO(artifact.read("00000.parquet")))["key"].to_pylist() == ["catfish", "dog"]
        assert artifact.read("00001.tar") == shard(["emu", "fox"])
        assert {finding.key: finding.state for finding in verify(artifact) if finding.state != "sound"} == {
            "00000.parquet": "purged",
            "00000.tar": "purged",
        }
    assert [store.read(f"{artifact.prefix}/manifest.json") for artifact in (first, second)] == manifests
    assert unfinished.existing() == {"00001.tar", "00001.parquet", "00001_stats.json"}
    kept = json.loads(store.read(record))
    assert kept["samples"] == ["cat"]
    assert kept["reason"] == "asked for by the author"
    assert kept["derived"] == [str(upsampler.ref)]
    original = hashlib.sha256(b"original cat").hexdigest()
    assert withdrawn(store, "datasets/pics") == Withdrawn(frozenset({"cat"}), frozenset({original}))
    assert withdrawn(store, "datasets/other") == Withdrawn(frozenset(), frozenset({original}))


def test_the_bytes_of_a_removed_sample_leave_the_disk(store):
    """The server rewrites its volumes: no file of the data folder holds the picture any more."""
    picture = os.urandom(4096)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for key, data in (("cat", picture), ("dog", os.urandom(4096))):
            member = tarfile.TarInfo(f"{key}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    artifact = planned(store)
    artifact.put("00000.tar", sink.getvalue())
    artifact.publish(counts={})
    files = list((store.settings.folder / "data").rglob("*.dat"))
    assert any(picture[:64] in path.read_bytes() for path in files)
    purge(store, plan_purge(store, ["cat"]), reason="r")
    files = [path for path in (store.settings.folder / "data").rglob("*") if path.is_file()]
    assert not any(picture[:64] in path.read_bytes() for path in files)
    assert members(resolve(store, str(artifact.ref)).read("00000.tar")) == ["dog.png"]


def test_a_rewritten_object_that_is_damaged_is_still_refused(store):
    """A tombstone allows its own bytes, not any."""
    artifact = dataset(store, 256)
    purge(store, plan_purge(store, ["cat"]), reason="r")
    purge(store, plan_purge(store, ["dog"]), reason="r")
    found = resolve(store, str(artifact.ref))
    assert sorted({name.partition(".")[0] for name in members(found.read("00000.tar"))}) == ["catfish"]
    assert tombstone(store, f"{artifact.prefix}/00000.tar").samples == ("cat", "dog")
    store.overwrite(f"{artifact.prefix}/00000.tar", b"damaged")
    with pytest.raises(IntegrityError, match=r"00000\.tar does not match its digest"):
        found.read("00000.tar")
    assert [finding.state for finding in verify(found) if finding.key == "00000.tar"] == ["corrupt"]


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_killed_removal_is_finished_by_running_it_again(store, moment):
    """Killed before any write: consumers read the old or the new form, never a broken one, and the second run finishes everything."""
    artifact = dataset(store, 256)
    store.put_cache("cache/1", b"c")

    def work():
        own = Store(store.settings)
        plan = plan_purge(own, ["cat"])
        put, writes = Objects.put, []

        def counted(self, *arguments, **named):
            writes.append(1)
            if len(writes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return put(self, *arguments, **named)

        Objects.put = counted
        purge(own, plan, reason="r")

    in_child(work)
    found = resolve(store, str(artifact.ref))
    assert "dog.png" in members(found.read("00000.tar"))
    store.delete([COLLECTOR])  # stands for the minute that a killed collector holds others up
    purge(store, plan_purge(store, ["cat"]), reason="r")
    assert "cat.png" not in members(found.read("00000.tar"))
    assert all(finding.is_sound for finding in verify(found))
    assert list(store.list("cache/")) == []


def test_a_removal_can_be_kept_to_one_name(store):
    """Two sources may use one key for two pictures."""
    pics, other = dataset(store, 256), planned(store, name="other")
    other.put("00000.tar", shard(["cat"]))
    other.publish(counts={})
    purge(store, plan_purge(store, ["cat"], "datasets/other"), reason="r")
    assert members(resolve(store, str(other.ref)).read("00000.tar")) == []
    assert "cat.png" in members(resolve(store, str(pics.ref)).read("00000.tar"))
    assert withdrawn(store, "datasets/other").keys == {"cat"}
    assert withdrawn(store, "datasets/pics").keys == set()
    with pytest.raises(NotFound, match=r"'reports/x' cannot hold samples; write datasets/NAME or samples/NAME"):
        plan_purge(store, ["cat"], "reports/x")


def test_a_sample_that_nobody_has_is_said(store):
    dataset(store, 256)
    with pytest.raises(NotFound, match=r"no dataset and no samples .* hold yak"):
        plan_purge(store, ["yak"])
    assert list(store.list("purged/")) == []
