"""Leases and collection: what is in use is never deleted, and nothing is deleted unseen."""

import os
import signal
import threading
from datetime import timedelta

import pytest
from small_artifacts import NOW, content, in_child, make, planned

from selfcascade.storage import IntegrityError, Store, lease, resolve
from selfcascade.storage.collect import collect, plan_collection
from selfcascade.storage.leases import COLLECTOR, Lease, collecting, leased
from selfcascade.storage.verification import verify


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(request, monkeypatch):
    if "disk" not in request.node.name:
        monkeypatch.setattr("selfcascade.storage.embedded.VACUUM_PAUSE", 0)


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

    in_child(work)
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
