"""Which instance a connection goes to, and what happens when none is left."""

import pytest

from mesh import Echo, Service, Silent, Upstream, eventually, stays


def instances(mesh, count, **more):
    """Several instances of one service, each saying its number; the first one's name is the service's."""
    made = []
    for number in range(count):
        name = made[0].name if made else mesh.name("server")
        fields = {key: value[number] for key, value in more.items()}
        instance = Service(mesh, name, id=f"{name}-{number}", **fields)
        instance.app = mesh.keep(Echo(instance.port, b"%d\n" % number))
        instance.register().start()
        made.append(instance)
    return made


def who(client):
    """Which instance answered, or "" when none did."""
    with client.dial(within=10) as conn:
        return conn.line().decode().strip()


def answers(client, count):
    return [who(client) for _ in range(count)]


def test_connections_are_spread_over_instances(mesh):
    servers = instances(mesh, 3)
    client = mesh.service("client", [servers[0]])
    eventually(lambda: set(answers(client, 20)) == {"0", "1", "2"})


def test_a_failing_instance_is_left_out_until_it_is_back(mesh):
    servers = instances(mesh, 2)
    client = mesh.service("client", [servers[0]])
    eventually(lambda: set(answers(client, 10)) == {"0", "1"})
    servers[1].passing("fail")
    eventually(lambda: set(answers(client, 10)) == {"0"})
    assert set(answers(client, 20)) == {"0"}
    servers[1].passing("pass")
    eventually(lambda: set(answers(client, 10)) == {"0", "1"})


def test_an_instance_in_warning_is_used(mesh):
    servers = instances(mesh, 2)
    client = mesh.service("client", [servers[0]])
    servers[0].passing("fail")
    servers[1].passing("warn")
    eventually(lambda: set(answers(client, 10)) == {"1"})


def test_an_instance_in_maintenance_is_left_out(mesh):
    servers = instances(mesh, 2)
    client = mesh.service("client", [servers[0]])
    mesh.agent.put(f"/v1/agent/service/maintenance/{servers[0].proxy_id}?enable=true")
    eventually(lambda: set(answers(client, 10)) == {"1"})
    mesh.agent.put(f"/v1/agent/service/maintenance/{servers[0].proxy_id}?enable=false")
    eventually(lambda: set(answers(client, 10)) == {"0", "1"})


def test_weights_count(mesh):
    weights = [{"Weights": {"Passing": 10, "Warning": 1}}, {"Weights": {"Passing": 1, "Warning": 1}}]
    servers = instances(mesh, 2, sidecar_fields=weights)
    client = mesh.service("client", [servers[0]])
    eventually(lambda: set(answers(client, 40)) == {"0", "1"})
    # Connections that are held, made one after the other (all at once would be kept from flooding an instance that
    # is new): ten in flight there weigh as much as one here.
    held, got = [], []
    for _ in range(66):
        held.append(client.dial())
        got.append(held[-1].line())
    assert got.count(b"0\n") > 3 * got.count(b"1\n") > 0, got


def test_a_warning_weight_of_nought_leaves_out(mesh):
    weights = [{"Weights": {"Passing": 1, "Warning": 0}}, {"Weights": {"Passing": 1, "Warning": 1}}]
    servers = instances(mesh, 2, sidecar_fields=weights)
    client = mesh.service("client", [servers[0]])
    eventually(lambda: set(answers(client, 10)) == {"0", "1"})
    servers[0].passing("warn")
    eventually(lambda: set(answers(client, 10)) == {"1"})


def test_one_of_two_dead_but_passing_costs_no_connection(mesh):
    servers = instances(mesh, 2)
    client = mesh.service("client", [servers[0]])
    eventually(lambda: set(answers(client, 10)) == {"0", "1"})
    servers[1].process.kill()
    assert answers(client, 60) == ["0"] * 60
    servers[1].start()
    eventually(lambda: "1" in answers(client, 10), 90, "the instance that is back is used again")


def test_one_of_two_that_hangs_costs_no_connection(mesh):
    """It accepts, and then says nothing: only the connect timeout tells."""
    good = mesh.service("server")
    hanging = Service(mesh, good.name, id=f"{good.name}-hanging")
    mesh.keep(Silent(hanging.public))
    hanging.register()
    client = mesh.service("client", [Upstream(good.name, mesh.ports.take(), {"Config": {"connect_timeout_ms": 1000}})])
    eventually(lambda: len(mesh.agent.get(f"/v1/health/connect/{good.name}?passing")) == 2)
    assert all(client.reaches() for _ in range(12))


def test_an_instance_at_an_ipv6_address_is_dialled_there(mesh):
    server = mesh.service("server", sidecar_fields={"Address": "::1"}, sidecar=None)
    server.start()
    with pytest.raises(ConnectionRefusedError):
        mesh.dial(server.public)
    mesh.service("client", [server]).eventually_reaches()


def test_an_instance_that_moved_is_found(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    server.process.stop()
    server.public = mesh.ports.take()
    server.register().start()
    client.eventually_reaches()


def test_an_instance_with_an_address_is_dialled_there(mesh):
    server = mesh.service("server", sidecar_fields={"Address": "127.0.0.5"}, sidecar=None)
    server.start()
    with pytest.raises(ConnectionRefusedError):
        mesh.dial(server.public)
    client = mesh.service("client", [server])
    client.eventually_reaches()


def none_left(mesh, client, pattern):
    """An immediate, clean end, and a line that says why."""
    with client.dial(within=3) as conn:
        assert conn.end(within=3) == "fin"
    return client.process.logged(pattern, within=5).group()


def test_no_instance_registered_ends_at_once_and_is_logged(mesh):
    nobody = mesh.name("nobody")
    client = mesh.service("client", [Upstream(nobody, mesh.ports.take())])
    none_left(mesh, client, rf"[^\n]*no instance[^\n]*{nobody}[^\n]*|[^\n]*{nobody}[^\n]*no instance[^\n]*")


def test_none_passing_ends_at_once_and_is_logged(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    server.passing("fail")
    client.eventually_refused()
    none_left(mesh, client, rf"[^\n]*{server.name}[^\n]*passing[^\n]*|[^\n]*passing[^\n]*{server.name}[^\n]*")


def test_all_refused_ends_at_once_and_is_logged_with_the_address(mesh):
    server = mesh.service("server", sidecar=None)
    client = mesh.service("client", [server])
    eventually(lambda: mesh.agent.get(f"/v1/health/connect/{server.name}"))
    eventually(lambda: client.dial().end(3) == "fin" and client.process.look(rf"127\.0\.0\.1:{server.public}"))


def test_an_app_that_is_down_ends_the_connection_and_is_logged(mesh):
    server = mesh.service("server", app=None)
    client = mesh.service("client", [server])
    eventually(lambda: client.ended() == "fin")
    server.process.logged(rf"[^\n]*127\.0\.0\.1:{server.port}[^\n]*", within=5)
    server.app = mesh.keep(Echo(server.port))
    client.eventually_reaches()


def test_health_changes_leave_open_connections_alone(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    with client.dial() as conn:
        assert conn.ask(b"open") == b"open"
        server.passing("fail")
        client.eventually_refused()
        stays(lambda: conn.ask(b"open") == b"open", 0.5)
