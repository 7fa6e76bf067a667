#!/usr/bin/env python3
"""Measures many sidecars on one host that share an agent: their connections to it, how soon all are up, whether other
programs are still served, what they weigh, and the agent's CPU. Prints a table, and writes it to target/bench/hosts.md."""

import argparse
import http.client
import os
import sys
import tempfile
import threading
import time

from bench import TOP, common_arguments, context, peers_of
from peers import ConsulPeer, EnvoyPeer, Pair
from report import machine, table
from system import FAULTS, NA, Bad, alive, cpu, listening, mem, now

PAIRS = [(2, 1), (20, 1), (100, 1)]  # of 1, 10 and 50 pairs of sidecars (W11)
SHAPES = [*PAIRS, (20, 3), (40, 3), (10, 60), (1, 200)]
# Of Envoy's: memory, a shared page counted once, and the agent's CPU where the agent configures Envoy.
PSS_RATIO, AGENT_RATIO = 0.08, 0.5
# What the built-in proxy's time to be up is multiplied by, and seconds, at the most.
UP_RATIO, UP_SECONDS = {(20, 3): 2.0}, {(10, 60): 10.0}
MOST_CONNECTIONS = {(20, 3): 120, (10, 60): 60, (1, 200): 6}
PROBE_PERIOD = 0.05


class Probe:
    """Another program of the host: a request to the agent on a new connection, twenty times a second."""

    def __init__(self, port):
        self.port, self.sent, self.refused, self._end = port, 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._end.wait(PROBE_PERIOD):
            self.sent += 1
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/v1/status/leader")
                self.refused += connection.getresponse().status != 200
            except (OSError, http.client.HTTPException):
                self.refused += 1
            finally:
                connection.close()

    def stop(self):
        self._end.set()
        self._thread.join()


def connections_to(port):
    """Established connections to this port of the loopback, as their makers see them."""
    count = 0
    for line in open("/proc/net/tcp").readlines()[1:]:
        _, _, remote, state = line.split(None, 4)[:4]
        count += state == "01" and int(remote.rsplit(":", 1)[1], 16) == port
    return count


class Host:
    """So many sidecars, each with as many upstreams, the first of which is the next sidecar's service."""

    def __init__(self, ctx, peer, sidecars, upstreams):
        self.ctx, self.peer, self.agent, self.procs = ctx, peer, peer.agent(), []
        self.label = peer.name(f"host{sidecars}x{upstreams}")
        take = ctx.ports.take
        self.services = [(f"{self.label}-{n}", take()) for n in range(sidecars)]
        self.upstreams = []
        for n in range(sidecars):
            others = [f"{self.label}-other-{n}-{i}" for i in range(upstreams - 1)]
            following = self.services[(n + 1) % sidecars][0]
            self.upstreams.append([(name, take()) for name in [following, *others]])
        if isinstance(peer, ConsulPeer):
            for (name, public), ups in zip(self.services, self.upstreams):
                self.agent.register(name, ctx.origin_port, public, ups)
            for name, public in self.services:
                self.agent.wait_endpoint(name, public)

    def argv(self, number):
        (name, public), ups = self.services[number], self.upstreams[number]
        if isinstance(self.peer, ConsulPeer):
            return self.peer.argv(self.agent.http, name)
        pair = Pair()
        pair.agent, pair.app, pair.public = self.agent, name, public
        pair.leaf_app, pair.dir = self.agent.leaf(name), tempfile.mkdtemp(dir=self.ctx.tmp)
        return self.peer.big(pair, 1, 1, ups)

    def measure(self, rest):
        argvs = [self.argv(number) for number in range(len(self.services))]
        ports = {public for _, public in self.services} | {port for ups in self.upstreams for _, port in ups}
        probe, most, out = Probe(self.agent.http), 0, {}
        try:
            # What the agent has to do anyhow: its own work, and the probe's requests.
            burnt, began = cpu(self.agent.proc.pid), now()
            time.sleep(rest)
            alone = (cpu(self.agent.proc.pid) - burnt) / (now() - began)
            burnt, began = cpu(self.agent.proc.pid), now()
            for number, argv in enumerate(argvs):
                self.procs.append(self.ctx.procs.start(argv, f"{self.label}-{number}", self.ctx.pin_proxy))
            while ports - listening():
                most = max(most, connections_to(self.agent.http))
                if now() - began > 120:
                    raise Bad(f"{len(ports - listening())} of {len(ports)} ports are not listened on after 120 s")
                time.sleep(0.02)
            out["up_s"] = now() - began
            while now() - began < out["up_s"] + rest:
                most = max(most, connections_to(self.agent.http))
                time.sleep(0.05)
            out["agent_start_cpu_s"] = max(0, cpu(self.agent.proc.pid) - burnt - alone * (now() - began))
            resting = []
            burnt, since = cpu(self.agent.proc.pid), now()
            while now() - since < rest:
                resting.append(connections_to(self.agent.http))
                time.sleep(0.1)
            for proc in self.procs:
                alive(proc)
            out["pss_MB"] = sum(mem(proc.pid)["pss"] for proc in self.procs) / 1e6
            # The probe has one of its own now and then.
            out["at_rest"] = sorted(resting)[len(resting) // 2]
            out["most"] = max(most, *resting)
            out["agent_rest_cpu_pct"] = max(0, 100 * ((cpu(self.agent.proc.pid) - burnt) / (now() - since) - alone))
        finally:
            probe.stop()
            self.stop()
        out["probes"], out["refused"] = probe.sent, probe.refused
        return out

    def stop(self):
        for proc in self.procs:
            self.ctx.procs.stop(proc, 2)
        if isinstance(self.peer, ConsulPeer):
            for name, _ in self.services:
                self.agent.put(f"/v1/agent/service/deregister/{name}")


def verdict(shape, found):
    """The targets that are missed."""
    ours, builtin = found.get("lictor"), found.get("consul")
    if not ours or "fail" in ours:
        return ["not measured"]
    missed = []
    if ours["refused"]:
        missed.append(f"{ours['refused']} requests of others refused")
    if ours["at_rest"] > MOST_CONNECTIONS.get(shape, sys.maxsize):
        missed.append(f"{ours['at_rest']} connections at rest")
    if shape in UP_SECONDS and ours["up_s"] > UP_SECONDS[shape]:
        missed.append(f"up after {ours['up_s']:.1f} s")
    if shape in UP_RATIO and builtin and "up_s" in builtin and ours["up_s"] > UP_RATIO[shape] * builtin["up_s"]:
        missed.append(f"up after {ours['up_s'] / builtin['up_s']:.1f} times the built-in proxy's time")
    return missed + (missed_by_pairs(ours, found) if shape in PAIRS else [])


def missed_by_pairs(ours, found):
    missed = []
    envoys = [found[kind] for kind in ("managed-envoy", "envoy") if "pss_MB" in found.get(kind, {})]
    if envoys and ours["pss_MB"] > PSS_RATIO * envoys[0]["pss_MB"]:
        missed.append(f"{ours['pss_MB'] / envoys[0]['pss_MB']:.3f} of Envoy's memory")
    managed = found.get("managed-envoy", {})
    for key, what in (("agent_start_cpu_s", "the start"), ("agent_rest_cpu_pct", "rest")):
        if managed.get(key) and ours[key] > AGENT_RATIO * managed[key]:
            missed.append(f"{ours[key] / managed[key]:.2f} of the agent's CPU for Envoys, at {what}")
    return missed


COLUMNS = ["sidecars × upstreams", "peer", "all up, s", "connections, most", "at rest", "probes refused", "PSS, MB", "agent CPU of the start, s", "agent CPU at rest, %"]


def row(shape, kind, got):
    if "fail" in got:
        return [f"{shape[0]} × {shape[1]}", kind, got["fail"], "", "", "", "", "", ""]
    return [f"{shape[0]} × {shape[1]}", kind, f"{got['up_s']:.2f}", str(got["most"]), str(got["at_rest"]), f"{got['refused']} of {got['probes']}",
            f"{got['pss_MB']:.1f}", f"{got['agent_start_cpu_s']:.2f}", f"{got['agent_rest_cpu_pct']:.1f}"]


def main():
    ap = argparse.ArgumentParser(prog="scripts/bench --hosts", description=__doc__)
    common_arguments(ap)
    ap.add_argument("--shapes", default=",".join(f"{n}x{u}" for n, u in SHAPES), help="sidecars x upstreams, comma separated")
    ap.add_argument("--rest", type=float, default=8, help="seconds that a host is looked at once it is up, and again at rest")
    ap.add_argument("--out", default=os.path.join(TOP, "target", "bench"), help="directory of hosts.md")
    args = ap.parse_args()
    args.time_scale = 1.0
    shapes = [tuple(int(part) for part in shape.split("x")) for shape in args.shapes.split(",")]
    ctx, net = context(args)
    rows, judged, failed = [], [], 0
    try:
        peers = [p for p in peers_of(ctx, args, ["consul", "envoy", "managed-envoy", "lictor"]) if isinstance(p, (ConsulPeer, EnvoyPeer)) and p.l4]
        for shape in shapes:
            found = {}
            for peer in peers:
                try:
                    found[peer.kind] = Host(ctx, peer, *shape).measure(args.rest)
                except NA:
                    continue
                except FAULTS as e:
                    found[peer.kind] = {"fail": f"{type(e).__name__}: {e}"}
                rows.append(row(shape, peer.label, found[peer.kind]))
                print("# " + "  ".join(rows[-1]), file=sys.stderr, flush=True)
            missed = verdict(shape, found)
            failed += bool(missed)
            judged.append(f"{shape[0]} × {shape[1]}: {'; '.join(missed) if missed else 'met'}")
    finally:
        ctx.end(args.keep)
    m = machine()
    text = f"{m['cores']} x {m['cpu']}, Linux {m['kernel']}; network: {net}.\n\n{table(rows, COLUMNS)}\n\n" + "\n".join(f"- {line}" for line in judged) + "\n"
    print(text)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "hosts.md"), "w") as f:
        f.write(text)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
