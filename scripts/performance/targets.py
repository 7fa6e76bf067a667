"""The targets of Lictor: ratios within a round to Envoy and to Consul's built-in proxy."""

import re
from dataclasses import dataclass

from report import good, ratios

NAMES = {"floor": "the floor", "envoy": "Envoy", "envoy-http": "Envoy", "consul": "built-in", "itself": "itself idle", "quiet": "itself at rest", "time": "the clock"}


@dataclass(frozen=True)
class Target:
    work: str
    title: str
    key: str  # of the figure; "cN_" stands for the largest number of connections that was measured
    theirs: str
    must: float | None
    aim: float | None = None
    ours: str = "lictor"
    more: bool = False  # more is better

    @property
    def against(self):
        return NAMES[self.theirs]

    def limit(self, value):
        if value is None:
            return "-"
        return ("≥ " if self.more else "≤ ") + f"{value:g}" + (" ms" if self.theirs == "time" else "")

    def judge(self, ours, theirs):
        """The ratio (or figure) of each round."""
        key = self.key
        if key.startswith("cN_"):
            sizes = [int(m[1]) for r in good(ours) for k in r if (m := re.match(r"c(\d+)_", k))]
            key = key.replace("cN", f"c{max(sizes, default=0)}")
        if self.theirs == "time":
            return [r[key] for r in good(ours) if key in r]
        if self.theirs == "quiet":
            return [r[key] / r[f"quiet_{key}"] for r in good(ours) if key in r]
        if self.theirs == "itself":
            return [r[key] / r["idle_rss_MB"] for r in good(ours) if key in r]
        return ratios(ours, theirs, key)

    def verdict(self, found):
        if not found:
            return "not measured"
        value = sorted(found)[len(found) // 2] if len(found) % 2 else sum(sorted(found)[len(found) // 2 - 1:len(found) // 2 + 1]) / 2
        within = (lambda limit: limit is not None and (value >= limit if self.more else value <= limit))
        if within(self.aim):
            return "aim met"
        return "met" if within(self.must) or self.must is None else "MISSED"


def against_both(work, title, key, envoy, builtin, aim=None, more=False):
    """A figure of L4 with what is wanted of it against Envoy and against the built-in proxy."""
    return [Target(work, title, key, "envoy", envoy, aim, more=more), Target(work, title, key, "consul", builtin, more=more)]


def l7(work, title, key, must, aim=None, more=False):
    return [Target(work, title, key, "envoy-http", must, aim, "lictor-http", more)]


def to_floor(work, title, key, must, ours="lictor"):
    """Against two plain relays with the time that the AEAD alone takes on this processor (floor.py)."""
    return Target(work, title, key, "floor", must, ours=ours)


TARGETS = [
    *against_both("bulk", "CPU per GB", "cpu_s_per_GB", 0.70, 0.42, 0.60),
    *against_both("bulk", "GB/s", "GBps", 1.35, 2.2, 1.6, more=True),
    *against_both("http-over-l4", "CPU per request", "cpu_us_per_req", 0.75, 0.72, 0.65),
    *against_both("http-over-l4", "requests/s", "rps", 1.25, 1.40, 1.35, more=True),
    *against_both("http-over-l4", "p99", "p99_us", 0.85, 0.70),
    *against_both("http-over-l4-64k", "CPU per request", "cpu_us_per_req", 0.60, 0.45, 0.50),
    *l7("http-over-l7", "CPU per request", "cpu_us_per_req", 0.50, 0.36),
    *l7("http-over-l7", "requests/s", "rps", 1.9, 2.3, more=True),
    *l7("grpc", "CPU per call", "cpu_us_per_req", 0.65, 0.45),
    *l7("grpc", "calls/s", "rps", 1.2, more=True),
    *against_both("connections", "connections/s", "conn_s", 1.25, 5, 1.5, more=True),
    *against_both("connections", "CPU per connection", "cpu_ms_per_conn", 0.80, 0.20, 0.65),
    *against_both("idle-connections", "memory per idle connection", "cN_KB_per_conn", 0.25, 0.07, 0.10),
    *against_both("idle-connections", "RSS idle", "idle_rss_MB", 0.15, 0.21, 0.08),
    *against_both("idle-connections", "RSS with all connections open", "cN_rss_MB", 0.22, 0.08, 0.12),
    Target("idle-connections", "RSS after all have closed", "after_rss_MB", "itself", 1.5, 1.2),
    *against_both("start", "start to first answer", "warm_ms", 0.20, 0.25, 0.10),
    *against_both("start", "size of the binary", "binary_MB", 0.10, 0.15),
    Target("deny", "deny reaches new connections", "deny_ms", "consul", 1.2, 0.9),
    Target("deny", "allow reaches new connections", "allow_ms", "consul", 1.2, 0.9),
    Target("deny", "deny cuts open connections", "cut_ms", "time", None, 50),
    *against_both("latency", "added p50, L4", "added_p50_us", 0.80, 0.35, 0.73),
    *l7("latency", "added p50, L7", "added_p50_us", 0.45, 0.33),
    *against_both("control-state", "start to traffic", "traffic_ms", 0.45, 1.3, 0.25),
    *against_both("control-state", "RSS", "rss_MB", 0.20, 0.45),
    *against_both("control-state", "idle CPU", "idle_cpu_pct", 0.2, 2),
    Target("churn", "p99 while things change", "p99_us", "quiet", 1.3, ours="lictor-http"),
    *l7("churn", "p99 while things change", "p99_us", 0.6),
    *l7("open-calls", "CPU per message, both ways", "bidi_cpu_us_per_message", 0.3),
    *l7("open-calls", "CPU per message, server push", "push_cpu_us_per_message", 0.3),
    Target("handshakes", "full handshakes/s", "conn_s", "envoy", 1.1, more=True),
    Target("connections-without-tunnel", "connections/s", "conn_s", "envoy", 1.25, more=True),
    *l7("bulk-bodies", "GB/s", "GBps", 1.15, more=True),
    *l7("bulk-bodies", "CPU per GB", "cpu_s_per_GB", 0.80),
    Target("long-path", "L4 down", "down_GBps", "envoy", 1.0, more=True),
    Target("long-path", "L4 up", "up_GBps", "envoy", 1.0, more=True),
    *l7("long-path", "L7 down", "down_GBps", 1.0, more=True),
    *l7("long-path", "L7 up", "up_GBps", 1.0, more=True),
    to_floor("bulk", "CPU per GB", "cpu_s_per_GB", 1.10),
    to_floor("http-over-l4", "CPU per request", "cpu_us_per_req", 1.15),
    to_floor("http-over-l4-64k", "CPU per request", "cpu_us_per_req", 1.05),
    to_floor("http-over-l7", "CPU per request", "cpu_us_per_req", 1.35, ours="lictor-http"),
]
