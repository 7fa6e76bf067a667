"""Two sidecars of ours carry one connection after another on the same mTLS session, each judged by itself."""

import signal
import threading
import time

import pytest

from mesh import Authority, Churn, Upstream, eventually

CONNECTIONS = 200
LISTEN, TIME_WAIT = "0A", "06"


def ends(port, but=(LISTEN,)):
    """The other ends of a local port's connections, those included that were closed within the last minute."""
    wanted, found = f":{port:04X}", set()
    with open("/proc/net/tcp") as lines:
        for line in lines:
            _, local, remote, state, _ = line.split(None, 4)
            if state not in but:
                found |= {other for one, other in ((local, remote), (remote, local)) if one.endswith(wanted)}
    return found


def open_sessions(service):
    return ends(service.public, (LISTEN, TIME_WAIT))


class Sessions:
    """Counts the sessions that are made with a service meanwhile."""

    def __init__(self, service):
        self._port, self._before, self._seen = service.public, ends(service.public), set()

    def look(self):
        """Notes those that are there now: one that ends with a reset leaves nothing to be counted."""
        self._seen |= ends(self._port) - self._before

    def count(self):
        self.look()
        return len(self._seen)


def pair(mesh, **how):
    server = mesh.service("server", **how)
    client = mesh.service("client", [server])
    client.eventually_reaches()
    return server, client


def test_many_connections_take_few_sessions(mesh):
    server, client = pair(mesh)
    served, made = server.app.served, Sessions(server)
    for _ in range(CONNECTIONS):
        assert client.reaches()
    assert server.app.served == served + CONNECTIONS
    # Each thread of the client's sidecar has its own.
    assert made.count() < CONNECTIONS / 4


def test_nobody_keeps_a_session_for_long(mesh):
    server, client = pair(mesh)
    conns = [client.dial() for _ in range(300)]
    for conn in conns:
        assert conn.ask(b"open") == b"open"
    for conn in conns:
        conn.close()
    eventually(lambda: server.app.open() == 0, 2, "the app's side ends with the connections and not with the sessions")
    eventually(lambda: not open_sessions(server), 8, "no session is left")
    assert client.reaches()


def test_a_deny_cuts_the_open_connection_and_refuses_the_next_on_a_session_that_was_kept(mesh):
    server, client = pair(mesh)
    with client.dial() as conn:
        assert conn.ask(b"open") == b"open"
        assert all(client.reaches() for _ in range(10))
        undo = mesh.deny(client, server)
        assert conn.end(within=1) == "fin"
    served = server.app.served
    assert client.refused() == "fin" and client.refused() == "fin"
    assert server.app.served == served
    undo()
    client.eventually_reaches(within=1)


def test_the_end_of_one_direction_goes_through_and_the_session_goes_on(mesh):
    server, client = pair(mesh)
    made = Sessions(server)
    for size in (0, 1, 100_000, 3_000_000):
        data = bytes(range(251)) * (size // 251 + 1)
        for _ in range(10):
            with client.dial() as conn:
                sent = threading.Thread(target=lambda: conn.send(data).finish())
                sent.start()
                assert conn.rest() == data
                sent.join()
    assert made.count() < 20
    assert server.app.ends and set(server.app.ends) == {"fin"}


def test_what_ends_abruptly_is_passed_on_and_the_next_connection_is_none_the_worse(mesh):
    server, client = pair(mesh)
    for _ in range(5):
        before = server.app.ends.count("reset")
        conn = client.dial()
        assert conn.ask(b"open") == b"open"
        conn.reset()
        eventually(lambda: server.app.ends.count("reset") == before + 1)
        assert client.reaches()


def test_a_new_root_under_churn_fails_no_connection(own_mesh):
    mesh = own_mesh()
    server, client = pair(mesh)
    load = Churn(client, 4)
    try:
        for authority in (Authority(mesh.agent.trust_domain), None):
            old = open_sessions(server)
            mesh.agent.rotate_root(authority)
            eventually(lambda: not old & open_sessions(server), 30, "sessions of the old credentials are gone", every=0.2)
    finally:
        failures = load.end()
    assert failures == []


def test_a_server_that_ends_with_free_sessions_ends_at_once_and_the_client_goes_on(mesh):
    first = mesh.service("server")
    second = mesh.service("second", of=first)
    client = mesh.service("client", [first])
    client.eventually_reaches()
    eventually(lambda: client.reaches() and first.app.served and second.app.served, what="both have sessions")
    started = time.monotonic()
    first.process.signal(signal.SIGTERM)
    for _ in range(50):
        assert client.reaches()
    assert first.process.wait(5) == 0 and time.monotonic() - started < 4
    for _ in range(50):
        assert client.reaches()
    first.start()
    served = first.app.served
    eventually(lambda: client.reaches() and first.app.served > served, 60, "the one that is back is used again")


def test_a_server_that_is_killed_costs_no_connection(mesh):
    first = mesh.service("server")
    second = mesh.service("second", of=first)
    client = mesh.service("client", [first])
    client.eventually_reaches()
    eventually(lambda: client.reaches() and first.app.served and second.app.served, what="both have sessions")
    first.process.signal(signal.SIGKILL)
    first.process.wait(5)
    for _ in range(50):
        assert client.reaches()


def test_a_client_that_ends_leaves_nothing_at_the_server(mesh):
    server, client = pair(mesh)
    assert all(client.reaches() for _ in range(10))
    started = time.monotonic()
    assert client.process.stop() == 0 and server.process.stop() == 0
    assert time.monotonic() - started < 4


def test_whoever_knows_no_tunnel_has_a_session_for_each_connection(mesh):
    server = mesh.service("server", sidecar=None)
    server.start("consul")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    made = Sessions(server)
    for _ in range(40):
        with client.dial() as conn:
            assert conn.ask(b"open") == b"open"
            # The built-in proxy ends some with a reset.
            made.look()
    # The same port may come twice.
    assert made.count() > 30


def test_a_sidecar_that_dies_is_passed_on_as_a_reset(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    with client.dial() as conn:
        assert conn.ask(b"open") == b"open"
        server.process.kill()
        assert conn.end() == "reset"


@pytest.mark.parametrize("where", ["client's flag", "client's variable", "server's flag", "server's config", "upstream's config"])
def test_it_can_be_turned_off(mesh, where):
    side, _, how = where.partition("'s ")
    config = {"Config": {"lictor_tunnel": False}}
    words = {"client": [], "server": [], side: ["-tunnel=false"] if how == "flag" else []}
    server = mesh.service("server", sidecar=None, proxy=config if where == "server's config" else None)
    server.start("lictor", *words["server"])
    upstream = Upstream(server.name, mesh.ports.take(), config if side == "upstream" else {})
    client = mesh.service("client", [upstream], sidecar=None)
    client.start("lictor", *words["client"], env={"LICTOR_TUNNEL": "false"} if how == "variable" else None)
    client.eventually_reaches()
    made = Sessions(server)
    for _ in range(20):
        assert client.reaches()
        made.look()
    assert made.count() >= 20


def test_it_is_turned_off_and_on_without_a_restart(mesh):
    server, client = pair(mesh)

    def sessions():
        made = Sessions(server)
        for _ in range(20):
            assert client.reaches()
            made.look()
        return made.count()

    eventually(lambda: sessions() < 8, what="sessions are used again and again")
    for off in (True, False):
        server.proxy = {"Config": {"lictor_tunnel": not off}}
        server.register()
        eventually(lambda: (sessions() >= 20) == off, what=f"it is {'off' if off else 'on'}")
