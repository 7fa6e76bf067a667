"""Each query of the agent: its purpose, how it is sent, the age of its answer, and its last error."""

import json
import re

from mesh import Gate, eventually
from mesh.series import Metrics

# Of a sidecar with one upstream.
KINDS = {"registration", "roots", "leaf", "intentions", "default_policy", "chain", "instances", "config_entry", "table"}


def watches(service):
    return json.loads(service.admin("/debug/watches").body)


def by_what(service):
    return {watch["what"]: watch for watch in watches(service)["watches"]}


def watch_if(watch, holds):
    return watch if holds(watch) else None


def pair(mesh):
    db = mesh.service("db")
    web = mesh.service("web", [db], app=None)
    web.eventually_reaches()
    eventually(lambda: {watch["kind"] for watch in watches(web)["watches"] if watch["age"] is not None} == KINDS)
    return db, web


def test_each_query_tells_how_it_is_asked_and_what_it_was_answered(mesh):
    db, web = pair(mesh)
    about = watches(web)
    assert about["address"].endswith(str(mesh.agent.port)) and about["room"] in ("enough", "crowded", "scarce") and about["connections"] >= 1
    by_name = by_what(web)
    registration, chain, instances = (by_name[what] for what in (f"registration of {web.proxy_id}", f"discovery chain of {db.name}", f"endpoints of {db.name} in dc1"))
    assert registration["request"] == f"GET /v1/agent/service/{web.proxy_id}" and registration["answered_by"] == "agent"
    assert (registration["how"], registration["index"]) == ("blocks", None)
    assert (chain["how"], chain["table"], instances["how"], instances["table"]) == ("table", "config entries", "table", "instances in dc1")
    assert chain["request"] == f"GET /v1/discovery-chain/{db.name}" and instances["index"] > 0
    assert by_name["CA roots"]["how"] == "blocks" and by_name["CA roots"]["answered_by"] == "agent_cache"
    assert by_name[f"default policy of {web.name}"]["how"] == "periodic" and by_name["changes of instances in dc1"]["how"] == "blocks"
    for watch in by_name.values():
        assert (watch["errors"] == 0) == (watch["error"] is None) and (watch["errors"] > 0 or not watch["failing"]), watch
        assert (watch["state"] == "waiting") == (watch["under_way"] is None), watch
    # The one for intentions blocks for as long as it may.
    rules = eventually(lambda: watch_if(by_what(web)[f"intentions of {web.name}"], lambda one: one["state"] == "blocked"))
    assert rules["blocks_for"] >= 1 and rules["index"] > 0
    state = json.loads(web.admin("/status").body)
    assert {watch["what"] for watch in state["watches"]} == set(by_name) and state["agent"]["room"] == about["room"]


def test_a_failure_is_told_until_and_after_an_answer_comes(own_mesh):
    mesh = own_mesh()
    gate = mesh.keep(Gate(mesh.ports.take(), mesh.agent.port))
    web = mesh.service("web", sidecar=None)
    web.start(env={"CONSUL_HTTP_ADDR": f"127.0.0.1:{gate.port}"})
    rules = lambda: by_what(web)[f"intentions of {web.name}"]  # noqa: E731
    eventually(lambda: rules()["age"] is not None)
    gate.mode = "fault"
    failed = eventually(lambda: watch_if(rules(), lambda one: one["failing"] and "No cluster leader" in one["error"]), 40)
    assert failed["error_age"] >= 0 and failed["errors"] >= 1 and failed["age"] is not None
    assert "GET /v1/connect/intentions" in failed["error"]
    now = Metrics(web, "/metrics")
    assert now("lictor_agent_queries", kind="intentions", state="failing") == 1
    assert now("lictor_agent_requests_total", kind="intentions", result="refused") >= 1
    gate.mode = "pass"
    back = eventually(lambda: watch_if(rules(), lambda one: not one["failing"]), 40)
    assert "No cluster leader" in back["error"] and back["errors"] >= failed["errors"]
    assert Metrics(web, "/metrics")("lictor_agent_queries", kind="intentions", state="failing") == 0


def test_requests_of_the_agent_are_counted_and_ages_are_bounded_by_kind(mesh):
    db, web = pair(mesh)

    def agrees():
        """What is told of each query and the counters say the same, once no request ends in between."""
        now = Metrics(web, "/metrics")
        for kind in ("leaf", "chain", "registration"):
            of_kind = [watch for watch in watches(web)["watches"] if watch["kind"] == kind]
            over = sum(watch["requests"] - (watch["under_way"] is not None) for watch in of_kind)
            assert now("lictor_agent_requests_total", kind=kind) == over
        return True
    eventually(agrees)
    now = Metrics(web, "/metrics")
    assert {labels["kind"] for labels, _ in now.series["lictor_agent_query_age_seconds"]} == KINDS
    assert now("lictor_agent_query_age_seconds", kind="table") < 70
    # Two upstreams more are no series more, and neither is what a sidecar asks that nobody uses any more.
    for name in ("one", "two"):
        web.add_upstream(mesh.service(name))
    web.register()
    eventually(lambda: len([1 for watch in watches(web)["watches"] if watch["kind"] == "chain"]) == 3)
    assert Metrics(web, "/metrics")("lictor_agent_queries", kind="chain", state="ok") == 3
    assert len(Metrics(web, "/metrics").series["lictor_agent_query_age_seconds"]) == len(KINDS)
    web.upstreams.clear()
    web.register()
    eventually(lambda: not [1 for watch in watches(web)["watches"] if watch["kind"] == "chain"])
    eventually(lambda: Metrics(web, "/metrics")("lictor_agent_queries", kind="chain") is None)


def test_roots_say_when_they_end(mesh):
    _, web = pair(mesh)
    now = Metrics(web, "/metrics")
    leaf, root = now("lictor_certificate_expiry_timestamp_seconds"), now("lictor_root_expiry_timestamp_seconds")
    [entry] = json.loads(web.admin("/certs").body)["certificates"]
    serials = {labels["serial"] for labels, _ in now.series["lictor_root_expiry_timestamp_seconds"]}
    assert serials == {root["serial_number"] for root in entry["ca_cert"]} and all(re.fullmatch("[0-9a-f]+", serial) for serial in serials)
    assert root > leaf > 1_700_000_000
