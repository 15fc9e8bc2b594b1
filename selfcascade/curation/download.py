"""Downloads: pictures by HTTP, many at a time, politely, bounded in time and bytes, and never from inside the network that this machine is in."""

from __future__ import annotations

import asyncio
import random
import threading
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

from selfcascade.config import UrlsSource
from selfcascade.curation import addresses
from selfcascade.curation.addresses import AddressRefused
from selfcascade.curation.record import Rejected
from selfcascade.settings import SettingsError

try:
    import aiohttp
    from yarl import URL
except ImportError:
    raise SettingsError("source 'urls' needs the package aiohttp, which is not installed; install selfcascade[http]") from None

AHEAD = 2**28
"""Bytes of finished downloads that may wait for the decoder."""
LONGEST_WAIT = 60.0
"""Seconds that are waited at most between two tries, whatever ``Retry-After`` asks for."""


class Passing(Rejected):
    """A failure that may pass: it is worth another try."""

    def __init__(self, reason: str, *, wait: float | None = None, offline: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.offline = offline


class Downloads:
    """Downloads of one unit, begun in the order given and taken in any: ``with Downloads(urls, settings) as downloads: downloads.take(key)``.

    A thread runs them; at most :data:`AHEAD` bytes and one picture wait to be taken.
    """

    def __init__(self, urls: Mapping[str, str], settings: UrlsSource) -> None:
        self.settings = settings
        self._urls = dict(urls)
        self._results: dict[str, Future[bytes]] = {key: Future() for key in urls}
        self.unreached: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="downloads", daemon=True)
        self._hosts: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(settings.per_host))
        self._held = 0
        self._room = asyncio.Event()
        self._main: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join()
        self._loop.close()  # not by its thread: whoever takes the last picture still talks to it

    def take(self, key: str) -> bytes:
        """The content behind the URL of ``key``, once; waits for it.

        Raises:
            Rejected: it could not be had, for this reason.
        """
        data = self._results[key].result()
        del self._results[key]  # not before: a failure of all is told to whoever waits
        self._loop.call_soon_threadsafe(self._freed, len(data))
        return data

    def _stop(self) -> None:
        if self._main is not None:
            self._main.cancel()

    def _freed(self, count: int) -> None:
        self._held -= count
        self._room.set()

    def _run(self) -> None:
        try:
            self._main = self._loop.create_task(self._all())
            self._loop.run_until_complete(self._main)
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # what waits must not wait for ever
            for future in list(self._results.values()):
                if not future.done():
                    future.set_exception(error)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())

    async def _all(self) -> None:
        turns = asyncio.Semaphore(self.settings.concurrency)
        async with asyncio.TaskGroup() as group, session(self.settings) as client:
            running: set[asyncio.Task[None]] = set()
            for key, url in self._urls.items():
                await turns.acquire()
                while self._held > AHEAD:
                    self._room.clear()
                    await self._room.wait()
                task = group.create_task(self._one(client, self._results[key], url, turns))
                running.add(task)
                task.add_done_callback(running.discard)
            # The session closes when the block ends.
            await asyncio.gather(*running)

    async def _one(self, client: aiohttp.ClientSession, result: Future[bytes], url: str, turns: asyncio.Semaphore) -> None:
        try:
            data = await fetch(client, url, self.settings, self._hosts)
            self._held += len(data)
            result.set_result(data)
        except Rejected as reason:
            if isinstance(reason, Passing) and reason.offline:
                self.unreached.append(url)
            result.set_exception(reason)
        finally:
            turns.release()


def session(settings: UrlsSource) -> aiohttp.ClientSession:
    """A client that connects to public addresses alone, unless ``settings.allow_private``: it resolves names once, and checks what it connects to."""
    connector = aiohttp.TCPConnector(
        limit=settings.concurrency,
        limit_per_host=settings.per_host,
        resolver=None if settings.allow_private else _PublicResolver(),
        socket_factory=None if settings.allow_private else addresses.open_socket,
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_seconds, sock_read=settings.read_seconds)
    headers = {"User-Agent": settings.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    # No cookies, no proxy out of the environment (the check would see the proxy's address), no unpacking behind our back.
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)


async def fetch(client: aiohttp.ClientSession, url: str, settings: UrlsSource, hosts: Mapping[str, asyncio.Semaphore]) -> bytes:
    """The content behind ``url``, after as many tries as the settings allow.

    Raises:
        Rejected: it could not be had.
    """
    for number in range(settings.retries + 1):
        try:
            async with asyncio.timeout(settings.total_seconds):
                return await _follow(client, url, settings, hosts)
        except TimeoutError:
            failure = Passing(f"download: more than {settings.total_seconds:g} seconds in all")
        except Passing as passing:
            failure = passing
        if number < settings.retries:
            # Full jitter: those that failed together do not come back together.
            wait = random.uniform(0.5, 1) * settings.backoff_seconds * 2**number
            await asyncio.sleep(min(LONGEST_WAIT, max(wait, failure.wait or 0)))
    raise Passing(f"{failure.reason} ({settings.retries + 1} tries)", offline=failure.offline)


async def _follow(client: aiohttp.ClientSession, address: str, settings: UrlsSource, hosts: Mapping[str, asyncio.Semaphore]) -> bytes:
    url = checked(address)
    for _ in range(settings.redirects + 1):
        async with hosts[url.host or ""]:
            moved, data = await _get(client, url, settings)
        if moved is None:
            return data
        try:
            url = checked(str(url.join(URL(moved))))
        except ValueError:
            raise Rejected("redirect: it leads to what is no URL") from None
    raise Rejected(f"redirect: more than {settings.redirects} in a row")


async def _get(client: aiohttp.ClientSession, url: URL, settings: UrlsSource) -> tuple[str | None, bytes]:
    """Where it moved to, or the content."""
    try:
        async with _request(client, url) as reply:
            if reply.status in (301, 302, 303, 307, 308) and "Location" in reply.headers:
                return reply.headers["Location"], b""
            if reply.status == 429 or reply.status >= 500 or reply.status == 408:
                raise Passing(f"download: status {reply.status}", wait=_seconds(reply.headers.get("Retry-After")))
            if reply.status != 200:
                raise Rejected(f"download: status {reply.status}")
            if directive := disallowed(reply.headers.getall("X-Robots-Tag", []), settings.robots, settings.robots_token):
                raise Rejected(f"robots: X-Robots-Tag says {directive}")
            return None, await _read(reply, settings.max_mb * 2**20)
    except AddressRefused as error:
        raise Rejected(f"address: {error}") from None
    except aiohttp.ClientConnectorError as error:
        if isinstance(error.os_error, AddressRefused):
            raise Rejected(f"address: {error.os_error}") from None
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            raise Rejected("download: the certificate is not valid") from None
        named = isinstance(error, aiohttp.ClientConnectorDNSError)
        raise Passing("download: the name of the host cannot be resolved" if named else "download: no connection", offline=True) from None
    except aiohttp.InvalidURL:
        raise Rejected("address: the host is not written as a name or a plain address") from None
    except TimeoutError:
        raise Passing("download: the server does not answer in time") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Passing(f"download: the connection broke ({type(error).__name__})") from None


def _request(client: aiohttp.ClientSession, url: URL) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
    return client.get(url, allow_redirects=False)


async def _read(reply: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, unpacked where the server packed it although it was not asked to; neither form may exceed ``limit`` bytes."""
    if (reply.content_length or 0) > limit:
        raise Rejected(f"too large: {reply.content_length} bytes, source.max_mb allows {limit}")
    packing = reply.headers.get("Content-Encoding", "identity").strip().lower()
    if packing not in ("identity", "gzip", "x-gzip", "deflate", ""):
        raise Rejected(f"download: the body is packed as {packing[:20]}, which was not asked for")
    unpacked = None if packing in ("identity", "") else zlib.decompressobj(wbits=47 if "gzip" in packing else 15)
    parts: list[bytes] = []
    packed = total = 0
    async for chunk in reply.content.iter_chunked(2**16):
        packed += len(chunk)
        if unpacked is not None:
            try:
                chunk = unpacked.decompress(chunk, limit + 1 - total)
            except zlib.error:
                raise Rejected("download: the body cannot be unpacked") from None
        parts.append(chunk)
        total += len(chunk)
        if max(packed, total) > limit:
            raise Rejected(f"too large: more than {limit} bytes, source.max_mb")
    return b"".join(parts)


def checked(address: str) -> URL:
    """``address`` as a URL that may be asked for.

    Raises:
        Rejected: it is none, not of HTTP, or holds a user's name.
    """
    try:
        url = URL(address)
        known = url.scheme in ("http", "https") and url.host and url.port
    except ValueError:
        known = False
    if not known:
        raise Rejected("URL: it is not one of http or https with a host")
    if url.user is not None or url.password is not None:
        raise Rejected("URL: it holds a user or a password, which shall not be stored")
    return url


def disallowed(values: Sequence[str], directives: Sequence[str], token: str) -> str | None:
    """The first directive out of ``directives`` in ``X-Robots-Tag`` headers that are meant for everybody or for ``token``; None if there is none."""
    for value in values:
        agent, colon, rest = value.partition(":")
        if colon and agent.strip().lower() != token.lower():
            continue
        for directive in (rest if colon else value).split(","):
            if directive.strip().lower() in directives:
                return directive.strip().lower()
    return None


def _seconds(value: str | None) -> float | None:
    """``Retry-After``: seconds, or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value) if value.strip().isdigit() else (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


class _PublicResolver(aiohttp.ThreadedResolver):
    """Resolves, and refuses a host that has but one address that is not public."""

    async def resolve(self, host: str, *arguments: Any, **options: Any) -> Any:
        found = await super().resolve(host, *arguments, **options)
        for result in found:
            if reason := addresses.refusal(result["host"]):
                raise AddressRefused(f"{host} is {reason}")
        return found
