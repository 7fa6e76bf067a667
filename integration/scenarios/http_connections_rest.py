"""A connection on which a client makes no requests for now costs little, and is as good as new when it does again."""

import contextlib

import pytest

from mesh import Browser, Upstream, Web, dial, eventually

CONNECTIONS = 1000
# In bytes, for one on the outbound side.
COST = 12_000


@pytest.fixture
def pair(mesh):
    server = mesh.service("server", app=Web, proxy={"Config": {"protocol": "http"}})
    client = mesh.service("client", [Upstream(server.name, mesh.ports.take(), {"Config": {"protocol": "http"}})])
    return server, client


def private(process):
    with open(f"/proc/{process.pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Private_Dirty:"))


def test_idle_connections_are_small_and_wake_up(pair):
    _, client = pair
    with contextlib.ExitStack() as stack:
        browsers = [stack.enter_context(Browser(client.upstreams[0].port)) for _ in range(CONNECTIONS)]
        for browser in browsers[:50]:
            assert browser.ask().status == 200
        before = private(client.process)
        for browser in browsers[50:]:
            assert browser.ask().status == 200
        assert private(client.process) - before < (CONNECTIONS - 50) * COST
        for browser in browsers:
            assert browser.ask("/again", "POST", b"body").seen()["body"] == "body"
        for browser in browsers[:10]:
            assert [browser.ask("/more").status for _ in range(20)] == [200] * 20


def test_requests_that_come_at_once_are_all_answered(pair):
    _, client = pair
    request = b"POST /%d HTTP/1.1\r\nHost: shop\r\nContent-Length: 3\r\n\r\nabc"
    with dial(client.upstreams[0].port) as conn:
        for _ in range(5):
            conn.send(b"".join(request % number for number in range(20)))
            for number in range(20):
                length = 0
                assert conn.line().split()[1] == b"200"
                while line := conn.line().strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                assert b'"/%d"' % number in conn.take(length)


def test_a_resting_connection_ends_with_either_side(pair):
    server, client = pair
    with Browser(client.upstreams[0].port) as one, dial(client.upstreams[0].port) as other:
        assert one.ask().status == 200
        other.send(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n").line()
        assert other.finish().end() == "fin"
        client.process.signal(15)
        assert eventually(lambda: one.conn.sock.recv(1) == b"")
