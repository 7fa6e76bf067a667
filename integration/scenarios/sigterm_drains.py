"""The end of a sidecar: what is open may finish, for a while, and a second signal ends at once."""

import signal
import time

import pytest

from mesh import eventually
from mesh.ports import is_listening


def pair(mesh, *words):
    server = mesh.service("server", sidecar=None)
    server.start("lictor", *words)
    client = mesh.service("client", [server], sidecar=None)
    client.start("lictor", *words)
    client.eventually_reaches()
    return server, client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("side", ["server", "client"])
def test_open_connections_finish_and_none_are_accepted(mesh, number, side):
    server, client = pair(mesh, "-drain-time", "60s")
    with client.dial() as conn:
        assert conn.ask(b"before") == b"before"
        drained = server if side == "server" else client
        drained.process.signal(number)
        port = server.public if side == "server" else client.upstreams[0].port
        eventually(lambda: not is_listening(port), 5, "nothing new is accepted")
        assert conn.ask(b"during") == b"during"
        assert drained.process.running()
        assert conn.finish().end() == "fin"
    # Nothing is left to wait for: the end comes long before the drain time does.
    assert drained.process.wait(10) == 0


def test_what_is_still_open_is_closed_after_the_drain_time(mesh):
    server, client = pair(mesh, "-drain-time", "2s")
    with client.dial() as conn:
        assert conn.ask(b"before") == b"before"
        server.process.signal(signal.SIGTERM)
        assert conn.ask(b"during") == b"during"
        assert conn.end(10) in ("fin", "reset")
    assert server.process.wait(5) == 0


def test_a_second_signal_ends_at_once(mesh):
    server, client = pair(mesh, "-drain-time", "60s")
    with client.dial() as conn:
        assert conn.ask(b"before") == b"before"
        server.process.signal(signal.SIGTERM)
        eventually(lambda: not is_listening(server.public), 5)
        server.process.signal(signal.SIGTERM)
        assert server.process.wait(3) == 0
        assert conn.end(3) in ("fin", "reset")


def test_an_idle_sidecar_ends_at_once(mesh):
    server, client = pair(mesh)
    eventually(lambda: server.app.open() == 0)
    started = time.monotonic()
    assert server.process.stop() == 0 and client.process.stop() == 0
    assert time.monotonic() - started < 5


def test_a_sidecar_that_waits_for_its_agent_ends_when_told(mesh):
    process = mesh.proxy("-sidecar-for", "whatever", env={"CONSUL_HTTP_ADDR": f"127.0.0.1:{mesh.ports.take()}"})
    process.logged(r"127\.0\.0\.1")
    assert process.stop(5) == 0
