"""Prepared queries, redirects, subsets, failover and datacenters lead to the right instance, with its identity checked."""

from mesh import Echo, Gate, Service, Upstream, eventually, mtls_server


def named(mesh, what, greeting=None, **more):
    """A service that says its name first."""
    return mesh.service(what, app=lambda port: Echo(port, (greeting or what).encode() + b"\n"), **more)


def says(client, expected, to=None):
    """Whether a new connection meets the app that says this."""
    with client.dial(to, within=10) as conn:
        return conn.line() == expected.encode() + b"\n"


def eventually_says(client, expected, to=None, within=20):
    eventually(lambda: says(client, expected, to), within, f"{client.name} meets {expected}")


def test_a_redirect_leads_to_another_service(mesh):
    old, new = named(mesh, "old"), named(mesh, "new")
    client = mesh.service("client", [old])
    eventually_says(client, "old")
    with client.dial() as untouched:
        assert untouched.line() == b"old\n"
        mesh.agent.write("service-resolver", old.name, Redirect={"Service": new.name})
        eventually_says(client, "new")
        assert untouched.ask(b"still here") == b"still here"
    mesh.agent.delete(f"/v1/config/service-resolver/{old.name}")
    eventually_says(client, "old")


def test_after_a_redirect_the_identity_meant_is_the_targets(known):
    mesh, old = known, known.name("old")
    new = mesh.service("new", app=None, sidecar=None)
    mesh.agent.write("service-resolver", old, Redirect={"Service": new.name})
    # First a server that says it is the service before the redirect, then one that is the target.
    fake = mesh.keep(mtls_server(new.public, mesh.agent.roots(), mesh.agent.leaf(old), b"false\n"))
    client = mesh.service("client", [Upstream(old, mesh.ports.take())])
    eventually(lambda: client.refused() and fake.failures)
    assert fake.received == b""
    fake.close()
    right = mesh.keep(mtls_server(new.public, mesh.agent.roots(), mesh.agent.leaf(new.name), b"right\n"))
    eventually_says(client, "right", within=60)
    assert set(right.server_names) == {mesh.agent.sni(new.name)}


def test_subsets_are_filtered(mesh):
    name, made = mesh.name("server"), {}
    for version in ("v1", "v2"):
        instance = Service(mesh, name, id=f"{name}-{version}", service_fields={"Meta": {"version": version}})
        instance.app = mesh.keep(Echo(instance.port, version.encode() + b"\n"))
        made[version] = instance.register().start() and instance
    subsets = {version: {"Filter": f"Service.Meta.version == {version}"} for version in made}
    mesh.agent.write("service-resolver", name, DefaultSubset="v2", Subsets=subsets)
    client = mesh.service("client", [Upstream(name, mesh.ports.take())])
    eventually_says(client, "v2")
    assert all(says(client, "v2") for _ in range(10))
    mesh.agent.write("service-resolver", name, DefaultSubset="v1", Subsets=subsets)
    eventually_says(client, "v1")
    assert all(says(client, "v1") for _ in range(10))


def test_a_subset_of_only_passing_leaves_out_warnings(mesh):
    name = mesh.name("server")
    made = []
    for number in range(2):
        instance = Service(mesh, name, id=f"{name}-{number}")
        instance.app = mesh.keep(Echo(instance.port, b"%d\n" % number))
        instance.register().start()
        made.append(instance)
    made[0].passing("warn")
    mesh.agent.write("service-resolver", name, DefaultSubset="good", Subsets={"good": {"OnlyPassing": True}})
    client = mesh.service("client", [Upstream(name, mesh.ports.take())])
    eventually(lambda: all(says(client, "1") for _ in range(10)))


def test_failover_leads_to_another_service_and_back(mesh):
    main, spare = named(mesh, "main"), named(mesh, "spare")
    mesh.agent.write("service-resolver", main.name, Failover={"*": {"Service": spare.name}})
    client = mesh.service("client", [main])
    eventually_says(client, "main")
    main.passing("fail")
    eventually_says(client, "spare")
    with client.dial() as untouched:
        assert untouched.line() == b"spare\n"
        main.passing("pass")
        eventually_says(client, "main")
        assert untouched.ask(b"still here") == b"still here"


def test_failover_also_happens_when_the_main_service_is_dead_but_passing(mesh):
    main, spare = named(mesh, "main"), named(mesh, "spare")
    mesh.agent.write("service-resolver", main.name, Failover={"*": {"Service": spare.name}})
    client = mesh.service("client", [main])
    eventually_says(client, "main")
    main.process.kill()
    assert all(says(client, "spare") for _ in range(10))


def test_a_prepared_query_is_executed(mesh):
    first, second = named(mesh, "first"), named(mesh, "second")
    query = mesh.name("query")
    made = mesh.agent.call("POST", "/v1/query", {"Name": query, "Service": {"Service": first.name}})
    mesh.stack.callback(mesh.agent.delete, f"/v1/query/{made['ID']}")
    client = mesh.service("client", [Upstream(query, mesh.ports.take(), {"DestinationType": "prepared_query"})])
    eventually_says(client, "first")
    mesh.agent.put(f"/v1/query/{made['ID']}", {"Name": query, "Service": {"Service": second.name}})
    # Queries have no blocking form: they are asked again from time to time.
    eventually_says(client, "second", within=60)


def test_a_prepared_query_may_be_made_later(mesh):
    server, query = named(mesh, "server"), mesh.name("query")
    client = mesh.service("client", [Upstream(query, mesh.ports.take(), {"DestinationType": "prepared_query"})])
    assert client.ended() == "fin"
    made = mesh.agent.call("POST", "/v1/query", {"Name": query, "Service": {"Service": server.name}})
    mesh.stack.callback(mesh.agent.delete, f"/v1/query/{made['ID']}")
    eventually_says(client, "server", within=60)


def test_another_datacenter_is_reached_by_upstream_redirect_and_failover(federation):
    first, second = federation
    there = named(second, "there")
    here = named(first, "here")
    moved = first.name("moved")
    first.agent.write("service-resolver", moved, Redirect={"Service": there.name, "Datacenter": "dc2"})
    first.agent.write("service-resolver", here.name, Failover={"*": {"Service": there.name, "Datacenters": ["dc2"]}})
    client = first.service("client", [
        Upstream(there.name, first.ports.take(), {"Datacenter": "dc2"}), Upstream(moved, first.ports.take()), here])
    eventually_says(client, "there", there, within=40)
    eventually_says(client, "there", moved, within=40)
    eventually_says(client, "here", here)
    here.passing("fail")
    eventually_says(client, "there", here, within=40)
    # Intentions are replicated; the source keeps its name across datacenters.
    first.deny(client, there)
    client.eventually_refused(there, within=40)


def test_an_instance_in_another_datacenter_is_reached_at_its_wan_address(federation):
    first, second = federation
    port = second.ports.take()
    wan = {"wan": {"Address": "127.0.0.1", "Port": port}}
    there = named(second, "there", sidecar_fields={"TaggedAddresses": wan})
    gate = second.keep(Gate(port, there.public))
    client = first.service("client", [Upstream(there.name, first.ports.take(), {"Datacenter": "dc2"})])
    eventually_says(client, "there", within=40)
    assert gate.most_open > 0
    # Within the datacenter it is not asked for.
    near, before = second.service("near", [there]), len(gate.requests)
    eventually_says(near, "there")
    assert len(gate.requests) == before
