#!/usr/bin/env python3
"""Measures how CPU, memory, start-up and the agent's load grow with connections, upstreams, endpoints, intentions,
body size and concurrency, and draws it."""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time

from bench import FAULTS, TOP, common_arguments, context, peers_of
from peers import ConsulPeer, EnvoyPeer
from plot import Chart, Series
from proof import body_ok, http_get, tls_ctx, verify
from report import machine
from system import Bad, cpu, mem, now
from works import Hub, first_answer, holds

DASHED, DOTTED = "7 4", "2 3"
# Colours that differ for every kind of sight; L7 is dashed.
LOOKS = {"lictor": ("Lictor", "#0072b2", ""), "envoy": ("Envoy", "#d55e00", ""), "consul": ("built-in", "#009e73", ""),
         "lictor-http": ("Lictor, L7", "#0072b2", DASHED), "envoy-http": ("Envoy, L7", "#d55e00", DASHED)}


class Curves:
    def __init__(self, ctx, peers, args):
        self.ctx, self.quick, self.began = ctx, args.quick, now()
        self.peers, self.found, self.failed = peers, {}, 0

    def of(self, *kinds):
        return [p for p in self.peers if p.kind in kinds]

    def point(self, curve, peer, x, measure):
        """Notes what `measure` gives. False when it gives nothing: then the larger ones are left out, too."""
        try:
            got = measure()
        except FAULTS as e:
            self.lost(peer, f"{curve} {x:,}", e)
            return False
        self.found.setdefault(curve, {}).setdefault(peer.kind, []).append({"x": x, **got})
        self.say(peer, f"{curve} {x:,}: " + "  ".join(f"{k}={v:.4g}" for k, v in got.items()))
        return True

    def lost(self, peer, what, error):
        self.failed += peer.kind.startswith("lictor")
        self.say(peer, f"{what}: none: {error}")

    def say(self, peer, text):
        print(f"# {now() - self.began:5.0f}s {peer.label} {text}", file=sys.stderr, flush=True)

    def stop(self, pair):
        for p in pair.procs() if pair else []:
            self.ctx.procs.stop(p)

    # Each of the following measures one thing for every peer.

    def requests(self):
        """CPU per request against body size, then against connections that are busy."""
        sizes = [0, 16 << 10, 1 << 20] if self.quick else [0, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20]
        busy = [1, 64, 512] if self.quick else [1, 4, 16, 64, 256, 1024]
        for peer in self.of(*LOOKS):
            pair = None
            try:
                pair = peer.start(peer.mode())
                verify(self.ctx, peer, pair, peer.mode())
                for size in sizes:
                    self.point("body", peer, size, lambda: self.load(pair, 64, size))
                for connections in busy:
                    self.point("concurrency", peer, connections, lambda: self.load(pair, connections, 1024))
            except FAULTS as e:
                self.lost(peer, "requests", e)
            finally:
                self.stop(pair)

    def load(self, pair, connections, size):
        r = self.ctx.run_load(["http", pair.upstream, connections, self.ctx.t(1.5), size, 0], pair)
        return {"rps": r["rps"], "cpu_us": 1e6 * r["cpu"] / r["total"], "p50_us": r["p50_us"], "p99_us": r["p99_us"]}

    def connections(self):
        """Memory, and CPU per request of 64 busy connections, with many others open and idle."""
        # A sidecar needs two descriptors for each.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - 500
        for peer in self.of("lictor", "envoy", "consul"):
            pair, openers, held = None, [], 0
            try:
                pair = peer.start("tcp")
                verify(self.ctx, peer, pair, "tcp")
                for count in [10, 100, 1000] if self.quick else [10, 100, 1000, 5000, 20000]:
                    count = min(count, most)
                    if count == held or not self.point("connections", peer, count, lambda: self.with_open(pair, openers, count - held)):
                        break
                    held = count
            except FAULTS as e:
                self.lost(peer, "connections", e)
            finally:
                for p in openers:
                    p.kill()
                    p.wait()
                self.stop(pair)

    def with_open(self, pair, openers, more):
        p = subprocess.Popen([self.ctx.load, "idle", str(pair.upstream), str(more)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        openers.append(p)
        killer = threading.Timer(120, p.kill)
        killer.start()
        try:
            ready = json.loads(p.stdout.readline() or b'{"ready":0,"why":"died or timed out"}')
        finally:
            killer.cancel()
        if not ready.get("ready"):
            raise Bad(f"{more} more connections: {ready.get('why')}")
        time.sleep(self.ctx.t(1))
        memory = sum(mem(x.pid)["pss"] for x in pair.procs())
        return {"pss_MB": memory / 1e6, **self.load(pair, 64, 1024)}

    def upstreams(self):
        """Start, size and idle CPU of a sidecar, and what it asks of the agent."""
        for peer in self.of("lictor", "envoy", "consul"):
            for count in [1, 10, 50] if self.quick else [1, 10, 50, 100, 200, 500]:
                hub = Hub(self.ctx, peer, f"up{count}", count, 2, 0)
                try:
                    if not self.point("upstreams", peer, count, lambda: {**hub.start(within=30), **hub.settle(self.ctx.t(1), self.ctx.t(2))}):
                        break
                    hub.halt()
                    if isinstance(peer, ConsulPeer) and not self.point("agent", peer, count, lambda: self.agent_load(hub)):
                        break
                finally:
                    hub.stop()

    def agent_load(self, hub):
        with Counter(hub.agent.http) as counter:
            hub.start(counter.port, within=30)
            time.sleep(self.ctx.t(1.5))
            got = {"parked": counter.parked(), "requests": counter.requests, "KB": counter.bytes / 1e3}
            before, began = counter.bytes, now()
            time.sleep(self.ctx.t(2))
            return {**got, "idle_B_per_s": (counter.bytes - before) / (now() - began)}

    def endpoints(self):
        """An upstream with many instances, all of them alive: start, size, CPU per connection."""
        for peer in self.of("lictor", "envoy", "consul"):
            pair = peer.prepare("tcp")
            pair.listen = "0.0.0.0"
            try:
                peer.start_server(pair)
                peer.wait_port(pair.public, pair.server)
                for count in [10, 100] if self.quick else [10, 100, 1000, 5000]:
                    if not self.point("endpoints", peer, count, lambda: self.with_endpoints(peer, pair, count)):
                        break
            except FAULTS as e:
                self.lost(peer, "endpoints", e)
            finally:
                self.stop(pair)

    def with_endpoints(self, peer, pair, count):
        """Adds instances up to `count` (the sidecar itself is one, too) and starts the client's sidecar anew."""
        if pair.client:
            self.ctx.procs.stop(pair.client)
        addresses = [(f"127.20.{k // 250}.{k % 250 + 1}", pair.public) for k in range(count - 1)]
        if isinstance(peer, EnvoyPeer):
            pair.endpoints = [("127.0.0.1", pair.public), *addresses]
        else:
            pair.agent.ensure_instances({pair.app: addresses})
        out = {"start_ms": self.start_client(peer, pair)}
        time.sleep(self.ctx.t(1))
        out |= {"start_cpu_ms": 1e3 * cpu(pair.client.pid), "rss_MB": mem(pair.client.pid)["rss"] / 1e6}
        return {**out, **self.churn(pair)}

    def start_client(self, peer, pair):
        """The milliseconds from its exec to an answer through both sidecars."""
        began = now()
        peer.start_client(pair)
        while not holds(lambda: body_ok(http_get(pair.upstream, "/1024", 3), 1024)):
            if now() - began > 30:
                raise Bad("no traffic after 30 s")
            time.sleep(0.002)
        return 1e3 * (now() - began)

    def churn(self, pair):
        r = self.ctx.run_load(["churn", pair.upstream, 16, self.ctx.t(1.5), 1024], pair)
        return {"conn_s": r["rps"], "cpu_ms": 1e3 * r["cpu"] / r["total"], "agent_ms": 1e3 * r["cpu_agent"] / r["total"]}

    def intentions(self):
        """A destination with many intentions: start and size of its sidecar, CPU per connection."""
        for peer in self.of("lictor", "envoy", "consul"):
            pair = peer.prepare("tcp")
            tls = tls_ctx(self.ctx, pair.agent, pair.agent.leaf(pair.cli))
            try:
                for count in [10, 100] if self.quick else [10, 100, 1000, 10000]:
                    if not self.point("intentions", peer, count, lambda: self.with_intentions(peer, pair, tls, count)):
                        break
            finally:
                self.stop(pair)

    def with_intentions(self, peer, pair, tls, count):
        self.stop(pair)
        if isinstance(peer, EnvoyPeer):
            pair.denied = [f"src-{i}" for i in range(count)]
        else:
            pair.agent.ensure_denials(pair.app, count)
        out = {"start_ms": 1e3 * first_answer(self.ctx, peer, pair, tls)}
        self.start_client(peer, pair)
        time.sleep(self.ctx.t(1))
        out |= {"start_cpu_ms": 1e3 * cpu(pair.server.pid), "rss_MB": mem(pair.server.pid)["rss"] / 1e6}
        return {**out, **self.churn(pair)}

    def charts(self):
        request, connection = "CPU per request, both sidecars (µs)", "CPU per connection, both sidecars (ms)"
        shared = "1 KiB bodies; load, app and both sidecars share the machine"
        agents = "the built-in proxy's decisions are the agent's, whose CPU is not counted here"
        busy = "connections, each with one request under way"
        return {
            "connections-memory": self.chart("connections", "pss_MB", "Memory of both sidecars", "open connections", "MB (proportional set size)"),
            "connections-cpu": self.chart("connections", "cpu_us", "CPU per request with idle connections beside it", "idle connections", request,
                                          log_y=False, note="64 connections are busy, 1 KiB bodies"),
            "body-cpu": self.chart("body", "cpu_us", "CPU per request against body size", "body (bytes)", request, note="64 connections, HTTP/1.1 keep-alive"),
            "concurrency-requests": self.chart("concurrency", "rps", "Requests per second against concurrency", busy, "requests/s", log_y=False, note=shared),
            "concurrency-cpu": self.chart("concurrency", "cpu_us", "CPU per request against concurrency", busy, request, log_y=False, note=shared),
            "intentions-cpu": self.chart("intentions", "cpu_ms", "CPU per new connection against intentions", "intentions of the destination", connection, note=agents),
            "intentions-memory": self.chart("intentions", "rss_MB", "Memory of the destination's sidecar", "intentions of the destination", "MB (resident)"),
            "endpoints-cpu": self.chart("endpoints", "cpu_ms", "CPU per new connection against instances", "instances of the upstream", connection, note=agents),
            "endpoints-memory": self.chart("endpoints", "rss_MB", "Memory of the client's sidecar", "instances of its upstream", "MB (resident)"),
            "upstreams-memory": self.chart("upstreams", "rss_MB", "Memory of a sidecar", "upstreams", "MB (resident)"),
            "upstreams-idle-cpu": self.chart("upstreams", "idle_cpu_pct", "CPU of an idle sidecar", "upstreams", "% of one core", log_y=False),
            "start": self.start_chart(),
            "agent": self.agent_chart(),
        }

    def chart(self, curve, key, title, x_label, y_label, **how):
        return Chart(title, x_label, y_label, [self.series(curve, kind, key) for kind in LOOKS], **how)

    def series(self, curve, kind, key, name=None, dash=None):
        label, colour, usual = LOOKS[kind]
        points = [(p["x"], p.get(key)) for p in self.found.get(curve, {}).get(kind, [])]
        return Series(f"{label}: {name}" if name else label, points, colour, usual if dash is None else dash)

    def start_chart(self):
        lines = [self.series(curve, kind, key, curve, dash)
                 for kind in ("lictor", "envoy", "consul")
                 for curve, key, dash in (("upstreams", "traffic_ms", ""), ("endpoints", "start_ms", DASHED), ("intentions", "start_ms", DOTTED))]
        return Chart("Start-up against control state: exec to the first answer", "upstreams, instances of one upstream, or intentions", "ms", lines)

    def agent_chart(self):
        lines = [self.series("agent", kind, key, key, dash)
                 for kind in ("lictor", "consul") for key, dash in (("parked", ""), ("KB", DASHED))]
        return Chart("What a sidecar asks of the agent", "upstreams", "requests parked; KB both ways until it is up", lines)


class Counter:
    """A relay in front of the agent that counts what passes: bytes, requests, and those that wait for their answer."""

    def __init__(self, to):
        self.to, self.bytes, self.requests, self.waiting, self.open = to, 0, 0, {}, []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listener.getsockname()[1]

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        # A shutdown, not a close: it also wakes whoever waits there.
        for s in [self.listener, *self.open]:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                return
            for s in (near, far):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.open += [near, far]
            number = len(self.open)
            threading.Thread(target=self.carry, args=(near, far, number, True), daemon=True).start()
            threading.Thread(target=self.carry, args=(far, near, number, False), daemon=True).start()

    def carry(self, source, sink, number, asks):
        try:
            while data := source.recv(65536):
                self.bytes += len(data)
                self.requests += asks and not self.waiting.get(number)
                self.waiting[number] = asks
                sink.sendall(data)
        except OSError:
            pass
        self.waiting[number] = False
        for s, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
            try:
                s.shutdown(how)
            except OSError:
                pass

    def parked(self):
        return sum(self.waiting.values())


def main():
    ap = argparse.ArgumentParser(prog="scripts/bench --curves", description=__doc__)
    common_arguments(ap)
    # Many connections come last: those that have just closed make the list slow that says who listens.
    names = ("requests", "upstreams", "endpoints", "intentions", "connections")
    ap.add_argument("--only", default=",".join(names), help="comma separated, default all: " + ",".join(names))
    ap.add_argument("--scale", type=float, default=1.0, dest="time_scale", help="multiply all durations")
    ap.add_argument("--out", help="directory of the plots and curves.json (default docs/performance; with --quick target/bench/curves)")
    args = ap.parse_args()
    args.time_scale *= 0.4 if args.quick else 1
    out = args.out or os.path.join(TOP, *(("target", "bench", "curves") if args.quick else ("docs", "performance")))
    ctx, net = context(args)
    try:
        curves = Curves(ctx, peers_of(ctx, args, LOOKS), args)
        for name in args.only.split(","):
            if name not in names:
                ap.error(f"no curves {name}; there are {', '.join(names)}")
            getattr(curves, name)()
        os.makedirs(out, exist_ok=True)
        for name, chart in curves.charts().items():
            if any(s.points for s in chart.series):
                with open(os.path.join(out, name + ".svg"), "w") as f:
                    f.write(chart.svg())
        with open(os.path.join(out, "curves.json"), "w") as f:
            json.dump({"machine": machine(), "net": net, "quick": args.quick, "found": curves.found}, f, indent=1)
        print(f"# {now() - curves.began:.0f} s; written to {os.path.relpath(out)}", file=sys.stderr)
    finally:
        ctx.end(args.keep)
    sys.exit(1 if curves.failed else 0)


if __name__ == "__main__":
    main()
