"""More upstreams than connections to the agent: little is asked while nothing changes, and what changes is seen soon."""

import time

from mesh import Echo, Gate, Service, eventually

# After a quiet time; changes that follow each other are looked for at a bounded rate.
SOON, NEXT = 5, 15


def instance(mesh, name, says):
    made = Service(mesh, name, id=f"{name}-{says}")
    made.app = mesh.keep(Echo(made.port, says.encode() + b"\n"))
    made.register().start()
    return made


def request_count(gate):
    return gate.requests.count(b" /v1/")


def is_quiet(gate):
    before = request_count(gate)
    time.sleep(2)
    return request_count(gate) - before < 12


def test_changes_are_followed_soon_and_silence_is_cheap(mesh):
    gate = mesh.keep(Gate(mesh.ports.take(), mesh.agent.port))
    name = mesh.name("server")
    first = instance(mesh, name, "first")
    client = mesh.service("client", [first, *(mesh.name("absent") for _ in range(70))], sidecar=None)
    client.start(env={"CONSUL_HTTP_ADDR": f"127.0.0.1:{gate.port}"})

    def answers():
        found = set()
        for _ in range(12):
            with client.dial(within=10) as conn:
                found.add(conn.line().decode().strip())
        return found

    eventually(lambda: answers() == {"first"})
    eventually(lambda: is_quiet(gate), 60)
    before = request_count(gate)
    time.sleep(10)
    # In turns, 140 queries would have asked about as many times.
    assert request_count(gate) - before < 45

    second = instance(mesh, name, "second")
    eventually(lambda: answers() == {"first", "second"}, SOON)
    first.passing("fail")
    eventually(lambda: answers() == {"second"}, NEXT)
    other = instance(mesh, mesh.name("other"), "other")
    mesh.agent.write("service-resolver", name, Redirect={"Service": other.name})
    try:
        eventually(lambda: answers() == {"other"}, NEXT)
    finally:
        mesh.agent.delete(f"/v1/config/service-resolver/{name}")
    eventually(lambda: answers() == {"second"}, NEXT)
    second.deregister()
    first.passing("pass")
    eventually(lambda: answers() == {"first"}, NEXT)
    assert gate.most_open <= 32
