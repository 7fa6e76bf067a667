"""Changes of a mesh's identities in the long run: another cluster, clocks that jump, leaves that last an hour."""

import pytest

from mesh import eventually
from mesh.clock import Clock

LEAVES_OF_AN_HOUR = {"connect": {"ca_provider": "consul", "ca_config": {"leaf_cert_ttl": "1h"}}}


def test_the_cluster_is_made_anew_under_running_sidecars(own_mesh):
    """It has another trust domain and other roots, and counts its changes from the beginning."""
    mesh = own_mesh()
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    before = mesh.agent.trust_domain
    mesh.agent.kill()
    # With what they know they go on.
    assert client.reaches()
    mesh.agent.start()
    assert mesh.agent.trust_domain != before
    for service in (server, client):
        service.register()
    fresh = mesh.service("fresh", [server])
    # A sidecar that was started in the new cluster knows nothing else, so both sides have moved when it gets through.
    fresh.eventually_reaches(within=60)
    eventually(lambda: all(client.reaches() for _ in range(5)), 60, "the old sidecar is of the new cluster")
    to_fresh = client.add_upstream(fresh)
    client.register()
    client.eventually_reaches(fresh, within=60)
    assert to_fresh


@pytest.mark.parametrize("jump", ["+62m", "-62m"])
def test_a_clock_that_jumps_an_hour_and_back(own_mesh, jump):
    """While it is wrong every certificate is out of its time, and the log says so; then all is well at once."""
    mesh = own_mesh(LEAVES_OF_AN_HOUR)
    clock = Clock(mesh.directory)
    server = mesh.service("server", sidecar=None)
    server.start(env=clock.env)
    client = mesh.service("client", [server])
    client.eventually_reaches()
    clock.set(jump)
    client.eventually_refused()
    server.process.logged("expired" if jump.startswith("+") else "not valid yet")
    clock.set("+0")
    client.eventually_reaches()
    # Half an hour is nothing to it.
    clock.set("+30m")
    assert all(client.reaches() for _ in range(5))
