"""connect_timeout_ms, local_connect_timeout_ms and handshake_timeout_ms, against peers that say nothing."""

import socket

import pytest

from mesh import Silent, dial


class Full:
    """A port whose queue of connections is full: the kernel no longer answers who wants to connect."""

    def __init__(self, port):
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(0)
        self._waiting = []
        for _ in range(64):
            sock = socket.socket()
            sock.settimeout(0.2)
            self._waiting.append(sock)
            try:
                sock.connect(("127.0.0.1", port))
            except TimeoutError:
                return
        raise AssertionError("the queue takes everything")

    def close(self):
        for sock in [self._listener, *self._waiting]:
            sock.close()


def test_an_upstream_that_takes_no_connection_is_given_up_after_connect_timeout_ms(mesh):
    server = mesh.service("server", app=None, sidecar=None)
    mesh.keep(Full(server.public))
    client = mesh.service("client", [server], sidecar=None)
    client.upstreams[0].more = {"Config": {"connect_timeout_ms": 700}}
    client.register().start()
    assert client.ended(within=4) == "fin"


def test_an_upstream_that_never_shakes_hands_is_given_up_after_connect_timeout_ms(mesh):
    server = mesh.service("server", app=None, sidecar=None)
    mesh.keep(Silent(server.public))
    client = mesh.service("client", [server], sidecar=None)
    client.upstreams[0].more = {"Config": {"connect_timeout_ms": 700}}
    client.register().start()
    assert client.ended(within=4) == "fin"


def test_an_app_that_takes_no_connection_is_given_up_after_local_connect_timeout_ms(mesh):
    server = mesh.service("server", app=Full, proxy={"Config": {"local_connect_timeout_ms": 700}})
    client = mesh.service("client", [server])
    assert client.ended(within=4) in ("fin", "reset")


@pytest.mark.parametrize("start", [b"", b"\x16\x03\x01"], ids=["nothing", "the beginning of a handshake"])
def test_a_client_that_only_says(mesh, start):
    server = mesh.service("server", proxy={"Config": {"handshake_timeout_ms": 700}})
    with dial(server.public) as conn:
        assert conn.send(start).end(4) in ("fin", "reset")
