"""Consul finds a service whatever the case of its name, and its certificate spells it as it was registered."""

import pytest


@pytest.mark.parametrize("other", ["lictor", "consul", "envoy"])
def test_an_upstream_in_another_case(mesh, other):
    if other == "consul":
        mesh.agent.needs((1, 9), "a built-in proxy that finds its service in any case")
    server = mesh.service("PayApi", sidecar=None)
    if other == "envoy":
        mesh.envoy(server)
    else:
        server.start(other)
    for spelled in (server.name.lower(), server.name.upper(), server.name):
        client = mesh.service("client", [spelled])
        client.eventually_reaches()
        with client.dial() as conn:
            assert conn.ask(b"hello") == b"hello"


def test_no_more_than_the_case_may_differ(mesh):
    """Whoever registers an instance does not say whom its callers trust."""
    other = mesh.service("other")
    server = mesh.service("server", app=None, sidecar=None)
    # An instance of the server whose port is that of another service's sidecar.
    server.public = other.public
    server.register()
    client = mesh.service("client", [server.name.upper()])
    assert client.refused()
    line = client.process.logged(r"[^\n]*was refused[^\n]*").group()
    assert f"svc/{other.name}" in line, line
