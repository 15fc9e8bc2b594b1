"""Stores that ignore conditional writes are refused at first use, naming the condition. They speak S3 over real sockets."""

import threading
from collections.abc import Iterator
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from selfcascade.config import StoreSettings
from selfcascade.storage import ConditionalWritesUnsupported, Store, StoreError, StoreUnreachable


class Forgetful(BaseHTTPRequestHandler):
    """As much of S3 as the probe uses, honouring the conditions in ``server.honours`` ("none", "match", "parts")."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def refused(self, kinds: dict[str, str]) -> bool:
        held = self.server.objects.get(self.path.partition("?")[0])
        tag = held and f'"{md5(held).hexdigest()}"'
        none, match = self.headers.get("If-None-Match"), self.headers.get("If-Match")
        return (none is not None and kinds["none"] in self.server.honours and held is not None) or (
            match is not None and kinds["match"] in self.server.honours and match != tag
        )

    def do_PUT(self) -> None:
        data = self.body()
        if self.server.failing:
            self.reply(self.server.failing, b"<Error><Code>%s</Code></Error>" % (b"SlowDown" if self.server.failing != 400 else b"InvalidArgument"))
        elif "partNumber" in self.path:
            self.server.parts.append(data)
            self.reply(200, ETag='"part"')
        elif self.refused({"none": "none", "match": "match"}):
            self.reply(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        else:
            self.server.objects[self.path.partition("?")[0]] = data
            self.reply(200, ETag=f'"{md5(data).hexdigest()}"')

    def do_POST(self) -> None:
        data = self.body()
        path = self.path.partition("?")[0]
        if "uploads" in self.path:
            self.reply(200, b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")
        elif "delete" in self.path:
            self.reply(200, b"<DeleteResult/>")
        elif self.refused({"none": "parts", "match": "parts"}):
            self.reply(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        else:
            self.server.objects[path] = self.server.parts[-1] + data[:0]
            self.reply(200, b'<CompleteMultipartUploadResult><ETag>"x"</ETag></CompleteMultipartUploadResult>')

    def do_GET(self) -> None:
        held = self.server.objects.get(self.path.partition("?")[0])
        if held is None:
            self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self.reply(200, held, ETag=f'"{md5(held).hexdigest()}"')

    def do_HEAD(self) -> None:
        self.reply(200)

    def do_DELETE(self) -> None:
        self.reply(204)


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    made = ThreadingHTTPServer(("127.0.0.1", 0), Forgetful)
    made.objects, made.parts, made.honours, made.failing = {}, [], set(), 0
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def settings(server: ThreadingHTTPServer) -> StoreSettings:
    return StoreSettings(endpoint=f"http://127.0.0.1:{server.server_port}", access_key="a", secret_key="b", bucket="forgetful")


@pytest.mark.parametrize(
    ("honours", "condition"),
    [(set(), r"If-None-Match: \*,"), ({"none"}, "If-Match,"), ({"none", "match"}, r"If-None-Match: \* at the end of an upload in parts,")],
)
def test_a_bucket_that_ignores_a_condition_is_refused(server, honours, condition):
    server.honours = honours
    for _ in range(2):  # the answer of a refused bucket is not remembered
        with pytest.raises(ConditionalWritesUnsupported, match=f"bucket 'forgetful' ignores {condition} so two runs could overwrite each other") as caught:
            Store.open(settings(server))
        assert "\n" not in str(caught.value)
    assert not any("conditional-writes" in path for path in server.objects)


def test_a_bucket_that_honours_them_is_used_and_looking_needs_no_probe(server):
    server.honours = {"none", "match", "parts"}
    Store.open(settings(server), read_only=True).close()
    assert server.objects == {}
    Store.open(settings(server)).close()
    assert any("conditional-writes" in path for path in server.objects)


@pytest.mark.parametrize(("status", "error"), [(503, StoreUnreachable), (429, StoreUnreachable), (400, StoreError)])
def test_what_may_pass_is_told_apart(server, monkeypatch, status, error):
    """A busy server is a failure that may pass, so that tasks try again; a wrong request is not."""
    monkeypatch.setattr("selfcascade.storage.client.ATTEMPTS", 1)
    server.honours = {"none", "match", "parts"}
    with Store.open(settings(server)) as store:
        server.failing = status
        with pytest.raises(error) as caught:
            store.put_new("x", b"1")
    assert caught.value.transient == (status != 400)
