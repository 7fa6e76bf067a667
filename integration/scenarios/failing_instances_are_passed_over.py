"""Instances whose app, sidecar, host or path fails while the agent says that they pass: others are used, and they are used again at once."""

import time

import pytest

from mesh import Blackhole, Echo, Service, Upstream, ask, eventually

KINDS = pytest.mark.parametrize("kind", ["tcp", "http"])
# Long, so that whoever waits for a part of it is noticed on a busy machine too.
CONNECT_TIMEOUT = {"Config": {"connect_timeout_ms": 120_000}}


def instance(mesh, kind, name, of=None, **more):
    """One of several instances of a service; its app says its name."""
    if kind == "http":
        return mesh.web(name, of=of, **more)
    return mesh.service("server" if of is None else name, of=of, app=lambda port: Echo(port, f"{name}\n".encode()), **more)


def client_of(mesh, kind, service):
    return mesh.service("client", [Upstream(service.name, mesh.ports.take(), CONNECT_TIMEOUT)], protocol="http" if kind == "http" else None)


def who(client, kind, within=20):
    """Which instance answered, or what came instead."""
    port = client.upstreams[0].port
    if kind == "http":
        answer = ask(port, within=within)
        return answer.seen()["app"] if answer.status == 200 else f"{answer.status}"
    with client.dial(within=within) as conn:
        return conn.line().decode().strip()


def pair(mesh, kind, **more):
    one = instance(mesh, kind, "one")
    two = instance(mesh, kind, "two", of=one, **more)
    client = client_of(mesh, kind, one)
    eventually(lambda: {who(client, kind) for _ in range(20)} == {"one", "two"})
    return one, two, client


def used_again(client, kind, name, within):
    """In a while that is far shorter than time aside used to be; nobody is failed by looking."""
    def look():
        got = {who(client, kind) for _ in range(8)}
        assert got <= {"one", "two"}, got
        return name in got
    eventually(look, within, f"instance {name} is used again")


def test_an_app_that_is_dead_behind_its_sidecar_fails_no_connection(mesh):
    _, two, client = pair(mesh, "tcp")
    two.app.close()
    assert [who(client, "tcp") for _ in range(80)] == ["one"] * 80
    two.app = mesh.keep(Echo(two.port, b"two\n"))
    used_again(client, "tcp", "two", 5)


def test_an_app_that_hangs_in_connecting_fails_no_connection(mesh):
    _, two, client = pair(mesh, "tcp")
    two.app.close()
    mesh.keep(Blackhole(two.port))
    assert [who(client, "tcp") for _ in range(10)] == ["one"] * 10


@pytest.mark.parametrize("other", ["consul", "envoy"])
def test_an_app_that_is_dead_behind_another_sidecar_fails_few(mesh, other):
    one = instance(mesh, "tcp", "one")
    two = instance(mesh, "tcp", "two", of=one, sidecar=None)
    if other == "envoy":
        two.process = mesh.envoy(two)
    else:
        two.start(other)
    client = client_of(mesh, "tcp", one)
    eventually(lambda: {who(client, "tcp") for _ in range(20)} == {"one", "two"})
    two.app.close()
    got = [who(client, "tcp") for _ in range(80)]
    # Such a sidecar takes the connection, and only what does not come back tells. A probe or two fail besides.
    assert set(got) <= {"one", ""} and got.count("") <= 8, got
    two.app = mesh.keep(Echo(two.port, b"two\n"))
    eventually(lambda: "two" in {who(client, "tcp") for _ in range(4)}, 60, "it is used again")


def test_a_service_that_answers_nothing_to_anybody_is_left_alone(mesh):
    """No instance of it is any worse than the others."""
    one = mesh.service("server", app=Taker, sidecar="consul")
    two = mesh.service("two", of=one, app=Taker, sidecar="consul")
    client = mesh.service("client", [one])
    eventually(lambda: client.refused() and one.app.taken and two.app.taken)
    before = [one.app.taken, two.app.taken]
    assert all(client.refused() for _ in range(60))
    after = [one.app.taken, two.app.taken]
    assert sum(after) == sum(before) + 60 and all(now - then >= 10 for now, then in zip(after, before)), (before, after)


class Taker(Echo):
    """Takes a line, and that is all."""
    taken = 0

    def serve(self, conn):
        self.taken += bool(conn.line())


@KINDS
def test_a_host_that_swallows_connection_attempts_costs_no_time(mesh, kind):
    one = instance(mesh, kind, "one")
    dead = Service(mesh, one.name, id=f"{one.name}-dead")
    mesh.keep(Blackhole(dead.public))
    dead.register()
    client = client_of(mesh, kind, one)
    eventually(lambda: len(mesh.agent.get(f"/v1/health/connect/{one.name}?passing")) == 2)
    eventually(lambda: who(client, kind) == "one")
    for _ in range(12):
        assert who(client, kind, within=15) == "one"


@KINDS
def test_a_sidecar_that_is_frozen_costs_no_time(mesh, kind):
    _, two, client = pair(mesh, kind)
    for _ in range(3):
        with two.process.frozen():
            for _ in range(8):
                assert who(client, kind, within=15) == "one"
        used_again(client, kind, "two", 10)


@KINDS
def test_an_instance_that_can_be_reached_again_is_used_at_once_and_nobody_pays(mesh, kind):
    _, two, client = pair(mesh, kind)
    two.process.kill()
    # Long enough for the times between looks at it to have grown, were they to.
    until = time.monotonic() + 8
    while time.monotonic() < until:
        assert who(client, kind) == "one"
        time.sleep(0.05)
    two.start()
    used_again(client, kind, "two", 3)


@KINDS
def test_an_instance_that_nobody_could_reach_at_start_is_used_when_it_comes(mesh, kind):
    one = instance(mesh, kind, "one")
    two = instance(mesh, kind, "two", of=one, sidecar=None)
    client = client_of(mesh, kind, one)
    assert {who(client, kind) for _ in range(20)} == {"one"}
    two.start()
    used_again(client, kind, "two", 3)


@KINDS
def test_traffic_returns_from_a_failover_when_the_service_is_back(mesh, kind):
    first = instance(mesh, kind, "one")
    other = mesh.web("two") if kind == "http" else mesh.service("other", app=lambda port: Echo(port, b"two\n"))
    mesh.agent.write("service-resolver", first.name, Failover={"*": {"Service": other.name}})
    client = client_of(mesh, kind, first)
    eventually(lambda: who(client, kind) == "one")
    first.process.kill()
    until = time.monotonic() + 8
    eventually(lambda: who(client, kind) == "two")
    while time.monotonic() < until:
        assert who(client, kind) == "two"
        time.sleep(0.05)
    first.start()
    eventually(lambda: who(client, kind) == "one", 3, "it leads to the service that is meant again")


def test_three_of_four_that_swallow_attempts_cost_no_request_at_start(mesh, workers):
    one = mesh.web("one")
    for number in range(3):
        dead = Service(mesh, one.name, id=f"{one.name}-dead{number}")
        mesh.keep(Blackhole(dead.public))
        dead.register()
    client = client_of(mesh, "http", one)
    eventually(lambda: len(mesh.agent.get(f"/v1/health/connect/{one.name}?passing")) == 4)
    pending = [workers.submit(who, client, "http") for _ in range(60)]
    assert [each.result(30) for each in pending] == ["one"] * 60


def test_a_request_to_an_app_that_swallows_attempts_is_answered_after_one_connect_timeout(mesh, workers):
    server = mesh.web("server", proxy={"Config": {"local_connect_timeout_ms": 1500}})
    client = mesh.web("client", [server])
    eventually(lambda: who(client, "http") == "server")
    server.app.close()
    mesh.keep(Blackhole(server.port))
    began = time.monotonic()
    pending = [workers.submit(who, client, "http") for _ in range(20)]
    assert {each.result(30) for each in pending} == {"503"}
    assert time.monotonic() - began < 6
