"""The log of the client's sidecar says why a TCP connection was denied, as well as that can be known there."""

import json
import time

import pytest

from mesh import Upstream, dial, eventually
from mesh.apps import App

CERTAIN = "Connection denied by the destination"
PROBABLE = "Connection probably denied by the destination"
NO_TUNNEL = {"Config": {"lictor_tunnel": False}}
KINDS = ["lictor", "lictor without tunnel", "consul", "envoy", "envoy with TLS 1.3"]


class Closing(App):
    """Ends each connection without a byte."""

    def serve(self, conn):
        conn.close()


class Sink(App):
    """Takes what comes and says nothing."""

    def serve(self, conn):
        conn.rest()


def serve(server, kind, denied=()):
    """Starts a sidecar of this kind. Envoy has no agent to follow: it denies who is named."""
    if kind.startswith("envoy"):
        server.mesh.envoy(server, denied=denied, tls="TLSv1_3" if "1.3" in kind else None)
    else:
        server.start(kind.split()[0])


def server_of(mesh, kind, **how):
    server = mesh.service("server", sidecar=None, proxy=NO_TUNNEL if kind == "lictor without tunnel" else None, **how)
    serve(server, kind)
    return server


def unstarted_pair(mesh, kind):
    """Its client is denied from the first connection on: a session that is resumed gets past a deny in some builds of Consul's proxy."""
    server = mesh.service("server", sidecar=None, proxy=NO_TUNNEL if kind == "lictor without tunnel" else None)
    client = mesh.service("client", [server], sidecar=None)
    mesh.deny(client, server)
    serve(server, kind, [client.name])
    return server, client


def denied_pair(mesh, kind):
    server, client = unstarted_pair(mesh, kind)
    client.start()
    assert client.eventually_refused()
    return server, client


def problems(client, reason):
    def found():
        return [each for each in json.loads(client.admin("/status").body)["problems"] if each["reason"] == reason]
    return eventually(found, what=f"a problem {reason}")


def check(client, server, what, reason):
    """The line in the log, with who, to whom, where and why, and the same in the status. Returns the cause."""
    def logged():
        found = client.process.look(rf"[^\n]*{what}[^\n]*")
        # A sidecar that has just started may break off handshakes at first, which is another reason.
        return found or (client.refused() and None)
    line = eventually(logged, what=f"a line like {what}").group()
    assert "WARN" in line and server.name in line and f"127.0.0.1:{server.public}" in line and f"/svc/{client.name}" in line, line
    # Others with another cause may have come since.
    problem = eventually(lambda: next((each for each in problems(client, reason) if each["cause"] in line.replace('\\"', '"')), None))
    assert (problem["direction"], problem["listener"]) == ("outbound", server.name) and problem["remedy"]
    return problem["cause"]


def test_between_two_of_ours_the_reason_is_certain_and_the_rule_is_kept_back(mesh):
    server, client = denied_pair(mesh, "lictor")
    cause = check(client, server, CERTAIN, "DeniedByDestination")
    assert "its intentions do not allow this service" in cause and "rule" not in cause
    assert "precedence" in server.process.text() and "precedence" not in client.process.text()
    assert PROBABLE not in client.process.text()


def test_the_rule_is_shown_where_the_destination_allows_it(mesh):
    server, client = denied_pair(mesh, "lictor")
    server.proxy = {"Config": {"lictor_share_denial_rule": True}}
    server.register()
    eventually(lambda: client.refused() and f"{client.name} => {server.name} (deny" in client.process.text(), what="the rule is named")
    assert f"{client.name} => {server.name} (deny" in problems(client, "DeniedByDestination")[0]["cause"]


def test_a_deny_that_ends_an_open_connection_is_told(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    assert "denied" not in client.process.text()
    with client.dial() as conn:
        assert conn.ask(b"open") == b"open"
        mesh.deny(client, server)
        assert conn.end(within=5) == "fin"
    assert "its intentions do not allow this service" in check(client, server, CERTAIN, "DeniedByDestination")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_without_a_tunnel_it_is_probable(mesh, kind):
    server, client = denied_pair(mesh, kind)
    cause = check(client, server, PROBABLE, "ProbablyDenied")
    assert "probably denied" in cause and CERTAIN not in client.process.text()


def test_what_the_tunnel_is_turned_off_for_is_probable(mesh):
    server = mesh.service("server")
    upstream = Upstream(server.name, mesh.ports.take(), NO_TUNNEL)
    client = mesh.service("client", [upstream])
    client.eventually_reaches()
    mesh.deny(client, server)
    client.eventually_refused()
    check(client, server, PROBABLE, "ProbablyDenied")


def test_envoy_denies_when_the_first_bytes_come(mesh):
    server, client = unstarted_pair(mesh, "envoy")
    client.start()
    with client.dial() as conn:
        # Longer than a sidecar may take that denies at once.
        time.sleep(1.5)
        assert conn.is_open()
        conn.send(b"hello\n")
        assert conn.end(within=5) in ("fin", "reset")
    check(client, server, PROBABLE, "ProbablyDenied")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_app_that_closes_at_once_is_not_called_denied_for_sure(mesh, kind):
    server = server_of(mesh, kind, app=Closing)
    client = mesh.service("client", [server])
    assert client.eventually_refused()
    cause = check(client, server, PROBABLE, "ProbablyDenied")
    assert "its app took no connection or closed it at once" in cause and CERTAIN not in client.process.text()


def test_between_two_of_ours_an_app_that_closes_at_once_is_not_called_denied_at_all(mesh):
    server = server_of(mesh, "lictor", app=Closing)
    client = mesh.service("client", [server])
    eventually(lambda: client.refused() and server.app.served)
    assert "denied" not in client.process.text()


@pytest.mark.parametrize("kind", KINDS)
def test_connections_that_are_allowed_leave_no_such_line(mesh, kind):
    server, sink = server_of(mesh, kind), server_of(mesh, kind, app=Sink)
    client = mesh.service("client", [server, sink])
    client.eventually_reaches(server)
    for _ in range(5):
        assert client.reaches(server)
    # One that says nothing, one whose end comes with its words, one that gets no answer, and one that breaks off.
    client.dial(server).close()
    with client.dial(server) as conn:
        # The built-in proxy ends both directions at an end of one.
        conn.send(b"at once").finish()
        conn.rest()
    with client.dial(sink) as conn:
        conn.send(b"told").finish()
        assert conn.rest() == b""
    conn = client.dial(sink).send(b"told")
    conn.reset()
    eventually(lambda: not sink.app.open() and not server.app.open())
    assert client.reaches(server)
    assert "denied" not in client.process.text(), client.process.text()
    assert not json.loads(client.admin("/status").body)["problems"]


def test_denials_are_counted_rather_than_logged_one_by_one(mesh):
    server, client = denied_pair(mesh, "lictor")
    port = client.upstreams[0].port
    for _ in range(100):
        with dial(port) as conn:
            conn.end(5)
    client.process.logged(r"Failed again[^\n]*its intentions do not allow this service")
    assert client.process.count(CERTAIN) <= 5
    assert len(problems(client, "DeniedByDestination")) >= 100


def test_the_access_log_says_why(own_mesh):
    mesh = own_mesh()
    mesh.agent.needs((1, 15), "AccessLogs of proxy-defaults")
    mesh.agent.write("proxy-defaults", "global", AccessLogs={"Enabled": True, "TextFormat": "why: %CONNECTION_TERMINATION_DETAILS%"})
    for kind, words in (("lictor", "its intentions do not allow this service"), ("lictor without tunnel", "probably denied")):
        _, client = denied_pair(mesh, kind)
        eventually(lambda: any(line.startswith("why: ") and words in line for line in client.process.out().splitlines()))
