"""Consul takes almost any text as the name of a service, and its data plane names it in the handshake byte by byte."""

import socket

import pytest

from mesh import Echo, Service

NAMES = {
    "64 characters": lambda tag, _: tag.ljust(64, "x"),
    "as long as an SNI can be": lambda tag, suffix: tag.ljust(255 - len(suffix), "x"),
    "spaces": lambda tag, _: f"a b {tag}",
    "a dash at the beginning": lambda tag, _: f"-{tag}",
    "a dash at the end": lambda tag, _: f"{tag}-",
    "at": lambda tag, _: f"a@{tag}",
    "colon": lambda tag, _: f"a:{tag}",
    "empty label": lambda tag, _: f"a..{tag}",
    "not ASCII": lambda tag, _: f"grün-{tag}",
}
EACH = pytest.mark.parametrize("what", NAMES)


def odd(mesh, what, app=True):
    """A registered service of that kind of name, without a sidecar yet."""
    return registered(mesh, NAMES[what](mesh.tag, mesh.agent.sni("")), app)


def registered(mesh, name, app=True):
    service = Service(mesh, name, id=mesh.name("odd"))
    if app:
        service.app = mesh.keep(Echo(service.port))
    return service.register()


@EACH
def test_among_ours(mesh, what):
    server = odd(mesh, what)
    server.start()
    client = mesh.service("client", [server])
    client.eventually_reaches()
    mesh.deny(client, server)
    client.eventually_refused()


@EACH
def test_on_the_wire(mesh, what):
    server = odd(mesh, what, app=False)
    with socket.create_server(("127.0.0.1", server.public)) as listener:
        listener.settimeout(20)
        client = mesh.service("client", [server])
        client.dial()
        conn, _ = listener.accept()
        with conn:
            conn.settimeout(20)
            assert server_name(conn) == mesh.agent.sni(server.name).encode()


@EACH
def test_envoy_calls_us(mesh, what):
    server = odd(mesh, what)
    server.start()
    client = mesh.service("client", [server], sidecar=None)
    mesh.envoy(client, endpoints={server.name: [server.public]})
    client.eventually_reaches()


@EACH
def test_we_call_envoy(mesh, what):
    server = odd(mesh, what)
    mesh.envoy(server)
    client = mesh.service("client", [server])
    client.eventually_reaches()


def test_a_name_too_long_for_an_sni(mesh):
    """Ours reach each other without one; Envoy refuses to be configured with it."""
    server = registered(mesh, mesh.tag.ljust(300, "x"))
    server.start()
    client = mesh.service("client", [server])
    client.eventually_reaches()
    other = mesh.service("other", [server], sidecar=None)
    with pytest.raises(AssertionError, match="Sni: value length must be at most 255 bytes"):
        mesh.envoy(other, endpoints={server.name: [server.public]})


def server_name(conn):
    """The host name that a client's hello holds (RFC 8446, 4.1.2, and RFC 6066, 3), or None."""
    header = take(conn, 5)
    hello = Reader(take(conn, int.from_bytes(header[3:])))
    hello.take(4 + 2 + 32)
    hello.field(1), hello.field(2), hello.field(1)
    extensions = Reader(hello.field(2))
    while extensions.rest:
        kind, value = extensions.take(2), Reader(extensions.field(2))
        if kind == b"\0\0":
            names = Reader(value.field(2))
            assert names.take(1) == b"\0"
            return names.field(2)
    return None


def take(conn, size):
    got = b""
    while len(got) < size:
        part = conn.recv(size - len(got))
        assert part, "it ended before its hello did"
        got += part
    return got


class Reader:
    def __init__(self, rest):
        self.rest = rest

    def take(self, size):
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def field(self, width):
        """Bytes behind their length, which is of `width` bytes."""
        return self.take(int.from_bytes(self.take(width)))
