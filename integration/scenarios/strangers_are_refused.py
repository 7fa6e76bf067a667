"""Peers that the public listener refuses, and servers that an upstream never sends to."""

import datetime
import re
import ssl

import pytest

from mesh import Authority, dial, eventually, mtls_connect, mtls_server
from mesh.identity import client_context

HOUR = datetime.timedelta(hours=1)


def own_uri(mesh, name):
    return mesh.agent.spiffe(name)


REFUSED_CLIENTS = {
    "no certificate": lambda mesh, name: None,
    "another CA's certificate with the right name": lambda mesh, name: Authority(mesh.agent.trust_domain).issue(own_uri(mesh, name)),
    "an expired certificate": lambda mesh, name: mesh.authority.issue(own_uri(mesh, name), starts=-3 * HOUR, ends=-HOUR),
    "a certificate that is not valid yet": lambda mesh, name: mesh.authority.issue(own_uri(mesh, name), starts=HOUR, ends=2 * HOUR),
    "another trust domain": lambda mesh, name: mesh.authority.issue(f"spiffe://elsewhere.consul/ns/default/dc/dc1/svc/{name}"),
    "a certificate for servers only": lambda mesh, name: mesh.authority.issue(own_uri(mesh, name), purposes=["server"]),
    "two identities": lambda mesh, name: mesh.authority.issue(own_uri(mesh, name), own_uri(mesh, "other")),
    "no identity": lambda mesh, name: mesh.authority.issue(),
    "an agent's identity": lambda mesh, name: mesh.authority.issue(f"spiffe://{mesh.agent.trust_domain}/agent/client/dc/dc1/id/node"),
    "an identity with an empty name": lambda mesh, name: mesh.authority.issue(f"spiffe://{mesh.agent.trust_domain}/ns/default/dc/dc1/svc/"),
    "an identity that goes on": lambda mesh, name: mesh.authority.issue(own_uri(mesh, name) + "/more"),
}


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"])
def test_the_public_listener_refuses(known, version):
    server = known.service("server")
    for who, make in REFUSED_CLIENTS.items():
        try:
            with mtls_connect(server.public, known.agent.roots(), make(known, known.name("client")), version=version) as conn:
                conn.send(b"let me in\n")
                got = conn.take(1)
        except (ssl.SSLError, ConnectionError):
            got = b""
        assert got == b"", f"{who} got through"
    assert server.app.served == 0


def test_the_public_listener_accepts_who_belongs_to_the_mesh(known):
    server = known.service("server")
    name = known.name("client")
    uri, sni = own_uri(known, name), known.agent.sni(server.name)
    for identity, server_name, version in [
        (known.agent.leaf(name), sni, ssl.TLSVersion.TLSv1_2),
        (known.agent.leaf(name), sni, ssl.TLSVersion.TLSv1_3),
        (known.agent.leaf(name), None, None),
        (known.agent.leaf(name), "anything.else.example", None),
        (known.authority.issue(uri), sni, None),
        (known.authority.issue(uri, key="rsa"), sni, ssl.TLSVersion.TLSv1_2),
        (known.authority.issue(uri, key="rsa"), sni, ssl.TLSVersion.TLSv1_3),
        (known.authority.issue(uri.replace("/dc/dc1/", "/dc/elsewhere/")), sni, None),
    ]:
        with mtls_connect(server.public, known.agent.roots(), identity, server_name, version) as conn:
            assert conn.ask(b"hello") == b"hello"


def test_the_public_listener_shows_its_own_identity(known):
    server = known.service("server")
    with mtls_connect(server.public, known.agent.roots(), known.agent.leaf(known.name("client"))) as conn:
        assert ("URI", known.agent.spiffe(server.name)) in conn.sock.getpeercert()["subjectAltName"]
        assert conn.sock.selected_alpn_protocol() is None


def test_an_alpn_offer_of_old_peers_does_no_harm(known):
    """Consul 1.8's own proxy offers h2 although it then sends whatever it likes."""
    server = known.service("server")
    context = client_context(known.agent.roots(), known.agent.leaf(known.name("client")))
    context.set_alpn_protocols(["h2"])
    with mtls_connect(server.public, None, context=context) as conn:
        assert conn.ask(b"not http at all") == b"not http at all"


def fake_server(mesh, make, version=None):
    """A registered service whose sidecar the scenario plays, and a client with a real sidecar."""
    server = mesh.service("server", app=None, sidecar=None)
    server.app = mesh.keep(mtls_server(server.public, mesh.agent.roots(), make(mesh, server.name), b"greetings\n", version))
    return server, mesh.service("client", [server])


# Peers, and the expected log lines.
REFUSED_SERVERS = {
    "another service's identity": (lambda mesh, name: mesh.agent.leaf(mesh.name("other")), r"/svc/other-"),
    "another CA's certificate with the right name": (lambda mesh, name: Authority(mesh.agent.trust_domain).issue(own_uri(mesh, name)), "(?i)signature|issuer"),
    "an expired certificate": (lambda mesh, name: mesh.authority.issue(own_uri(mesh, name), starts=-3 * HOUR, ends=-HOUR), "expired"),
    "another trust domain": (lambda mesh, name: mesh.authority.issue(f"spiffe://elsewhere.consul/ns/default/dc/dc1/svc/{name}"), r"elsewhere\.consul"),
    "another datacenter": (lambda mesh, name: mesh.authority.issue(own_uri(mesh, name).replace("/dc/dc1/", "/dc/dc2/")), "/dc/dc2/"),
    "a certificate for clients only": (lambda mesh, name: mesh.authority.issue(own_uri(mesh, name), purposes=["client"]), "key usage"),
    "two identities": (lambda mesh, name: mesh.authority.issue(own_uri(mesh, name), own_uri(mesh, "other")), "2 URIs"),
}


@pytest.mark.parametrize("who", REFUSED_SERVERS)
def test_a_server_is_never_spoken_to_that_has(known, who):
    make, logged = REFUSED_SERVERS[who]
    server, client = fake_server(known, make)
    with client.dial() as conn:
        conn.send(b"a secret")
        assert conn.rest() == b""
    assert server.app.received == b""
    line = client.process.logged(rf"[^\n]*127\.0\.0\.1:{server.public} was refused[^\n]*").group()
    assert server.name in line and re.search(logged, line), line


def test_the_log_says_which_identity_was_met_and_which_was_meant(known):
    other = known.name("other")
    server, client = fake_server(known, lambda mesh, name: mesh.agent.leaf(other))
    assert client.refused()
    line = client.process.logged(rf"[^\n]*svc/{other}[^\n]*").group()
    assert f"svc/{server.name}" in line or server.name in line, line


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"])
@pytest.mark.parametrize("key", ["ec", "rsa"])
def test_a_server_of_the_right_identity_is_spoken_to(known, version, key):
    server, client = fake_server(known, lambda mesh, name: mesh.authority.issue(own_uri(mesh, name), key=key), version)
    with client.dial() as conn:
        assert conn.line() == b"greetings\n"
        assert conn.ask(b"hello") == b"hello"
    assert set(server.app.server_names) == {known.agent.sni(server.name)}


def test_silent_clients_are_cut_within_10_s_and_2000_of_them_keep_nobody_waiting(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    silent = [mesh.keep(dial(server.public)) for _ in range(2000)]
    for _ in range(20):
        assert client.dial(within=2).ask(b"hello") == b"hello"
    # The bound is 10 s from when each was accepted; all were by now.
    eventually(lambda: all(conn.end(within=0.001) != "open" for conn in silent[-20:] + silent[:20]), within=11)
    eventually(lambda: all(conn.end(within=0.001) != "open" for conn in silent), within=2)
