"""The agent goes away, comes back, answers nonsense or goes back in time: traffic goes on, and is up to date afterwards."""

import pytest

from mesh import Echo, Gate, eventually, stays


def gated_pair(mesh):
    """Server and client that see the agent only through a gate."""
    gate = mesh.keep(Gate(mesh.ports.take(), mesh.agent.port))
    env = {"CONSUL_HTTP_ADDR": f"127.0.0.1:{gate.port}"}
    server = mesh.service("server", sidecar=None)
    server.start(env=env)
    client = mesh.service("client", [server], sidecar=None)
    client.start(env=env)
    client.eventually_reaches()
    return gate, server, client


def test_traffic_goes_on_without_an_agent_and_its_restart_is_followed(own_mesh):
    mesh = own_mesh(persist=True)
    server = mesh.service("server", check="alias")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    with client.dial() as untouched:
        assert untouched.ask(b"before") == b"before"
        mesh.agent.kill()
        stays(client.reaches, 2)
        mesh.agent.start()
        client.eventually_reaches()
        mesh.deny(client, server)
        client.eventually_refused(within=40)
        assert untouched.end() == "fin"
    mesh.allow(client, server)
    client.eventually_reaches()


def test_an_agent_that_lost_everything_harms_nothing(own_mesh):
    """A development agent forgets all, its root too: nothing it says fits, until the services are registered again."""
    mesh = own_mesh()
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    with client.dial() as untouched:
        assert untouched.ask(b"before") == b"before"
        mesh.agent.kill()
        mesh.agent.start()
        for service in (server, client):
            service.register()
        client.eventually_reaches(within=60)
        mesh.deny(client, server)
        client.eventually_refused(within=60)
    assert server.process.running() and client.process.running()


def test_what_changed_while_the_agent_was_away_is_caught_up_with(mesh):
    gate, server, client = gated_pair(mesh)
    other = mesh.service("other")
    with client.dial() as conn:
        assert conn.ask(b"open") == b"open"
        gate.mode = "refuse"
        mesh.deny(client, server)
        added = client.add_upstream(other)
        client.register()
        stays(client.reaches, 2)
        gate.mode = "pass"
        client.eventually_refused(within=40)
        assert conn.end() == "fin"
    eventually(lambda: mesh.dial(added.port).ask(b"hello") == b"hello", 40)


@pytest.mark.parametrize("mode", ["refuse", "hang", "fault", "broken", "rubbish"])
def test_traffic_does_not_mind_an_agent_that_would(mesh, mode):
    gate, server, client = gated_pair(mesh)
    with client.dial() as untouched:
        assert untouched.ask(b"before") == b"before"
        gate.mode = mode
        stays(client.reaches, 3)
        gate.mode = "pass"
        mesh.deny(client, server)
        client.eventually_refused(within=60)
        assert untouched.end() == "fin"


def test_an_agent_whose_indexes_go_back_is_followed(own_mesh):
    """A restored snapshot takes every index back: a cursor of before would wait for ever."""
    mesh = own_mesh()
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    snapshot = mesh.agent.raw("/v1/snapshot")
    for number in range(50):
        mesh.agent.put(f"/v1/kv/filler/{number}", "x")
        mesh.agent.intention(f"nobody-{number}", server.name, "allow")
    undo = mesh.deny(client, server)
    client.eventually_refused()
    undo()
    client.eventually_reaches()
    mesh.agent.put("/v1/snapshot", snapshot)
    mesh.deny(client, server)
    client.eventually_refused(within=60)


def test_a_sidecar_waits_for_an_agent_that_starts_late(start_agent, mesh):
    name, port, public = mesh.name("server"), mesh.ports.take(), mesh.ports.take()
    agent = start_agent({"services": [{
        "id": name, "name": name, "port": port,
        "connect": {"sidecar_service": {"port": public, "check": {"name": "sidecar", "alias_service": name}}},
    }]}, start=False, label="late")
    late = mesh.on(agent)
    late.keep(Echo(port))
    process = late.proxy("-sidecar-for", name)
    process.logged(rf"127\.0\.0\.1:{agent.port}")
    stays(process.running, 1)
    agent.start()
    client = late.service("client", [name])
    client.eventually_reaches(within=60)


def test_few_connections_to_the_agent_are_held(mesh):
    """The agent serves 200 to all programs of a host together."""
    gate = mesh.keep(Gate(mesh.ports.take(), mesh.agent.port))
    servers = [mesh.name("server") for _ in range(60)]
    client = mesh.service("client", servers, sidecar=None)
    client.start(env={"CONSUL_HTTP_ADDR": f"127.0.0.1:{gate.port}"})
    last = mesh.service("last")
    added = client.add_upstream(last)
    client.register()
    eventually(lambda: mesh.dial(added.port).ask(b"hello") == b"hello", 60)
    assert gate.most_open <= 32
