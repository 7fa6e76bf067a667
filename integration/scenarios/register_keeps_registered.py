"""-register: the proxy is in the catalog for as long as it runs, also after an agent restart."""

from mesh import ApiError, Echo, eventually


def start(mesh, *words):
    name, app, public = mesh.name("adhoc"), mesh.ports.take(), mesh.ports.take()
    mesh.keep(Echo(app))
    process = mesh.proxy("-service", name, "-service-addr", f"127.0.0.1:{app}", "-listen", f"127.0.0.1:{public}", "-register", *words)
    return name, public, process


def registered(agent, id):
    try:
        return agent.get(f"/v1/agent/service/{id}")
    except (ApiError, OSError):
        return None


def test_it_registers_is_found_and_deregisters_at_the_end(mesh):
    name, public, process = start(mesh)
    found = eventually(lambda: registered(mesh.agent, f"{name}-proxy"))
    assert (found["Kind"], found["Service"], found["Port"]) == ("connect-proxy", f"{name}-proxy", public)
    assert found["Proxy"]["DestinationServiceName"] == name
    client = mesh.service("client", [name])
    client.eventually_reaches()
    checks = mesh.agent.get(f"/v1/health/checks/{name}-proxy")
    assert [check["Status"] for check in checks] == ["passing"]
    assert process.stop() == 0
    assert not registered(mesh.agent, f"{name}-proxy")


def test_an_id_suffix_tells_two_apart(mesh):
    name, _, process = start(mesh, "-register-id", "second")
    assert eventually(lambda: registered(mesh.agent, f"{name}-proxy-second"))["Service"] == f"{name}-proxy"
    assert process.stop() == 0
    assert not registered(mesh.agent, f"{name}-proxy-second")


def test_it_registers_again_after_an_agent_restart(own_mesh):
    mesh = own_mesh()
    name, _, process = start(mesh)
    eventually(lambda: registered(mesh.agent, f"{name}-proxy"))
    mesh.agent.kill()
    mesh.agent.start()
    # Looked after every 30 s in the worst case.
    eventually(lambda: registered(mesh.agent, f"{name}-proxy"), 60)
    assert process.stop() == 0
    assert not registered(mesh.agent, f"{name}-proxy")


def test_it_registers_again_when_someone_deregisters_it(mesh):
    name, _, _ = start(mesh)
    eventually(lambda: registered(mesh.agent, f"{name}-proxy"))
    mesh.agent.put(f"/v1/agent/service/deregister/{name}-proxy")
    eventually(lambda: registered(mesh.agent, f"{name}-proxy"), 60)


def test_an_agent_that_is_gone_at_the_end_holds_nobody_up(own_mesh):
    mesh = own_mesh()
    name, _, process = start(mesh)
    eventually(lambda: registered(mesh.agent, f"{name}-proxy"))
    mesh.agent.kill()
    assert process.stop(15) == 0
