"""A proxy before an object store that spoils a share of the requests: late, refused, cut off in the middle, or with one bit turned."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web
from yarl import URL

FAULTS = ("delayed", "refused", "cut before", "cut after", "corrupted on the way in", "corrupted on the way out")
HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}
"""Headers that belong to one connection."""
DELAY = 1.5
"""Seconds."""


class FaultyProxy:
    """Listens on loopback while the context is open, in a thread of its own.

    ``cut before``: the request is not passed on and the connection closed. ``cut after``: it is passed on, and half of the answer's bytes come back.
    ``corrupted``: one bit of an object's bytes, of the request or the answer. A fault that a request cannot have (a GET has no body) is drawn again.

    Args:
        target: URL of the store.
        share: of the requests that are spoilt, 0 to 1.
        seed: of the draws.
    """

    def __init__(self, target: str, *, share: float, seed: int) -> None:
        self.target, self.share = target, share
        self.requests = 0
        self.spoilt: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), name="faulty-proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def _serve(self) -> None:
        async with aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=300)) as self._session:
            application = web.Application(client_max_size=2**30)
            application.router.add_route("*", "/{path:.*}", self._pass)
            runner = web.AppRunner(application, handler_cancellation=True)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
            self._ready.set()
            await self._end.wait()
            await runner.cleanup()

    def _drawn(self, method: str, *, has_body: bool, names_object: bool) -> str | None:
        self.requests += 1
        if self._random.random() >= self.share:
            return None
        while True:
            fault = self._random.choice(FAULTS)
            if (fault == "corrupted on the way in" and not (has_body and method == "PUT")) or (
                fault == "corrupted on the way out" and not (names_object and method == "GET")
            ):
                continue
            self.spoilt[fault] += 1
            return fault

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        # An object is bucket/key; a request with a query lists, or sends parts.
        fault = self._drawn(request.method, has_body=bool(body), names_object=request.path.strip("/").count("/") > 0 and "list-type" not in request.query)
        if fault == "delayed":
            await asyncio.sleep(DELAY)
        if fault == "refused":
            text = "<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            return web.Response(status=503, text=text, content_type="application/xml")
        if fault == "cut before":
            return self._cut(request)
        if fault == "corrupted on the way in":
            body = self._turned(body)
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP | {"expect"}]
        url = URL(self.target + request.raw_path, encoded=True)
        async with self._session.request(request.method, url, headers=headers, data=body or None, allow_redirects=False) as answer:
            data = await answer.read()
            kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in HOP]
            if fault == "corrupted on the way out" and answer.status in (200, 206):
                data = self._turned(data)
            response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=kept)
            if request.method != "HEAD":
                response.content_length = len(data)
            await response.prepare(request)
            if fault == "cut after":
                await response.write(data[: len(data) // 2])
                return self._cut(request, response)
            if request.method != "HEAD":
                await response.write(data)
            await response.write_eof()
            return response

    def _turned(self, data: bytes) -> bytes:
        if not data:
            return data
        at = self._random.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << self._random.randrange(8)]) + data[at + 1 :]

    def _cut(self, request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return response or web.Response()
