"""Splitters and resolvers of HTTP services: canaries, subsets, redirects, failover and prepared queries."""

import collections
import time

from mesh import Blackhole, Upstream, ask, eventually, who


def versions(mesh, count=2):
    """A service with a subset for each version; returns the instances."""
    first = mesh.web("v1", service_fields={"Meta": {"version": "v1"}})
    rest = [mesh.web(f"v{n}", of=first, service_fields={"Meta": {"version": f"v{n}"}}) for n in range(2, count + 1)]
    subsets = {f"v{n}": {"Filter": f"Service.Meta.version == v{n}"} for n in range(1, count + 1)}
    mesh.agent.write("service-resolver", first.name, DefaultSubset="v1", Subsets=subsets)
    return [first, *rest]


def split(mesh, service, *legs):
    splits = [{"Weight": weight, "ServiceSubset": subset, **more} for weight, subset, *rest in legs for more in (rest or [{}])]
    mesh.agent.write("service-splitter", service.name, Splits=splits)


def client_of(mesh, service, **config):
    """A client; what its calls to the upstream meet."""
    client = mesh.web("client", [Upstream(service.name, mesh.ports.take(), {"Config": config} if config else {})])
    return client, client.upstreams[0].port


def counted(port, requests, **more):
    return collections.Counter(who(port, **more) for _ in range(requests))


def test_a_canary_gets_its_share_and_then_all(mesh):
    v1, _ = versions(mesh)
    split(mesh, v1, (90, "v1"), (10, "v2"))
    _, port = client_of(mesh, v1)
    eventually(lambda: len(counted(port, 20)) == 2)
    # With 600 requests, fewer than 24 or more than 108 come once in a hundred million runs.
    got = counted(port, 600)
    assert set(got) == {"v1", "v2"} and 24 <= got["v2"] <= 108, got
    split(mesh, v1, (0, "v1"), (100, "v2"))
    eventually(lambda: set(counted(port, 20)) == {"v2"})
    assert counted(port, 200) == {"v2": 200}


def test_weights_come_to_hundredths(mesh):
    v1, _ = versions(mesh)
    split(mesh, v1, (0.01, "v2"), (99.99, "v1"))
    _, port = client_of(mesh, v1)
    eventually(lambda: who(port) == "v1")
    assert counted(port, 200)["v1"] >= 197


def test_nested_splits_multiply(mesh):
    outer, (v1, _) = mesh.web("outer"), versions(mesh)
    split(mesh, v1, (50, "v1"), (50, "v2"))
    mesh.agent.write("service-splitter", outer.name, Splits=[{"Weight": 40}, {"Weight": 60, "Service": v1.name}])
    _, port = client_of(mesh, outer)
    eventually(lambda: len(counted(port, 30)) == 3)
    got = counted(port, 600)
    # 40, 30 and 30 per cent.
    assert 170 <= got["outer"] <= 310 and 115 <= got["v1"] <= 245 and 115 <= got["v2"] <= 245, got


def test_legs_edit_headers(mesh):
    mesh.agent.needs((1, 11), "editing headers")
    v1, _ = versions(mesh)
    split(mesh, v1, (100, "v2", {"RequestHeaders": {"Set": {"x-leg": "two"}}, "ResponseHeaders": {"Add": {"x-from": "v2"}}}))
    _, port = client_of(mesh, v1)
    eventually(lambda: who(port) == "v2")
    answer = ask(port)
    assert ["x-leg", "two"] in answer.seen()["headers"] and answer.header("x-from") == "v2"


def test_a_request_in_flight_finishes_on_the_split_that_it_began_with(mesh, workers):
    v1, v2 = versions(mesh)
    split(mesh, v1, (100, "v1"))
    _, port = client_of(mesh, v1)
    eventually(lambda: who(port) == "v1")
    # A config entry takes up to 2 s to reach the sidecar, and longer on a busy machine.
    v1.app.delay = 10
    slow = workers.submit(who, port, "/slow")
    eventually(lambda: v1.app.waiting == 1)
    v1.app.delay = 0
    split(mesh, v1, (100, "v2"))
    eventually(lambda: who(port) == "v2")
    assert not slow.done() and slow.result(20) == "v1"


def test_the_default_subset_and_a_routed_one(mesh):
    v1, _ = versions(mesh)
    to_v2 = {"Match": {"HTTP": {"Header": [{"Name": "x-canary", "Present": True}]}}, "Destination": {"ServiceSubset": "v2"}}
    mesh.agent.write("service-router", v1.name, Routes=[to_v2])
    _, port = client_of(mesh, v1)
    eventually(lambda: who(port, headers={"x-canary": "1"}) == "v2")
    assert counted(port, 20) == {"v1": 20} and counted(port, 20, headers={"x-canary": "1"}) == {"v2": 20}


def test_a_redirect_leads_the_next_request_to_another_service(mesh):
    old, new = mesh.web("old"), mesh.web("new")
    _, port = client_of(mesh, old)
    eventually(lambda: who(port) == "old")
    mesh.agent.write("service-resolver", old.name, Redirect={"Service": new.name})
    eventually(lambda: who(port) == "new")
    mesh.agent.delete(f"/v1/config/service-resolver/{old.name}")
    eventually(lambda: who(port) == "old")


def test_failover_when_none_passes_and_back(mesh):
    main, spare = mesh.web("main"), mesh.web("spare")
    mesh.agent.write("service-resolver", main.name, Failover={"*": {"Service": spare.name}})
    _, port = client_of(mesh, main)
    eventually(lambda: who(port) == "main")
    main.passing("fail")
    eventually(lambda: who(port) == "spare")
    main.passing("pass")
    eventually(lambda: who(port) == "main")


def test_failover_does_not_wait_for_the_agent_when_connections_are_refused(mesh):
    main, spare = mesh.web("main"), mesh.web("spare")
    mesh.agent.write("service-resolver", main.name, Failover={"*": {"Service": spare.name}})
    _, port = client_of(mesh, main)
    eventually(lambda: who(port) == "main")
    # The agent goes on saying that it passes.
    main.process.kill()
    assert counted(port, 30) == {"spare": 30}


def test_failover_when_connects_are_not_answered(mesh):
    main, spare = mesh.web("main"), mesh.web("spare")
    mesh.agent.write("service-resolver", main.name, ConnectTimeout="1s", Failover={"*": {"Service": spare.name}})
    _, port = client_of(mesh, main)
    eventually(lambda: who(port) == "main")
    main.process.kill()
    mesh.keep(Blackhole(main.public))
    began = time.monotonic()
    assert ask(port, "/", "POST", b"whole").seen()["body"] == "whole"
    # The usual connect timeout is 5 s.
    assert 0.9 < time.monotonic() - began < 4.5
    assert counted(port, 20) == {"spare": 20}


def test_failover_leads_to_another_datacenter_and_back(federation):
    here_dc, there_dc = federation
    here, there = here_dc.web("here"), there_dc.web("there")
    here_dc.agent.write("service-resolver", here.name, Failover={"*": {"Service": there.name, "Datacenters": ["dc2"]}})
    _, port = client_of(here_dc, here)
    eventually(lambda: who(port) == "here")
    here.passing("fail")
    eventually(lambda: who(port) == "there", 60)
    assert counted(port, 20) == {"there": 20}
    # And without waiting for the agent, when connections are refused.
    here.passing("pass")
    eventually(lambda: who(port) == "here")
    here.process.kill()
    assert counted(port, 20) == {"there": 20}
    # The source keeps its name across datacenters, and a deny is one of HTTP.
    here_dc.deny("*", there)
    eventually(lambda: who(port) == "403 RBAC: access denied", 40)


def test_a_subset_fails_over_to_another(mesh):
    v1, v2, v3 = versions(mesh, 3)
    entry = {f"v{n}": {"Filter": f"Service.Meta.version == v{n}"} for n in (1, 2, 3)}
    mesh.agent.write("service-resolver", v1.name, DefaultSubset="v1", Subsets=entry, Failover={"v1": {"ServiceSubset": "v3"}})
    _, port = client_of(mesh, v1)
    eventually(lambda: who(port) == "v1")
    v1.passing("fail")
    eventually(lambda: who(port) == "v3")
    assert counted(port, 20) == {"v3": 20}


def test_failover_targets_are_tried_in_order(mesh):
    mesh.agent.needs((1, 14), "failover targets")
    main, second, third = mesh.web("main"), mesh.web("second"), mesh.web("third")
    mesh.agent.write("service-resolver", main.name, Failover={"*": {"Targets": [{"Service": second.name}, {"Service": third.name}]}})
    _, port = client_of(mesh, main)
    eventually(lambda: who(port) == "main")
    for service, then in ((main, "second"), (second, "third")):
        service.process.kill()
        assert counted(port, 20) == {then: 20}


def test_a_prepared_query_finds_http_instances(mesh):
    server = mesh.web("server")
    mesh.agent.call("POST", "/v1/query", {"Name": f"query-{server.name}", "Service": {"Service": server.name, "Connect": True}})
    upstream = Upstream(f"query-{server.name}", mesh.ports.take(), {"DestinationType": "prepared_query", "Config": {"protocol": "http"}})
    mesh.web("client", [upstream])
    eventually(lambda: who(upstream.port) == "server")
    assert ask(upstream.port).seen()["headers"]
    server.app.status = 418
    assert ask(upstream.port).status == 418
