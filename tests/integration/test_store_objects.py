"""The store's promises about single objects, against the real server."""

import concurrent.futures
import hashlib
import multiprocessing
import pickle
import random
import threading
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta

import pytest
from botocore.exceptions import IncompleteReadError, ReadTimeoutError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfcascade.config import StoreSettings
from selfcascade.storage import (
    BLOCK,
    BucketMissing,
    Conflict,
    IntegrityError,
    NotFound,
    Store,
    StoreDenied,
    StoreError,
    StoreUnreachable,
    embedded,
    entry_of,
    objects,
)
from selfcascade.storage import entry as entry_module
from selfcascade.storage import store as store_module
from selfcascade.storage.objects import Objects

MIB = 2**20


def noise(seed: int, size: int) -> bytes:
    """Reproducible bytes without a pattern."""
    return random.Random(seed).randbytes(size)


@pytest.fixture
def remote(weed, store) -> StoreSettings:
    """The session's server as somebody else's S3: an endpoint and keys."""
    endpoint = embedded.ensure(weed)
    return StoreSettings(
        endpoint=endpoint.url, access_key=endpoint.access_key, secret_key=endpoint.secret_key, bucket=store.bucket, prefix=store.settings.prefix
    )


def test_an_object_is_written_once_and_a_second_writer_adopts_it(store):
    """The second put writes nothing and returns the digest of what was there first."""
    first = store.put_new("a/b", b"first")
    assert store.put_new("a/b", b"second") == first == entry_of("a/b", b"first")
    assert store.read("a/b", sha256=first.sha256) == b"first"


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1])
def test_bytes_and_digests_survive_the_round_trip(store, tmp_path, size):
    """From memory and from a file, in one piece and in parts: equal entries, equal bytes, and HEAD alone restores the entry."""
    data = noise(size, size)
    (tmp_path / "in").write_bytes(data)
    whole = store.put_new("whole", data)
    parted = Store(store.settings.model_copy(update={"multipart_mb": 5})).put_new("parted", tmp_path / "in")
    assert whole.same_bytes(parted)
    assert whole == entry_of("whole", data) == store.entry("whole")
    assert store.entry("parted") == parted
    store.download("parted", tmp_path / "deep" / "out", sha256=parted.sha256)
    assert (tmp_path / "deep" / "out").read_bytes() == data == store.read("whole", sha256=whole.sha256)


def test_parts_overwrite_nothing_either(store, tmp_path, monkeypatch):
    """An upload in parts that loses the race at its last request adopts the winner and leaves no parts behind."""
    slow = Store(store.settings.model_copy(update={"multipart_mb": 5}))
    head, seen = slow._objects.head, []
    monkeypatch.setattr(slow._objects, "head", lambda key: seen.append(key) or (None if len(seen) == 1 else head(key)))
    store.put_new("big", noise(1, 6 * MIB))
    adopted = slow.put_new("big", noise(2, 6 * MIB))
    assert adopted == entry_of("big", noise(1, 6 * MIB))
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.settings.prefix)


def test_of_writers_at_once_one_wins_and_all_return_its_digest(store):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        entries = list(pool.map(lambda n: store.put_new("one", noise(n, 1000)), range(3)))
    assert len(set(entries)) == 1
    assert entries[0] in [entry_of("one", noise(n, 1000)) for n in range(3)]
    assert store.read("one", sha256=entries[0].sha256)


def test_a_flipped_byte_is_refused_by_name(store):
    data = noise(3, 1000)
    entry = store.put_new("d/x.tar", data)
    store.overwrite("d/x.tar", data[:500] + bytes([data[500] ^ 1]) + data[501:])
    with pytest.raises(IntegrityError, match=rf"object {store.uri('d/x.tar')} does not match its digest"):
        store.read("d/x.tar", sha256=entry.sha256)


def test_a_refused_download_leaves_no_file(store, tmp_path):
    entry = store.put_new("x", b"good")
    store.overwrite("x", b"evil")
    with pytest.raises(IntegrityError, match="does not match its digest"):
        store.download("x", tmp_path / "x", sha256=entry.sha256)
    assert list(tmp_path.iterdir()) == []


def test_adoption_notices_what_its_writer_did_not_write(store):
    """An object whose bytes are not those that its writer recorded is not adopted."""
    store.client.put_object(Bucket=store.bucket, Key=f"{store.settings.prefix}/x", Body=b"damaged", Metadata={"sha256": "0" * 64})
    with pytest.raises(IntegrityError, match="does not match its digest"):
        store.put_new("x", b"mine")


def test_objects_of_other_tools_are_adopted_by_reading_them(store):
    store.client.put_object(Bucket=store.bucket, Key=f"{store.settings.prefix}/x", Body=noise(4, BLOCK + 9))
    assert store.entry("x") == store.put_new("x", b"mine") == entry_of("x", noise(4, BLOCK + 9))


@pytest.fixture(scope="module")
def big() -> bytes:
    return noise(5, 2 * BLOCK + 1000)


@pytest.mark.parametrize(
    ("start", "end"), [(0, 1), (0, BLOCK), (BLOCK - 3, BLOCK + 3), (BLOCK, BLOCK + 1), (2 * BLOCK + 990, 2 * BLOCK + 5000), (5, 5), (9, 3), (0, 3 * BLOCK)]
)
def test_ranges_are_those_of_the_whole(store, big, start, end):
    entry = store.put_new("big", big)
    assert store.read_range(entry, start, end) == big[start:end]


def test_a_range_is_checked_by_the_blocks_that_it_touches(store, big):
    """A flipped byte in block 1 is refused for a range that touches block 1 and unnoticed by one that does not."""
    entry = store.put_new("big", big)
    store.overwrite("big", big[: BLOCK + 7] + bytes([big[BLOCK + 7] ^ 128]) + big[BLOCK + 8 :])
    assert store.read_range(entry, 0, BLOCK) == big[:BLOCK]
    with pytest.raises(IntegrityError, match=r"/big does not match its digest in block 1"):
        store.read_range(entry, 2 * BLOCK - 10, 2 * BLOCK)


def test_compare_and_swap_changes_only_what_it_saw(store):
    first = store.compare_and_swap("p", b"1", None)
    second = store.compare_and_swap("p", b"2", first)
    for stale in (first, None):
        with pytest.raises(Conflict, match="another writer was first"):
            store.compare_and_swap("p", b"3", stale)
    assert store.read_tagged("p") == (b"2", second)
    with pytest.raises(Conflict):
        store.compare_and_swap("missing", b"1", first)


def test_a_swap_whose_answer_was_lost_is_known_for_its_own(store):
    """The write went through, the reply did not: the second try meets its own bytes and is a success; another's bytes are a conflict."""
    etag = store.compare_and_swap("p", b"1", None)

    def lose(**about):
        raise ReadTimeoutError(endpoint_url="the reply is lost")

    store.client.meta.events.register("after-call.s3.PutObject", lose)  # the client is replaced after the failure, this hook with it
    second = store.compare_and_swap("p", b"2", etag)
    assert store.read_tagged("p") == (b"2", second)
    store.client.meta.events.register("after-call.s3.PutObject", lose)
    with pytest.raises(Conflict):
        store.compare_and_swap("p", b"3", etag)


def test_missing_objects_are_told_apart_from_failures(store):
    assert store.head("no") is None
    for read in (lambda: store.read("no"), lambda: store.entry("no"), lambda: list(store.stream("no"))):
        with pytest.raises(NotFound, match=rf"object {store.uri('no')} does not exist"):
            read()


def test_listing_is_complete_over_many_pages_and_odd_names(store, monkeypatch):
    """125 keys in pages of 10, with characters around which servers sort differently, neighbours of the prefix left out."""
    wanted = {f"l/{'a-' if n % 3 else 'a.'}{n}/x ü{n}" for n in range(125)}
    monkeypatch.setattr(objects, "PAGE", 10)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put_new(key, b""), wanted | {"l2/x", "k/x"}))
    found = [info.key for info in store.list("l/")]
    assert len(found) == len(set(found))
    assert set(found) == wanted
    assert store.delete(found) == 125
    assert list(store.list("l/")) == []
    assert store.head("l2/x") is not None


def test_caches_are_overwritten_and_nothing_else_is(store):
    store.put_cache("cache/x", b"1")
    store.put_cache("cache/x", b"2")
    assert store.read("cache/x") == b"2"
    with pytest.raises(ValueError, match="use put_new"):
        store.put_cache("datasets/x", b"1")


def test_the_clock_is_the_store_s(store):
    store.put_cache("cache/now", b"")
    modified = store.head("cache/now").modified
    assert abs(store.now() - modified) < timedelta(seconds=5)
    assert abs(store.now() - datetime.now(UTC)) < timedelta(seconds=5)


def test_a_link_reads_one_object_and_no_other(store):
    store.put_new("x.html", b"<p>")
    store.put_new("y.html", b"secret")
    link = store.presign("x.html", 60)
    with urllib.request.urlopen(link) as reply:
        assert reply.read() == b"<p>"
        assert reply.headers["Content-Type"] == "text/html"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(link.replace("x.html", "y.html"))


def _put_in_worker(store: Store, number: int) -> str:
    return store.put_new(f"w/{number}", b"same").sha256


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_store_travels_to_worker_processes(store, method):
    """Pickled without its client; workers connect on their own, whether spawned or forked from a process with open connections."""
    store.put_new("w/before", b"x")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        digests = list(pool.map(_put_in_worker, [store] * 3, range(3)))
    assert set(digests) == {hashlib.sha256(b"same").hexdigest()}
    assert {info.key for info in store.list("w/")} == {"w/before", "w/0", "w/1", "w/2"}


def test_threads_share_a_store(store):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        fresh = Store(store.settings)
        list(pool.map(lambda n: fresh.put_new(f"t/{n}", str(n).encode()), range(40)))
        assert sorted(pool.map(lambda n: int(fresh.read(f"t/{n}")), range(40))) == list(range(40))
    fresh.close()


def test_a_broken_connection_is_taken_up_where_it_broke(store, monkeypatch):
    """The body ends early twice; the bytes that come out are still those of the object."""
    data = noise(6, 5 * MIB + 3)
    store.put_new("x", data)
    get = store._objects.get
    breaks = []

    def fragile(key, how):
        found = get(key, how)
        if len(breaks) < 2:
            breaks.append(how)
            chunks = found["Body"].iter_chunks
            found["Body"].iter_chunks = lambda size: _broken(chunks(size), IncompleteReadError(actual_bytes=1, expected_bytes=2))
        return found

    monkeypatch.setattr(store._objects, "get", fragile)
    assert store.read("x") == data
    assert len(breaks) == 2


def _broken(chunks, error):
    yield next(chunks)
    raise error


@pytest.mark.parametrize("way", ["read", "download", "range"])
@pytest.mark.parametrize("turned", [2, 3])
def test_what_was_damaged_on_the_way_is_read_again(store, monkeypatch, tmp_path, way, turned):
    """A bit turned in the first two bodies: the bytes that come out are those of the object. In every body: refused, and no file is left."""
    data = noise(7, 2 * MIB + 3)
    entry = store.put_new("x", data)
    get, bodies = store._objects.get, []

    def damaged(key, how):
        found = get(key, how)
        bodies.append(how)
        if len(bodies) <= turned:
            chunks = found["Body"].iter_chunks
            found["Body"].iter_chunks = lambda size: (bytes([chunk[0] ^ 4]) + chunk[1:] for chunk in chunks(size))
        return found

    monkeypatch.setattr(store._objects, "get", damaged)

    def found() -> bytes:
        if way == "download":
            store.download("x", tmp_path / "x")
            return (tmp_path / "x").read_bytes()
        return store.read("x") if way == "read" else bytes(store.read_range(entry, 5, 2 * MIB))

    if turned == 2:
        assert found() == (data[5 : 2 * MIB] if way == "range" else data)
    else:
        with pytest.raises(IntegrityError, match="does not match its digest"):
            found()
        assert list(tmp_path.iterdir()) == []
    assert len(bodies) == 3


@pytest.mark.parametrize("size", [1000, 6 * MIB])
def test_what_arrives_damaged_is_sent_again(store, size):
    """A bit of the first body turns after it was signed, in one piece and in parts: the server refuses it, and what it holds in the end is what was meant."""
    parted = Store(store.settings.model_copy(update={"multipart_mb": 5}))
    data, turned = noise(8, size), []

    def turn(request, **_):
        if not turned and request.method == "PUT":
            body = request.body.read() if hasattr(request.body, "read") else request.body
            turned.append(len(body))
            request.body = bytes([body[0] ^ 1]) + body[1:]

    parted.client.meta.events.register("before-send.s3", turn)
    assert parted.put_new("x", data) == entry_of("x", data)
    assert turned
    assert store.read("x", sha256=hashlib.sha256(data).hexdigest()) == data


# What the user can get wrong: one line each


def test_a_remote_store_works_like_the_embedded_one(remote, store):
    with Store.open(remote) as other:
        assert not other.is_embedded
        assert other.put_new("x", b"1") == store.put_new("x", b"2")


def test_the_usual_variables_name_the_store(remote, store, monkeypatch):
    """AWS_ENDPOINT_URL_S3 before AWS_ENDPOINT_URL; keys from the variables. A pickled store keeps its address without them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", remote.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", remote.access_key.get_secret_value())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", remote.secret_key.get_secret_value())
    with Store.open(StoreSettings(bucket=remote.bucket, prefix=remote.prefix)) as opened:
        opened.put_new("v", b"v")
        travelled = pickle.loads(pickle.dumps(opened))
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
        assert travelled.read("v") == b"v"


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_nobody_at_the_address(remote):
    with pytest.raises(StoreUnreachable, match=r"the store at http://127\.0\.0\.1:9 does not answer .*check store\.endpoint") as caught:
        Store.open(remote.model_copy(update={"endpoint": "http://127.0.0.1:9"}))
    one_line(caught)
    assert caught.value.transient


@pytest.mark.parametrize("change", [{"secret_key": "wrong"}, {"access_key": "nobody"}])
def test_wrong_keys(remote, change):
    with pytest.raises(StoreDenied, match=r"refuses the credentials .*check store\.access_key and store\.secret_key") as caught:
        Store.open(StoreSettings.model_validate({**remote.model_dump(), **change}))
    assert remote.secret_key.get_secret_value() not in one_line(caught)
    assert not caught.value.transient


def test_half_a_pair_of_keys(remote):
    with pytest.raises(StoreError, match=r"store\.access_key and store\.secret_key go together"):
        Store.open(remote.model_copy(update={"secret_key": None}))


def test_no_keys_at_all(remote, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreDenied, match=r"no credentials for the store at .*set store\.access_key") as caught:
        Store.open(remote.model_copy(update={"access_key": None, "secret_key": None}))
    one_line(caught)


def test_a_missing_bucket_of_a_remote_store_is_not_made(remote):
    with pytest.raises(BucketMissing, match=r"bucket 'not-there' does not exist at .*create-bucket --bucket not-there.*or set store\.bucket") as caught:
        Store.open(remote.model_copy(update={"bucket": "not-there"}))
    one_line(caught)


@pytest.mark.parametrize("endpoint", ["localhost:9000", "not a url"])
def test_an_endpoint_that_is_no_url(remote, endpoint):
    with pytest.raises(StoreError, match=rf"{endpoint}") as caught:
        Store.open(remote.model_copy(update={"endpoint": endpoint}))
    one_line(caught)


def test_looking_writes_nothing(store):
    """A store that was opened to look refuses every write and leaves the bucket as it was."""
    before = {info.key for info in store.list("")}
    with Store.open(store.settings, read_only=True) as looking:
        assert looking.head("x") is None
        for write in (lambda: looking.put_new("x", b""), lambda: looking.delete(["x"]), lambda: looking.compare_and_swap("x", b"", None)):
            with pytest.raises(StoreError, match="opened to look"):
                write()
    assert {info.key for info in store.list("")} == before


def test_looking_into_a_bucket_that_was_never_made_makes_none(store):
    with Store.open(store.settings.model_copy(update={"bucket": "never-made"}), read_only=True) as looking:
        assert list(looking.list("")) == []
        assert looking.head("x") is None
        with pytest.raises(NotFound):
            looking.read("x")
    assert "never-made" not in [bucket["Name"] for bucket in store.client.list_buckets()["Buckets"]]


def test_looking_at_a_store_that_was_never_made_makes_none(tmp_path):
    with Store.open(StoreSettings(folder=tmp_path / "never"), read_only=True) as looking:
        assert list(looking.list("")) == []
        assert looking.head("x") is None
        with pytest.raises(NotFound, match="there is no store in"):
            looking.read("x")
    assert not (tmp_path / "never").exists()


def test_the_probe_is_remembered_in_the_bucket(store, monkeypatch):
    """The second opening costs one GET and writes nothing."""
    requests = []
    call = Objects.call
    monkeypatch.setattr(Objects, "call", lambda self, key, request: requests.append(key) or call(self, key, request))
    with Store.open(store.settings):
        pass
    assert requests == ["probe/conditional-writes.json"]
    assert [info.key for info in store.list("probe/")] == ["probe/conditional-writes.json"]


def test_many_threads_stop(store):
    """No thread is left behind by uploads in parts."""
    before = threading.active_count()
    Store(store.settings.model_copy(update={"multipart_mb": 5})).put_new("big", noise(7, 20 * MIB))
    assert threading.active_count() <= before


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=100), start=st.integers(-5, 110), end=st.integers(-5, 110))
def test_any_range_is_that_of_the_whole(store, data, start, end):
    """With blocks of 16 bytes: every range of every object equals the slice, whatever blocks it touches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry_module, "BLOCK", 16)
        patch.setattr(store_module, "BLOCK", 16)
        entry = store.put_new(f"r/{hashlib.sha256(data).hexdigest()}", data)
        assert len(entry.blocks) == -(-len(data) // 16)
        assert store.read_range(entry, start, end) == data[max(start, 0) : max(end, 0)]
