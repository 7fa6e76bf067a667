"""Whatever shape a request has and whichever way it comes, it is judged by what the app receives of it, or refused."""

import contextlib
import http.client
import json

import pytest

from mesh import Mesh, Upstream, Web, dial, eventually, mtls_connect
from mesh.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, Http2, block, frame
from mesh.identity import client_context
from mesh.rules import deny, header

DENIED = [
    deny(Header=[header("Host", exact="admin.example")]),
    deny(Header=[header("Host", suffix=".secret.example")]),
    deny(Header=[header("Host", regex="[a-z]+\\.hidden\\.example")]),
    deny(PathPrefix="/reads", Methods=["POST", "PUT"]),
    deny(PathPrefix="/plain", Header=[header("upgrade", exact="websocket")]),
    deny(Header=[header("cookie", exact="a=1; b=2")]),
    deny(PathPrefix="/api", Header=[header("Host", exact="api.example", invert=True)]),
]


class Ways:
    """One service with these rules, and each way to make requests of it as `client`."""

    def __init__(self, mesh):
        # Older agents have no permissions; then what would be denied is left out.
        self.mesh, self.judges = mesh, mesh.agent.version >= (1, 9)
        self.server = mesh.web("server")
        self.client = mesh.web("client", [self.server])
        self.near = self.client.upstreams[0].port
        self._trust, self._leaf = mesh.agent.roots(), mesh.agent.leaf(self.client.name)
        if self.judges:
            mesh.agent.write("service-intentions", self.server.name, Sources=[{"Name": self.client.name, "Permissions": DENIED}])
        for way in ("public", "upstream"):
            eventually(lambda: self.http1(way, b"GET / HTTP/1.1", b"Host: admin.example")[0] == (403 if self.judges else 200), 20, "the rules hold")

    @contextlib.contextmanager
    def connection(self, way, alpn):
        if way == "upstream":
            conn = dial(self.near, 10)
        else:
            context = client_context(self._trust, self._leaf)
            context.set_alpn_protocols([alpn])
            conn = mtls_connect(self.server.public, None, context=context, within=10)
        with conn:
            yield conn

    def http1(self, way, *lines, body=b""):
        """(status, what the app saw)"""
        with self.connection(way, "http/1.1") as conn:
            close = [] if any(line.startswith(b"Connection") for line in lines) else [b"Connection: close"]
            conn.send(b"\r\n".join([*lines, *close, b"", body]))
            answer = http.client.HTTPResponse(conn.sock, method=lines[0].split()[0].decode("latin-1"))
            answer.begin()
            text = answer.read()
        return answer.status, json.loads(text) if answer.status == 200 and text else None

    def http2(self, way, *more, body=None, **pseudo):
        fields = {":method": "GET", ":scheme": "http", ":path": "/", ":authority": "shop", **{f":{name}": value for name, value in pseudo.items()}}
        fields = [(name, value) for name, value in fields.items() if value is not None]
        with self.connection(way, "h2") as conn, Http2(conn, 10) as http2:
            http2.send(frame(HEADERS, END_HEADERS | (END_STREAM if body is None else 0), 1, block([*fields, *more])))
            if body is not None:
                http2.send(frame(DATA, END_STREAM, 1, body))
            kind, *rest = http2.outcome()
        if kind != "answer":
            return 400, None
        return rest[0], json.loads(rest[1]) if rest[0] == 200 and rest[1] else None


@pytest.fixture(scope="module")
def ways(shared_agent, binaries, ports, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        mesh = Mesh(shared_agent, binaries, ports, tmp_path_factory.mktemp("received"), stack, "recv")
        yield Ways(mesh)


EACH = pytest.mark.parametrize("way", ["public", "upstream"])


def hosts(seen):
    return [value for name, value in seen["headers"] if name == "host"]


@EACH
def test_the_authority_that_is_judged_is_the_one_that_goes_on(ways, way):
    cases = [
        # The target's authority goes before the header's (RFC 9112, 3.2.2).
        (200, ["public.example"], b"GET http://public.example/x HTTP/1.1", b"Host: admin.example"),
        (403, None, b"GET http://admin.example/x HTTP/1.1", b"Host: public.example"),
        (200, ["public.example:81"], b"GET http://public.example:81/x HTTP/1.1", b"Host: public.example"),
        (200, ["public.example"], b"GET http://public.example/x HTTP/1.1"),
        (403, None, b"GET http://admin.example/x HTTP/1.0"),
        (200, ["Public.Example."], b"GET / HTTP/1.1", b"Host: Public.Example."),
        (200, ["[2001:db8::1]:8080"], b"GET / HTTP/1.1", b"Host: [2001:db8::1]:8080"),
        (400, None, b"GET http://user@admin.example/x HTTP/1.1", b"Host: public.example"),
        (400, None, b"GET http://public.example@admin.example/x HTTP/1.1", b"Host: public.example"),
        (400, None, b"GET / HTTP/1.1", b"Host: public.example@admin.example"),
        (400, None, b"GET / HTTP/1.1", b"Host: public.example", b"Host: admin.example"),
        (400, None, b"GET http://public.example/ HTTP/1.1", b"Host: public.example", b"Host: admin.example"),
        (400, None, b"GET / HTTP/1.1", b"Host: public.example, admin.example"),
        (400, None, b"GET / HTTP/1.1", b"Host: %61dmin.example"),
        (400, None, b"GET / HTTP/1.1", b"Host: public.example:80:80"),
        (400, None, b"GET / HTTP/1.1", b"Host: [::1]admin.example"),
        (400, None, b"GET / HTTP/1.1", b"Host:"),
        (400, None, b"GET / HTTP/1.1"),
    ]
    for status, received, *lines in cases:
        if status == 403 and not ways.judges:
            continue
        got, seen = ways.http1(way, *lines)
        assert (got, seen and hosts(seen)) == (status, received), lines
    for status, received, pseudo, *more in [
        (200, ["public.example"], {"authority": "public.example"}),
        (200, ["public.example"], {"authority": None}, ("host", "public.example")),
        (200, ["public.example"], {"authority": "public.example"}, ("host", "public.example")),
        (403, None, {"authority": "admin.example"}),
        (403, None, {"authority": None}, ("host", "admin.example")),
        (400, None, {"authority": "public.example"}, ("host", "admin.example")),
        (400, None, {"authority": "admin.example"}, ("host", "public.example")),
        (400, None, {"authority": "public.example@admin.example"}),
        (400, None, {"authority": "%61dmin.example"}),
        (400, None, {"authority": None}),
        (400, None, {"authority": ""}),
    ]:
        if status == 403 and not ways.judges:
            continue
        got, seen = ways.http2(way, *more, **pseudo)
        assert (got, seen and hosts(seen)) == (status, received), (pseudo, more)


@EACH
def test_no_spelling_of_an_authority_gets_round_a_deny(ways, way):
    ways.mesh.agent.needs((1, 9), "L7 permissions")
    for host in ("admin.example", "ADMIN.example", "admin.example.", "admin.example:80", "admin.example:443", "admin.example:", "Admin.Example.:080",
                 "admin.example:8080", "a.SECRET.example", "a.secret.example.:80", "A.Hidden.Example", "a.hidden.example:80"):
        assert ways.http1(way, b"GET / HTTP/1.1", b"Host: " + host.encode())[0] == 403, host
        assert ways.http1(way, b"GET http://%b/ HTTP/1.1" % host.encode(), b"Host: public.example")[0] == 403, host
        assert ways.http2(way, authority=host)[0] == 403, host
    # What is let in by name alone is let in by exactly that name.
    for host, status in (("api.example", 200), ("API.example", 403), ("api.example:80", 403), ("api.example.", 403)):
        assert ways.http1(way, b"GET /api HTTP/1.1", b"Host: " + host.encode())[0] == status, host
        assert ways.http2(way, authority=host, path="/api")[0] == status, host


@EACH
def test_a_method_in_another_case_is_none(ways, way):
    for method in ("post", "Post", "pUT"):
        assert ways.http1(way, b"%b /reads HTTP/1.1" % method.encode(), b"Host: shop", b"Content-Length: 0")[0] in (400, 403)
        assert ways.http2(way, method=method, path="/reads")[0] in (400, 403)
    for method in ("get", "post", "Purge"):
        assert ways.http1(way, b"%b /x HTTP/1.1" % method.encode(), b"Host: shop", b"Content-Length: 0")[0] == 400
        assert ways.http2(way, method=method)[0] == 400
    got, seen = ways.http1(way, b"PURGE /x HTTP/1.1", b"Host: shop")
    assert (got, seen["method"]) == (200, "PURGE")


@EACH
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS", "PATCH", "POST"])
def test_a_body_arrives_whatever_the_method(ways, way, method):
    app = ways.server.app

    def last():
        return app.requests[-1]["method"], app.requests[-1]["body"]
    line = b"%b /body HTTP/1.1" % method.encode()
    assert ways.http1(way, line, b"Host: shop", b"Transfer-Encoding: chunked", body=b"4\r\nbody\r\n0\r\n\r\n")[0] == 200
    assert last() == (method, "body")
    assert ways.http1(way, line, b"Host: shop", b"Content-Length: 4", body=b"sent")[0] == 200
    assert last() == (method, "sent")
    assert ways.http2(way, method=method, path="/body", body=b"data")[0] == 200
    assert last() == (method, "data")
    assert ways.http2(way, ("content-length", "4"), method=method, path="/body", body=b"DATA")[0] == 200
    assert last() == (method, "DATA")
    assert ways.http2(way, method=method, path="/body", body=b"")[0] == 200
    assert last() == (method, "")


@EACH
def test_only_websocket_goes_on_as_an_upgrade(ways, way):
    for protocols, received in (("websocket", ["websocket"]), ("WebSocket", ["WebSocket"]), ("h2c", []), ("H2C", []), ("h2c, websocket", ["websocket"]),
                                ("TLS/1.2", []), ("chat", []), ("HTTP/2.0", [])):
        got, seen = ways.http1(way, b"GET / HTTP/1.1", b"Host: shop", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: " + protocols.encode(),
                               b"HTTP2-Settings: AAMAAABkAAQAAP__")
        names = [name for name, _ in seen["headers"]]
        assert (got, [value for name, value in seen["headers"] if name == "upgrade"]) == (200, received), protocols
        assert "http2-settings" not in names and ("connection" in names) == bool(received), protocols
    got, seen = ways.http1(way, b"GET / HTTP/1.1", b"Host: shop", b"Connection: Upgrade", b"Upgrade: h2c", b"Upgrade: websocket")
    assert [value for name, value in seen["headers"] if name == "upgrade"] == ["websocket"]
    if ways.judges:
        assert ways.http1(way, b"GET /plain HTTP/1.1", b"Host: shop", b"Connection: Upgrade", b"Upgrade: websocket")[0] == 403


@EACH
def test_an_upgrade_that_is_not_forwarded_costs_no_connection(ways, way):
    request = b"GET /again HTTP/1.1\r\nHost: shop\r\nConnection: Upgrade\r\nUpgrade: TLS/1.2\r\n\r\n"
    with ways.connection(way, "http/1.1") as conn:
        for _ in range(5):
            conn.send(request)
            answer = http.client.HTTPResponse(conn.sock)
            answer.begin()
            assert answer.status == 200 and answer.getheader("connection") is None
            answer.read()


def test_a_protocol_that_is_named_is_forwarded(mesh):
    more = {"Config": {"protocol": "http", "lictor_upgrades": ["chat"]}}
    server = mesh.web("server", proxy=more)
    client = mesh.web("client", [Upstream(server.name, mesh.ports.take(), more)])
    port = client.upstreams[0].port

    def forwarded(protocols):
        with dial(port, 10) as conn:
            conn.send(b"GET / HTTP/1.1\r\nHost: shop\r\nConnection: Upgrade\r\nUpgrade: %b\r\n\r\n" % protocols)
            answer = http.client.HTTPResponse(conn.sock)
            answer.begin()
            seen = json.loads(answer.read()) if answer.status == 200 else {"headers": []}
            return [value for name, value in seen["headers"] if name == "upgrade"]
    eventually(lambda: forwarded(b"chat/2") == ["chat/2"])
    assert forwarded(b"websocket, h2c, chat, other") == ["websocket, chat"]


@EACH
def test_cookies_in_several_lines_are_judged_as_the_one_that_the_app_receives(ways, way):
    ways.mesh.agent.needs((1, 9), "L7 permissions")
    assert ways.http2(way, ("cookie", "a=1"), ("cookie", "b=2"))[0] == 403
    assert ways.http1(way, b"GET / HTTP/1.1", b"Host: shop", b"Cookie: a=1", b"Cookie: b=2")[0] == 403
    got, seen = ways.http2(way, ("cookie", "a=1"), ("cookie", "c=3"))
    assert (got, [value for name, value in seen["headers"] if name == "cookie"]) == (200, ["a=1; c=3"])


def test_http10_without_a_host_is_for_the_service(ways):
    got, seen = ways.http1("upstream", b"GET /health HTTP/1.0")
    assert (got, hosts(seen)) == (200, [ways.server.name])
    got, seen = ways.http1("public", b"GET /health HTTP/1.0")
    assert (got, hosts(seen)) == (200, [ways.server.name])


@EACH
def test_a_target_without_a_path_has_the_path_of_the_root(ways, way):
    for target, path in ((b"http://db?x=1", "/?x=1"), (b"http://db", "/"), (b"http://db/?", "/?")):
        got, seen = ways.http1(way, b"GET " + target + b" HTTP/1.1", b"Host: db")
        assert (got, seen["path"], hosts(seen)) == (200, path, ["db"])
    assert ways.http1(way, b"GET * HTTP/1.1", b"Host: db")[0] == 400
