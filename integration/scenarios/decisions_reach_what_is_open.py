"""A deny ends what is open, wherever it is open: on a listener that has moved, and while a sidecar drains."""

import signal

from mesh import eventually
from mesh.ports import is_listening


def opened(mesh, *words, count=3):
    server = mesh.service("server", sidecar=None)
    server.start("lictor", *words)
    client = mesh.service("client", [server])
    client.eventually_reaches()
    conns = [client.dial() for _ in range(count)]
    for conn in conns:
        assert conn.ask(b"open") == b"open"
    return server, client, conns


def move(server):
    """Has the public listener at another port, and gives that."""
    before, server.public = server.public, server.mesh.ports.take()
    server.register()
    eventually(lambda: is_listening(server.public) and not is_listening(before), what="the public listener has moved")


def test_connections_of_a_listener_that_has_moved_see_a_deny(mesh):
    server, client, conns = opened(mesh)
    move(server)
    assert [conn.ask(b"still open") for conn in conns] == [b"still open"] * len(conns)
    mesh.deny(client, server)
    assert [conn.end(within=2) for conn in conns] == ["fin"] * len(conns)


def test_a_deny_during_a_drain_is_applied_at_once(mesh):
    server, client, conns = opened(mesh, "-drain-time", "60s")
    other = mesh.service("other", [server])
    with other.dial() as kept:
        assert kept.ask(b"open") == b"open"
        server.process.signal(signal.SIGTERM)
        eventually(lambda: not is_listening(server.public), what="nothing new is accepted")
        mesh.deny(client, server)
        assert [conn.end(within=2) for conn in conns] == ["fin"] * len(conns)
        assert kept.ask(b"still open") == b"still open"


def test_one_denied_connection_is_one_line_also_where_a_session_was_kept(mesh):
    server, client, conns = opened(mesh, count=20)
    for conn in conns:
        conn.finish().end()
    mesh.deny(client, server)
    client.eventually_refused()
    assert server.process.count(rf"Connection denied[^\n]*svc/{client.name}|svc/{client.name}[^\n]*Connection denied") == 1
