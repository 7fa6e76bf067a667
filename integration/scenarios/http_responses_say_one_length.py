"""A response whose headers describe another message than it is, is answered for with 502, and nothing of it reaches the client.

The next hop might go by the header that the codec did not go by, and take the rest for another response.
"""

import contextlib
import http.client

import hpack
import pytest

from mesh import Mesh, Upstream, dial
from mesh.http2 import END_STREAM, HEADERS, END_HEADERS, PSEUDO, Http2, block, frame
from mesh.identity import server_context
from mesh.raw import Raw, Script, data, fields

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"\r\n5\r\nhello\r\n0\r\n\r\n"
SPLIT = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\ninvited"

HTTP1 = {
    "a length and a transfer coding": OK + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n" + CHUNKED,
    "a transfer coding and a length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n" + CHUNKED,
    "a length of none and a transfer coding": OK + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n" + CHUNKED,
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "one length twice": OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "a list of lengths": OK + b"Content-Length: 5, 5\r\n\r\nhello",
    "a length with a sign": OK + b"Content-Length: +5\r\n\r\nhello",
    "a length that is empty": OK + b"Content-Length:\r\n\r\nhello",
    "a length before a colon with a space": OK + b"Content-Length : 5\r\n\r\nhello",
    "two transfer codings": OK + b"Transfer-Encoding: gzip, chunked\r\n" + CHUNKED,
    "two lines of transfer codings": OK + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n" + CHUNKED,
    "chunked twice": OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n" + CHUNKED,
    "another transfer coding": OK + b"Transfer-Encoding: gzip\r\n\r\nhello",
    "no transfer coding by name": OK + b"Transfer-Encoding: identity\r\n\r\nhello",
    "no transfer coding by name, and a length": OK + b"Transfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello",
    "a transfer coding in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n" + CHUNKED,
    "a body for a 204": b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello",
    "a chunked 204": b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a NUL": OK + b"X-A: a\0b\r\nContent-Length: 5\r\n\r\nhello",
    "no HTTP": b"nonsense\r\n\r\n",
}

LENGTH = "content-length"
HTTP2 = {
    "one length twice": Script((fields(200, (LENGTH, "5"), (LENGTH, "5")), data(b"hello", end=True))),
    "two lengths": Script((fields(200, (LENGTH, "5"), (LENGTH, "6")), data(b"hello", end=True))),
    "a list of lengths": Script((fields(200, (LENGTH, "5, 5")), data(b"hello", end=True))),
    "a length with a sign": Script((fields(200, (LENGTH, "+5")), data(b"hello", end=True))),
    "a transfer coding": Script((fields(200, ("transfer-encoding", "chunked")), data(b"0\r\n\r\n", end=True))),
    "a length for a 204": Script((fields(204, (LENGTH, "5")), data(b"hello", end=True))),
    "a length and no body": Script(((HEADERS, END_HEADERS | END_STREAM, block([(":status", "200"), (LENGTH, "5")])),)),
    "a connection header": Script((fields(200, ("connection", "x-a")), data(b"hello", end=True))),
}


def path(what):
    return "/" + what.replace(" ", "-").replace(",", "")


@pytest.fixture(scope="module")
def legs(known_root, binaries, ports, tmp_path_factory):
    """The port of a client's upstream, by who answers: an app behind a sidecar, or whatever is in a sidecar's place."""
    with contextlib.ExitStack() as stack:
        agent, _ = known_root
        mesh = Mesh(agent, binaries, ports, tmp_path_factory.mktemp("one-length"), stack, "len")
        scripts = {path(what): Script((answer, SPLIT), "fin") for what, answer in HTTP1.items()}
        scripts |= {path(what): Script((answer,), "fin") for what, (_, answer, *_) in CLEAR.items()}
        frames = {path(what): script for what, script in HTTP2.items()}
        frames[path(TRAILED)] = Script((fields(200), data(b"hello"), (HEADERS, END_HEADERS | END_STREAM, block(
            [(LENGTH, "7"), ("host", "other"), ("x-end", "1")]))))
        servers = {
            "app, HTTP/1": mesh.service("one", app=lambda port: Raw(port, scripts), protocol="http"),
            "app, HTTP/2": mesh.service("two", app=lambda port: Raw(port, frames), protocol="http2"),
            "peer, HTTP/1": mesh.service("three", sidecar=None, app=None, protocol="http"),
            "peer, HTTP/2": mesh.service("four", sidecar=None, app=None, protocol="http2"),
        }
        for leg, answers, alpn in (("peer, HTTP/1", scripts, ["http/1.1"]), ("peer, HTTP/2", frames, ["h2"])):
            context = server_context(agent.roots(), agent.leaf(servers[leg].name), alpn)
            mesh.keep(Raw(servers[leg].public, answers, context))
        client = mesh.service("client", [Upstream(server.name, ports.take()) for server in servers.values()])
        yield {leg: client.port_to(server) for leg, server in servers.items()}


CASES = [(leg, what) for leg in ("app, HTTP/1", "peer, HTTP/1") for what in HTTP1] + [
    (leg, what) for leg in ("app, HTTP/2", "peer, HTTP/2") for what in HTTP2]


@pytest.mark.parametrize(("leg", "what"), CASES)
def test_refused(legs, leg, what):
    for method in ("GET", "HEAD") if leg.endswith("1") else ("GET",):
        with dial(legs[leg], within=10) as conn:
            conn.send(f"{method} {path(what)} HTTP/1.1\r\nHost: shop\r\n\r\n".encode())
            response = http.client.HTTPResponse(conn.sock, method=method)
            response.begin()
            body = response.read()
            assert response.status == 502, (method, response.status, body)
            assert b"hello" not in body and b"invited" not in body
            # The client's connection is as good as before, and nothing of the bad response comes next on it.
            conn.send(b"GET /known HTTP/1.1\r\nHost: shop\r\n\r\n")
            response = http.client.HTTPResponse(conn.sock)
            response.begin()
            assert (response.status, response.read()) == (200, b"known")
    with Http2(dial(legs[leg], within=10)) as http2:
        http2.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block([*PSEUDO[:2], (":path", path(what)), PSEUDO[3]])))
        outcome = http2.outcome()
        assert outcome[:2] == ("answer", 502) and b"hello" not in outcome[2], outcome


CLEAR = {
    # (method, script): what goes on of the length, and the body
    "a 204 of length none": ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", None, b""),
    # Of what the client has already: it need not be told over HTTP/1.
    "a 304 with a length": ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", None, b""),
    "a length for HEAD": ("HEAD", OK + b"Content-Length: 5\r\n\r\n", "5", b""),
    "a 205 with a body": ("GET", b"HTTP/1.1 205 Reset Content\r\nContent-Length: 5\r\n\r\nhello", "5", b"hello"),
    "chunked in capitals": ("GET", OK + b"Transfer-Encoding: CHUNKED\r\n" + CHUNKED, None, b"hello"),
    "a body up to the end": ("GET", OK + b"\r\nhello", None, b"hello"),
    "a body up to the end in HTTP/1.0": ("GET", b"HTTP/1.0 200 OK\r\n\r\nhello", None, b"hello"),
    "a length in HTTP/1.0": ("GET", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", "5", b"hello"),
    "a length named in connection": ("GET", OK + b"Connection: content-length\r\nContent-Length: 5\r\n\r\nhello", "5", b"hello"),
}


@pytest.mark.parametrize("leg", ["app, HTTP/1", "peer, HTTP/1"])
def test_what_is_clear_is_passed_on(legs, leg):
    for what, (method, _, length, body) in CLEAR.items():
        with dial(legs[leg], within=10) as conn:
            conn.send(f"{method} {path(what)} HTTP/1.1\r\nHost: shop\r\n\r\n".encode())
            response = http.client.HTTPResponse(conn.sock, method=method)
            response.begin()
            assert response.getheader(LENGTH) == length, what
            assert (response.read(), response.getheader("transfer-encoding") in (None, "chunked")) == (body, True), what


TRAILED = "a length in a trailer"


@pytest.mark.parametrize("leg", ["app, HTTP/2", "peer, HTTP/2"])
def test_trailers_frame_nothing(legs, leg):
    with Http2(dial(legs[leg], within=10)) as http2:
        http2.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block([*PSEUDO[:2], (":path", path(TRAILED)), PSEUDO[3]])))
        decoder, blocks = hpack.Decoder(), []
        while got := http2.next():
            kind, flags, stream, payload = got
            if kind == HEADERS and stream == 1:
                blocks.append(dict(decoder.decode(payload)))
            if stream == 1 and flags & END_STREAM:
                break
        assert blocks[-1] == {"x-end": "1"}
