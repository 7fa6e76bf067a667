"""Of the certificates that a peer shows, and of those that the agent gives with our leaf, only those count that lead to a root.

Consul signs a new root by the old one too, for a week, and leaves that certificate in the chain of every leaf from then on.
"""

import pytest
from cryptography import x509

from mesh import Authority, eventually, mtls_connect
from mesh.clock import Clock

LEAVES_OF_A_MONTH = {"connect": {"ca_provider": "consul", "ca_config": {"leaf_cert_ttl": "720h"}}}
# A day after the certificate that cross-signs the new root has expired, and long before a leaf does.
A_DAY_LATER = "+8d"


def rotated(own_mesh):
    mesh = own_mesh(LEAVES_OF_A_MONTH)
    before = mesh.agent.active_root()
    mesh.agent.rotate_root(Authority(mesh.agent.trust_domain))
    eventually(lambda: mesh.agent.active_root() != before)
    # So that what is issued from here on is of the new root.
    eventually(lambda: len(certificates(mesh.agent.leaf(mesh.name("probe")))) > 1, 60, "leaves come with the cross-signed root")
    return mesh


def certificates(identity):
    return x509.load_pem_x509_certificates(identity.cert_pem.encode())


def test_a_mesh_outlives_the_week_after_a_rotation(own_mesh):
    mesh = rotated(own_mesh)
    leaf, cross = certificates(mesh.agent.leaf(mesh.name("probe")))[:2]
    assert (cross.not_valid_after_utc - cross.not_valid_before_utc).days == 7 and leaf.not_valid_after_utc > cross.not_valid_after_utc
    clock = Clock(mesh.directory)
    server = mesh.service("server", sidecar=None)
    server.start(env=clock.env)
    client = mesh.service("client", [server], sidecar=None)
    client.start(env=clock.env)
    client.eventually_reaches()
    with client.dial() as untouched:
        assert untouched.ask(b"before") == b"before"
        clock.set(A_DAY_LATER)
        # New handshakes, resumed ones and kept sessions; and a connection that was open.
        for _ in range(20):
            assert client.reaches()
        assert untouched.ask(b"after") == b"after"
    # A new start then: our own leaf's chain, and full handshakes.
    for service in (server, client):
        service.process.stop()
        service.start(env=clock.env)
    client.eventually_reaches()
    for service in (server, client):
        assert not service.process.look("expired"), service.process.text()


@pytest.mark.parametrize("tls", ["TLSv1_2", "TLSv1_3"])
def test_we_go_on_with_envoy(own_mesh, tls):
    """Both ways. Envoy goes by the system's clock: libfaketime stops it."""
    mesh = rotated(own_mesh)
    clock = Clock(mesh.directory, A_DAY_LATER)
    envoy_server, our_server = mesh.service("envoy-server", sidecar=None), mesh.service("our-server", sidecar=None)
    mesh.envoy(envoy_server, tls=tls)
    our_server.start(env=clock.env)
    us = mesh.service("us", [envoy_server], sidecar=None)
    us.start(env=clock.env)
    us.eventually_reaches()
    envoy = mesh.service("envoy", [our_server], sidecar=None)
    mesh.envoy(envoy, endpoints={our_server.name: [our_server.public]}, tls=tls)
    envoy.eventually_reaches()


def test_more_than_the_path_needs_is_of_no_interest(known):
    """What others add to a chain: their root, a leaf twice, a foreign certificate, whatever the order."""
    mesh, authority = known, known.authority
    foreign = Authority(mesh.agent.trust_domain, name="Foreign CA")
    server = mesh.service("server")
    caller = mesh.agent.spiffe(mesh.name("caller"))
    for more in ([foreign.cert_pem], [authority.cert_pem], [foreign.issue(caller).cert_pem, foreign.cert_pem, authority.cert_pem]):
        identity = authority.issue(caller)
        identity.cert_pem += "".join(more)
        with mtls_connect(server.public, mesh.agent.roots(), identity) as conn:
            assert conn.ask(b"hello") == b"hello"
