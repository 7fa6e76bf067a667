"""A real Prometheus scrapes the sidecars as docs/prometheus has it, and is asked what Consul's UI, HashiCorp's dashboards and ours ask."""

import json
import math
import re
import time

import pytest

from mesh import Web, ask, eventually
from mesh.prometheus import DOCS, TOP, Prometheus, program, promtool
from mesh.queries import BOARDS, FIGURES, GRAPHS, KNOWN_LINTS, VARIABLES, filled

# Seconds that the app takes, and what of it lies in one bucket: from 10 to 25 ms, and from 250 to 500 ms.
SHORT, LONG = 0.012, 0.3
BOUNDS = (0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000)


class Timed(Web):
    """Gives the status that the path names, after a known time."""

    def answer(self, request):
        body = self.take(request)
        time.sleep(LONG if request.path == "/slow" else SHORT)
        self.show(request, body, int(request.path[1:]) if request.path[1:].isdigit() else 200)


@pytest.fixture
def scraped(own_mesh, ports, tmp_path):
    """A mesh of web, db (HTTP), cache (TCP) and evil, which both deny; and a Prometheus that finds all four."""
    binary = program("prometheus", "PROMETHEUS_BIN")
    mesh = own_mesh()
    # An agent of its own: names need nothing that tells them from those of others.
    mesh.name = str

    def service(name, *how, **more):
        port = str(mesh.ports.take())
        return mesh.service(name, *how, proxy={"Config": {"envoy_prometheus_bind_addr": f"127.0.0.1:{port}"}},
                            sidecar_fields={"Meta": {"metrics_port": port}}, **more)
    db, cache = service("db", app=Timed, protocol="http"), service("cache")
    web, evil = service("web", [db, cache], app=None), service("evil", [db, cache], app=None)
    mesh.deny(evil, db)
    mesh.deny(evil, cache)
    eventually(lambda: ask(web.port_to(db), "/200").status == 200)
    web.eventually_reaches(cache)
    eventually(lambda: ask(evil.port_to(db), "/200").status == 403)
    evil.eventually_refused(cache)
    prometheus = Prometheus(binary, ports.take(), tmp_path, mesh.agent)
    mesh.processes.append(prometheus)
    mesh.stack.callback(prometheus.end)
    mesh.web, mesh.db, mesh.cache, mesh.evil, mesh.prometheus = web, db, cache, evil, prometheus
    prometheus.sees([each.proxy_id for each in (web, db, cache, evil)])
    return mesh


def load(mesh):
    """A known load; the seconds that each answered request took."""
    took = []

    def ask_db(path, status, source):
        began = time.monotonic()
        assert ask(source.port_to(mesh.db), path).status == status
        return time.monotonic() - began
    for path, times, status in (("/200", 40, 200), ("/301", 3, 301), ("/404", 7, 404), ("/500", 5, 500), ("/slow", 5, 200)):
        took += [ask_db(path, status, mesh.web) for _ in range(times)]
    for _ in range(4):
        ask_db("/200", 403, mesh.evil)
    for _ in range(6):
        assert mesh.web.reaches(mesh.cache, b"x" * 999 + b"\n")
    for _ in range(3):
        assert mesh.evil.refused(mesh.cache)
    return took


# What the load adds to each figure of the UI, by service and peer: (the service itself, its upstreams, those who call it).
GROWN = {
    "db": [
        {"": {"RPS": 64, "5xx": 5}},
        {},
        {"web": {"RPS": 60, "5xx": 5}, "evil": {"RPS": 4, "5xx": 0}},
    ],
    "web": [
        {},
        {"db": {"RPS": 60, "5xx": 5}, "cache": {"CR": 6, "RX": 6000, "TX": 6000, "NR": 0}},
        {},
    ],
    "cache": [
        {"": {"CR": 9, "RX": 6000, "TX": 6000, "NR": 0}},
        {},
        # One connection of TCP each; a denied one carries nothing.
        {"web": {"CR": 6, "RX": 6000, "TX": 6000, "NR": 0}, "evil": {"CR": 3, "NR": 0}},
    ],
}
PEER = (None, "consul_upstream_service", "consul_source_service")


def figures(prometheus, change):
    """Each figure by service, place, peer and name, as Prometheus tells it now."""
    found = {}
    for service in GROWN:
        for place in range(3):
            for figure in FIGURES:
                for labels, number in prometheus.query(figure.query(place, service, change)):
                    # A ratio of nothing to nothing is none.
                    if math.isfinite(number):
                        found[service, place, labels.get(PEER[place], ""), figure.name] = number
    return found


def counted(prometheus):
    """The counters under the figures: bare sums, and what of the answers was of class 5."""
    found = figures(prometheus, "{series}")
    for key, number in list(found.items()):
        if key[3] in ("RX", "TX"):
            found[key] = number / 8
        if key[3] == "ER":
            found[*key[:3], "5xx"] = number * found[*key[:3], "RPS"]
    return found


def test_what_the_ui_and_the_dashboards_ask_agrees_with_the_load(scraped):
    prometheus = scraped.prometheus

    def settled():
        prometheus.looked()
        first = counted(prometheus)
        prometheus.looked()
        return first if first == counted(prometheus) else None
    before = eventually(settled, 40, "nothing moves any more")
    took = load(scraped)

    def as_loaded():
        now = counted(prometheus)
        for service, places in GROWN.items():
            for place, peers in enumerate(places):
                for peer, names in peers.items():
                    for name, grown in names.items():
                        key = (service, place, peer, name)
                        assert abs(now[key] - before.get(key, 0) - grown) < 1e-6, (key, before.get(key), now[key])
        return True
    eventually(as_loaded, 40, every=0.2)
    check_rates(figures(prometheus, "rate({series}[15m])"), took)
    check_boards(scraped)


def check_rates(now, took):
    """What the UI shows: ratios are those of the load (a few requests came before it), quantiles are within the bucket."""
    for key, low, high in ((("db", 0, ""), 64, 5), (("db", 2, "web"), 60, 5), (("web", 1, "db"), 60, 5)):
        assert 0.7 * high / low <= now[*key, "ER"] <= high / low + 1e-9, (key, now)
    # A peer that never had a 5xx has a ratio of 0, and not none.
    assert now["db", 2, "evil", "ER"] == 0
    took = sorted(took)
    for key in (("db", 0, ""), ("db", 2, "web"), ("web", 1, "db")):
        for name, least, most in (("P50", SHORT, took[len(took) * 3 // 4]), ("P99", LONG, took[-1])):
            low = max(bound for bound in BOUNDS if bound <= least * 1000)
            high = min(bound for bound in BOUNDS if bound >= most * 1000)
            assert low <= now[*key, name] <= high, (key, name, now[*key, name], took)
    for key in (("web", 1, "cache"), ("cache", 0, ""), ("cache", 2, "web")):
        # As much there as back.
        assert now[*key, "CR"] > 0 and now[*key, "RX"] > 0 and abs(now[*key, "RX"] / now[*key, "TX"] - 1) < 0.01, (key, now)


def check_boards(mesh):
    """Each panel shows something while there is traffic: of HashiCorp's boards, and of ours."""
    prometheus = mesh.prometheus
    values = {name: "|".join(sorted({labels[label] for labels, _ in prometheus.query(f'{series}{{{label}!=""}}')}))
              for name, (series, label) in VARIABLES.items()}
    assert values["app"] == values["source"] == "cache|db|evil|web" and values["to"] == "cache|db", values
    queries = {f"{name} of {service}": filled(query, service=service) for name, query in GRAPHS.items() for service in (("db",) if "L7" in name else ("cache",))}
    queries |= {name: filled(query, **values) for name, query in BOARDS.items()} | our_panels(mesh)
    empty = set(queries)

    def all_show():
        # A rate over the last two looks is nothing where nothing happened between them.
        load_once(mesh)
        empty.intersection_update({name for name in empty if not any(math.isfinite(number) for _, number in prometheus.query(queries[name]))})
        assert not empty, sorted(empty)
        return True
    eventually(all_show, 40, "each panel shows something", every=0.1)
    assert prometheus.number(filled(BOARDS["S: running services"])) == 4
    assert prometheus.number(filled(BOARDS["D: cluster state"], **values)) == 1
    rules = {rule["name"]: rule["health"] for group in prometheus.get("rules")["groups"] for rule in group["rules"]}
    assert rules and set(rules.values()) == {"ok"}, rules


def load_once(mesh):
    for path in ("/200", "/404", "/500"):
        ask(mesh.web.port_to(mesh.db), path)
    mesh.web.reaches(mesh.cache)


def our_panels(mesh):
    """The queries of docs/grafana by board, panel and letter: of a caller's sidecar or of a called one's, as most panels are about one of them."""
    instances = {labels["source"]: labels["instance"] for labels, _ in mesh.prometheus.query("lictor_ready")}
    found = {}
    for file in sorted((TOP / "docs/grafana").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", []):
                of = [filled(target["expr"], source=name, instance=instances[name], __rate_interval="1m") for name in ("web", "db")]
                found[f"{file.stem}: {panel['title']} ({target['refId']})"] = f"({of[0]}) or ({of[1]})"
    assert len(found) > 40
    return found


def test_promtool_accepts_both_expositions(mesh):
    program("promtool", "PROMTOOL_BIN")
    db = mesh.web("db")
    web = mesh.service("web", [db], app=None)
    eventually(lambda: ask(web.port_to(db)).status == 200)
    # Ours gives no reason for a remark.
    text = web.admin("/metrics")
    assert text.header("content-type").startswith("text/plain; version=0.0.4")
    assert promtool("check", "metrics", text=text.body.decode()) == (0, "")
    openmetrics = web.admin("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"})
    assert openmetrics.header("content-type").startswith("application/openmetrics-text") and openmetrics.body.endswith(b"# EOF\n")
    status, output = promtool("check", "metrics", text=web.admin("/stats/prometheus").body.decode())
    # Remarks have a status of their own; what can't be read has 1.
    unknown = [line for line in output.splitlines() if not any(re.fullmatch(lint, line) for lint in KNOWN_LINTS)]
    assert status in (0, 3) and not unknown, (status, unknown)


def test_the_alert_rules_hold_what_they_say():
    for words in (("check", "rules", DOCS / "alerts.yml"), ("test", "rules", DOCS / "alerts_test.yml")):
        status, output = promtool(*words)
        assert status == 0, output
