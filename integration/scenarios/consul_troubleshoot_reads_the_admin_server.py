"""`consul troubleshoot`, and others that read Envoy's admin answers field by field, read ours."""

import json

from mesh import Upstream, ask, eventually
from mesh.newer import NewerAgent
from mesh.series import Metrics
from mesh.service import admin_port

ADMIN = "type.googleapis.com/envoy.admin.v3."
TROUBLESHOOT = (1, 15)


def troubleshoot(service, *words):
    """What the command says; it takes every message's type from the binary, so that a wrong field makes it fail."""
    return service.mesh.agent.consul("troubleshoot", *words, "-envoy-admin-endpoint", f"127.0.0.1:{admin_port(service.process)}")


def verdict(service, upstream):
    """Lines that are marked as bad, and the whole output."""
    output = troubleshoot(service, "proxy", "-upstream-envoy-id", getattr(upstream, "name", upstream))
    return [line for line in output.splitlines() if " ! " in line], output


def sections(service, query=""):
    configs = json.loads(service.admin(f"/config_dump{query}").body)["configs"]
    return {config["@type"].removeprefix(ADMIN): config for config in configs}


def cluster_of(mesh, service):
    return f"{service.name}.default.dc1.internal.{mesh.agent.trust_domain}"


def statuses(service):
    return {status["name"]: status for status in json.loads(service.admin("/clusters?format=json").body)["cluster_statuses"]}


def test_upstreams_are_listed_and_found_healthy(mesh):
    mesh.agent.needs(TROUBLESHOOT, "consul troubleshoot")
    plain, http, routed, spare = mesh.service("plain"), mesh.web("http"), mesh.web("routed"), mesh.web("spare")
    mesh.agent.write("service-router", routed.name, Routes=[
        {"Match": {"HTTP": {"PathPrefix": "/x", "Header": [{"Name": "a", "Exact": "b"}], "Methods": ["GET"]}}, "Destination": {"Service": spare.name}}])
    web = mesh.service("web", [plain, http, routed], app=None)

    def all_are_good():
        listed = troubleshoot(web, "upstreams")
        assert all(upstream.name in listed.split() for upstream in (plain, http, routed)), listed
        for upstream in (plain, http, routed):
            bad, output = verdict(web, upstream)
            assert not bad, output
            for line in ("Certificates are valid", "Envoy has 0 rejected configurations", f'Listener for upstream "{upstream.name}" found',
                         "Healthy endpoints for cluster", "Upstream resources are valid"):
                assert line in output, output
        assert f'Route for upstream "{routed.name}" found' in verdict(web, routed)[1]
        assert verdict(web, "nobody")[0]
        return True
    eventually(all_are_good)


def test_an_upstream_without_healthy_instances_is_found(mesh):
    mesh.agent.needs(TROUBLESHOOT, "consul troubleshoot")
    db = mesh.service("db")
    web = mesh.service("web", [db], app=None)
    web.eventually_reaches()
    assert not verdict(web, db)[0]
    db.passing("fail")
    eventually(lambda: "No healthy endpoints for cluster" in "".join(verdict(web, db)[0]))
    hosts = statuses(web)[cluster_of(mesh, db)]["host_statuses"]
    assert [host["health_status"]["eds_health_status"] for host in hosts] == ["UNHEALTHY"]
    db.passing()
    eventually(lambda: not verdict(web, db)[0])


def test_failover_is_found_healthy_as_long_as_one_target_is(mesh):
    mesh.agent.needs(TROUBLESHOOT, "consul troubleshoot")
    db, spare = mesh.service("db"), mesh.service("spare")
    mesh.agent.write("service-resolver", db.name, Failover={"*": {"Service": spare.name}})
    web = mesh.service("web", [db], app=None)
    eventually(lambda: "Healthy endpoints for aggregate cluster" in verdict(web, db)[1])
    db.passing("fail")
    name = cluster_of(mesh, db)

    def states():
        all = statuses(web)
        hosts = [all.get(f"failover-target~{place}~{name}", {}).get("host_statuses", []) for place in (0, 1)]
        return [[host["health_status"]["eds_health_status"] for host in some] for some in hosts]
    eventually(lambda: states() == [["UNHEALTHY"], ["HEALTHY"]])
    assert not verdict(web, db)[0]
    spare.passing("fail")
    eventually(lambda: "No healthy endpoints for aggregate cluster" in "".join(verdict(web, db)[0]))


def test_an_answer_that_can_not_be_used_is_counted(mesh):
    agent = mesh.keep(NewerAgent(mesh.ports.take(), mesh.agent))
    db = mesh.service("db")
    web = mesh.service("web", [db], app=None, sidecar=None)
    web.start(env=agent.env)
    web.eventually_reaches()

    def counted(name):
        [stat] = json.loads(web.admin(f"/stats?format=json&filter={name}&type=Counters").body)["stats"]
        return stat["value"]
    names = ("cluster_manager.cds.update_rejected", "listener_manager.lds.update_rejected")
    assert [counted(name) for name in names] == [0, 0]
    agent.changes[f"/v1/discovery-chain/{db.name}"] = lambda answer: answer["Chain"].update(StartNode="nowhere")
    mesh.agent.write("service-resolver", db.name, ConnectTimeout="3s")
    eventually(lambda: counted(names[0]) > 0)
    assert web.reaches() and counted(names[1]) == 0
    if mesh.agent.version >= TROUBLESHOOT:
        assert "rejected configurations" in "".join(verdict(web, db)[0])


def test_listeners_and_clusters_have_envoys_shapes(mesh):
    db = mesh.web("db")
    web = mesh.service("web", [db])
    port, name = web.port_to(db), cluster_of(mesh, db)
    lines = web.admin("/listeners").body.decode().splitlines()
    assert lines == [f"public_listener:0.0.0.0:{web.public}::0.0.0.0:{web.public}", f"{db.name}:127.0.0.1:{port}::127.0.0.1:{port}"]
    listeners = json.loads(web.admin("/listeners?format=json").body)["listener_statuses"]
    assert listeners[1] == {"name": f"{db.name}:127.0.0.1:{port}",
                            "local_address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}

    def has_instance():
        hosts = statuses(web).get(name, {}).get("host_statuses", [])
        assert len(hosts) == 1, hosts
        host = hosts[0]
        assert host["address"]["socket_address"]["port_value"] == db.public
        assert host["health_status"] == {"eds_health_status": "HEALTHY"} and host["weight"] == 1
        assert host["stats"] == [{"name": "rq_active", "type": "GAUGE"}]
        return True
    eventually(has_instance)
    [app] = statuses(web)["local_app"]["host_statuses"]
    assert app["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": web.port}
    text = web.admin("/clusters").body.decode().splitlines()
    place = next(line.split("::")[1] for line in text if line.startswith(name) and line.endswith("health_flags::healthy"))
    assert place.endswith(f":{db.public}") and f"{name}::{place}::weight::1" in text
    assert f"{name}::default_priority::max_connections::{2 ** 32 - 1}" in text


def test_the_dump_has_envoys_sections_in_order_and_no_secrets(mesh):
    db, other = mesh.web("db"), mesh.web("other")
    mesh.agent.write("service-splitter", db.name, Splits=[{"Weight": 90}, {"Weight": 10, "Service": other.name}])
    token = "7c3b1f0a-1f0e-4f4e-9d3c-5d1b5a6c7e8f"
    web = mesh.service("web", [db], sidecar=None)
    web.start("lictor", env={"CONSUL_HTTP_TOKEN": token})
    order = ["Bootstrap", "Clusters", "Listeners", "ScopedRoutes", "Routes", "Secrets"]
    assert list(sections(web)) == [f"{kind}ConfigDump" for kind in order]
    assert list(sections(web, "?include_eds")) == [f"{kind}ConfigDump" for kind in (*order[:2], "Endpoints", *order[2:])]
    name = cluster_of(mesh, db)

    def has_instance():
        configs = sections(web, "?include_eds")["EndpointsConfigDump"]["dynamic_endpoint_configs"]
        named = [config["endpoint_config"] for config in configs if config["endpoint_config"]["cluster_name"] == name]
        instances = [one for assignment in named for one in assignment["endpoints"][0]["lb_endpoints"]]
        assert [one["endpoint"]["address"]["socket_address"]["port_value"] for one in instances] == [db.public]
        return True
    eventually(has_instance)
    clusters = {one["cluster"]["name"]: one for one in sections(web)["ClustersConfigDump"]["dynamic_active_clusters"]}
    assert clusters[name]["cluster"]["type"] == "EDS" and clusters[name]["last_updated"].endswith("Z")
    assert clusters[name]["cluster"]["transport_socket"]["typed_config"]["sni"].startswith(name)
    assert clusters["local_app"]["cluster"]["type"] == "STATIC"
    public, upstream = (one["active_state"]["listener"] for one in sections(web)["ListenersConfigDump"]["dynamic_listeners"])
    assert (public["traffic_direction"], upstream["traffic_direction"]) == ("INBOUND", "OUTBOUND")
    names = [filter["name"] for filter in public["filter_chains"][0]["filters"]]
    assert names == ["envoy.filters.network.rbac", "envoy.filters.network.tcp_proxy"]
    http = upstream["filter_chains"][0]["filters"][0]
    assert http["typed_config"]["rds"]["route_config_name"] == db.name
    [routes] = sections(web)["RoutesConfigDump"]["dynamic_route_configs"]
    legs = routes["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["weighted_clusters"]["clusters"]
    assert sorted(leg["weight"] for leg in legs) == [1000, 9000]
    for path in ("/config_dump?include_eds", "/clusters?format=json", "/listeners", "/certs", "/stats", "/server_info"):
        body = web.admin(path).body.decode()
        assert token not in body and "PRIVATE" not in body, path
    assert "[redacted]" in web.admin("/config_dump").body.decode()


def test_days_until_a_certificate_expires_are_told(mesh):
    web = mesh.service("web")
    assert b"server.days_until_first_cert_expiring: 2\n" in web.admin("/stats").body


def test_the_configuration_shows_who_may_reach_us_and_our_certificates_without_a_key(mesh):
    db = mesh.web("db")
    mesh.deny("evil", db)
    mesh.allow("good", db)

    def shown():
        dump = sections(db)
        assert dump["BootstrapConfigDump"]["bootstrap"]["node"]["id"] == db.proxy_id
        [public] = [one["active_state"]["listener"] for one in dump["ListenersConfigDump"]["dynamic_listeners"] if one["name"].startswith("public_listener")]
        [manager] = public["filter_chains"][0]["filters"]
        rules, router = manager["typed_config"]["http_filters"]
        assert (rules["name"], router["name"]) == ("envoy.filters.http.rbac", "envoy.filters.http.router")
        principals = [one for policy in rules["typed_config"]["rules"]["policies"].values() for one in policy["principals"]]
        # The agent of these scenarios allows by default, so that the rules are those who are denied.
        assert rules["typed_config"]["rules"]["action"] == "DENY"
        sources = [one["authenticated"]["principal_name"]["safe_regex"]["regex"] for one in principals if "authenticated" in one]
        assert any(source.endswith("/ns/default/dc/[^/]+/svc/evil$") for source in sources) and not any("good" in source for source in sources)
        leaf, roots = (one["secret"] for one in dump["SecretsConfigDump"]["dynamic_active_secrets"])
        assert leaf["tls_certificate"]["private_key"] == {"inline_string": "[redacted]"}
        for pem in (leaf["tls_certificate"]["certificate_chain"], roots["validation_context"]["trusted_ca"]):
            assert pem["inline_string"].startswith("-----BEGIN CERTIFICATE-----\n")
        return True
    eventually(shown)
    assert b"PRIVATE KEY" not in db.admin("/config_dump?include_eds").body


def test_an_upstream_with_settings_of_its_own_is_a_cluster_of_its_own(mesh):
    db = mesh.web("db")
    plain = Upstream(db.name, mesh.ports.take())
    slow = Upstream(db.name, mesh.ports.take(), {"Config": {"connect_timeout_ms": 7000}})
    web = mesh.service("web", [slow], app=None)
    other = mesh.service("other", [plain], app=None)
    custom = mesh.agent.call("POST", f"/v1/discovery-chain/{db.name}", {"OverrideConnectTimeout": "7s"})["Chain"]["CustomizationHash"]
    own = f"{custom}~{cluster_of(mesh, db)}"
    eventually(lambda: own in statuses(web) and statuses(web)[own]["host_statuses"])
    assert eventually(lambda: cluster_of(mesh, db) in statuses(other))
    eventually(lambda: ask(slow.port).status == 200)
    series = Metrics(web)
    assert series("envoy_cluster_upstream_rq_total", consul_destination_custom_hash=custom, consul_destination_service=db.name) >= 1
    assert series("envoy_cluster_upstream_rq_total", envoy_cluster_name=f"{custom}~{db.name}") >= 1
