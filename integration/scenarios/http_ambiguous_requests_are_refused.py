"""Ambiguous requests, which two parties could read in two ways, are answered with 400, and nothing of them reaches the app."""

import pytest

from mesh import Upstream, Web, dial

HOST = b"Host: shop\r\n"

AMBIGUOUS = {
    "a length beside a transfer coding": b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a transfer coding beside a length": b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "one length twice": b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 4, 4\r\n\r\nabcd",
    "a length with a sign": b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: +4\r\n\r\nabcd",
    "a length in hexadecimal": b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length: 0x4\r\n\r\nabcd",
    "no length at all": b"POST /x HTTP/1.1\r\n" + HOST + b"Content-Length:\r\n\r\n",
    "a folded header": b"GET /x HTTP/1.1\r\n" + HOST + b"X-A: one\r\n two\r\n\r\n",
    "a bare LF": b"GET /x HTTP/1.1\r\n" + HOST + b"X-A: one\nX-B: two\r\n\r\n",
    "bare LFs alone": b"GET /x HTTP/1.1\nHost: shop\n\n",
    "a bare CR": b"GET /x HTTP/1.1\r\n" + HOST + b"X-A: one\rX-B: two\r\n\r\n",
    "a NUL": b"GET /x HTTP/1.1\r\n" + HOST + b"X-A: o\0ne\r\n\r\n",
    "a space before the colon": b"GET /x HTTP/1.1\r\n" + HOST + b"Content-Length : 4\r\n\r\nabcd",
    "a space before the first header": b"GET /x HTTP/1.1\r\n Host: shop\r\n\r\n",
    "another transfer coding": b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a transfer coding that is nearly chunked": b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk size that is none": b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabcd\r\n0\r\n\r\n",
    "a chunk size with a prefix": b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0x4\r\nabcd\r\n0\r\n\r\n",
    "a chunk size with a space": b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n4 \r\nabcd\r\n0\r\n\r\n",
    "a chunk size with a bare LF": b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n4\nabcd\r\n0\r\n\r\n",
    "a chunk size beyond all numbers": b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\nabcd\r\n0\r\n\r\n",
    "a chunk longer than it says": b"POST /x HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n4\r\nabcdef\r\n0\r\n\r\n",
    "a transfer coding in HTTP/1.0": b"POST /x HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no host": b"GET /x HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /x HTTP/1.1\r\n" + HOST + b"Host: other\r\n\r\n",
    "a host that is none": b"GET /x HTTP/1.1\r\nHost: shop/admin\r\n\r\n",
    "a host with a user": b"GET /x HTTP/1.1\r\nHost: user@shop\r\n\r\n",
    "a space in the path": b"GET /x y HTTP/1.1\r\n" + HOST + b"\r\n",
    "a path that is none": b"GET x HTTP/1.1\r\n" + HOST + b"\r\n",
    "another version": b"GET /x HTTP/1.2\r\n" + HOST + b"\r\n",
    "no version": b"GET /x\r\n\r\n",
}


@pytest.fixture(scope="module")
def pair(shared_agent, binaries, ports, tmp_path_factory):
    import contextlib
    from mesh import Mesh
    with contextlib.ExitStack() as stack:
        mesh = Mesh(shared_agent, binaries, ports, tmp_path_factory.mktemp("ambiguous"), stack, "amb")
        server = mesh.service("server", app=Web, proxy={"Config": {"protocol": "http"}})
        client = mesh.service("client", [Upstream(server.name, ports.take(), {"Config": {"protocol": "http"}})])
        yield server, client


@pytest.mark.parametrize("what", AMBIGUOUS)
def test_refused(pair, what):
    server, client = pair
    before = len(server.app.requests)
    with dial(client.upstreams[0].port, within=10) as conn:
        conn.send(AMBIGUOUS[what] + b"GET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n")
        assert conn.line().split()[1:2] == [b"400"], what
        assert b"HTTP/1.1 2" not in conn.rest()
    assert [seen["path"] for seen in server.app.requests[before:]] == []


@pytest.mark.parametrize("what", ["a bare LF", "a length beside a transfer coding", "a chunk size with a space", "two hosts"])
def test_refused_byte_by_byte_too(pair, what):
    _, client = pair
    with dial(client.upstreams[0].port, within=10) as conn:
        for byte in AMBIGUOUS[what]:
            conn.send(bytes([byte]))
        assert conn.line().split()[1:2] == [b"400"]


def test_what_is_unusual_but_clear_is_served(pair):
    _, client = pair
    clear = [
        b"\r\nGET /clear HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET http://shop/clear HTTP/1.1\r\n" + HOST + b"\r\n",
        b"POST /clear HTTP/1.1\r\n" + HOST + b"transfer-ENCODING:Chunked\r\n\r\n4;ext=\"1\"\r\nabcd\r\n00\r\nX-Trailer: 1\r\n\r\n",
        b"GET /clear HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
    ]
    with dial(client.upstreams[0].port, within=10) as conn:
        for request in clear:
            conn.send(request)
            assert conn.line().split()[1] == b"200", request
            length = 0
            while line := conn.line().strip():
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert b"/clear" in conn.take(length)


def test_heads_that_are_too_large_are_answered_with_431(pair):
    _, client = pair
    for head in (b"X-Long: " + b"x" * 62_000 + b"\r\n", b"".join(b"X-%d: 1\r\n" % number for number in range(101))):
        with dial(client.upstreams[0].port, within=10) as conn:
            conn.send(b"GET / HTTP/1.1\r\n" + HOST + head + b"\r\n")
            assert conn.line().split()[1] == b"431"


def test_connect_is_refused(pair):
    _, client = pair
    with dial(client.upstreams[0].port, within=10) as conn:
        conn.send(b"CONNECT shop:80 HTTP/1.1\r\n" + HOST + b"\r\n")
        assert conn.line().split()[1] == b"405"
