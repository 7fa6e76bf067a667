"""A port that is taken: a clear error, tried again, and every other listener works."""

from mesh import Echo, Gate, Upstream, eventually
from mesh.ports import is_listening


def test_an_upstream_port_that_is_taken_is_tried_again(mesh):
    first, second = mesh.service("first"), mesh.service("second")
    client = mesh.service("client", [first, second], sidecar=None)
    taken = client.port_to(second)
    squatter = Echo(taken, b"squatter\n")
    client.start(ready=False)
    client.process.logged(rf"[^\n]*:{taken}[^\n]*in use[^\n]*|[^\n]*in use[^\n]*:{taken}[^\n]*")
    eventually(lambda: client.reaches(first))
    squatter.close()
    client.eventually_reaches(second, within=60)


def test_a_public_port_that_is_taken_is_tried_again(mesh):
    server, other = mesh.service("server", sidecar=None), mesh.service("other")
    upstream = server.add_upstream(other)
    server.register()
    squatter = Echo(server.public)
    server.start(ready=False)
    server.process.logged(rf"[^\n]*:{server.public}[^\n]*in use[^\n]*|[^\n]*in use[^\n]*:{server.public}[^\n]*")
    eventually(lambda: mesh.dial(upstream.port).ask(b"hello") == b"hello")
    squatter.close()
    client = mesh.service("client", [server])
    client.eventually_reaches(within=60)


def test_ports_that_another_sidecar_has_are_taken_too(mesh):
    """Two of one registration must not share its ports in silence: which of them would a connection meet?"""
    server = mesh.service("server")
    client = mesh.service("client", [server])
    second = mesh.proxy("-sidecar-for", client.id)
    for port in (client.public, client.port_to(server)):
        second.logged(rf"[^\n]*:{port}[^\n]*in use[^\n]*|[^\n]*in use[^\n]*:{port}[^\n]*")
    assert client.reaches()
    client.process.stop()
    client.eventually_reaches(within=60)
    assert second.running()


def test_an_address_that_the_machine_lacks_harms_no_other(mesh):
    good = mesh.service("good")
    client = mesh.service("client", [good, Upstream(mesh.name("bad"), mesh.ports.take(), {"LocalBindAddress": "192.0.2.1"})], sidecar=None)
    client.start(ready=False)
    client.process.logged(r"192\.0\.2\.1")
    eventually(lambda: client.reaches(good))


def test_a_negative_port_means_no_public_listener(mesh):
    """The API refuses port 0 for a proxy; -1 is how a registration says that it listens nowhere."""
    server = mesh.service("server")
    name, port = mesh.name("quiet"), mesh.ports.take()
    mesh.agent.put("/v1/agent/service/register", {
        "Kind": "connect-proxy", "ID": name, "Name": name, "Port": -1,
        "Proxy": {"DestinationServiceName": name, "Upstreams": [{"DestinationName": server.name, "LocalBindPort": port}]},
    })
    process = mesh.proxy("-proxy-id", name)
    eventually(lambda: mesh.dial(port).ask(b"hello") == b"hello")
    assert process.running()


def test_without_a_listen_flag_there_is_no_public_listener(mesh):
    server = mesh.service("server")
    port = mesh.ports.take()
    mesh.proxy("-service", mesh.name("adhoc"), "-upstream", f"{server.name}:{port}")
    eventually(lambda: is_listening(port))
    eventually(lambda: mesh.dial(port).ask(b"hello") == b"hello")


def test_the_public_listener_is_bound_only_when_ready(mesh):
    """Without a leaf nobody can be served: the port stays shut, so that Consul's check keeps traffic away."""
    gate = mesh.keep(Gate(mesh.ports.take(), mesh.agent.port))
    gate.mode = "fault"
    server = mesh.service("server", sidecar=None)
    server.start(env={"CONSUL_HTTP_ADDR": f"127.0.0.1:{gate.port}"}, ready=False)
    eventually(lambda: gate.served >= 2)
    assert not is_listening(server.public) and server.process.running()
    gate.mode = "pass"
    eventually(lambda: is_listening(server.public), 40)
