"""What an artifact promises: committed whole or not at all, once, with the same bytes whoever wrote them and however often they were killed."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from small_artifacts import NOW, content, in_child, make, planned

from selfcascade.storage import IntegrityError, NotFound, Store, resolve, rollback, versions
from selfcascade.storage import pointer as pointers
from selfcascade.storage.collect import collect, plan_collection
from selfcascade.storage.listing import listing
from selfcascade.storage.objects import Objects
from selfcascade.storage.pulling import pull
from selfcascade.storage.verification import verify


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(request, monkeypatch):
    if "disk" not in request.node.name:
        monkeypatch.setattr("selfcascade.storage.embedded.VACUUM_PAUSE", 0)


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
    monkeypatch.setattr(Objects, "put", lambda *_, **__: pytest.fail("a rerun wrote"))
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


def _killed_at(store: Store, moment: int, when: str):
    """A run that is killed before or after its ``moment``-th write."""
    put, writes = Objects.put, []

    def counted(self, *arguments, **named):
        writes.append(1)
        if when == "before" and len(writes) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        result = put(self, *arguments, **named)
        if when == "after" and len(writes) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Objects.put = counted
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
        status = in_child(lambda again=again, moment=moment: _killed_at(again, moment, when))
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
