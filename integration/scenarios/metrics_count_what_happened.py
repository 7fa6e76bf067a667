"""Counts are exact: known traffic, and the series that Consul's UI and HashiCorp's dashboards query, as Envoy 1.40 has them under Consul.

Names, labels and moments are those that were seen on a running Envoy with the same traffic. Where ours differs on purpose (a denied
connection dials no app), it is said beside the number.
"""

import json
import time

from mesh import Upstream, Web, ask, eventually
from mesh.series import Metrics


class Answers(Web):
    """Gives the status that the path names; /flaky comes good at the third try; /slow takes longer than the client waits."""

    def __init__(self, port):
        super().__init__(port)
        self.tries = 0

    def answer(self, request):
        body = self.take(request)
        path = request.path.strip("/")
        if path == "slow":
            time.sleep(1.5)
        if path == "flaky":
            self.tries += 1
            return self.show(request, body, 200 if self.tries % 3 == 0 else 503)
        return self.show(request, body, int(path) if path.isdigit() else 200)


def eventually_counts(service, check):
    """The end of a request is counted a moment after its client has the answer."""
    def holds():
        check(Metrics(service))
        return True
    eventually(holds)


def test_requests_are_counted_on_both_sides(mesh):
    db = mesh.service("db", app=Answers, protocol="http")
    mesh.agent.write("service-router", db.name, Routes=[
        {"Match": {"HTTP": {"PathPrefix": "/flaky"}}, "Destination": {"NumRetries": 3, "RetryOnStatusCodes": [503]}},
        {"Match": {"HTTP": {"PathPrefix": "/slow"}}, "Destination": {"RequestTimeout": "500ms"}}])
    web, evil = mesh.service("web", [db], app=None), mesh.service("evil", [db], app=None)
    mesh.deny(evil, db)
    port = web.port_to(db)
    # What it takes to see that all of it is there is counted, too.
    eventually(lambda: ask(evil.port_to(db), "/200").status == 403)
    eventually(lambda: ask(port, "/flaky").status == 200 and db.app.tries % 3 == 0)
    eventually(lambda: all(entry.status == 200 for entry in [ask(port, "/200")]))
    before = {service: Metrics(service) for service in (web, db, evil)}
    for path, times, status in (("/200", 20, 200), ("/301", 3, 301), ("/404", 7, 404), ("/500", 5, 500), ("/flaky", 2, 200), ("/slow", 2, 504)):
        assert [ask(port, path).status for _ in range(times)] == [status] * times
    for _ in range(4):
        assert ask(evil.port_to(db), "/200").status == 403

    def grown(service, now):
        return lambda name, **labels: (now(name, **labels) or 0) - (before[service](name, **labels) or 0)

    def by_class(of, name, **labels):
        return [of(name, envoy_response_code_class=str(n), **labels) for n in range(2, 6)]

    upstream = {"envoy_http_conn_manager_prefix": "upstream", "consul_upstream_service": db.name, "consul_upstream_datacenter": "dc1",
                "consul_source_service": web.name, "consul_source_datacenter": "dc1", "consul_source_namespace": "default"}
    cluster = {"consul_destination_service": db.name, "consul_destination_datacenter": "dc1", "consul_source_service": web.name, "local_cluster": web.name}

    def on_web(now):
        of = grown(web, now)
        assert by_class(of, "envoy_http_downstream_rq_xx", **upstream) == [22, 3, 7, 7]
        assert of("envoy_http_downstream_rq_completed", **upstream) == 39
        assert by_class(of, "envoy_cluster_upstream_rq_xx", **cluster) == [22, 3, 7, 7]
        assert of("envoy_cluster_upstream_rq_completed", **cluster) == 39
        assert of("envoy_cluster_upstream_rq_total", **cluster) == 43
        # Final answers of the other side: no timeouts.
        assert of("envoy_cluster_upstream_rq_time_count", **cluster) == 37
        assert of("envoy_cluster_upstream_rq", envoy_response_code="404", **cluster) == 7
        assert of("envoy_cluster_retry_upstream_rq_xx", envoy_response_code_class="5", **cluster) == 4
        assert (of("envoy_cluster_upstream_rq_retry", **cluster), of("envoy_cluster_upstream_rq_retry_success", **cluster)) == (4, 2)
        assert of("envoy_cluster_upstream_rq_timeout", **cluster) == 2
        assert now("envoy_cluster_ssl_handshake", **cluster) >= 1
        assert (now("envoy_http_downstream_rq_active", **upstream), now("envoy_cluster_membership_healthy", **cluster)) == (0, 1)
    eventually_counts(web, on_web)

    public = {"envoy_http_conn_manager_prefix": "public_listener", "consul_source_service": db.name}
    app = {"envoy_cluster_name": "local_app"}

    def on_db(now):
        of = grown(db, now)
        assert by_class(of, "envoy_http_downstream_rq_xx", **public) == [22, 3, 11, 9]
        assert by_class(of, "envoy_listener_http_downstream_rq_xx", envoy_listener_address=f"0.0.0.0_{db.public}") == [22, 3, 11, 9]
        assert (of("envoy_http_downstream_rq_total", **public), of("envoy_http_downstream_rq_completed", **public)) == (47, 45)
        # The two timeouts. (Envoy counts two more: answers whose bodies the client's sidecar did not read to the end.)
        assert of("envoy_http_downstream_rq_rx_reset", **public) == 2
        assert (of("envoy_http_rbac_allowed", **public), of("envoy_http_rbac_denied", **public)) == (43, 4)
        assert of("envoy_cluster_upstream_rq_xx", envoy_response_code_class="5", **app) == 9
    eventually_counts(db, on_db)

    def on_evil(now):
        assert grown(evil, now)("envoy_cluster_upstream_rq_xx", envoy_response_code_class="4", consul_destination_service=db.name) == 4
    eventually_counts(evil, on_evil)


def test_connections_are_counted_on_both_sides(mesh):
    cache = mesh.service("cache")
    web, evil = mesh.service("web", [cache], app=None), mesh.service("evil", [cache], app=None)
    mesh.deny(evil, cache)
    web.eventually_reaches()
    evil.eventually_refused()
    # Connections are over on both sides before anything is counted.
    open_of = lambda service, **labels: Metrics(service)("envoy_tcp_downstream_cx_active", **labels)  # noqa: E731
    eventually(lambda: open_of(cache, envoy_tcp_prefix="public_listener") == 0)
    before = {service: Metrics(service) for service in (web, cache, evil)}
    for _ in range(6):
        assert web.reaches(text=b"x" * 999 + b"\n")
    for _ in range(3):
        assert evil.refused()
    upstream = {"envoy_tcp_prefix": "upstream", "consul_upstream_service": cache.name}

    def grown(service, now, name, **labels):
        return (now(name, **labels) or 0) - (before[service](name, **labels) or 0)

    def on_web(now):
        assert grown(web, now, "envoy_tcp_downstream_cx_total", **upstream) == 6
        assert grown(web, now, "envoy_tcp_downstream_cx_rx_bytes_total", **upstream) == 6000
        assert grown(web, now, "envoy_tcp_downstream_cx_tx_bytes_total", **upstream) == 6000
        assert grown(web, now, "envoy_cluster_upstream_rq_total", consul_destination_service=cache.name) == 6
    eventually_counts(web, on_web)

    def on_cache(now):
        public = {"envoy_tcp_prefix": "public_listener"}
        assert grown(cache, now, "envoy_tcp_downstream_cx_total", **public) == 9
        assert (grown(cache, now, "envoy_tcp_downstream_cx_rx_bytes_total", **public), grown(cache, now, "envoy_tcp_downstream_cx_tx_bytes_total", **public)) == (6000, 6000)
        rules = {"envoy_rbac_prefix": "connect_authz"}
        assert (grown(cache, now, "envoy_rbac_allowed", **rules), grown(cache, now, "envoy_rbac_denied", **rules)) == (6, 3)
        # Envoy has dialled the app for those it denies, too: 9.
        assert grown(cache, now, "envoy_cluster_upstream_cx_total", envoy_cluster_name="local_app") == 6
    eventually_counts(cache, on_cache)
    eventually_counts(evil, lambda now: grown(evil, now, "envoy_tcp_downstream_cx_total", **upstream) == 3)
    # By rule, from the first connection on: what a sidecar is tried with until it is denied is decided by the default.
    rule = decided(cache, evil)
    assert rule["denied"] >= 3 and rule["allowed"] == 0
    assert rules_of(cache)[f"{evil.name} => {cache.name}"] == (0, rule["denied"])
    [inbound] = json.loads(cache.admin("/status").body)["inbound"]
    assert rules_of(cache)["default policy"] == (inbound["default_allowed"], inbound["default_denied"]) and inbound["default_allowed"] >= 6


def decided(service, source):
    """The hits of the intention for this source; `None` where there is none."""
    [inbound] = json.loads(service.admin("/status").body)["inbound"]
    return next((rule for rule in inbound["intentions"] if rule["source"] == source.name), None)


def rules_of(service):
    """Allowed and denied by rule."""
    rules = {}
    for labels, value in Metrics(service, "/metrics").series["lictor_intention_hits_total"]:
        counts = rules.setdefault(labels["rule"], {})
        counts[labels["decision"]] = int(value)
    return {rule: (counts["allowed"], counts["denied"]) for rule, counts in rules.items()}


def test_each_rule_counts_what_it_decided_and_goes_with_its_intention(mesh):
    db = mesh.web("db")
    good, evil = (mesh.service(name, [db], app=None) for name in ("good", "evil"))
    undo = mesh.deny(evil, db)
    mesh.allow(good, db)
    eventually(lambda: ask(evil.port_to(db)).status == 403 and decided(db, good))
    eventually(lambda: ask(good.port_to(db)).status == 200)
    before = {source: (decided(db, source)["allowed"], decided(db, source)["denied"]) for source in (good, evil)}
    assert [ask(good.port_to(db)).status for _ in range(5)] == [200] * 5
    assert [ask(evil.port_to(db)).status for _ in range(3)] == [403] * 3

    def counts(source, allowed, denied):
        rule, (was_allowed, was_denied) = decided(db, source), before[source]
        assert (rule["allowed"], rule["denied"]) == (was_allowed + allowed, was_denied + denied)
        assert rules_of(db)[f"{source.name} => {db.name}"] == (rule["allowed"], rule["denied"])
    counts(good, 5, 0)
    counts(evil, 0, 3)
    # A rule that is changed counts on; one that is taken away is no series any more.
    mesh.allow(evil, db)
    eventually(lambda: ask(evil.port_to(db)).status == 200)
    rule = decided(db, evil)
    assert rule["action"] == "allow" and rule["denied"] >= before[evil][1] + 3 and rule["allowed"] >= 1
    undo()
    eventually(lambda: decided(db, evil) is None)
    assert f"{evil.name} => {db.name}" not in rules_of(db) and f"{good.name} => {db.name}" in rules_of(db)


class Failing(Web):
    """Answers 500, but for as long as it is well."""

    well = False

    def answer(self, request):
        return self.show(request, self.take(request), 200 if self.well else 500)


def test_breakers_and_limits_are_told_by_their_state(mesh):
    good = mesh.web("good")
    bad = mesh.service("bad", app=Failing, of=good, protocol="http")
    # Long enough for what is looked at meanwhile.
    check = {"max_failures": 3, "interval": "100ms", "base_ejection_time": "12s", "max_ejection_percent": 50}
    upstream = Upstream(good.name, mesh.ports.take(), {"Config": {"passive_health_check": check, "limits": {"max_connections": 0}}})
    web = mesh.service("web", [upstream], app=None, protocol="http")

    def target():
        [outbound] = json.loads(web.admin("/status").body)["outbound"]
        assert len(outbound["targets"]) == 1, "the chain is known"
        return outbound["targets"][0]

    def state_of(service):
        found = [endpoint for endpoint in target()["endpoints"] if endpoint["address"].endswith(f":{service.public}")]
        assert len(found) == 1
        return found[0]

    def instances(now):
        return {labels["state"]: value for labels, value in now.series["lictor_upstream_instances"]}
    eventually(lambda: len(target()["endpoints"]) == 2)
    now = Metrics(web, "/metrics")
    assert instances(now) == {"closed": 2, "open": 0, "half-open": 0}
    assert [now("lictor_upstream_endpoints", health=health) for health in ("passing", "failing")] == [2, 0]
    # A limit of zero is reached from the start: nothing passes, and each request that is turned away is counted.
    assert [ask(upstream.port).status for _ in range(3)] == [503] * 3
    assert target()["limits"]["connections"] == {"used": 0, "maximum": 0, "open": True}
    assert now("lictor_upstream_limit_reached", limit="connection") == 1 and now("lictor_upstream_limit_reached", limit="request") == 0
    envoy = Metrics(web)
    assert (envoy("envoy_cluster_circuit_breakers_default_cx_open"), envoy("envoy_cluster_circuit_breakers_default_rq_open")) == (1, 0)
    assert envoy("envoy_cluster_upstream_cx_overflow") == 3
    upstream.more["Config"].pop("limits")
    web.register()
    eventually(lambda: 200 in {ask(upstream.port).status for _ in range(10)} and state_of(bad)["breaker"] == "open")
    assert state_of(bad)["state"] == "ejected" and state_of(good)["breaker"] == "closed"
    lines = web.admin("/clusters").body.decode().splitlines()
    assert {line.rsplit("::", 1)[1] for line in lines if f":{bad.public}::breaker::" in line} == {"open"}
    assert any(f":{bad.public}::health_flags::/failed_outlier_check" in line for line in lines)
    now, envoy = Metrics(web, "/metrics"), Metrics(web)
    assert now("lictor_upstream_limit_reached", limit="connection") == 0
    assert envoy("envoy_cluster_circuit_breakers_default_cx_open") == 0 and envoy("envoy_cluster_outlier_detection_ejections_enforced_total") >= 1
    bad.app.well = True
    eventually(lambda: ask(upstream.port).status == 200 and state_of(bad)["breaker"] == "closed", 60)
    eventually(lambda: instances(Metrics(web, "/metrics")) == {"closed": 2, "open": 0, "half-open": 0})
    good.passing("fail")
    eventually(lambda: [Metrics(web, "/metrics")("lictor_upstream_endpoints", health=health) for health in ("passing", "failing")] == [1, 1])


def test_an_ejection_that_is_one_too_many_is_counted_and_not_made(mesh):
    db = mesh.service("db", app=Failing, protocol="http")
    check = {"max_failures": 3, "interval": "100ms", "max_ejection_percent": 50}
    upstream = Upstream(db.name, mesh.ports.take(), {"Config": {"passive_health_check": check}})
    web = mesh.service("web", [upstream], app=None, protocol="http")
    # Its own error: the instance is half of nothing, and all that there is.
    eventually(lambda: ask(upstream.port).status == 500)
    eventually(lambda: (ask(upstream.port).status, Metrics(web)("envoy_cluster_outlier_detection_ejections_overflow")) == (500, 1))
    assert [ask(upstream.port).status for _ in range(3)] == [500] * 3
    series = Metrics(web)
    assert series("envoy_cluster_outlier_detection_ejections_overflow") == 2
    assert [series(f"envoy_cluster_outlier_detection_ejections_{name}") for name in ("enforced_total", "active")] == [0, 0]


def test_bytes_are_counted_while_their_connection_is_open(mesh):
    cache = mesh.service("cache")
    web = mesh.service("web", [cache], app=None)
    web.eventually_reaches()
    public, upstream = {"envoy_tcp_prefix": "public_listener"}, {"envoy_tcp_prefix": "upstream", "consul_upstream_service": cache.name}
    local_app, target = {"envoy_cluster_name": "local_app"}, {"consul_destination_service": cache.name}

    def bytes_of(service, listener, cluster):
        now = Metrics(service)
        names = [(f"envoy_tcp_downstream_cx_{way}_bytes_total", listener) for way in ("rx", "tx")]
        names += [(f"envoy_cluster_upstream_cx_{way}_bytes_total", cluster) for way in ("tx", "rx")]
        return [now(name, **labels) or 0 for name, labels in names]

    for service, labels in ((web, upstream), (cache, public)):
        eventually(lambda service=service, labels=labels: Metrics(service)("envoy_tcp_downstream_cx_active", **labels) == 0)
    before = {web: bytes_of(web, upstream, target), cache: bytes_of(cache, public, local_app)}

    def grown(of):
        eventually(lambda: bytes_of(web, upstream, target) == [count + of for count in before[web]])
        eventually(lambda: bytes_of(cache, public, local_app) == [count + of for count in before[cache]])
    def connections(service, cluster):
        return [Metrics(service)(f"envoy_cluster_upstream_rq_{name}", **cluster) for name in ("active", "total")]
    sent = {web: connections(web, target)[1], cache: connections(cache, local_app)[1]}
    with web.dial() as conn:
        assert conn.ask(b"x" * 1000) == b"x" * 1000
        grown(1000)
        # To Envoy an open connection is a request that is under way.
        assert connections(web, target) == [1, sent[web] + 1] and connections(cache, local_app) == [1, sent[cache] + 1]
        assert conn.ask(b"y" * 500) == b"y" * 500
        grown(1500)
    for service, labels in ((web, upstream), (cache, public)):
        eventually(lambda service=service, labels=labels: Metrics(service)("envoy_tcp_downstream_cx_active", **labels) == 0)
    # The end counts nothing twice.
    grown(1500)
    assert connections(web, target) == [0, sent[web] + 1] and connections(cache, local_app) == [0, sent[cache] + 1]


def test_series_follow_the_registration_and_nothing_that_clients_say(mesh):
    db = mesh.web("db")
    web = mesh.service("web", [db], app=None)
    port = web.port_to(db)
    eventually(lambda: ask(port).status == 200)
    names = lambda: {(name, tuple(sorted(labels.items()))) for name, all in Metrics(web).series.items() for labels, _ in all}  # noqa: E731
    before = names()
    for n in range(200):
        ask(port, f"/path/{n}?q={n}", headers={"Host": f"host{n}.example", "User-Agent": f"agent{n}"})
    assert names() == before
    web.upstreams.clear()
    web.register()
    eventually(lambda: not any(db.name in str(key) for key in names()))
