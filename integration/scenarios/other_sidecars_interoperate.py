"""Our sidecar with Consul's own proxy and with Envoy at the other end, both ways."""

import pytest

from mesh import eventually

OTHERS = pytest.mark.parametrize("other", ["consul", "envoy", "envoy with TLS 1.3"])


def start(service, kind, to=None):
    if kind.startswith("envoy"):
        service.process = service.mesh.envoy(
            service, endpoints={to.name: [to.public]} if to else None, tls="TLSv1_3" if "1.3" in kind else None)
    else:
        service.start(kind)


@OTHERS
def test_they_call_us(mesh, other):
    server = mesh.service("server")
    client = mesh.service("client", [server], sidecar=None)
    start(client, other, server)
    client.eventually_reaches()
    with client.dial() as conn:
        assert conn.ask(b"x" * 100_000) == b"x" * 100_000
        mesh.deny(client, server)
        assert conn.end(within=1) in ("fin", "reset")
    assert client.refused()


@OTHERS
def test_we_call_them(mesh, other):
    server = mesh.service("server", sidecar=None)
    start(server, other)
    client = mesh.service("client", [server])
    client.eventually_reaches()
    with client.dial() as conn:
        assert conn.ask(b"x" * 100_000) == b"x" * 100_000


def test_consuls_proxy_denies_us(mesh):
    """From the first connection on: later ones could resume a session, which some builds of it let past a deny."""
    server = mesh.service("server", sidecar=None)
    server.start("consul")
    client = mesh.service("client", [server], sidecar=None)
    mesh.deny(client, server)
    client.start()
    assert client.refused()


def test_envoy_denies_us(mesh):
    server = mesh.service("server", sidecar=None)
    client = mesh.service("client", [server])
    other = mesh.service("other", [server])
    mesh.envoy(server, denied=[client.name])
    other.eventually_reaches()
    assert client.refused()


def test_envoy_passes_our_half_close_on(mesh):
    server = mesh.service("server", sidecar=None)
    mesh.envoy(server)
    client = mesh.service("client", [server])
    with client.dial() as conn:
        # Envoy as a TLS server ends both directions at a close_notify; what was echoed before it must be there.
        assert conn.ask(b"last words") == b"last words"
        conn.finish()
        assert conn.end() == "fin"
    eventually(lambda: server.app.open() == 0)
