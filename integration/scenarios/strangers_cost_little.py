"""Whoever reaches a port can neither fill the log nor take the places of those who belong to the mesh."""

import contextlib
import time

from mesh import Web, ask, dial, eventually
from mesh.ports import is_listening

MANY = 300


def test_many_refused_connections_are_a_few_lines_with_their_number(mesh):
    server = mesh.service("server")
    for _ in range(MANY):
        with dial(server.public) as conn:
            conn.send(b"GET / HTTP/1.0\r\n\r\n").end()
    counted = server.process.logged(r"Refused again[^\n]*count=(\d+)|count=(\d+)[^\n]*Refused again")
    assert int(counted[1] or counted[2]) > 0
    assert 1 <= server.process.count(r"did not prove a mesh identity") < 5


def test_many_denied_connections_are_a_few_lines(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    mesh.deny(client, server)
    client.eventually_refused()
    for _ in range(100):
        with contextlib.suppress(ConnectionError):
            client.dial().end()
    server.process.logged("Refused again")
    assert server.process.count("Connection denied") < 5


def test_silent_clients_do_not_use_up_max_inbound_connections(mesh):
    server = mesh.service("server", proxy={"Config": {"max_inbound_connections": 2}})
    client = mesh.service("client", [server])
    silent = [mesh.dial(server.public) for _ in range(10)]
    client.eventually_reaches()
    # Connections count until both of their ends have been passed on.
    eventually(lambda: server.app.open() == 0, what="no connection is left")
    with client.dial() as one, client.dial() as two:
        assert one.ask(b"one") == b"one" and two.ask(b"two") == b"two"
        client.eventually_refused()
    assert all(conn.is_open() for conn in silent)


def test_silent_clients_do_not_use_up_an_exposed_listener(mesh):
    port = mesh.ports.take()
    service = mesh.service("exposing", app=Web, sidecar=None, proxy={"Config": {"protocol": "http"}})
    service.proxy["Expose"] = {"Paths": [{"Path": "/health", "LocalPathPort": service.port, "ListenerPort": port}]}
    service.register().start()
    eventually(lambda: is_listening(port), what="the exposed port is listened on")
    silent = [mesh.dial(port) for _ in range(400)]
    assert ask(port, "/health").status == 200
    # The oldest made room for it, and the others are not waited for either.
    assert silent[0].end(5) in ("fin", "reset")
    started = time.monotonic()
    assert silent[-1].end(20) in ("fin", "reset") and time.monotonic() - started < 15
    with dial(port) as conn:
        conn.send(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Unfinished: ")
        assert conn.end(20) in ("fin", "reset")
