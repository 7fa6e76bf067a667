"""Requests that are malformed (RFC 9113) or ambiguous reach no app over HTTP/2 either."""

import contextlib

import pytest

from mesh import Mesh, Upstream, Web, dial, mtls_connect
from mesh.http2 import CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PSEUDO, Http2, block, frame
from mesh.identity import client_context

PROTOCOL_ERROR = 1


def get(*more, **pseudo):
    """A request; pseudo-headers are replaced, or left out if they are None."""
    fields = [(name, pseudo.get(name[1:], value)) for name, value in PSEUDO]
    return [frame(HEADERS, END_HEADERS | END_STREAM, 1, block([field for field in fields if field[1] is not None] + list(more)))]


def post(body, *more, trailers=None):
    fields = [(":method", "POST"), *PSEUDO[1:], *more]
    data = frame(DATA, 0 if trailers else END_STREAM, 1, body)
    tail = [frame(HEADERS, END_HEADERS | END_STREAM, 1, block(trailers))] if trailers else []
    return [frame(HEADERS, END_HEADERS, 1, block(fields)), data, *tail]


MALFORMED = {
    "a name in capitals": get(("X-A", "1")),
    "an empty name": get(("", "1")),
    "a name with a space": get(("x a", "1")),
    "a name with a colon": get(("x:a", "1")),
    "a name with a line in it": get(("x-a: 1\r\nx-b", "1")),
    "a value with a line in it": get(("x-a", "1\r\nx-b: 2")),
    "a value with a LF": get(("x-a", "1\nx-b: 2")),
    "a value with a NUL": get(("x-a", "1\0")),
    "a connection header": get(("connection", "x-a")),
    "a keep-alive header": get(("keep-alive", "1")),
    "a proxy-connection header": get(("proxy-connection", "1")),
    "an upgrade": get(("upgrade", "websocket")),
    "a transfer coding": post(b"0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n", ("transfer-encoding", "chunked")),
    "te other than trailers": get(("te", "gzip")),
    "te with more than trailers": get(("te", "trailers, gzip")),
    "two methods": get((":method", "GET")),
    "two paths": get((":path", "/smuggled")),
    "two schemes": get((":scheme", "http")),
    "two authorities": get((":authority", "other")),
    "a pseudo-header behind the others": [frame(HEADERS, END_HEADERS | END_STREAM, 1, block([*PSEUDO[:3], ("x-a", "1"), PSEUDO[3]]))],
    "an unknown pseudo-header": get((":own", "1")),
    "a status": get((":status", "200")),
    "a protocol": get((":protocol", "websocket")),
    "no method": get(method=None),
    "no path": get(path=None),
    "no scheme": get(scheme=None),
    "no authority": get(authority=None),
    "an empty path": get(path=""),
    "a path that is none": get(path="smuggled"),
    "a path with a space": get(path="/a HTTP/1.1"),
    "a path with a line in it": get(path="/ HTTP/1.1\r\n\r\nGET /smuggled"),
    "a method with a space": get(method="GET /smuggled HTTP/1.1"),
    "a method with a line in it": get(method="GET / HTTP/1.1\r\nx: "),
    "an empty method": get(method=""),
    "an authority with a user": get(authority="user@shop"),
    "an authority with a path": get(authority="shop/smuggled"),
    "an authority with a line in it": get(authority="shop\r\nx-a: 1"),
    "a host that is another": get(("host", "other")),
    "two hosts": get(("host", "shop"), ("host", "shop"), authority=None),
    "a host that is none": get(("host", "shop/smuggled"), authority=None),
    "two lengths": post(b"abcd", ("content-length", "4"), ("content-length", "5")),
    "one length twice": post(b"abcd", ("content-length", "4"), ("content-length", "4")),
    "a list of lengths": post(b"abcd", ("content-length", "4, 4")),
    "a length with a sign": post(b"abcd", ("content-length", "+4")),
    "a length that is none": post(b"abcd", ("content-length", "x")),
    "a length without a body": get(("content-length", "4")),
    "a CONNECT": [frame(HEADERS, END_HEADERS, 1, block([(":method", "CONNECT"), (":authority", "shop:80")]))],
}


@pytest.fixture(scope="module")
def pair(shared_agent, binaries, ports, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        mesh = Mesh(shared_agent, binaries, ports, tmp_path_factory.mktemp("malformed"), stack, "mal")
        server = mesh.service("server", app=Web, proxy={"Config": {"protocol": "http"}})
        client = mesh.service("client", [Upstream(server.name, ports.take(), {"Config": {"protocol": "http"}})])
        context = client_context(mesh.agent.roots(), mesh.agent.leaf(client.name))
        context.set_alpn_protocols(["h2"])
        ways = {
            "upstream listener": lambda: dial(client.upstreams[0].port, within=10),
            "public listener": lambda: mtls_connect(server.public, None, context=context, sni=mesh.agent.sni(server.name), within=10),
        }
        yield server, ways


@pytest.mark.parametrize("way", ["upstream listener", "public listener"])
def test_refused(pair, way):
    server, ways = pair
    taken = {}
    for what, frames in MALFORMED.items():
        before = len(server.app.requests)
        with Http2(ways[way]()) as connection:
            outcome = connection.send(*frames).outcome()
        refused = outcome in (("reset", PROTOCOL_ERROR), ("goaway", PROTOCOL_ERROR)) or (outcome[0] == "answer" and outcome[1] in (400, 405))
        if not refused or len(server.app.requests) != before:
            taken[what] = outcome, server.app.requests[before:]
    assert taken == {}


@pytest.mark.parametrize("way", ["upstream listener", "public listener"])
def test_a_body_of_another_length_is_not_taken_for_the_whole(pair, way):
    server, ways = pair
    for frames in (post(b"abc", ("content-length", "4")), post(b"abcdGET /smuggled HTTP/1.1\r\n\r\n", ("content-length", "4"))):
        before = len(server.app.requests)
        with Http2(ways[way]()) as connection:
            outcome = connection.send(*frames).outcome()
        assert outcome[:2] != ("answer", 200), outcome
        assert "/smuggled" not in [seen["path"] for seen in server.app.requests[before:]]


@pytest.mark.parametrize("way", ["upstream listener", "public listener"])
def test_pseudo_headers_among_trailers_go_nowhere(pair, way):
    server, ways = pair
    before = len(server.app.requests)
    with Http2(ways[way]()) as connection:
        connection.send(*post(b"abcd", trailers=[(":path", "/smuggled")])).outcome()
    assert "smuggled" not in str(server.app.requests[before:])


@pytest.mark.parametrize("way", ["upstream listener", "public listener"])
def test_what_is_unusual_but_clear_is_served(pair, way):
    _, ways = pair
    whole = block(PSEUDO)
    clear = [
        get(("host", "shop")),
        get(("host", "shop"), authority=None),
        get(("te", "trailers")),
        get(("cookie", "a=1"), ("cookie", "b=2")),
        [frame(HEADERS, END_STREAM, 1, whole[:3]), frame(CONTINUATION, 0, 1, whole[3:9]), frame(CONTINUATION, END_HEADERS, 1, whole[9:])],
        post(b"abcd", ("content-length", "4")),
        post(b"abcd", trailers=[("x-checksum", "1")]),
    ]
    for frames in clear:
        with Http2(ways[way]()) as connection:
            assert connection.send(*frames).outcome()[:2] == ("answer", 200), frames
