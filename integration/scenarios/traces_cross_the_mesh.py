"""Traces: whole ones reach a collector, headers go on in the form in which they came, and a collector that is away costs spans alone."""

import json
import re
import socket

import pytest

from mesh import Collector, GrpcCollector, Web, ask, eventually, who

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SHORT, SPAN = TRACE[16:], "00f067aa0ba902b7"
W3C = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
B3 = {"x-b3-traceid": TRACE, "x-b3-spanid": SPAN, "x-b3-sampled": "1"}
FORMS = re.compile("traceparent|tracestate|b3|x-b3-.*|x-request-id|x-client-trace-id")
# Spans are sent at once.
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50"}


def headers_of(seen):
    return {name: value for name, value in seen["headers"] if FORMS.fullmatch(name)}


class Relay(Web):
    """An app that asks another one at `to` for its own answer, and passes headers on as apps do."""

    to = None

    def answer(self, request):
        self.take(request)
        headers = {name: value for name, value in request.headers.items() if FORMS.fullmatch(name.lower())}
        answer = ask(self.to, request.path, headers=headers)
        self.say(request, answer.body, answer.status)


def chain(mesh, env=None, config=None):
    """order → invoice → tax, and the port that leads from order to invoice."""
    env, proxy = {**SOON, **(env or {})}, {"proxy": {"Config": config or {}}}
    tax = mesh.web("tax", sidecar=None, **proxy)
    invoice = mesh.web("invoice", [tax], sidecar=None, app=lambda port: Relay(port, name="invoice"), **proxy)
    order = mesh.web("order", [invoice], sidecar=None, **proxy)
    invoice.app.to = invoice.upstreams[0].port
    for service in (tax, invoice, order):
        service.start("lictor", env=env)
    port = order.upstreams[0].port
    eventually(lambda: who(port) == "tax")
    return order, invoice, tax, port


def zipkin(collector, **more):
    """What Consul's documentation has in `Config`."""
    tracer = {"http": {"name": "envoy.tracers.zipkin", "typedConfig": {
        "@type": "type.googleapis.com/envoy.config.trace.v3.ZipkinConfig", "collector_cluster": "zipkin", "collector_endpoint": "/api/v2/spans",
        "collector_endpoint_version": "HTTP_JSON", "shared_span_context": False, "trace_id_128bit": True, **more}}}
    address = {"socket_address": {"address": "127.0.0.1", "port_value": collector.port}}
    cluster = {"name": "zipkin", "type": "STRICT_DNS", "connect_timeout": "5s",
               "load_assignment": {"cluster_name": "zipkin", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]}}
    return {"envoy_tracing_json": json.dumps(tracer), "envoy_extra_static_clusters_json": json.dumps(cluster)}


def whole(spans, services, **fields):
    """The four spans of one trace, of which the first one's `fields` are given, each below the one before."""
    order, invoice, tax = services
    trace = eventually(lambda: spans.all(service=order.name, **fields), what="the first span")[0]["trace"]
    found = eventually(lambda: len(all_ := spans.all(trace=trace)) >= 4 and all_, what="four spans")
    assert len(found) == 4, found
    expected = [(order.name, "CLIENT"), (invoice.name, "SERVER"), (invoice.name, "CLIENT"), (tax.name, "SERVER")]
    line = [next(span for span in found if (span["service"], span["kind"]) == each) for each in expected]
    for above, below in zip(line, line[1:]):
        assert below["parent"] == above["id"]
        assert above["start"] - 1000 <= below["start"] and below["duration"] <= above["duration"] + 1000
    return line


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_a_whole_trace_is_sent_over_otlp(mesh, way):
    collector = mesh.keep((Collector if way == "http" else GrpcCollector)(mesh.ports.take()))
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}", "OTEL_EXPORTER_OTLP_HEADERS": "x-key=a%20secret",
           "OTEL_RESOURCE_ATTRIBUTES": "env=lab", **({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"} if way == "grpc" else {})}
    *services, port = chain(mesh, env)
    url = f"http://127.0.0.1:{port}/whole?x=1"
    assert ask(port, "/whole?x=1", headers={"user-agent": "tester"}).status == 200
    line = whole(collector.spans, services, **{"http.url": url})
    assert line[0]["parent"] is None and line[0]["name"] == f"egress 127.0.0.1:{port}" and line[1]["name"] == "ingress"
    tags = line[0]["tags"]
    assert {**tags, "http.method": "GET", "http.protocol": "HTTP/1.1", "http.status_code": "200", "user_agent": "tester", "response_flags": "-",
            "component": "proxy", "node_id": services[0].proxy_id, "lictor.outcome": "Ended", "peer.address": "127.0.0.1"} == tags
    assert tags["upstream_cluster"] == mesh.agent.sni(services[1].name) and line[1]["tags"]["upstream_cluster"] == "local_app"
    assert line[1]["tags"]["lictor.source"] == mesh.agent.spiffe(services[0].name)
    # One id in all of it, which the app got.
    assert len({span["tags"]["guid:x-request-id"] for span in line}) == 1
    assert line[0]["resource"]["env"] == "lab" and not line[0]["error"]
    assert collector.spans.calls[0]["x-key"] == "a secret"
    # What the last app saw says whose span it lies under, in both forms.
    seen = headers_of(next(seen for seen in services[2].app.requests if seen["path"] == "/whole?x=1"))
    assert seen["traceparent"] == f"00-{line[3]['trace']}-{line[3]['id']}-01"
    assert (seen["x-b3-traceid"], seen["x-b3-spanid"], seen["x-b3-sampled"]) == (line[3]["trace"], line[3]["id"], "1")
    text = services[0].admin("/metrics", headers={"Accept": "application/openmetrics-text"}).body.decode()
    assert re.search(r'lictor_request_duration_seconds_bucket\{[^}]*\} \d+ # \{trace_id="[0-9a-f]{32}"\} [\d.]+ [\d.]+\n', text)
    assert int(re.search(r'lictor_spans_total\{result="sent".*\} (\d+)', text)[1]) >= 1 and 'lictor_spans_total{result="dropped"' in text


def test_a_whole_trace_is_sent_to_zipkin_as_proxy_defaults_say(own_mesh):
    mesh = own_mesh({"enable_central_service_config": True})
    collector = mesh.keep(Collector(mesh.ports.take()))
    *services, port = chain(mesh)
    seen = ask(port).seen()
    assert set(headers_of(seen)) == {"x-request-id"}
    mesh.agent.write("proxy-defaults", "global", Config=zipkin(collector))
    # It is followed: a trace is what somebody asks for, as nothing begins by chance.
    for service in services:
        service.process.logged("Tracing: spans are sent to a collector")
    assert ask(port, "/asked", headers={"x-client-trace-id": "mine"}).status == 200
    line = whole(collector.spans, services, **{"guid:x-client-trace-id": "mine"})
    assert [span["annotations"] for span in line] == [["cr"], ["ss"], ["cr"], ["ss"]] and line[0]["parent"] is None
    assert line[0]["name"] == f"127.0.0.1:{port}" and collector.spans.calls[0]["host"] == "zipkin"
    assert set(headers_of(ask(port, "/quiet").seen())) == {"x-request-id"}
    assert not collector.spans.all(**{"http.url": f"http://127.0.0.1:{port}/quiet"})
    mesh.agent.delete("/v1/config/proxy-defaults/global")
    eventually(lambda: "traceparent" not in headers_of(ask(port, headers={"x-client-trace-id": "mine"}).seen()))


# What comes in, and what the app sees of it; `id` stands for the server's span, and `up` for the one above it.
PASSED_ON = {
    "W3C": (W3C, {"traceparent": f"00-{TRACE}-id-01"}),
    "W3C with a state": ({**W3C, "tracestate": "a=b"}, {"traceparent": f"00-{TRACE}-id-01", "tracestate": "a=b"}),
    "B3": (B3, {"x-b3-traceid": TRACE, "x-b3-spanid": "id", "x-b3-parentspanid": "up", "x-b3-sampled": "1"}),
    "B3 of 64 bits": ({**B3, "x-b3-traceid": SHORT}, {"x-b3-traceid": SHORT, "x-b3-spanid": "id", "x-b3-parentspanid": "up", "x-b3-sampled": "1"}),
    "a single B3": ({"b3": f"{TRACE}-{SPAN}-1"}, {"b3": f"{TRACE}-id-1-up"}),
    "debugging": ({"b3": f"{SHORT}-{SPAN}-d"}, {"b3": f"{SHORT}-id-d-up"}),
    "both": ({**W3C, **B3}, {"traceparent": f"00-{TRACE}-id-01", "x-b3-traceid": TRACE, "x-b3-spanid": "id", "x-b3-parentspanid": "up", "x-b3-sampled": "1"}),
}
UNTOUCHED = {
    "nothing": {},
    "W3C that is not sampled": {"traceparent": f"00-{TRACE}-{SPAN}-00", "tracestate": "a=b"},
    "B3 that is not sampled": {**B3, "x-b3-sampled": "0"},
    "B3 that says no": {"b3": "0"},
    "a bad traceparent": {"traceparent": f"00-{TRACE}-{SPAN}", "tracestate": "a=b"},
    "a very long one": {"traceparent": "0" * 8000},
    "an unfinished B3": {"x-b3-traceid": TRACE},
    "a state alone": {"tracestate": "a=b"},
}


def test_headers_go_on_in_the_form_in_which_they_came(mesh):
    collector = mesh.keep(Collector(mesh.ports.take()))
    config = {"proxy": {"Config": zipkin(collector)}}
    server = mesh.web("server", sidecar=None, **config)
    client = mesh.web("client", [server], sidecar=None, **config)
    for service in (server, client):
        service.start("lictor", env=SOON)
    port = client.upstreams[0].port
    eventually(lambda: who(port) == "server")
    for service in (server, client):
        service.process.logged("Tracing: spans are sent to a collector")

    def seen(headers, path):
        found = headers_of(ask(port, path, headers=headers).seen())
        assert len(found.pop("x-request-id")) == 36
        return found
    for number, (name, (given, expected)) in enumerate(PASSED_ON.items()):
        got = seen(given, f"/on/{number}")
        url = f"http://127.0.0.1:{port}/on/{number}"
        spans = eventually(lambda: len(two := collector.spans.all(**{"http.url": url})) == 2 and two, what=f"two spans of {name}")
        ours = {span["kind"]: span for span in spans}
        above, this = ours["CLIENT"], ours["SERVER"]
        assert (above["parent"], this["parent"]) == (SPAN, above["id"]), name
        filled = {header: value.replace("id", this["id"]).replace("up", above["id"]) for header, value in expected.items()}
        assert got == filled, name
    for number, (name, given) in enumerate(UNTOUCHED.items()):
        assert seen(given, f"/off/{number}") == given, name
    # Spans come in order: those would be there before this one.
    last = f"http://127.0.0.1:{port}/last"
    seen(W3C, "/last")
    eventually(lambda: len(collector.spans.all(**{"http.url": last})) == 2)
    assert not [span for span in collector.spans.all() if "/off/" in span["tags"]["http.url"]]


def test_a_shared_span_has_one_id(mesh):
    collector = mesh.keep(Collector(mesh.ports.take()))
    *services, port = chain(mesh, config=zipkin(collector, shared_span_context=True, trace_id_128bit=False))
    for service in services:
        service.process.logged("Tracing: spans are sent to a collector")
    ask(port, headers={"x-client-trace-id": "x"})
    found = eventually(lambda: len(all_ := collector.spans.all(**{"guid:x-client-trace-id": "x"})) >= 4 and all_)
    by_place = {(span["service"], span["kind"]): span for span in found}
    order, invoice, tax = services
    first, second = by_place[order.name, "CLIENT"], by_place[invoice.name, "SERVER"]
    assert first["id"] == second["id"] and second["shared"] and not first["shared"] and len(first["trace"]) == 16
    third, last = by_place[invoice.name, "CLIENT"], by_place[tax.name, "SERVER"]
    assert third["parent"] == second["id"] and last["id"] == third["id"] and last["parent"] == third["parent"]


@pytest.mark.parametrize("given", [W3C, B3], ids=["W3C", "B3"])
@pytest.mark.parametrize("ends", ["lictor to envoy", "envoy to lictor"])
def test_envoy_and_ours_share_a_trace(mesh, ends, given):
    collector = mesh.keep(Collector(mesh.ports.take()))
    config = {"proxy": {"Config": zipkin(collector)}}
    server = mesh.web("server", sidecar=None, **config)
    client = mesh.web("client", [server], sidecar=None, **config)
    for service, kind in zip((client, server), ends.split(" to ")):
        if kind == "envoy":
            service.process = mesh.envoy(service, protocol="http", endpoints={server.name: [server.public]}, zipkin=collector.port)
        else:
            service.start(kind, env=SOON)
            service.process.logged("Tracing: spans are sent to a collector")
    port = client.upstreams[0].port
    eventually(lambda: who(port) == "server")
    assert ask(port, "/shared", headers=given).status == 200
    ours, envoys = (("CLIENT", "SERVER") if ends.startswith("lictor") else ("SERVER", "CLIENT"))
    spans = eventually(lambda: (found := {span["kind"]: span for span in collector.spans.all(trace=TRACE)}) and ours in found and found)
    assert spans[ours]["tags"]["http.url"].endswith("/shared") and spans[ours]["tags"]["lictor.outcome"] == "Ended"
    if given is W3C:
        # Envoy's Zipkin tracer does not read it; what came reaches our span, and goes on through Envoy.
        assert spans[ours]["parent"] == SPAN
        return
    spans = eventually(lambda: len(found := {span["kind"]: span for span in collector.spans.all(trace=TRACE)}) == 2 and found)
    assert spans["CLIENT"]["parent"] == SPAN and spans["SERVER"]["parent"] == spans["CLIENT"]["id"]
    # Both say the same things by the same names.
    common = ("component", "http.method", "http.protocol", "http.status_code", "response_flags", "http.url", "downstream_cluster", "peer.address",
              "guid:x-request-id", "user_agent", "request_size", "response_size")
    different = {name for name in common if spans[ours]["tags"].get(name) != spans[envoys]["tags"].get(name)}
    assert not different, (different, spans)


def test_what_went_wrong_stands_in_the_span(mesh):
    collector = mesh.keep(Collector(mesh.ports.take()))
    env = {**SOON, "OTEL_TRACES_EXPORTER": "zipkin", "OTEL_EXPORTER_ZIPKIN_ENDPOINT": f"http://127.0.0.1:{collector.port}/api/v2/spans"}
    server = mesh.web("server", sidecar=None)
    client = mesh.web("client", [server], sidecar=None)
    for service in (server, client):
        service.start("lictor", env=env)
    port = client.upstreams[0].port
    eventually(lambda: who(port) == "server")

    def spans(path, count):
        url = f"http://127.0.0.1:{port}{path}"
        found = eventually(lambda: len(all_ := collector.spans.all(**{"http.url": url})) == count and all_)
        return {span["kind"]: span["tags"] for span in found}
    server.app.status = 500
    assert ask(port, "/wrong").status == 500
    assert all((tags["error"], tags["http.status_code"], tags["lictor.outcome"]) == ("true", "500", "Ended") for tags in spans("/wrong", 2).values())
    server.app.status = 404
    assert ask(port, "/missing").status == 404
    assert not any("error" in tags for tags in spans("/missing", 2).values())
    server.passing("fail")
    eventually(lambda: ask(port, "/gone").status == 503)
    tags = eventually(lambda: collector.spans.all(response_flags="UH"))[-1]["tags"]
    assert (tags["error"], tags["lictor.outcome"], tags["http.status_code"]) == ("true", "NoInstance", "503") and tags["lictor.cause"]
    server.passing("pass")
    eventually(lambda: who(port) != "503 no healthy upstream")
    server.app.status = 200
    mesh.deny(client, server)
    eventually(lambda: ask(port, "/denied").status == 403)
    # A request in flight when the deny came has another cause.
    assert ask(port, "/denied/again").status == 403
    denied = {"lictor.outcome": "Denied", "http.url": f"http://127.0.0.1:{port}/denied/again"}
    tags = eventually(lambda: collector.spans.all(**denied))[-1]["tags"]
    assert tags["http.status_code"] == "403" and client.name in tags["lictor.cause"]
    # Tokens stay at home, and texts of strangers are cut.
    long = "/" + "y" * 4000
    ask(port, "/token?access_token=secret"), ask(port, long)
    eventually(lambda: [span for span in collector.spans.all() if "/yyy" in span["tags"]["http.url"]])
    text = json.dumps(collector.spans.all())
    assert "access_token=REDACTED" in text and "secret" not in text and "y" * 257 not in text


def test_connections_make_spans_on_request(mesh):
    collector = mesh.keep(Collector(mesh.ports.take()))
    env = {**SOON, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}"}
    server = mesh.service("server", sidecar=None, proxy={"Config": {"lictor_trace_connections": True}})
    client = mesh.service("client", [server], sidecar=None)
    for service in (server, client):
        service.start("lictor", env=env)
    client.eventually_reaches()
    client.reaches()
    span = eventually(lambda: collector.spans.all(service=server.name, request_size="6"))[0]
    assert (span["kind"], span["tags"]["response_size"], span["tags"]["lictor.outcome"]) == ("SERVER", "6", "Ended")
    assert span["tags"]["lictor.source"] == mesh.agent.spiffe(client.name)
    mesh.deny(client, server)
    client.eventually_refused()
    eventually(lambda: collector.spans.all(service=server.name, **{"lictor.outcome": "Denied"}))
    # The other side was not asked to.
    assert not collector.spans.all(service=client.name)


def test_a_collector_that_is_away_costs_spans_alone(mesh):
    port_of_collector = mesh.ports.take()
    env = {**SOON, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port_of_collector}"}
    *services, port = chain(mesh, env)
    order = services[0]

    def count(result):
        text = order.admin("/metrics").body.decode()
        return int(re.search(rf'lictor_spans_total\{{result="{result}".*\}} (\d+)', text)[1])
    assert all(ask(port).status == 200 for _ in range(50))
    eventually(lambda: count("dropped") >= 50)
    assert all(ask(port).status == 200 for _ in range(50))
    eventually(lambda: count("dropped") >= 100)
    assert count("sent") == 0 and order.process.text().count("Spans can't be sent") == 1
    collector = mesh.keep(Collector(port_of_collector))
    eventually(lambda: ask(port).status == 200 and count("sent") > 0, every=0.1)
    order.process.logged("The collector takes spans again")
    # One that refuses for good is not asked again for the same spans.
    collector.status = 400
    before = count("dropped")
    ask(port)
    eventually(lambda: count("dropped") > before)


def test_a_collector_that_is_slow_costs_spans_alone(mesh):
    # It takes a connection, and nothing more.
    silent = mesh.keep(socket.create_server(("127.0.0.1", 0)))
    env = {**SOON, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "OTEL_BSP_MAX_QUEUE_SIZE": "8"}
    server = mesh.web("server")
    client = mesh.web("client", [server], sidecar=None)
    client.start("lictor", env=env)
    port = client.upstreams[0].port
    eventually(lambda: who(port) == "server")
    assert all(ask(port).status == 200 for _ in range(200))
    # Some wait, and a batch or two may have been sent in vain.
    text = client.admin("/metrics").body.decode()
    assert int(re.search(r'lictor_spans_total\{result="dropped".*\} (\d+)', text)[1]) >= 150


def test_a_request_that_is_sent_again_makes_one_span(mesh):
    collector = mesh.keep(Collector(mesh.ports.take()))
    env = {**SOON, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}"}
    server = mesh.web("server", sidecar=None)
    mesh.agent.write("service-router", server.name, Routes=[
        {"Match": {"HTTP": {"PathPrefix": "/again"}}, "Destination": {"NumRetries": 3, "RetryOnStatusCodes": [503]}}])
    client = mesh.web("client", [server], sidecar=None)
    for service in (server, client):
        service.start("lictor", env=env)
    port = client.upstreams[0].port
    eventually(lambda: who(port) == "server")
    answers = iter([503, 503])
    server.app.answer = lambda request: server.app.show(request, server.app.take(request), next(answers, 200))
    assert ask(port, "/again").status == 200
    url = f"http://127.0.0.1:{port}/again"
    spans = eventually(lambda: len(all_ := collector.spans.all(**{"http.url": url})) == 4 and all_)
    one, = [span for span in spans if span["kind"] == "CLIENT"]
    assert (one["tags"]["lictor.attempts"], one["tags"]["http.status_code"], one["error"]) == ("3", "200", False)
    assert all(span["parent"] == one["id"] for span in spans if span["kind"] == "SERVER")


def test_what_there_is_at_the_end_is_still_sent(mesh):
    collector = mesh.keep(Collector(mesh.ports.take()))
    server = mesh.web("server", sidecar=None)
    client = mesh.web("client", [server])
    server.start("lictor", env={"OTEL_BSP_SCHEDULE_DELAY": "3600000", "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}"})
    eventually(lambda: who(client.upstreams[0].port) == "server")
    assert not collector.spans.all()
    server.process.stop()
    assert collector.spans.all(service=server.name)


def test_datadogs_tracer_is_told_to_be_none(mesh):
    tracer = {"http": {"name": "envoy.tracers.datadog", "typedConfig": {"@type": "type.googleapis.com/envoy.config.trace.v3.DatadogConfig"}}}
    service = mesh.service("web", sidecar=None, proxy={"Config": {"envoy_tracing_json": json.dumps(tracer)}})
    service.start("lictor").logged("the protocol of Datadog is not supported")
