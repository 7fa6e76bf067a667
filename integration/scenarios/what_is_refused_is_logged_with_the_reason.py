"""Requests that a codec refuses are logged as other refused ones: at once, with the reason, and then by their number."""

import contextlib

import pytest

from mesh import Mesh, Web, dial, eventually, mtls_connect
from mesh.http2 import END_HEADERS, END_STREAM, HEADERS, PSEUDO, Http2, block, frame
from mesh.identity import client_context
from mesh.ports import is_listening
from mesh.raw import Raw, Script, data, fields

WAYS = pytest.mark.parametrize("way", ["upstream", "public", "exposed"])
HOST = b"\r\nHost: shop\r\n"
HTTP1 = {
    "a line ends with a bare LF": b"GET /health HTTP/1.1" + HOST + b"X: y\nZ: 1\r\n\r\n",
    "the request target has a fragment": b"GET /health#x HTTP/1.1" + HOST + b"\r\n",
    "the request target has a byte that is not printable ASCII": b"GET /health\xe9 HTTP/1.1" + HOST + b"\r\n",
    "the version is neither HTTP/1.1 nor HTTP/1.0": b"GET /health HTTP/1.2" + HOST + b"\r\n",
    "the length of the body is given twice": b"POST /health HTTP/1.1" + HOST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a chunk size is no number": b"POST /health HTTP/1.1" + HOST + b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
    "does not speak HTTP": b"SSH-2.0 a b\r\n",
    "invalid HTTP header parsed": b"GET /health HTTP/1.1" + HOST + b"X(y): z\r\n\r\n",
    "message head is too large": b"GET /health HTTP/1.1" + HOST + b"X: " + b"x" * 62_000 + b"\r\n\r\n",
}


def get(*more, path="/health"):
    fields = [(name, path if name == ":path" else value) for name, value in PSEUDO]
    return frame(HEADERS, END_HEADERS | END_STREAM, 1, block([*fields, *more]))


HTTP2 = {
    "the HTTP/2 request is malformed": get(("connection", "x")),
    "a path that is not UTF-8": get(path="/health\xe9"),
    "the path has a character that paths can't have": get(path="/health#x"),
}


@pytest.fixture(scope="module")
def ways(shared_agent, binaries, ports, tmp_path_factory):
    """How each listener is dialled, and the sidecar that has it."""
    with contextlib.ExitStack() as stack:
        mesh = Mesh(shared_agent, binaries, ports, tmp_path_factory.mktemp("refused"), stack, "ref")
        exposed = ports.take()
        server = mesh.web("server", sidecar=None)
        server.proxy = {"Expose": {"Paths": [{"ListenerPort": exposed, "LocalPathPort": server.port, "Path": "/health", "Protocol": "http"}]}}
        server.register().start()
        eventually(lambda: is_listening(exposed))
        client = mesh.web("client", [server])
        context = client_context(mesh.agent.roots(), mesh.agent.leaf(client.name))
        context.set_alpn_protocols(["h2", "http/1.1"])
        plain = client_context(mesh.agent.roots(), mesh.agent.leaf(client.name))

        def public(http2):
            return mtls_connect(server.public, None, context=context if http2 else plain, sni=mesh.agent.sni(server.name))

        yield {
            "upstream": (lambda http2: dial(client.upstreams[0].port), client.process),
            "public": (public, server.process),
            "exposed": (lambda http2: dial(exposed), server.process),
        }


@WAYS
def test_in_http1(ways, way):
    connect, process = ways[way]
    for reason, request in HTTP1.items():
        with connect(False) as conn:
            conn.send(request)
            conn.end()
        logged(process, way, reason)


@WAYS
def test_in_http2(ways, way):
    connect, process = ways[way]
    for reason, request in HTTP2.items():
        with Http2(connect(True)) as connection:
            assert connection.send(request).outcome()[:2] != ("answer", 200)
        logged(process, way, reason)


@WAYS
def test_a_flood_is_counted(ways, way):
    connect, process = ways[way]
    for _ in range(30):
        with connect(False) as conn:
            conn.send(b"GET /flood" + HOST + b"\r\n").end()
        with Http2(connect(True)) as connection:
            connection.send(get(("te", "x"))).outcome()
    for reason in ("the request line has no version", "the HTTP/2 request is malformed"):
        process.logged(rf"(?:Refused|Failed) again[^\n]*{reason}")
        assert process.count(rf"Refused a malformed request[^\n]*{way}[^\n]*{reason}") <= 10


@pytest.mark.parametrize("code", [1, 7], ids=["PROTOCOL_ERROR", "REFUSED_STREAM"])
def test_a_reset_of_the_app_is_not_taken_for_a_refusal(mesh, code):
    """It is passed on as it came, by both sidecars, and says nothing of what the client sent."""
    broken = Script((fields(200), data(b"begun")), stream_end=code)
    server = mesh.service("server", app=lambda port: Raw(port, {"/broken": broken}), protocol="http2")
    client = mesh.service("client", [server], app=None)
    connect = lambda: Http2(dial(client.upstreams[0].port))
    eventually(lambda: outcome_of(connect(), "/known") == ("answer", 200, b"known"))
    with connect() as connection:
        # Where the reset overtakes the head, the client is answered.
        assert connection.send(get(path="/broken")).outcome()[0] in ("answer", "reset")
    assert outcome_of(connect(), "/known") == ("answer", 200, b"known")
    for service in (server, client):
        assert not service.process.count("Refused a malformed request"), service.process.text()


def outcome_of(connection, path):
    with connection:
        return connection.send(get(path=path)).outcome()


def logged(process, way, reason):
    process.logged(rf"(?:Refused a malformed request|Request for|Request failed|Request refused|(?:Refused|Failed) again)[^\n]*{reason}")
