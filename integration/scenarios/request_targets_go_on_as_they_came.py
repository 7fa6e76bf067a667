"""The target of a request reaches the app byte for byte, but for the path that the public listener normalises.

What a target may hold is what Envoy 1.40 takes: over HTTP/1.1 every printable byte of ASCII but `#`.
"""

import pytest

from mesh import Web, dial, eventually
from mesh.apps import App
from mesh.http2 import END_HEADERS, END_STREAM, HEADERS, PSEUDO, Http2, block, frame

PRINTABLE = bytes(byte for byte in range(0x21, 0x7f) if byte not in b"#")
# Bytes of a path that normalisation escapes (`\` becomes `/`, and `?` ends the path).
ESCAPED = b"\"<>^`{|}"


class Shown(App):
    """Answers each request with its target, as the bytes that came."""

    def serve(self, conn):
        while line := conn.line():
            while conn.line().strip():
                pass
            target = line.split(b" ")[1]
            conn.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(target), target))


def http1(port, target):
    """(status, body)"""
    with dial(port, 10) as conn:
        conn.send(b"GET " + target + b" HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n")
        head, _, body = conn.rest().partition(b"\r\n\r\n")
    assert head, "the connection ended without an answer"
    return int(head.split()[1]), body


def http2(port, target):
    fields = [(name, target if name == ":path" else value) for name, value in PSEUDO]
    with Http2(dial(port, 10), 10) as conn:
        outcome = conn.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block(fields))).outcome()
    return outcome[1:] if outcome[0] == "answer" else (400, b"")


VERSIONS = pytest.mark.parametrize("ask", [http1, http2])


def pair(mesh, ends="lictor to lictor"):
    near, far = ends.split(" to ")
    server = mesh.web("server", app=Shown, sidecar=None)
    client = mesh.web("client", [server], app=Web, sidecar=None)
    for service, kind in ((server, far), (client, near)):
        if kind == "envoy":
            service.process = mesh.envoy(service, protocol="http", endpoints={server.name: [server.public]})
        else:
            service.start(kind)
    port = client.upstreams[0].port
    eventually(lambda: http1(port, b"/")[0] == 200)
    return server, client, port


@VERSIONS
@pytest.mark.parametrize("ends", ["lictor to lictor", "lictor to envoy", "envoy to lictor"])
def test_a_query_passes_byte_for_byte(mesh, ends, ask):
    _, _, port = pair(mesh, ends)
    for query in (PRINTABLE, b'filter={"a":["<b>"]}&x=`|^', b"%61%2F%00%zz%", b"?", b""):
        target = b"/search?" + query
        assert ask(port, target) == (200, target)


@VERSIONS
def test_a_path_is_normalised_as_envoy_does(mesh, ask):
    _, _, port = pair(mesh)
    for byte in PRINTABLE.replace(b"%", b""):
        byte = bytes([byte])
        arrives = b"%%%02X" % ord(byte) if byte in ESCAPED else b"/" if byte == b"\\" else byte
        assert ask(port, b"/a" + byte + b"b") == (200, b"/a" + arrives + b"b"), byte
    for target, arrives in ((b"/%7e%41", b"/~A"), (b"/a/./b/../c", b"/a/c"), (b"/a%2fb", b"/a%2Fb")):
        assert ask(port, target) == (200, arrives)


def test_what_envoy_takes_over_http2_alone(mesh):
    _, _, port = pair(mesh)
    text = "/é?ü".encode()
    assert http2(port, text) == (200, "/%C3%A9?ü".encode())
    assert http1(port, text)[0] == 400


@VERSIONS
def test_what_no_target_has_is_refused(mesh, ask):
    _, client, port = pair(mesh)
    for byte in (*range(0x21), 0x7f):
        assert ask(port, b"/a" + bytes([byte]) + b"b")[0] == 400, byte
        assert ask(port, b"/?a" + bytes([byte]) + b"b")[0] == 400, byte
    assert http1(port, b"/a#b")[0] == http1(port, b"/a?b#c")[0] == 400


@VERSIONS
def test_a_router_sees_the_target_as_it_came(mesh, ask):
    server = mesh.web("server", app=Shown)
    other = mesh.web("other", app=lambda port: Web(port, name="other"))
    client = mesh.web("client", [server])
    port = client.upstreams[0].port
    routes = [{"PathExact": "/exact"}, {"PathRegex": "/re%2f[a-z]+"}, {"PathPrefix": "/admin"},
              {"PathPrefix": "/q", "QueryParam": [{"Name": "a\"b", "Present": True}]}]
    mesh.agent.write("service-router", server.name, Routes=[{"Match": {"HTTP": match}, "Destination": {"Service": other.name}} for match in routes])
    eventually(lambda: b'"other"' in http1(port, b"/admin")[1])
    # As Envoy 1.40 routes these without normalisation.
    for target, routed in ((b"/exact", True), (b"/exact?x", True), (b"/%65xact", False), (b"/a/../exact", False), (b"/re%2fab", True),
                           (b"/re%2Fab", False), (b"/re/ab", False), (b"/admin", True), (b"/%61dmin", False), (b"/./admin", False),
                           (b"/x/../admin", False), (b"/x\\..\\admin", False), (b"/q?a\"b=1", True), (b"/q?a%22b=1", False)):
        status, body = ask(port, target)
        assert (status, b'"other"' in body) == (200, routed), target


@VERSIONS
def test_without_normalisation_the_app_gets_the_target_as_it_came(own_mesh, ask):
    mesh = own_mesh()
    mesh.agent.needs((1, 21), "request normalisation")
    mesh.agent.put("/v1/config", {"Kind": "mesh", "HTTP": {"Incoming": {"RequestNormalization": {"InsecureDisablePathNormalization": True}}}})
    server, client, port = pair(mesh)
    mesh.agent.write("service-intentions", server.name, Sources=[{"Name": client.name, "Permissions": [
        {"Action": "deny", "HTTP": {"PathExact": "/value/secret"}}]}])
    eventually(lambda: ask(port, b"/value/secret")[0] == 403)
    for target in (b"/value/%73ecret", b"/value\\secret", b"/value/./secret", b"/x/../value/secret", b"/value//secret", b"/value%2Fsecret",
                   b"/%7E%41<>\"^`{|}", b"/value/secret/"):
        assert ask(port, target) == (200, target)
    warnings = [line for line in server.process.text().splitlines() if "InsecureDisablePathNormalization" in line]
    assert len(warnings) == 1 and "[WARN]" in warnings[0], warnings
