"""The stream limits of an HTTP/2 app are honoured: how many at a time, which it refused, and when a connection ends."""

import socket
import threading

import pytest

from mesh import ask, eventually
from mesh.apps import App
from mesh.http2 import DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PREFACE, RST_STREAM, SETTINGS, frame, next_frame
from mesh.rpc import Caller, Rpc

OK = b"\x88"  # :status 200, from HPACK's table
MAX_CONCURRENT_STREAMS, REFUSED_STREAM = 3, 7


class Frames(App):
    """An HTTP/2 app, frame by frame: `begin` at each connection, `request` at the end of each request."""

    def __init__(self, port):
        self.connections, self.requests, self.lock = 0, 0, threading.Lock()
        super().__init__(port)

    def serve(self, conn):
        with self.lock:
            self.connections += 1
        conn.sock.settimeout(None)
        conn.take(len(PREFACE))
        self.begin(conn)
        streams, conn.begun = 0, set()
        while got := next_frame(conn):
            kind, flags, stream, _ = got
            if kind == HEADERS:
                conn.begun.add(stream)
            if kind in (HEADERS, DATA) and flags & END_STREAM:
                conn.begun.discard(stream)
                streams += 1
                with self.lock:
                    self.requests += 1
                self.request(conn, stream, streams)

    def begin(self, conn):
        conn.send(frame(SETTINGS))

    def request(self, conn, stream, number):
        self.answer(conn, stream)

    def answer(self, conn, stream):
        conn.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, OK))


class Refuses(Frames):
    """Answers the first two requests of each connection and refuses the others."""

    def request(self, conn, stream, number):
        if number <= 2:
            self.answer(conn, stream)
        else:
            conn.send(frame(RST_STREAM, 0, stream, REFUSED_STREAM.to_bytes(4)))


class GoesAway(Frames):
    """Answers two requests of each connection or some more, says which was the last, and closes it."""

    def request(self, conn, stream, number):
        if number == 1 or any(earlier < stream for earlier in conn.begun):
            self.answer(conn, stream)
        elif not getattr(conn, "gone", False):
            conn.gone = True
            conn.send(frame(GOAWAY, 0, 0, stream.to_bytes(4) + bytes(4)))
            self.answer(conn, stream)
            conn.sock.shutdown(socket.SHUT_WR)


class Changes(Frames):
    """Allows one stream at a time, answers none until `open` says so, and then allows as many as are asked for."""

    def __init__(self, port):
        self.waits, self.allowed = [], 1
        super().__init__(port)

    def begin(self, conn):
        conn.send(frame(SETTINGS, 0, 0, MAX_CONCURRENT_STREAMS.to_bytes(2) + self.allowed.to_bytes(4)))

    def request(self, conn, stream, number):
        with self.lock:
            self.waits.append((conn, stream))

    def allow(self, streams):
        self.allowed = streams
        for conn in {conn for conn, _ in self.waits}:
            self.begin(conn)

    def open(self):
        for conn, stream in self.waits:
            self.answer(conn, stream)


def test_watchers_take_no_stream_from_the_next_call(mesh):
    """The app allows 4 streams on a connection: the fifth call goes over another."""
    server = mesh.service("server", app=lambda port: Rpc(port, streams=4), protocol="grpc")
    client = mesh.service("client", [server], app=None)
    caller = mesh.keep(Caller(client.upstreams[0].port))
    eventually(lambda: caller.code()[0].name == "OK")
    watchers = []
    for number in range(1, 13):
        watchers.append(caller.call("unary_unary", "Wait").future(b"", timeout=60))
        assert server.app.waiting.acquire(timeout=10), f"watcher {number} is served"
        assert caller.echo(timeout=10) == b"hello"


def all_answered(port, workers, method, body=None, count=40):
    requests = [workers.submit(ask, port, "/", method, body) for _ in range(count)]
    return [each.result().status for each in requests]


@pytest.mark.parametrize("app", [Refuses, GoesAway])
@pytest.mark.parametrize(("method", "body"), [("GET", None), ("POST", b"hello")])
def test_what_was_not_processed_is_sent_again(mesh, workers, app, method, body):
    server = mesh.service("server", app=app, protocol="http2")
    client = mesh.service("client", [server], app=None)
    port = client.upstreams[0].port
    eventually(lambda: ask(port).status == 200)
    for _ in range(6):
        assert ask(port, "/", method, body).status == 200
    assert all_answered(port, workers, method, body, 12) == [200] * 12


def test_changes_of_the_limit_are_followed(mesh, workers):
    server = mesh.service("server", app=Changes, protocol="http2", sidecar=None)
    client = mesh.service("client", [server], app=None)
    server.start("lictor", "-workers", "1")
    port, app = client.upstreams[0].port, server.app
    requests = [workers.submit(ask, port, within=60) for _ in range(3)]
    eventually(lambda: len(app.waits) == 3)
    assert app.connections == 3, "each connection takes one request"
    app.allow(10)
    eventually(lambda: requests.append(workers.submit(ask, port, within=60)) or len(app.waits) >= 20, every=0.2)
    assert app.connections == 3, "the connections that there are take more now"
    app.open()
    eventually(lambda: app.open() or all(each.done() for each in requests))
    assert {each.result().status for each in requests} == {200}


@pytest.mark.parametrize("protocol", ["http", "http2"])
def test_dials_to_an_app_that_accepts_nothing_do_not_queue(mesh, workers, protocol):
    server = mesh.service("server", app=None, protocol=protocol, proxy={"Config": {"local_connect_timeout_ms": 2000}})
    client = mesh.service("client", [server], app=None)
    deaf = mesh.keep(socket.socket())
    deaf.bind(("127.0.0.1", server.port))
    deaf.listen(0)
    # What fills the queue of the socket makes the kernel ignore the rest.
    for _ in range(4):
        filler = mesh.keep(socket.socket())
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.1", server.port))
    requests = [workers.submit(ask, client.upstreams[0].port, within=30) for _ in range(20)]
    assert {each.result(16).status for each in requests} == {503}


def test_the_request_timeout_includes_the_dial(mesh, workers):
    server = mesh.service("server", app=None, protocol="http", proxy={"Config": {"local_connect_timeout_ms": 60_000, "local_request_timeout_ms": 1000}})
    client = mesh.service("client", [server], app=None)
    deaf = mesh.keep(socket.socket())
    deaf.bind(("127.0.0.1", server.port))
    deaf.listen(0)
    for _ in range(4):
        filler = mesh.keep(socket.socket())
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.1", server.port))
    requests = [workers.submit(ask, client.upstreams[0].port, within=14) for _ in range(10)]
    assert {each.result(16).status for each in requests} == {504}
