"""More than a request and a response: upgrades, streams, trailers, interim answers, bodies of any size."""

import base64
import hashlib
import os
import threading
import time

import pytest

from mesh import Browser, Web, eventually, mtls_connect, who

LARGE = 300 << 20
PIECE = os.urandom(1 << 20)


class Streams(Web):
    """Streams, upgrades and counts, by path. `ends` has the clean ends of upgraded connections."""

    def __init__(self, port, **how):
        self.ends = []
        super().__init__(port, **how)

    def answer(self, request):
        match request.path.split("?")[0]:
            case "/events":
                self._events(request)
            case "/socket":
                self._socket(request)
            case "/trailers":
                self._trailers(request)
            case "/down":
                self._down(request)
            case "/up":
                self._up(request)
            case _:
                super().answer(request)

    def _head(self, request, *headers, status=200):
        request.send_response_only(status)
        for name, value in headers:
            request.send_header(name, value)
        request.end_headers()

    def _events(self, request):
        self._head(request, ("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
        for number in range(3):
            piece = b"data: %d\n\n" % number
            request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            # The next one comes when the reader has this one.
            assert self.next.wait(20)
            self.next.clear()
        request.wfile.write(b"0\r\n\r\n")

    def _socket(self, request):
        accept = hashlib.sha1(request.headers["sec-websocket-key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        self._head(request, ("upgrade", "websocket"), ("connection", "Upgrade"), ("sec-websocket-accept", base64.b64encode(accept).decode()), status=101)
        request.close_connection = True
        while data := request.rfile.read1(65536):
            request.wfile.write(data)
        self.ends.append("eof")

    def _trailers(self, request):
        self._head(request, ("transfer-encoding", "chunked"), ("trailer", "x-sum"))
        request.wfile.write(b"5\r\nhello\r\n0\r\nx-sum: 42\r\n\r\n")

    def _down(self, request):
        self._head(request, ("content-length", str(LARGE)))
        for _ in range(LARGE // len(PIECE)):
            request.wfile.write(PIECE)

    def _up(self, request):
        left, digest = LARGE, hashlib.blake2b()
        while left:
            part = request.rfile.read(min(left, 1 << 20))
            left -= len(part)
            digest.update(part)
        self.say(request, digest.hexdigest().encode())


@pytest.fixture
def pair(mesh):
    server = mesh.web("server", app=Streams)
    client = mesh.web("client", [server])
    client.app.close()
    eventually(lambda: who(client.upstreams[0].port) == "")
    return server, client


def head(conn):
    """The head of an answer: its status line, and the rest of its lines in lower case."""
    lines = []
    while (line := conn.line().decode().strip()):
        lines.append(line)
    return lines[0], [line.lower() for line in lines[1:]]


def test_a_websocket_talks_both_ways(mesh, pair):
    _, client = pair
    with client.dial() as conn:
        conn.send(b"GET /socket HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                  b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        status, lines = head(conn)
        assert "101" in status and "upgrade: websocket" in lines and "sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in lines
        for _ in range(3):
            assert conn.ask(b"\x81\x85abcd" + b"hello") == b"\x81\x85abcdhello"
        assert conn.ask(PIECE[:100_000]) == PIECE[:100_000]


def test_an_open_websocket_ends_within_a_second_of_a_deny(mesh, pair):
    server, client = pair
    with client.dial() as conn:
        conn.send(b"GET /socket HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n")
        assert "101" in head(conn)[0]
        assert conn.ask(b"before") == b"before"
        mesh.deny(client, server)
        assert conn.end(2) == "fin"
    eventually(lambda: "eof" in server.app.ends, what="the app sees a clean end too")


def test_a_denied_websocket_ends_with_a_close_notify_at_the_public_listener(mesh, pair):
    server, _ = pair
    name = mesh.name("peer")
    with mtls_connect(server.public, mesh.agent.roots(), mesh.agent.leaf(name), mesh.agent.sni(server.name)) as conn:
        conn.send(b"GET /socket HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n")
        assert "101" in head(conn)[0]
        assert conn.ask(b"before") == b"before"
        mesh.deny(name, server)
        # Python's TLS raises at an end without close_notify.
        assert conn.end(2) == "fin"


def test_events_come_one_by_one(pair):
    server, client = pair
    server.app.next = threading.Event()
    with client.dial() as conn:
        conn.send(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert "200" in head(conn)[0]
        for number in range(3):
            assert conn.line() == b"9\r\n" and conn.take(11) == b"data: %d\n\n\r\n" % number
            server.app.next.set()
        assert conn.take(5) == b"0\r\n\r\n"


def test_trailers_pass_to_who_takes_them(pair):
    _, client = pair
    with client.dial() as conn:
        conn.send(b"GET /trailers HTTP/1.1\r\nHost: x\r\nTE: trailers\r\nConnection: TE\r\n\r\n")
        assert "200" in head(conn)[0]
        text = b""
        while not text.endswith(b"\r\n\r\n"):
            text += conn.line()
        assert text.startswith(b"5\r\nhello\r\n0\r\n") and b"x-sum: 42" in text.lower()


def test_a_body_waits_for_its_100_continue(pair):
    _, client = pair
    with client.dial() as conn:
        conn.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert "100" in head(conn)[0]
        conn.send(b"hello")
        status, lines = head(conn)
        assert "200" in status
        size = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))
        assert b'"body": "hello"' in conn.take(size)


def test_chunked_bodies_pass_and_keep_the_connection(pair):
    _, client = pair
    with Browser(client.upstreams[0].port) as browser:
        for _ in range(3):
            pieces = iter([b"one ", b"two ", b"three"])
            assert browser.ask("/", "POST", pieces).seen()["body"] == "one two three"


def test_head_and_statuses_without_a_body(pair):
    server, client = pair
    with Browser(client.upstreams[0].port) as browser:
        answer = browser.ask("/", "HEAD")
        assert answer.body == b"" and int(answer.header("content-length")) > 0
        server.app.answer = lambda request: (request.send_response_only(304), request.send_header("etag", '"x"'), request.end_headers())
        answer = browser.ask()
        assert (answer.status, answer.body, answer.header("etag")) == (304, b"", '"x"')
        del server.app.answer
        assert browser.ask().status == 200


def rss(process):
    with open(f"/proc/{process.pid}/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def bounded(server, client, work):
    """Runs `work`; neither sidecar may grow by more than a fraction of what passes."""
    before = [rss(each.process) for each in (server, client)]
    work()
    grown = [rss(each.process) - was for each, was in zip((server, client), before)]
    assert max(grown) < 24 << 20, grown


def test_a_large_answer_in_little_memory_although_the_reader_pauses(pair):
    server, client = pair

    def down():
        digest, left = hashlib.blake2b(), LARGE
        with client.dial() as conn:
            conn.send(b"GET /down HTTP/1.1\r\nHost: x\r\n\r\n")
            assert "200" in head(conn)[0]
            # What is not read stays with the app, once every buffer on the way is full.
            time.sleep(2)
            while left:
                part = conn.take(min(left, 1 << 20))
                assert part
                digest.update(part)
                left -= len(part)
        assert digest.digest() == expected()

    bounded(server, client, down)


def test_a_large_request_in_little_memory(pair):
    server, client = pair

    def up():
        with client.dial(within=60) as conn:
            conn.send(b"POST /up HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % LARGE)
            for _ in range(LARGE // len(PIECE)):
                conn.send(PIECE)
            assert "200" in head(conn)[0]
            assert conn.take(128).decode() == expected().hex()

    bounded(server, client, up)


def expected():
    digest = hashlib.blake2b()
    for _ in range(LARGE // len(PIECE)):
        digest.update(PIECE)
    return digest.digest()


def test_connect_is_refused(pair):
    _, client = pair
    with client.dial() as conn:
        conn.send(b"CONNECT example:80 HTTP/1.1\r\nHost: example:80\r\n\r\n")
        assert head(conn)[0].split()[1] in ("400", "403", "404", "405")
