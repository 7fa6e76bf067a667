"""Clients outside of the mesh can neither fill the log nor take the places of mesh peers."""

import contextlib
import time

import pytest

from mesh import Browser, Web, ask, dial, eventually, mtls_connect, mtls_server
from mesh.identity import client_context
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


def test_many_requests_for_what_is_not_exposed_are_a_few_lines(mesh):
    port = mesh.ports.take()
    service = mesh.service("exposing", app=Web, sidecar=None, proxy={"Config": {"protocol": "http"}})
    service.proxy["Expose"] = {"Paths": [{"Path": "/health", "LocalPathPort": service.port, "ListenerPort": port}]}
    service.register().start()
    eventually(lambda: is_listening(port), what="the exposed port is listened on")
    with Browser(port) as browser:
        assert {browser.ask("/secret").status for _ in range(MANY)} == {404}
    service.process.logged("Refused again")
    assert 1 <= service.process.count("Request for an exposed path failed") < 5


@pytest.mark.parametrize("protocol, line", [("tcp", "failed to dial the upstream"), ("http", "Request failed")])
def test_a_local_app_that_tries_again_and_again_writes_a_few_lines(mesh, protocol, line):
    missing = mesh.name("missing")
    mesh.agent.write("service-defaults", missing, Protocol=protocol)
    client = mesh.service("client", [missing], app=None)
    port = client.upstreams[0].port
    for _ in range(MANY):
        assert ask(port).status == 503 if protocol == "http" else dial(port).end() == "fin"
    client.process.logged("Failed again")
    assert 1 <= client.process.count(line) < 5


def test_an_instance_that_is_another_service_is_told_of_now_and_then(mesh):
    server = mesh.service("server", app=None, sidecar=None)
    impostor = mesh.keep(mtls_server(server.public, mesh.agent.roots(), mesh.agent.leaf(mesh.name("impostor"))))
    client = mesh.service("client", [server], app=None)
    eventually(lambda: client.refused() and len(impostor.failures) + impostor.ran > 30, 60, "it was tried many times")
    assert 1 <= client.process.count("An instance was refused") < 15


def test_an_app_that_is_down_is_told_of_now_and_then(mesh):
    server = mesh.service("server", app=None)
    name = mesh.name("client")
    context = client_context(mesh.agent.roots(), mesh.agent.leaf(name))
    for _ in range(100):
        with contextlib.suppress(OSError), mtls_connect(server.public, None, context=context, sni=mesh.agent.sni(server.name)) as conn:
            conn.end()
    server.process.logged("Refused again")
    assert 1 <= server.process.count("failed to dial the local app") < 5


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
