"""A changed registration is followed without restart, and connections it does not concern stay open."""

import os
import socket
import stat

import pytest

from mesh import Echo, eventually
from mesh.ports import is_listening


def test_an_upstream_is_added_and_removed(mesh):
    first, second = mesh.service("first"), mesh.service("second")
    client = mesh.service("client", [first])
    with client.dial(first) as untouched:
        assert untouched.ask(b"before") == b"before"
        added = client.add_upstream(second)
        client.register()
        eventually(lambda: is_listening(added.port), what="the new upstream listens")
        client.eventually_reaches(second)
        client.upstreams.remove(added)
        client.register()
        eventually(lambda: not is_listening(added.port), what="the removed upstream no longer listens")
        assert untouched.ask(b"after") == b"after"
    assert client.reaches(first)


def test_an_upstream_moves_to_another_port(mesh):
    server, other = mesh.service("server"), mesh.service("other")
    client = mesh.service("client", [server, other])
    with client.dial(other) as untouched:
        assert untouched.ask(b"before") == b"before"
        old, new = client.upstreams[0].port, mesh.ports.take()
        client.upstreams[0].port = new
        client.register()
        eventually(lambda: is_listening(new) and not is_listening(old), what="the upstream has moved")
        assert client.reaches(server)
        assert untouched.ask(b"after") == b"after"


def test_two_upstreams_trade_their_ports(mesh):
    first = mesh.service("first", app=lambda port: Echo(port, b"first\n"))
    second = mesh.service("second", app=lambda port: Echo(port, b"second\n"))
    client = mesh.service("client", [first, second])
    assert client.dial(first).line() == b"first\n"
    one, two = client.upstreams
    one.port, two.port = two.port, one.port
    client.register()
    eventually(lambda: client.dial(first).line() == b"first\n" and client.dial(second).line() == b"second\n")


def test_an_upstream_moves_to_a_unix_socket_and_back(mesh, tmp_path):
    mesh.agent.needs((1, 10), "a socket path for an upstream")
    server = mesh.service("server")
    client = mesh.service("client", [server])
    upstream, old = client.upstreams[0], client.upstreams[0].port
    path = tmp_path / "upstream.sock"
    upstream.port, upstream.more = 0, {"LocalBindSocketPath": str(path), "LocalBindSocketMode": "0620"}
    client.register()
    eventually(lambda: path.is_socket() and not is_listening(old), what="the upstream has moved to its socket")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o620
    assert mesh.dial(path).ask(b"hello") == b"hello"
    upstream.port, upstream.more = old, {}
    client.register()
    eventually(lambda: is_listening(old) and not path.exists(), what="the upstream is back at its port, and the socket is gone")
    assert client.reaches(server)


def test_a_socket_that_a_killed_sidecar_left_behind_is_taken_over(mesh, tmp_path):
    mesh.agent.needs((1, 10), "a socket path for an upstream")
    server = mesh.service("server")
    path = tmp_path / "upstream.sock"
    client = mesh.service("client", [server], sidecar=None)
    client.upstreams[0].port, client.upstreams[0].more = 0, {"LocalBindSocketPath": str(path)}
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    client.register().start()
    eventually(lambda: mesh.dial(path).ask(b"hello") == b"hello")


def test_the_app_moves_to_another_port(mesh):
    server = mesh.service("server", app=lambda port: Echo(port, b"old\n"))
    client = mesh.service("client", [server])
    with client.dial() as untouched:
        assert untouched.line() == b"old\n"
        server.port = mesh.ports.take()
        mesh.keep(Echo(server.port, b"new\n"))
        server.register()
        eventually(lambda: client.dial().line() == b"new\n", what="new connections go to the app's new port")
        assert untouched.ask(b"still here") == b"still here"


def test_the_app_is_behind_a_unix_socket(mesh, tmp_path):
    mesh.agent.needs((1, 10), "LocalServiceSocketPath")
    path = tmp_path / "app.sock"
    mesh.keep(Echo(path, b"by socket\n"))
    server = mesh.service("server", app=None, proxy={"LocalServiceSocketPath": str(path)})
    client = mesh.service("client", [server])
    assert client.dial().line() == b"by socket\n"


def test_the_public_port_moves(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    with client.dial() as untouched:
        assert untouched.ask(b"before") == b"before"
        old, server.public = server.public, mesh.ports.take()
        server.register()
        eventually(lambda: is_listening(server.public) and not is_listening(old), what="the public listener has moved")
        client.eventually_reaches()
        assert untouched.ask(b"after") == b"after"


def test_upstreams_listen_where_they_are_told(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server, server.name + "-by-ipv6"], sidecar=None)
    client.upstreams[0].more = {"LocalBindAddress": "127.0.0.2"}
    client.upstreams[1].to, client.upstreams[1].more = mesh.service("other").name, {"LocalBindAddress": "::1"}
    client.register().start()
    for upstream, host in zip(client.upstreams, ("127.0.0.2", "::1")):
        assert mesh.dial(upstream.port, host=host).ask(b"hello") == b"hello"
        with pytest.raises(ConnectionRefusedError):
            mesh.dial(upstream.port)


def test_the_public_listener_binds_what_its_config_says(mesh):
    bound = mesh.ports.take()
    server = mesh.service("server", sidecar=None, proxy={"Config": {"bind_address": "127.0.0.3", "bind_port": bound}})
    server.start(ready=False)
    eventually(lambda: is_listening(bound), what="bind_port is listened on")
    assert not is_listening(server.public)
    mesh.dial(bound, host="127.0.0.3")
    with pytest.raises(ConnectionRefusedError):
        mesh.dial(bound)


def test_inbound_connections_are_limited_and_the_limit_is_live(mesh):
    server = mesh.service("server", proxy={"Config": {"max_inbound_connections": 2}})
    client = mesh.service("client", [server])
    held = [client.dial() for _ in range(2)]
    assert [conn.ask(b"held") for conn in held] == [b"held"] * 2
    assert client.refused()
    server.proxy = {"Config": {"max_inbound_connections": 3}}
    server.register()
    client.eventually_reaches()
    assert [conn.ask(b"held") for conn in held] == [b"held"] * 2
    server.proxy = {"Config": {"max_inbound_connections": 2}}
    server.register()
    client.eventually_refused()
    held.pop().close()
    client.eventually_reaches()


def test_central_config_is_followed(own_mesh):
    mesh = own_mesh({"enable_central_service_config": True})
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    with client.dial() as held:
        assert held.ask(b"held") == b"held"
        mesh.agent.write("proxy-defaults", "global", Config={"max_inbound_connections": 1})
        client.eventually_refused()
        mesh.agent.delete("/v1/config/proxy-defaults/global")
        client.eventually_reaches()
        assert held.ask(b"held") == b"held"


def test_a_deregistered_sidecar_goes_on_and_follows_when_registered_again(mesh):
    server, other = mesh.service("server"), mesh.service("other")
    client = mesh.service("client", [server])
    with client.dial() as untouched:
        assert untouched.ask(b"before") == b"before"
        client.deregister()
        assert client.reaches()
        added = client.add_upstream(other)
        client.register()
        eventually(lambda: is_listening(added.port), 60, "the registration of now is followed")
        assert untouched.ask(b"after") == b"after"
