"""A protocol that is set later than a connection was made: no client is left on a connection of the other kind."""

import time

import pytest

from mesh import Browser, Upstream, Web, ask, eventually

HTTP, TCP = {"Config": {"protocol": "http"}}, {"Config": {"protocol": "tcp"}}
REQUEST = b"GET /%d HTTP/1.1\r\nHost: shop\r\n\r\n"


def pair(mesh, config):
    server = mesh.service("server", app=Web, proxy=config)
    client = mesh.service("client", [Upstream(server.name, mesh.ports.take(), config)])
    eventually(lambda: ask(port(client)).status == 200)
    return server, client


def port(client):
    return client.upstreams[0].port


def change(service, config):
    """Of one side alone, without anything else."""
    service.proxy = config
    if service.upstreams:
        service.upstreams[0].more, service.proxy = config, {}
    service.register()


def is_http(client):
    """Whether the upstream listener adds what it adds to requests."""
    return "x-request-id" in dict(ask(port(client)).seen()["headers"])


def said(conn):
    """The head of a response, when all of it has come."""
    head = {}
    assert conn.line().split()[1] == b"200"
    while line := conn.line().strip():
        name, _, value = line.partition(b":")
        head[name.lower()] = value.strip()
    assert b'"path"' in conn.take(int(head[b"content-length"]))
    return head


def test_config_entries_that_come_after_a_connection_end_it(mesh):
    server = mesh.service("server", app=Web)
    client = mesh.service("client", [server])
    eventually(lambda: ask(port(client)).status == 200)
    idle, used = client.dial(), client.dial()
    said(used.send(REQUEST % 1))
    assert not is_http(client)
    mesh.agent.write("service-defaults", server.name, Protocol="http")
    assert [conn.end() for conn in (idle, used)] == ["fin", "fin"]
    eventually(lambda: is_http(client))
    with Browser(port(client)) as browser:
        assert [browser.ask().status for _ in range(3)] == [200] * 3


@pytest.mark.parametrize("side", ["public", "upstream"])
def test_a_request_on_a_connection_of_bytes_gets_its_answer_before_that_ends(mesh, side):
    server, client = pair(mesh, TCP)
    conns = [client.dial() for _ in range(4)]
    for conn in conns:
        said(conn.send(REQUEST % 1))
    server.app.delay = 1
    for conn in conns[:2]:
        conn.send(REQUEST % 2)
    eventually(lambda: server.app.waiting == 2)
    change(server if side == "public" else client, HTTP)
    for conn in conns[:2]:
        said(conn)
    assert [conn.end() for conn in conns] == ["fin"] * 4
    server.app.delay = 0
    eventually(lambda: ask(port(client)).status == 200)


@pytest.mark.parametrize("side", ["public", "upstream"])
def test_a_connection_of_bytes_that_never_rests_ends_too(mesh, side):
    server, client = pair(mesh, TCP)
    conn = client.dial()
    change(server if side == "public" else client, HTTP)
    deadline = time.monotonic() + 30
    with pytest.raises((ConnectionError, AssertionError, IndexError)):
        while time.monotonic() < deadline:
            said(conn.send(REQUEST % 1))
    assert time.monotonic() < deadline


def test_requests_end_and_connections_of_them_with_it_when_a_service_speaks_http_no_more(mesh):
    server, client = pair(mesh, HTTP)
    idle, used, busy, unused = (client.dial() for _ in range(4))
    for conn in (idle, used, busy):
        said(conn.send(REQUEST % 1))
    server.app.delay = 3
    busy.send(REQUEST % 2)
    eventually(lambda: server.app.waiting == 1)
    change(server, TCP)
    change(client, TCP)
    assert [conn.end() for conn in (idle, used, unused)] == ["fin"] * 3
    assert said(busy)[b"connection"] == b"close"
    assert busy.end() == "fin"
    server.app.delay = 0
    eventually(lambda: not is_http(client))


@pytest.mark.parametrize("side", ["public", "upstream"])
def test_a_kind_that_flaps_leaves_no_client_on_the_other(mesh, side):
    """As the first answers of an agent that has just started may."""
    server, client = pair(mesh, TCP)
    for config in (HTTP, TCP, HTTP, TCP):
        conn = client.dial()
        said(conn.send(REQUEST % 1))
        change(server if side == "public" else client, config)
        assert conn.end() == "fin"
        eventually(lambda: ask(port(client)).status == 200)
