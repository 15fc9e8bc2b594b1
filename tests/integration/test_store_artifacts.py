"""What an artifact promises: committed whole or not at all, once, with the same bytes whoever wrote them and however often they were killed."""

import hashlib
import io
import json
import os
import signal
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfcascade.config import CurationSettings
from selfcascade.storage import Artifact, IntegrityError, NotFound, Store, Withdrawn, lease, resolve, rollback, versions, withdrawn
from selfcascade.storage import pointer as pointers
from selfcascade.storage.collect import collect, plan_collection
from selfcascade.storage.leases import COLLECTOR, Lease, collecting, leased
from selfcascade.storage.listing import listing
from selfcascade.storage.pulling import pull
from selfcascade.storage.purge import plan_purge, purge
from selfcascade.storage.tombstone import tombstone
from selfcascade.storage.verification import verify

INPUTS = {"source": "ab" * 32}
NOW = timedelta(0)


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(request, monkeypatch):
    if "disk" not in request.node.name:
        monkeypatch.setattr("selfcascade.storage.embedded.VACUUM_PAUSE", 0)


def planned(store: Store, size: int = 256, name: str = "pics") -> Artifact:
    return Artifact.plan(store, "datasets", name, CurationSettings(name=name, size=size), INPUTS)


def make(artifact: Artifact, units: int = 2, salt: bytes = b"") -> None:
    """A stage in small: per unit data, then a sidecar derived from the adopted data; then the commit."""
    with artifact.writing():
        for unit in range(units):
            if artifact.has(f"{unit:05d}_stats.json"):
                continue
            entry = artifact.put(f"{unit:05d}.tar", b"data %d " % unit + salt)
            artifact.put(f"{unit:05d}_stats.json", json.dumps({"sha256": entry.sha256}).encode())
        artifact.publish(counts={"units": units})


def content(store: Store, prefix: str = "datasets/") -> dict[str, bytes]:
    """Every object below ``prefix`` but the sequence, which counts runs."""
    return {info.key: store.read(info.key) for info in store.list(prefix) if not info.key.endswith(("sequence.json", "latest.json"))}


def test_an_artifact_exists_for_consumers_from_its_manifest_on(store):
    artifact = planned(store)
    with artifact.writing():
        artifact.put("00000.tar", b"x")
        with pytest.raises(NotFound, match=r"nothing is published as datasets/pics .*run its stage first"):
            resolve(store, "datasets/pics")
        assert not artifact.published()
        ref = artifact.publish(counts={"n": 1})
    assert artifact.published()
    assert ref == resolve(store, "datasets/pics").ref
    assert str(ref) == f"datasets/pics@{ref.version[:12]}"


def test_an_artifact_is_found_by_name_version_and_address(store):
    artifact = planned(store)
    make(artifact)
    ref = artifact.ref
    for text, kind in [
        ("datasets/pics", None),
        ("pics", "datasets"),
        (f"datasets/pics@{ref.version}", None),
        (f"pics@{ref.short}", "datasets"),
        (str(ref), None),
        (ref.uri, None),
        (ref.uri, "datasets"),
        (store.uri("datasets/pics"), None),
    ]:
        assert resolve(store, text, kind).ref == ref


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pics", "is not an artifact; write"),
        ("bases/pics", "nothing is published as bases/pics"),
        ("datasets/pics@0000", "no published version of datasets/pics begins with 0000"),
        ("datasets/pics@xyz", "a version is 4 to 64 hexadecimal digits"),
        ("s3://elsewhere/datasets/pics", r"is not in this store \("),
        ("pictures/of/me", "is not an artifact"),
        ("", "is not an artifact"),
    ],
)
def test_what_cannot_be_found_is_said_in_one_line(store, text, message):
    make(planned(store), units=1)
    with pytest.raises(NotFound, match=message) as caught:
        resolve(store, text)
    assert "\n" not in str(caught.value)


def test_a_kind_is_held_against_what_was_asked_for(store):
    make(planned(store), units=1)
    with pytest.raises(NotFound, match="is not an artifact; write upsamplers/NAME"):
        resolve(store, "datasets/pics", "upsamplers")


def test_publishing_checks_that_every_object_is_there(store):
    """A missing object is named, no manifest is written, and the next run can still commit."""
    artifact = planned(store)
    artifact.put("00000.tar", b"x")
    with pytest.raises(NotFound, match=r"datasets/pics@\w+ cannot be published: its object 00001\.tar is missing"):
        artifact.publish(counts={}, objects=["00000.tar", "00001.tar"])
    assert not artifact.has("manifest.json")
    artifact.put("00001.tar", b"y")
    artifact.publish(counts={}, objects=["00000.tar", "00001.tar"])


def test_a_published_artifact_does_no_work_again(store, monkeypatch):
    """A rerun writes nothing: no object, no sequence, no pointer."""
    make(planned(store))
    before = {info.key: info.etag for info in store.list("")}
    monkeypatch.setattr(Store, "_put", lambda *_, **__: pytest.fail("a rerun wrote"))
    make(planned(store))
    assert {info.key: info.etag for info in store.list("")} == before


def test_manifests_of_equal_runs_are_byte_equal(store):
    """Two stores, different order of writing: equal versions, equal manifests; nothing in them says when or where."""
    other = Store.open(store.settings.model_copy(update={"prefix": store.settings.prefix + "-other"}))
    make(planned(store))
    second = planned(other)
    for unit in (1, 0):
        entry = second.put(f"{unit:05d}.tar", b"data %d " % unit)
        second.put(f"{unit:05d}_stats.json", json.dumps({"sha256": entry.sha256}).encode())
    second.publish(counts={"units": 2})
    assert content(store) == content(other)
    text = second.manifest().to_bytes().decode()
    assert store.settings.prefix not in text
    assert os.uname().nodename not in text.replace("objects", "")
    other.close()


def test_a_flipped_byte_is_refused_by_the_next_consumer_by_name(store, tmp_path):
    make(planned(store))
    artifact = resolve(store, "datasets/pics")
    key = f"{artifact.prefix}/00001.tar"
    data = store.read(key)
    store.delete([key])
    store.put_new(key, bytes([data[0] ^ 1]) + data[1:])
    assert artifact.read("00000.tar") == b"data 0 "
    for read in (lambda: artifact.read("00001.tar"), lambda: artifact.download("00001.tar", tmp_path / "x"), lambda: artifact.read_range("00001.tar", 0, 2)):
        with pytest.raises(IntegrityError, match=r"object s3://tests/\S+/datasets/pics/\w{64}/00001\.tar does not match its digest"):
            read()
    assert [(finding.key, finding.state) for finding in verify(artifact) if not finding.is_sound] == [("00001.tar", "corrupt")]


def test_verification_names_what_is_missing_short_or_damaged(store):
    make(planned(store), units=4)
    artifact = resolve(store, "datasets/pics")
    assert all(finding.state == "sound" for finding in verify(artifact))
    store.delete([f"{artifact.prefix}/00000.tar"])
    store.overwrite(f"{artifact.prefix}/00001.tar", b"short")
    store.overwrite(f"{artifact.prefix}/00002.tar", b"datA 2 ")
    found = {finding.key: (finding.state, finding.detail) for finding in verify(artifact)}
    assert found["00000.tar"][0] == "missing"
    assert found["00001.tar"][0] == "corrupt"
    assert "5 bytes instead of 7" in found["00001.tar"][1]
    assert "block 0 differs" in found["00002.tar"][1]
    assert found["00003.tar"] == ("sound", "")


def test_a_manifest_of_another_artifact_is_refused(store):
    make(planned(store))
    other = planned(store, size=512)
    store.put_new(f"{other.prefix}/manifest.json", store.read(f"{planned(store).prefix}/manifest.json"))
    with pytest.raises(IntegrityError, match=r"belongs to datasets/pics@\w+, not to datasets/pics@"):
        other.manifest()


# Two runs at once, and killed runs


def _in_child(work) -> int:
    """Run ``work`` in a forked process; the exit status as waitpid gives it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def _killed_at(store: Store, moment: int, when: str):
    """A run that is killed before or after its ``moment``-th write."""
    put, writes = Store._put, []

    def counted(self, *arguments, **named):
        writes.append(1)
        if when == "before" and len(writes) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        result = put(self, *arguments, **named)
        if when == "after" and len(writes) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Store._put = counted
    make(planned(Store(store.settings)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_between_any_two_writes_and_run_again_gives_the_same_bytes(store, when):
    """SIGKILL at every write in turn, each in a store of its own, then the same run again: every object, the manifest among them, has the
    bytes of an undisturbed run, consumers find it, and nothing is left to do."""
    make(planned(store))
    wanted = content(store)
    killed = 0
    for moment in range(1, 40):
        settings = store.settings.model_copy(update={"prefix": f"{store.settings.prefix}-{when}{moment}"})
        again = Store(settings)
        status = _in_child(lambda again=again, moment=moment: _killed_at(again, moment, when))
        make(planned(again))
        assert content(again) == wanted
        assert resolve(again, "datasets/pics").ref.version == planned(again).ref.version
        assert planned(again).published()
        again.close()
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
    assert status == 0
    assert killed >= 10  # lease, sequence, 4 objects, lease, manifest, pointer, sequence


def test_two_runs_at_once_publish_one_set(store):
    """Two processes with different bytes for the same version (two devices): both end well, every object is one writer's, sidecars match
    the data that won, the manifest matches what is stored."""
    pids = []
    for salt in (b"a", b"b"):
        pid = os.fork()
        if pid == 0:
            try:
                make(planned(Store(store.settings)), units=5, salt=salt)
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    artifact = resolve(store, "datasets/pics")
    assert all(finding.state == "sound" for finding in verify(artifact))
    for unit in range(5):
        entry = artifact.manifest().entry(f"{unit:05d}.tar")
        assert json.loads(artifact.read(f"{unit:05d}_stats.json"))["sha256"] == entry.sha256
    assert len(versions(store, "datasets/pics")) == 1
    assert planned(store).published()


# The pointer


def test_the_later_planned_run_wins_whichever_ends_first(store):
    early, late = planned(store, 256), planned(store, 512)
    with early.writing():
        early.put("a", b"1")
        make(late)
        assert resolve(store, "datasets/pics").ref == late.ref
        early.publish(counts={})
    assert early.published()
    assert resolve(store, "datasets/pics").ref == late.ref
    assert len(versions(store, "datasets/pics")) == 2


def test_going_back_is_explicit_and_a_rerun_does_not(store):
    old, new = planned(store, 256), planned(store, 512)
    make(old)
    make(new)
    make(planned(store, 256))
    assert resolve(store, "datasets/pics").ref == new.ref
    sequence = rollback(store, old.ref)
    assert resolve(store, "datasets/pics").ref == old.ref
    assert pointers.latest(store, "datasets/pics").sequence == sequence
    with pytest.raises(NotFound, match="is not published"):
        rollback(store, planned(store, 1024).ref)


def test_the_pointer_never_goes_back_under_races(store):
    """Three threads move it with sequences in shuffled order while a reader watches: what it sees never falls, and the highest stays."""
    seen, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            found = pointers.latest(store, "datasets/pics")
            seen.append(found.sequence if found else 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    moves = [[5, 2, 8], [1, 9, 3], [7, 4, 6]]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda numbers: [pointers.move(store, "datasets/pics", f"{n:064x}", n) for n in numbers], moves))
    stop.set()
    watcher.join()
    assert seen == sorted(seen)
    assert pointers.latest(store, "datasets/pics") == pointers.Latest(f"{9:064x}", 9)


def test_every_run_takes_its_own_sequence(store):
    with ThreadPoolExecutor(3) as pool:
        taken = list(pool.map(lambda n: pointers.take(store, "datasets/pics", f"{n % 2:064x}"), range(6)))
    assert sorted(taken) == [1, 2, 3, 4, 5, 6]
    assert pointers.sequences(store, "datasets/pics").taken == 6


# Sharing


def test_shared_shards_are_read_where_they_are_and_survive_collection(store):
    """A new version lists a shard of its parent: nothing is copied, consumers read it, gc keeps it, a missing one stops the commit."""
    parent = planned(store, 256)
    make(parent)
    child = planned(store, 512)
    with child.writing():
        child.put("00002.tar", b"new")
        child.publish(counts={"units": 3}, objects=["00002.tar"], shared=[resolve(store, str(parent.ref)).share("00000.tar")])
    found = resolve(store, "datasets/pics")
    assert found.read("00000.tar") == b"data 0 "
    assert found.share("00000.tar").source == parent.prefix
    assert found.read_range("00000.tar", 0, 4) == b"data"
    store.delete([f"{parent.prefix}/manifest.json"])
    collect(store, plan_collection(store, grace=NOW), grace=NOW)
    assert found.read("00000.tar") == b"data 0 "
    assert not store.head(f"{parent.prefix}/00001.tar")
    store.delete([f"{parent.prefix}/00000.tar"])
    third = planned(store, 1024)
    with pytest.raises(NotFound, match=r"cannot be published: it shares datasets/pics/\w+/00000\.tar, which does not exist"):
        third.publish(counts={}, objects=[], shared=[found.share("00000.tar")])


# Leases and collection


def test_collection_takes_what_nobody_refers_to_and_only_that(store):
    published, unfinished = planned(store, 256), planned(store, 512)
    make(published)
    unfinished.put("00000.tar", b"half")
    store.put_new(f"{published.prefix}/stray.tmp", b"stray")
    store.put_cache("cache/latents", b"c")
    store.put_cache("runs/1.json", b"{}")
    upload = store.client.create_multipart_upload(Bucket=store.bucket, Key=f"{store.settings.prefix}/{unfinished.prefix}/big")["UploadId"]
    before = content(store)
    young = plan_collection(store)
    assert (young.garbage, young.kept_young) == ((), 2)
    found = plan_collection(store, grace=NOW)
    assert {(item.key, item.reason) for item in found.garbage} == {
        (f"{published.prefix}/stray.tmp", "in no manifest"),
        (f"{unfinished.prefix}/00000.tar", "of an unfinished run"),
    }
    assert [item.upload_id for item in found.uploads] == [upload]
    assert content(store) == before  # a plan deletes nothing
    gone = collect(store, found, grace=NOW)
    assert len(gone.garbage) == 2
    assert content(store).keys() == before.keys() - {item.key for item in found.garbage}
    assert store.read("cache/latents") == b"c"
    assert store.read("runs/1.json") == b"{}"
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.settings.prefix)
    assert all(finding.state == "sound" for finding in verify(resolve(store, "datasets/pics")))
    collect(store, plan_collection(store, grace=NOW, cache=True), grace=NOW, cache=True)
    assert store.head("cache/latents") is None
    assert store.read("runs/1.json") == b"{}"


def test_collection_leaves_leased_prefixes_alone_and_deletes_only_what_was_shown(store):
    """Between plan and deletion a run leases one prefix, another is published, new garbage appears: none of these is touched."""
    working, committing, idle = (planned(store, size) for size in (256, 512, 1024))
    for artifact in (working, committing, idle):
        artifact.put("00000.tar", b"half")
    found = plan_collection(store, grace=NOW)
    assert len(found.garbage) == 3
    with lease(store, working.prefix):
        committing.publish(counts={})
        late = planned(store, 2048)
        late.put("00000.tar", b"late")
        gone = collect(store, found, grace=NOW)
        assert [item.key for item in gone.garbage] == [f"{idle.prefix}/00000.tar"]
        assert gone.kept_leased == (working.prefix,)
    assert working.has("00000.tar")
    assert late.has("00000.tar")
    assert all(finding.is_sound for finding in verify(resolve(store, str(committing.ref))))


def test_an_unreadable_manifest_stops_collection(store):
    """It may refer to anything, so nothing is garbage for certain."""
    artifact = planned(store)
    artifact.put("00000.tar", b"x")
    store.put_new(f"{artifact.prefix}/manifest.json", b"{")
    with pytest.raises(IntegrityError, match=r"manifest\.json is not a valid manifest"):
        plan_collection(store, grace=NOW)


def test_a_lease_beats_and_ends(store):
    with lease(store, "datasets/pics/1"):
        assert leased(store) == {"datasets/pics/1"}
    assert leased(store) == set()
    held = Lease(store, "datasets/pics/2", beat=0.05)
    first = store.head(held.key).etag, store.head(held.key).modified
    deadline = threading.Event()
    while store.head(held.key).modified == first[1] and not deadline.wait(0.1):
        pass
    held.release()
    assert leased(store) == set()


def test_a_lease_of_a_killed_process_ends_by_age(store, monkeypatch):
    """SIGKILL leaves the lease; it protects until its life is over, then it is collected itself."""

    def work():
        Lease(Store(store.settings), "datasets/pics/1")
        os.kill(os.getpid(), signal.SIGKILL)

    _in_child(work)
    assert leased(store) == {"datasets/pics/1"}
    monkeypatch.setattr("selfcascade.storage.leases.LIFE", timedelta(seconds=-5))
    assert leased(store) == set()
    collect(store, plan_collection(store), grace=NOW)
    assert list(store.list("leases/")) == []


def test_a_new_planner_waits_for_a_collector_and_a_collector_for_none(store):
    """While somebody deletes, a lease is not granted; so what a planner sees after it has its lease stays there."""
    granted = []

    def plan():
        with lease(store, "datasets/pics/1"):
            granted.append(store.head("x"))

    with collecting(store):
        planner = threading.Thread(target=plan)
        planner.start()
        planner.join(1.0)
        assert planner.is_alive()
        assert not granted
        assert leased(store) == {"datasets/pics/1"}  # already seen by the collector
    planner.join(10)
    assert granted == [None]


def test_there_is_one_collector_and_a_killed_one_is_replaced(store, monkeypatch):
    from selfcascade.storage import Conflict

    with collecting(store), pytest.raises(Conflict, match="another gc or purge is at work"), collecting(store):
        pass
    store.put_cache(COLLECTOR, b"killed")
    monkeypatch.setattr("selfcascade.storage.leases.COLLECTOR_LIFE", timedelta(seconds=-5))
    with collecting(store) as held:
        store.put_cache(COLLECTOR, b"taken over")
        with pytest.raises(Conflict):
            held._beat()
        with pytest.raises(Conflict, match="may no longer delete"):
            held.assert_held()
    assert store.read(COLLECTOR) == b"taken over"


# Removal requests


def shard(keys: list[str]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key in sorted(keys):
            for suffix, data in (("json", b"{}"), ("png", f"picture {key}".encode()), ("txt", key.encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def table(keys: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": keys, "sha256": [hashlib.sha256(f"original {key}".encode()).hexdigest() for key in keys]}), sink)
    return sink.getvalue()


def dataset(store: Store, size: int, *, publish: bool = True) -> Artifact:
    artifact = planned(store, size)
    for unit, keys in enumerate((["cat", "catfish", "dog"], ["emu", "fox"])):
        artifact.put(f"{unit:05d}.tar", shard(keys))
        artifact.put(f"{unit:05d}.parquet", table(keys))
        artifact.put(f"{unit:05d}_stats.json", b'{"kept": 3}')
    if publish:
        artifact.publish(counts={"kept": 5})
    return artifact


def members(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getnames()


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
        put, writes = Store._put, []

        def counted(self, *arguments, **named):
            writes.append(1)
            if len(writes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return put(self, *arguments, **named)

        Store._put = counted
        purge(own, plan, reason="r")

    _in_child(work)
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


# Listing and pulling


def test_the_listing_marks_what_consumers_get(store):
    old, new = planned(store, 256), planned(store, 512)
    make(old)
    make(new, units=3)
    make(planned(store, name="other"))
    rows = listing(store, "datasets/pics")
    assert [(row.ref, row.is_latest, row.objects) for row in sorted(rows, key=lambda row: row.objects)] == [(old.ref, False, 4), (new.ref, True, 6)]
    assert len(listing(store)) == len(listing(store, "datasets")) == 3
    assert listing(store, "bases") == []
    with pytest.raises(NotFound, match="is no kind of artifact; there are datasets"):
        listing(store, "pictures")


def test_pulling_again_fetches_only_what_is_wrong(store, tmp_path):
    artifact = planned(store)
    make(artifact)
    entries = artifact.manifest().objects
    assert [pull(artifact, entry, tmp_path) for entry in entries] == [True] * 4
    (tmp_path / "00000.tar").write_bytes(b"datA 0 ")
    assert [pull(artifact, entry, tmp_path) for entry in entries] == [True, False, False, False]
    assert (tmp_path / "00000.tar").read_bytes() == b"data 0 "


def test_pulling_stays_in_its_folder(store, tmp_path):
    from selfcascade.storage import StoreError, entry_of

    artifact = planned(store)
    make(artifact)
    with pytest.raises(StoreError, match="would lie outside"):
        pull(artifact, entry_of("../evil", b""), tmp_path / "in")
