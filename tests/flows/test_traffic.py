"""What a process counts of its requests to the store, against a proxy that counts them too."""

import threading

import faulty_proxy
from faulty_proxy import FaultyProxy

from selfcascade import traffic
from selfcascade.config import StoreSettings
from selfcascade.storage import Store, embedded
from selfcascade.traffic import Traffic

MIB = 2**20


def test_requests_and_bytes_are_those_of_the_objects(store):
    traffic.take()
    store.put_new("x", bytes(1000))
    assert traffic.take().sent == 1000
    store.read("x")
    assert traffic.take() == Traffic(requests=1, received=1000)
    entry = store.put_new("y", bytes(3 * MIB))
    traffic.take()
    store.read_range(entry, 10, 20)
    assert traffic.take() == Traffic(requests=1, received=3 * MIB)  # the block that is checked
    store.head("x")
    assert traffic.take() == Traffic(requests=1)


def test_large_objects_count_once_in_their_parts(store):
    parted = Store(store.settings.model_copy(update={"multipart_mb": 5}))
    traffic.take()
    parted.put_new("x", bytes(11 * MIB))
    assert 11 * MIB <= traffic.take().sent < 11 * MIB + 2000


def test_what_is_sent_again_is_told_apart(weed, monkeypatch):
    """Every request that arrives is one that was counted, or a try of it."""
    monkeypatch.setattr(faulty_proxy, "FAULTS", ("refused",))
    found = embedded.ensure(weed, "tests")
    with FaultyProxy(found.url, share=0.0, seed=4) as proxy:
        settings = StoreSettings(bucket="tests", prefix="traffic", endpoint=proxy.url, access_key=found.access_key, secret_key=found.secret_key)
        traffic.take()
        with Store.open(settings) as store:
            proxy.share = 0.5
            for number in range(2):
                store.put_cache(f"cache/{number}", b"x")
        taken = traffic.take()
    assert taken.retries == proxy.spoilt["refused"] > 0
    assert taken.requests + taken.retries == proxy.requests


def test_a_read_that_came_damaged_is_counted(store, monkeypatch):
    store.put_new("x", bytes(1000))
    traffic.take()
    turned = iter([b"\1" * 1000, bytes(1000)])
    monkeypatch.setattr(store, "stream", lambda key, *, found=None, span=None: _told(found, next(turned)))
    assert store.read("x", sha256="541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53") == bytes(1000)
    assert traffic.take().damaged == 1


def _told(found, body):
    found[:] = [{"ETag": "e", "Metadata": {}}]
    return iter([body])


def test_whatever_threads_count_is_taken_once():
    traffic.take()
    taken = []

    def work():
        for _ in range(500):
            traffic.count(requests=1)
            taken.append(traffic.take())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken, Traffic()).requests == 2000
