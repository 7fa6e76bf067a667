"""Transfers with progress may take any time, and stalled ones end, whichever side stalls: with default settings and others."""

import contextlib
import struct
import threading
import time

import grpc
import pytest

from mesh import Browser, Caller, Rpc, Web, ask, dial, eventually, mtls_connect
from mesh.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, PSEUDO, RST_STREAM, WINDOW_UPDATE, Http2, block, frame
from mesh.identity import client_context
from mesh.ports import is_listening

# Far beyond any limit that is meant here, for a busy machine.
LONG = 90
POST = block([(":method", "POST"), *PSEUDO[1:]])
# Nothing of a body may be sent to whoever says this.
NO_WINDOW = struct.pack(">HI", 4, 0)
PIECE = b"10000\r\n" + bytes(65536) + b"\r\n"


class Slow(Web):
    """Answers never, or without an end, by path."""

    def __init__(self, port, **how):
        self.over = threading.Event()
        super().__init__(port, **how)

    def answer(self, request):
        match request.path:
            case "/never":
                self.take(request)
                self.over.wait(LONG)
            case "/endless":
                self._endless(request)
            case _:
                super().answer(request)

    def _endless(self, request):
        request.send_response_only(200)
        request.send_header("transfer-encoding", "chunked")
        request.end_headers()
        self._count(1)
        try:
            while not self.over.is_set():
                request.wfile.write(PIECE)
        finally:
            self._count(-1)

    def close(self):
        self.over.set()
        super().close()


def each_second(what, seconds):
    for _ in range(seconds):
        yield what
        time.sleep(1)


def http1_upload(port, seconds, path="/"):
    began = time.monotonic()
    with Browser(port, LONG) as browser:
        answer = browser.ask(path, "POST", each_second(b"x", seconds))
    return answer.status, answer.seen()["body"] if answer.status == 200 else "", time.monotonic() - began


def http2_upload(connection, seconds):
    with connection:
        connection.send(frame(HEADERS, END_HEADERS, 1, POST))
        for piece in each_second(b"x", seconds):
            connection.send(frame(DATA, 0, 1, piece))
        kind, status, body = connection.send(frame(DATA, END_STREAM, 1)).outcome()
        return kind, status, b'"body": "' + b"x" * seconds + b'"' in body


def client_streaming(port, seconds):
    with Caller(port) as caller:
        return caller.call("stream_unary", "Sum")(each_second(b"1", seconds), timeout=LONG)


def bidirectional(port, seconds):
    with Caller(port) as caller:
        return list(caller.call("stream_stream", "Chat")(each_second(b"hello", seconds), timeout=LONG))


def stalled_call(port):
    began = time.monotonic()
    with Caller(port) as caller, pytest.raises(grpc.RpcError) as error:
        caller.call("unary_unary", "Wait")(b"", timeout=LONG)
    return error.value.code(), time.monotonic() - began


def direct(mesh, server, client):
    """HTTP/2 with the public listener itself, as the client."""
    context = client_context(mesh.agent.roots(), mesh.agent.leaf(client.name))
    context.set_alpn_protocols(["h2"])
    return mtls_connect(server.public, None, context=context, sni=mesh.agent.sni(server.name), within=LONG)


def test_with_default_settings_what_goes_on_lives_and_what_stands_still_ends(mesh, workers):
    web, rpc = mesh.web("web", app=Slow), mesh.service("rpc", app=Rpc, protocol="grpc")
    client = mesh.service("client", [web, rpc], app=None)
    to_web, to_rpc = (upstream.port for upstream in client.upstreams)
    eventually(lambda: ask(to_web).status == 200)
    with Caller(to_rpc) as caller:
        eventually(lambda: caller.code()[0] == grpc.StatusCode.OK)
    # More than the 15 s that an answer may take.
    uploads = [workers.submit(http1_upload, to_web, 20),
               workers.submit(http2_upload, Http2(dial(to_web, LONG), LONG), 20),
               workers.submit(http2_upload, Http2(direct(mesh, web, client), LONG), 20)]
    calls = [workers.submit(client_streaming, to_rpc, 18), workers.submit(bidirectional, to_rpc, 18)]
    stalled, stalled_later, stalled_rpc = (workers.submit(http1_upload, to_web, 0, "/never"), workers.submit(http1_upload, to_web, 6, "/never"),
                                           workers.submit(stalled_call, to_rpc))
    status, body, took = uploads[0].result(LONG)
    assert (status, body) == (200, "x" * 20) and took > 19
    assert [upload.result(LONG) for upload in uploads[1:]] == [("answer", 200, True)] * 2
    assert calls[0].result(LONG) == b"18" and calls[1].result(LONG) == [b"you said hello"] * 18
    for one, least in ((stalled, 14.5), (stalled_later, 20.5)):
        status, _, took = one.result(LONG)
        # Counted from when the request was complete.
        assert status == 504 and least < took < LONG
    code, took = stalled_rpc.result(LONG)
    assert code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE) and 14.5 < took < LONG


@pytest.fixture
def ways(mesh):
    """Connections to each kind of listener that leads to a `Slow` app: with the app, and the limit for an answer in ms if there is one."""
    def make(limit=None):
        exposed, exposed_endless = mesh.ports.take(), mesh.ports.take()
        config = {"protocol": "http", **({} if limit is None else {"local_request_timeout_ms": limit})}
        server = mesh.service("server", app=Slow, protocol="http", sidecar=None, proxy={"Config": config})
        paths = [{"Path": path, "LocalPathPort": server.port, "ListenerPort": port} for path, port in (("/", exposed), ("/endless", exposed_endless))]
        server.proxy["Expose"] = {"Paths": paths}
        server.register().start()
        client = mesh.service("client", [server], app=None)
        eventually(lambda: is_listening(exposed_endless) and ask(client.upstreams[0].port).status == 200)
        public = lambda alpn, path="/": mtls_connect(server.public, None, context=context(alpn), sni=mesh.agent.sni(server.name), within=LONG)
        def context(alpn):
            made = client_context(mesh.agent.roots(), mesh.agent.leaf(client.name))
            made.set_alpn_protocols([alpn])
            return made
        return server, {
            "public listener": public,
            "upstream listener": lambda *_: dial(client.upstreams[0].port, LONG),
            "exposed listener": lambda _, path="/": dial(exposed if path == "/" else exposed_endless, LONG),
        }
    return make


def is_reset(connection):
    """Whether stream 1 is reset, or the connection ends."""
    with contextlib.suppress(OSError):
        while got := connection.next():
            if got[0] == RST_STREAM and got[2] == 1:
                return True
    return True


def breaks_off(conn):
    """Reads on after the sidecar had its time: whether the answer ends, and without its last chunk."""
    last = b""
    with contextlib.suppress(OSError):
        while part := conn.sock.recv(1 << 20):
            last = (last + part)[-5:]
    return last != b"0\r\n\r\n"


def test_a_client_that_never_reads_gives_the_apps_connection_back(ways):
    server, listeners = ways(limit=2000)
    for name, connect in listeners.items():
        with Http2(connect("h2", "/endless"), LONG, NO_WINDOW) as http2, connect("http/1.1", "/endless") as http1:
            http2.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block([*PSEUDO[:2], (":path", "/endless"), PSEUDO[3]])))
            http1.send(b"GET /endless HTTP/1.1\r\nHost: shop\r\n\r\n")
            eventually(lambda: server.app.waiting == 2, what=f"both requests at the {name} are at the app")
            eventually(lambda: server.app.waiting == 0, LONG, f"the app is let go of by those that came to the {name}")
            assert is_reset(http2) and breaks_off(http1), name


def test_an_answer_is_not_kept_for_who_takes_only_its_beginning(ways):
    """Small as it is, it is held by the sidecar until the client has made room for all of it, or its time is over."""
    _, listeners = ways(limit=2000)
    with contextlib.ExitStack() as stack:
        connections = {name: stack.enter_context(Http2(connect("h2"), LONG, NO_WINDOW)) for name, connect in listeners.items()}
        for connection in connections.values():
            connection.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block(PSEUDO)), frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)))
        for name, connection in connections.items():
            kinds = []
            while not kinds or kinds[-1] != RST_STREAM:
                kind, _, stream, _ = connection.next()
                kinds.append(kind if stream == 1 else None)
            assert DATA in kinds, name


def trickles_head(conn, head):
    """Says a head a byte a second; how long that is borne."""
    began = time.monotonic()
    for byte in head:
        with contextlib.suppress(OSError):
            conn.send(bytes([byte]))
        if conn.end(within=1) != "open":
            break
    return time.monotonic() - began


def trickles_body(conn, seconds=20):
    conn.send(b"POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: %d\r\n\r\n" % seconds)
    for piece in each_second(b"x", seconds):
        conn.send(piece)
    conn.sock.settimeout(LONG)
    return b" 200 " in conn.line()


def takes_little(connection):
    """Takes an answer without an end a byte a second; how long that goes on, and how much came."""
    began, taken, over = time.monotonic(), 0, threading.Event()
    connection.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block([*PSEUDO[:2], (":path", "/endless"), PSEUDO[3]])))

    def more():
        while not over.wait(1):
            connection.send(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)))
    threading.Thread(target=more, daemon=True).start()
    try:
        while (got := connection.next()) and got[0] != RST_STREAM:
            taken += len(got[3]) if got[0] == DATA else 0
    except OSError:
        pass
    finally:
        over.set()
    return time.monotonic() - began, taken


def test_a_trickle_of_a_head_ends_one_of_a_body_goes_on_and_an_answer_has_its_time(ways, workers):
    _, listeners = ways()
    http1_head = b"GET / HTTP/1.1\r\nHost: shop\r\nX-Slow: " + b"x" * LONG
    # The whole preface at once, then a header block of 200 bytes.
    http2_head = frame(HEADERS, END_HEADERS | END_STREAM, 1, block([*PSEUDO, ("x-slow", "x" * 200)]))
    heads, bodies, readers = [], [], []
    for connect in listeners.values():
        heads.append(workers.submit(trickles_head, connect("http/1.1"), http1_head))
        heads.append(workers.submit(trickles_head, Http2(connect("h2"), LONG).conn, http2_head))
        bodies.append(workers.submit(trickles_body, connect("http/1.1")))
        readers.append(workers.submit(takes_little, Http2(connect("h2", "/endless"), LONG, NO_WINDOW)))
    # 15 s for a head, and up to twice that; 5 s at exposed listeners.
    assert all(3 < head.result(LONG) < 70 for head in heads)
    assert [body.result(LONG) for body in bodies] == [True] * len(bodies)
    for took, taken in (reader.result(LONG) for reader in readers):
        # The answer as a whole has its 15 s, whoever takes long over it.
        assert 12 < took < 70 and 5 < taken < 40


class Upgraded(Web):
    """Upgrades, and then echoes, or sends without an end, by path."""

    def answer(self, request):
        request.send_response_only(101)
        request.send_header("upgrade", "websocket")
        request.send_header("connection", "Upgrade")
        request.end_headers()
        request.close_connection = True
        self._count(1)
        try:
            while data := PIECE if request.path == "/endless" else request.rfile.read1(65536):
                request.wfile.write(data)
        finally:
            self._count(-1)


def upgrade(conn, path="/"):
    conn.send(b"GET " + path.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n")
    assert b" 101 " in conn.line()
    while conn.line().strip():
        pass
    return conn


def test_upgraded_connections_end_when_they_stand_still_and_no_sooner(mesh):
    mesh.agent.needs((1, 15), "local_idle_timeout_ms")
    server = mesh.service("server", app=Upgraded, protocol="http", proxy={"Config": {"protocol": "http", "local_idle_timeout_ms": 2000}})
    identity = mesh.agent.leaf(mesh.name("peer"))
    connect = lambda: mtls_connect(server.public, mesh.agent.roots(), identity, mesh.agent.sni(server.name))
    with connect() as silent, connect() as deaf, connect() as lively:
        upgrade(silent)
        upgrade(deaf, "/endless")
        upgrade(lively)
        eventually(lambda: server.app.waiting == 3, what="all are upgraded")
        # Whoever talks for longer than the limit is what is left.
        eventually(lambda: lively.ask(b"hello") == b"hello" and server.app.waiting == 1, LONG, "those that stand still have ended", every=0.5)
        assert silent.end() == "fin" and lively.ask(b"still here") == b"still here"


def test_upgraded_connections_count_towards_max_inbound_connections(mesh):
    server = mesh.service("server", app=Upgraded, protocol="http", proxy={"Config": {"protocol": "http", "max_inbound_connections": 2}})
    identity = mesh.agent.leaf(mesh.name("peer"))
    connect = lambda: mtls_connect(server.public, mesh.agent.roots(), identity, mesh.agent.sni(server.name))
    first, second = upgrade(connect()), upgrade(connect())
    with contextlib.suppress(OSError), connect() as third:
        assert third.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").end() in ("fin", "reset")
    assert server.app.waiting == 2 and second.ask(b"open") == b"open"
    # Its place is given back.
    first.close()
    eventually(lambda: upgrade(connect()))
    server.process.logged("max_inbound_connections are open")
