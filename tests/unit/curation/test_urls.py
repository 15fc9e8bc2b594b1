"""The ``urls`` source against a real HTTP server on this machine: polite, bounded, and never led into the network it runs in."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import threading
import time
from collections import Counter
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfcascade.config import UrlsSource
from selfcascade.curation import addresses, download
from selfcascade.curation.addresses import refusal
from selfcascade.curation.curate import curate, plan_curation
from selfcascade.curation.download import Downloads, disallowed
from selfcascade.curation.reading import read_samples, read_table
from selfcascade.curation.record import Rejected
from selfcascade.settings import SettingsError
from selfcascade.storage import resolve

web = pytest.importorskip("aiohttp.web")


class Server:
    """Answers by path; counts what it was asked, and how much at a time."""

    def __init__(self, picture: bytes) -> None:
        self.picture = picture
        self.asked: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.now = self.most = 0
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self.ready.wait(30)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)

        async def begin() -> None:
            application = web.Application()
            application.router.add_get("/{name:.*}", self._answer)
            runner = web.AppRunner(application)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]
            self.ready.set()

        self.loop.run_until_complete(begin())
        self.loop.run_forever()

    async def _answer(self, request):
        name = request.match_info["name"]
        self.asked[name] += 1
        self.times.setdefault(name, []).append(time.monotonic())
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await self._reply(name, request)
        finally:
            self.now -= 1

    async def _reply(self, name, request):
        kind, _, rest = name.partition("/")
        match kind:
            case "status":
                return web.Response(status=int(rest))
            case "passes":  # the second time it is well
                wait = {"Retry-After": "1"} if rest == "429" else {}
                return web.Response(body=self.picture) if self.asked[name] > 1 else web.Response(status=int(rest), headers=wait)
            case "to":
                return web.Response(status=302, headers={"Location": request.query["url"]})
            case "loop":
                return web.Response(status=302, headers={"Location": f"/loop/{int(rest) + 1}"})
            case "robots":
                return web.Response(body=self.picture, headers={"X-Robots-Tag": request.query["tag"]})
            case "gzip":
                return web.Response(body=gzip.compress(self.picture), headers={"Content-Encoding": "gzip"})
            case "bomb":
                return web.Response(body=gzip.compress(b"\0" * 2**22), headers={"Content-Encoding": "gzip"})
            case "endless":
                reply = web.StreamResponse()
                await reply.prepare(request)
                with suppress(ConnectionError):
                    for _ in range(64):
                        await reply.write(b"x" * 2**16)
                return reply
            case "drip":
                reply = web.StreamResponse()
                await reply.prepare(request)
                with suppress(ConnectionError):
                    for _ in range(100):
                        await reply.write(b"x")
                        await asyncio.sleep(0.1)
                return reply
            case "silent":
                await asyncio.sleep(10)
            case "cut":
                request.transport.close()
            case "slow":
                await asyncio.sleep(0.1)
        return web.Response(body=self.picture, content_type="text/html")


@pytest.fixture
def server(pictures):
    made = Server(pictures.encode(pictures.noise(seed=3), "JPEG"))
    yield made
    made.close()


def source(path="", **changes) -> UrlsSource:
    return UrlsSource(**({"path": str(path), "allow_private": True, "backoff_seconds": 0.01, "max_mb": 1} | changes))


def outcome(url: str, **changes) -> bytes | str:
    """The content, or the reason."""
    with Downloads({"k": url}, source(**changes)) as downloads:
        try:
            return downloads.take("k")
        except Rejected as rejection:
            return rejection.reason


@pytest.mark.parametrize(
    ("path", "expected", "asked"),
    [
        ("status/404", "download: status 404", 1),
        ("status/503", "download: status 503 (3 tries)", 3),
        ("cut/1", "download: the connection broke", 3),
        ("silent/1", "download: the server does not answer in time (3 tries)", 3),
        ("drip/1", "download: more than 0.6 seconds in all (3 tries)", 3),
        ("endless/1", "too large: more than 1048576 bytes", 1),
        ("bomb/1", "too large: more than 1048576 bytes", 1),
        ("loop/0", "redirect: more than 5 in a row", 1),
        ("robots/1?tag=noai", "robots: X-Robots-Tag says noai", 1),
        ("robots/2?tag=selfcascade: noindex", "robots: X-Robots-Tag says noindex", 1),
    ],
)
def test_what_cannot_be_had_has_a_reason_in_bounded_time(server, path, expected, asked):
    limits = {"silent/1": {"read_seconds": 0.5}, "drip/1": {"total_seconds": 0.6}}.get(path, {})  # elsewhere those of a loaded machine
    reason = outcome(server.url(path), retries=2, **limits)
    assert isinstance(reason, str)
    assert reason.startswith(expected)
    assert server.asked[path.partition("?")[0]] in (asked, asked * 2 if path.startswith("cut") else asked)


@pytest.mark.parametrize("path", ["passes/503", "passes/429", "gzip/1", "robots/1?tag=otherbot: noai", "robots/2?tag=all"])
def test_what_passes_or_is_meant_for_others_is_had(server, path):
    """Retry-After is waited for, though the backoff is a hundredth of it."""
    assert outcome(server.url(path)) == server.picture
    if path == "passes/429":
        first, second = server.times[path]
        assert second - first >= 0.95


def test_robots_are_not_asked_where_the_setting_says_so(server):
    assert outcome(server.url("robots/1?tag=noai"), robots=()) == server.picture


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["noai"], "noai"),
        (["index, NoImageAI"], "noimageai"),
        (["me: noai"], "noai"),
        (["you: noai"], None),
        (["all", "you: x", "noindex"], "noindex"),
        ([], None),
    ],
)
def test_robots_directives_are_those_of_everybody_and_of_our_name(values, found):
    assert disallowed(values, ("noai", "noimageai", "noindex"), "ME") == found


def test_one_host_is_asked_no_more_at_a_time_than_allowed(server):
    urls = {str(number): server.url(f"slow/{number}") for number in range(20)}
    with Downloads(urls, source(per_host=3)) as downloads:
        assert all(downloads.take(key) == server.picture for key in urls)
    assert server.most == 3


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2001:0:7f00:1::",
        "2001:db8::1",
        "localhost",
    ],
)
def test_what_is_not_public_is_refused(address):
    assert refusal(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "8.8.8.8", "2606:4700:4700::1111", "2002:808:808::1", "64:ff9b::808:808"])
def test_what_is_public_is_not(address):
    assert refusal(address) is None


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0"]
)
def test_no_way_of_writing_this_machine_reaches_it(server, host):
    reason = outcome(f"http://{host}:{server.port}/picture", allow_private=False, retries=0)
    assert isinstance(reason, str)
    # What the resolver does not know as an address is unknown; nothing else may keep it away than the guard or that.
    assert reason.startswith(("address:", "URL:", "download: the name of the host cannot be resolved"))
    assert not server.asked


def test_a_name_of_a_private_address_is_refused_and_what_is_connected_to_is_checked_again(server, monkeypatch):
    """Once by the resolver; where that lets it pass, as one would that answers otherwise the second time, by the socket."""
    asked = outcome(f"http://localhost:{server.port}/x", allow_private=False)
    assert str(asked).startswith("address: localhost is ")
    monkeypatch.setattr(download, "_PublicResolver", download.aiohttp.ThreadedResolver)
    asked = outcome(f"http://localhost:{server.port}/x", allow_private=False)
    assert str(asked).startswith("address: ")
    assert not server.asked


def test_a_redirect_is_checked_like_the_url(server, monkeypatch):
    """The server's own address counts as public here, that of the target does not."""
    monkeypatch.setattr(addresses, "refusal", lambda address: None if address == "127.0.0.1" else refusal(address))
    for target in ("http://127.0.0.2/", "http://169.254.169.254/latest/meta-data", "http://[::1]/"):
        assert str(outcome(server.url(f"to/1?url={target}"), allow_private=False)).startswith("address: ")
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/", "//user:word@127.0.0.1/"):
        assert str(outcome(server.url(f"to/1?url={target}"), allow_private=False)).startswith("URL: ")
    assert outcome(server.url("to/1?url=/picture"), allow_private=False) == server.picture


def table(folder, kind, rows):
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        comma = "\t" if kind == "tsv" else ","
        path.write_text("\n".join(comma.join(map(str, line)) for line in [list(rows[0]), *(row.values() for row in rows)]) + "\n")
    return path


def test_every_kind_of_table_gives_the_same_listing_in_any_order(pictures, store, tmp_path):
    rows = [{"url": f"http://example.com/{number}.jpg", "caption": f"thing {number}", "licence": "CC0"} for number in range(50)]
    rows.append(rows[7] | {"caption": "a later caption"})
    versions = set()
    for number, kind in enumerate(("parquet", "csv", "tsv", "jsonl")):
        found = source(table(tmp_path, kind, rows[number:] + rows[:number]), carry=("licence",))
        versions.add(plan_curation(pictures.settings(source=found), store).listing)
    store.put_cache("cache/raw/table.jsonl", (tmp_path / "table.jsonl").read_bytes())
    for place in (store.uri("cache/raw/table.jsonl"), store.uri("cache/raw")):
        versions.add(plan_curation(pictures.settings(source=source(place, carry=("licence",))), store).listing)
    assert len(versions) == 1


def test_a_table_of_urls_becomes_a_dataset(pictures, store, server, tmp_path):
    """Kept or with a reason, each row is there; what is carried is in shard and table; the same URL gives one picture."""
    good = hashlib.sha256(server.picture).hexdigest()
    rows = [
        {"url": server.url("a"), "caption": "one", "sum": good, "licence": "CC0"},
        {"url": server.url("a"), "caption": "two", "sum": None, "licence": "CC0"},
        {"url": server.url("b"), "caption": "three", "sum": "0" * 64, "licence": None},
        {"url": server.url("status/404"), "caption": "four", "sum": None, "licence": "CC0"},
        {"url": "ftp://example.com/x.png", "caption": "five", "sum": None, "licence": "CC0"},
        {"url": "http://me:word@example.com/x.png", "caption": "six", "sum": None, "licence": "CC0"},
        {"url": None, "caption": "seven", "sum": None, "licence": "CC0"},
    ]
    path = table(tmp_path, "parquet", rows)
    settings = pictures.settings(source=source(path, sha256="sum", carry=("licence",), retries=0), filters=pictures.settings().filters)
    ref = curate(settings, store)
    found = {row["caption"]: row for row in read_table(resolve(store, str(ref))).to_pylist()}
    kept = [sample.caption for sample in read_samples(resolve(store, str(ref)))]
    assert kept == ["one"] or kept == ["two"]
    reasons = {caption: row["reason"] for caption, row in found.items()}
    key = hashlib.sha256(server.url("a").encode()).hexdigest()[:32]
    assert {reasons["one"], reasons["two"]} == {None, f"duplicate of {key}"}
    assert reasons["three"].startswith("other content")
    assert reasons["four"] == "download: status 404"
    assert reasons["five"].startswith("URL: it is not one of http")
    assert reasons["six"].startswith("URL: it holds a user")
    assert reasons["seven"] == "URL: none is given"
    everything = b"".join(store.read(info.key) for info in store.list(ref.prefix))
    assert b"me:word" not in everything
    shard = store.read(f"{ref.prefix}/00000.tar")
    assert b'"extra":{"licence":"CC0"}' in shard


def test_a_table_that_cannot_be_read_is_one_clear_line(pictures, store, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    (tmp_path / "b.jsonl").write_text('{"url": "http://x/"}\nnot json\n')
    (tmp_path / "c.csv").write_text("link,caption\nhttp://x/,a\n")
    for name, complaint in (
        ("a.parquet", r"a\.parquet cannot be read as parquet"),
        ("b.jsonl", r"b\.jsonl line 2 is not a JSON object"),
        ("c.csv", r"c\.csv has no column 'url'; it has link, caption"),
        ("d.csv", r"d\.csv does not exist"),
    ):
        with pytest.raises(SettingsError, match=complaint):
            plan_curation(pictures.settings(source=source(tmp_path / name)), store)


def test_no_copy_is_kept_of_a_picture_whose_server_forbids_it(server, pictures, store, tmp_path):
    """It is not even decoded; the same picture where nothing forbids it is rejected as blurred, and an example of that."""
    rows = [{"url": server.url(f"robots/{number}?tag={tag}"), "caption": f"thing {number}"} for number, tag in enumerate(["noai", "all"])]
    asked = pictures.settings(source=source(table(tmp_path, "jsonl", rows)), filters={"min_side": 24, "min_sharpness": 1e9})
    with pytest.raises(SettingsError, match="no picture"):
        curate(asked, store)
    (key,) = (info.key for info in store.list("datasets/") if info.key.endswith(".parquet"))
    found = {row["reason"].partition(":")[0]: row["thumbnail"] for row in pq.read_table(io.BytesIO(store.read(key))).to_pylist()}
    assert set(found) == {"robots", "blurred"}
    assert found["robots"] is None
    assert found["blurred"]
