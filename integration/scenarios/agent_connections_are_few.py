"""The agent's connections belong to all programs of a host: a sidecar holds few, gives way, and still hears of a denial at once."""

import contextlib
import http.client
import time

import pytest

from mesh import ApiError, Authority, Gate, eventually, stays
from mesh.ports import is_listening

AT_REST, AT_START = 6, 8


def gated(mesh, service, *words, port=None):
    """Its sidecar, which sees the agent through a gate that counts connections."""
    gate = mesh.keep(Gate(mesh.ports.take(), port or mesh.agent.port))
    service.start("lictor", "-http-addr", f"127.0.0.1:{gate.port}", *words)
    return gate


@pytest.mark.parametrize("upstreams", [0, 1, 3, 60])
def test_few_connections_are_held_whatever_the_number_of_upstreams(mesh, upstreams):
    client = mesh.service("client", [mesh.name("absent") for _ in range(upstreams)], sidecar=None)
    gate = gated(mesh, client)
    time.sleep(4)
    stays(lambda: gate.open() <= AT_REST, 4)
    assert gate.most_open <= AT_START


@pytest.mark.parametrize("connections", [2, 3, 4, 8])
def test_a_denial_cuts_open_connections_within_a_second(mesh, connections):
    server = mesh.service("server", [mesh.name("absent") for _ in range(100)], sidecar=None)
    client = mesh.service("client", [server])
    gated(mesh, server, "-agent-connections", str(connections))
    client.eventually_reaches()
    for _ in range(3):
        with client.dial() as conn:
            assert conn.ask(b"open") == b"open"
            undo = mesh.deny(client, server)
            assert conn.end(within=1) == "fin"
        undo()
        client.eventually_reaches()


def test_too_few_connections_are_refused_with_the_number_that_is_needed(mesh):
    server = mesh.service("server", sidecar=None)
    process = mesh.proxy("-sidecar-for", server.id, "-agent-connections", "1")
    assert process.wait() == 1 and "2 are needed" in process.err()


def test_more_sidecars_than_the_agent_has_connections_for_leave_some_to_others(own_mesh):
    """Ten sidecars want forty connections, and there are thirty."""
    mesh = own_mesh({"limits": {"http_max_conns_per_client": 30}})

    def patiently(do):
        def attempt():
            with contextlib.suppress(ApiError, http.client.HTTPException, OSError):
                return [do()]
        return eventually(attempt, 30)[0]

    servers = [mesh.service(f"s{number}", [mesh.name("absent") for _ in range(3)], sidecar=None) for number in range(10)]
    client = mesh.service("client", [servers[0]], sidecar=None)
    for server in [*servers, client]:
        server.start(ready=False)
    for server in [*servers, client]:
        # Those that came first let go of connections within a minute.
        eventually(lambda: is_listening(server.public), 120)
    eventually(client.reaches, 60)

    def free():
        with contextlib.suppress(ApiError, http.client.HTTPException, OSError):
            return mesh.agent.get("/v1/status/leader")

    def leave_some():
        for _ in range(100):
            if not free():
                return False
            time.sleep(0.02)
        return True
    # Those that block let go within a minute of a refusal. Now and then one of them tries whether there is room again.
    eventually(leave_some, 180, every=1)
    with client.dial() as conn:
        assert conn.ask(b"open") == b"open"
        patiently(lambda: mesh.deny(client, servers[0]))
        assert conn.end(within=1) == "fin"


@pytest.fixture
def tls_mesh(own_mesh, ports, tmp_path):
    """An agent that wants a client certificate of its `https` port's clients."""
    authority = Authority("agents", "Agent CA")
    server = authority.issue(dns=("consul.example",))
    for name, text in (("ca.pem", authority.cert_pem), ("server.pem", server.cert_pem), ("server-key.pem", server.key_pem)):
        (tmp_path / name).write_text(text)
    https = ports.take()
    mesh = own_mesh()
    mesh.agent.process.end()
    mesh.agent.configure({
        "ca_file": f"{tmp_path}/ca.pem", "cert_file": f"{tmp_path}/server.pem", "key_file": f"{tmp_path}/server-key.pem",
        "verify_incoming_https": True, "ports": {"https": https},
    })
    mesh.agent.start()
    mesh.https, mesh.files, mesh.authority = https, tmp_path, authority
    return mesh


def show(directory, identity):
    (directory / "client.pem").write_text(identity.cert_pem)
    (directory / "client-key.pem").write_text(identity.key_pem)


def over_tls(mesh, port):
    """Words for a sidecar that reaches the agent by TLS at `port`."""
    return ["-http-addr", f"https://127.0.0.1:{port}", "-tls-server-name", "consul.example", "-ca-file", f"{mesh.files}/ca.pem",
            "-client-cert", f"{mesh.files}/client.pem", "-client-key", f"{mesh.files}/client-key.pem"]


def test_with_https_all_queries_share_one_connection(tls_mesh):
    mesh = tls_mesh
    show(mesh.files, mesh.authority.issue(dns=("client",)))
    server = mesh.service("server", [mesh.name("absent") for _ in range(60)], sidecar=None)
    client = mesh.service("client", [server])
    gate = mesh.keep(Gate(mesh.ports.take(), mesh.https))
    server.start("lictor", *over_tls(mesh, gate.port))
    client.eventually_reaches()
    time.sleep(2)
    assert gate.most_open == 1
    with client.dial() as conn:
        assert conn.ask(b"open") == b"open"
        mesh.deny(client, server)
        assert conn.end(within=1) == "fin"
    # It is made anew when it breaks.
    gate.mode = "refuse"
    time.sleep(1)
    gate.mode = "pass"
    mesh.allow(client, server)
    client.eventually_reaches(within=40)


def test_files_for_tls_with_the_agent_are_followed(tls_mesh):
    """The agent comes to trust another authority, and the files change as a renewal writes them: one after the other."""
    mesh = tls_mesh
    show(mesh.files, mesh.authority.issue(dns=("client",)))
    server = mesh.service("server", sidecar=None)
    client = mesh.service("client", [server])
    server.start("lictor", *over_tls(mesh, mesh.https))
    client.eventually_reaches()
    other = Authority("agents", "Other CA")
    renewed, agent = other.issue(dns=("client",)), other.issue(dns=("consul.example",))
    (mesh.files / "client.pem").write_text(renewed.cert_pem)
    server.process.logged("the files read before stay in use", within=20)
    # With half of the pair, what was read before still serves.
    mesh.deny(client, server)
    client.eventually_refused()
    mesh.allow(client, server)
    client.eventually_reaches()
    mesh.agent.process.end()
    for name, text in (("ca.pem", other.cert_pem), ("server.pem", agent.cert_pem), ("server-key.pem", agent.key_pem)):
        (mesh.files / name).write_text(text)
    (mesh.files / "client-key.pem").write_text(renewed.key_pem)
    mesh.agent.start()
    for service in (server, client):
        service.register()
    client.eventually_reaches(within=60)
    mesh.deny(client, server)
    client.eventually_refused(within=60)


def test_another_cause_of_a_failure_is_logged_once(tls_mesh):
    mesh = tls_mesh
    show(mesh.files, mesh.authority.issue(dns=("client",)))
    server = mesh.service("server", sidecar=None)
    server.start("lictor", *over_tls(mesh, mesh.https))
    mesh.agent.process.end()
    server.process.logged(r"WARN.*cannot reach the agent", within=30)
    # It is back, and trusts another authority than the one that made our certificate.
    other = Authority("agents", "Other CA")
    agent = mesh.authority.issue(dns=("consul.example",))
    (mesh.files / "agent-ca.pem").write_text(other.cert_pem)
    (mesh.files / "server.pem").write_text(agent.cert_pem)
    (mesh.files / "server-key.pem").write_text(agent.key_pem)
    mesh.agent.configure({"ca_file": f"{mesh.files}/agent-ca.pem"})
    mesh.agent.start()
    server.process.logged(r"WARN.*fatal alert", within=60)
    time.sleep(10)
    assert server.process.text().count("fatal alert") <= 3, server.process.text()
