"""Authorities as companies run them: with name constraints and certificate policies, and with more than one level."""

import re
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from mesh import Authority, eventually, mtls_connect, mtls_server


def uris(*permitted, excluded=()):
    subtrees = lambda hosts: [x509.UniformResourceIdentifier(host) for host in hosts] or None
    return x509.NameConstraints(subtrees(permitted), subtrees(excluded))


POLICIES = x509.CertificatePolicies([x509.PolicyInformation(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), None)])


def start(service, kind, to=None):
    if kind == "envoy":
        service.process = service.mesh.envoy(service, endpoints={to.name: [to.public]} if to else None)
    else:
        service.start(kind)


@pytest.mark.parametrize("what", ["URI name constraints", "critical certificate policies"])
def test_a_root_with(own_mesh, what):
    """The agent's own, so that ours, Envoy's and Consul's proxy each show a leaf of it to the other."""
    mesh = own_mesh()
    agent = mesh.agent
    extension = uris(agent.trust_domain) if what == "URI name constraints" else POLICIES
    before = agent.active_root()
    agent.rotate_root(Authority(agent.trust_domain, "Company CA", extensions=[(extension, True)]))
    eventually(lambda: agent.active_root() != before)
    ours = mesh.service("ours")
    client = mesh.service("client", [ours])
    client.eventually_reaches()
    for kind in ("envoy", "consul"):
        theirs = mesh.service(f"{kind}-server", sidecar=None)
        start(theirs, kind)
        us = mesh.service(f"to-{kind}", [theirs])
        us.eventually_reaches()
        they = mesh.service(f"from-{kind}", [ours], sidecar=None)
        start(they, kind, ours)
        they.eventually_reaches()


KEYS = {
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("kinds", [("RSA", "P-384"), ("P-256", "RSA"), ("Ed25519", "P-256")], ids="-".join)
def test_two_levels_below_the_root(known, kinds):
    mesh = known
    constrained = [(uris(mesh.agent.trust_domain), True), (POLICIES, True)]
    upper = mesh.authority.below("Upper CA", KEYS[kinds[0]](), constrained)
    lower = upper.below("Lower CA", KEYS[kinds[1]](), constrained)
    server = mesh.service("server")
    caller = lower.issue(mesh.agent.spiffe(mesh.name("caller")))
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        with mtls_connect(server.public, mesh.agent.roots(), caller, version=version) as conn:
            assert conn.ask(b"hello") == b"hello"
    played = mesh.service("played", app=None, sidecar=None)
    identity = lower.issue(mesh.agent.spiffe(played.name))
    played.app = mesh.keep(mtls_server(played.public, mesh.agent.roots(), identity, b"greetings\n"))
    client = mesh.service("client", [played])
    with client.dial() as conn:
        assert conn.line() == b"greetings\n"


CONSTRAINTS = {
    "another domain permitted": uris("elsewhere.consul"),
    "only what is below the domain permitted": lambda domain: uris(f".{domain}"),
    "the domain excluded": lambda domain: uris(excluded=[domain]),
    "what the domain is below excluded": uris(excluded=[".consul"]),
}


@pytest.mark.parametrize("what", CONSTRAINTS)
def test_name_constraints_are_enforced(known, what):
    mesh, constraints = known, CONSTRAINTS[what]
    constraints = constraints(mesh.agent.trust_domain) if callable(constraints) else constraints
    authority = mesh.authority.below("Constrained CA", extensions=[(constraints, True)])
    server = mesh.service("server")
    caller = authority.issue(mesh.agent.spiffe(mesh.name("caller")))
    try:
        with mtls_connect(server.public, mesh.agent.roots(), caller) as conn:
            conn.send(b"let me in\n")
            got = conn.take(1)
    except (ssl.SSLError, ConnectionError):
        got = b""
    assert got == b"" and server.app.served == 0
    assert re.search("name constraints of intermediate 1", server.process.logged("did not prove a mesh identity.*").group())
