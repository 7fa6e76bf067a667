#!/usr/bin/env python3
"""Measures sidecar proxies side by side and writes tables, ratios and verdicts. See docs/performance.md."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

from context import Context
from floor import add_floor, aead_speeds, fastest
from peers import KINDS, parse_peer
from proof import Sniff, verify
from report import fmt, limits, machine, report, table, verdicts
from system import FAULTS, NA, Bad, now, private_network, raise_file_limit
from targets import TARGETS
from works import BY_ID, WORKS, applies

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STEAL = 15  # per cent; above it no absolute figure says anything


def arguments():
    ap = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    common_arguments(ap)
    ap.add_argument("--works", default=",".join(WORKS), help="names or ids, comma separated, default all: " + ", ".join(f"{name} ({work.id})" for name, work in WORKS.items()))
    ap.add_argument("--rounds", type=int, help="interleaved rounds (default 3, quick 1)")
    ap.add_argument("--slow-rounds", type=int, help="rounds of idle-connections and control-state (default: as the others, but at most 3)")
    ap.add_argument("--scale", type=float, default=1.0, dest="time_scale", help="multiply all durations")
    ap.add_argument("--streams", type=int, default=2, help="bulk: streams per direction")
    ap.add_argument("--churn", type=int, default=16, help="connections: connections in flight")
    ap.add_argument("--rate", type=int, default=2000, help="latency-at-rate: requests per second")
    ap.add_argument("--idle", help="idle-connections: connection counts, ascending (default 1000,5000)")
    ap.add_argument("--control", help="control-state: upstreams,endpoints,intentions (default 200,1000,2000)")
    ap.add_argument("--aead", help="the program that measures the AEAD alone, for the distance to the floor")
    ap.add_argument("--limits", action="store_true", help="also measure what the machine can do at all")
    ap.add_argument("--out", default=os.path.join(TOP, "target", "bench"), help="directory of report.md and run.json (default target/bench)")
    ap.add_argument("--ref", help="labels to take ratios against (default: every other peer)")
    ap.add_argument("--budget", type=float, default=1500, help="seconds after which no further round starts")
    ap.add_argument("--noise", type=float, default=12, help="per cent of the machine taken by others above which a run is repeated")
    ap.add_argument("--retries", type=int, default=2, help="how often at most")
    args = ap.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.slow_rounds = args.slow_rounds or min(args.rounds, 3)
    args.time_scale *= 0.3 if args.quick else 1
    args.idle = [int(x) for x in (args.idle or ("500,1000" if args.quick else "1000,5000")).split(",")]
    args.control = [int(x) for x in (args.control or ("20,100,200" if args.quick else "200,1000,2000")).split(",")]
    args.works = [BY_ID.get(w.strip(), w.strip()) for w in args.works.split(",")]
    for w in args.works:
        if w not in WORKS:
            ap.error(f"no workload {w}; there are {', '.join(WORKS)}")
    return args


def common_arguments(ap):
    ap.add_argument("--lictor", help="the binary to measure")
    ap.add_argument("--consul", help="Consul's binary: the agent, and the built-in proxy")
    ap.add_argument("--envoy", help="Envoy's binary")
    ap.add_argument("--peers", nargs="+", metavar="[LABEL:]KIND[=PATH][,OPT=V]", help="other peers than those; kinds: " + ", ".join(KINDS))
    ap.add_argument("--quick", action="store_true", help="short runs, one round, less of everything")
    ap.add_argument("--net", choices=("private", "host"), default="private", help="private: a network namespace of our own, the default; host: the machine's loopback")
    ap.add_argument("--cc", default="reno", help="congestion control in the private namespace (default reno: no pacing timers on loopback)")
    ap.add_argument("--pin", action="store_true", help="proxies on core 1, load and origin on core 0")
    ap.add_argument("--no-sniff", action="store_true", help="skip the packet capture proof (no CAP_NET_RAW)")
    ap.add_argument("--port-base", type=int, default=20000)
    ap.add_argument("--keep", action="store_true", help="keep the temporary directory with logs and configurations")


def context(args):
    """Sets the process up for measuring; must come before any socket is opened."""
    raise_file_limit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    net = private_network(args.cc) if args.net == "private" else "host"
    ctx = Context(args)
    if ctx.sniff:
        try:
            Sniff([1]).stop()
        except PermissionError:
            ctx.end()
            sys.exit("no CAP_NET_RAW: cannot prove that the traffic is TLS; run as root, or pass --no-sniff to go without that proof")
    return ctx, net


def peers_of(ctx, args, kinds):
    """The peers asked for, or one of each of `kinds` whose binary was given."""
    paths = {"lictor": args.lictor, "lictor-http": args.lictor, "consul": args.consul, "envoy": args.envoy, "managed-envoy": args.envoy, "envoy-http": args.envoy}
    specs = args.peers or [k if k not in paths else f"{k}={paths[k]}" for k in kinds if k not in paths or paths[k]]
    taken = set()
    peers = [parse_peer(ctx, spec, taken) for spec in specs]
    ctx.default_agent = os.path.abspath(args.consul) if args.consul else next((p.path for p in peers if p.kind == "consul"), None)
    return peers


class Run:
    """All rounds of all workloads."""

    def __init__(self, ctx, peers, args):
        self.ctx, self.peers, self.args = ctx, peers, args
        self.results, self.facts, self.pairs = {}, {}, {}
        self.failed, self.began = 0, now()
        self.aead = aead_speeds(args.aead)

    def everything(self):
        for w in self.args.works:
            rounds = min(self.args.rounds, self.args.slow_rounds) if w in ("idle-connections", "control-state") else self.args.rounds
            for number in range(rounds):
                if now() - self.began > self.args.budget:
                    print(f"# time budget spent: {w} round {number + 1} skipped", file=sys.stderr)
                    self.failed += number == 0
                    break
                for peer in self.peers if number % 2 == 0 else self.peers[::-1]:
                    self.cell(w, number, peer)
        self.add_latency_over_direct()
        relay = next((p.label for p in self.peers if p.kind == "relay"), None)
        add_floor(self.results, relay, fastest(self.aead))

    def cell(self, w, number, peer):
        mode = applies(w, peer)
        if not mode:
            return
        try:
            r = self.calmest(w, peer, mode)
        except NA:
            return
        except FAULTS as e:
            r = {"fail": f"{type(e).__name__}: {e}"}
            self.failed += 1
        r["round"] = number
        self.results.setdefault(w, {}).setdefault(peer.label, []).append(r)
        brief = r.get("fail") or "  ".join(f"{k}={fmt(r[k])}" for k in (WORKS[w].main or list(r)[:6]) if k in r)
        mark = "FAILED " if "fail" in r else ""
        print(f"# {now() - self.began:5.0f}s {w:16} round {number + 1} {peer.label:18} {mark}{brief}", file=sys.stderr, flush=True)

    def calmest(self, w, peer, mode):
        """Measures; again if somebody else had the machine, and keeps the calmest."""
        pair = None if WORKS[w].fresh else self.pair(peer, mode)
        best = WORKS[w].run(self.ctx, peer, pair)
        disturbed = lambda r: r.get("foreign_pct", 0) + r.get("steal_pct", 0)
        for again in range(self.args.retries):
            if disturbed(best) <= self.args.noise:
                break
            time.sleep(0.5)
            best = min(best, WORKS[w].run(self.ctx, peer, pair), key=disturbed)
            best["retries"] = again + 1
        return best

    def pair(self, peer, mode):
        key = (peer.label, mode)
        if key not in self.pairs:
            try:
                pair = peer.start(mode)
                verify(self.ctx, peer, pair, mode)
                self.pairs[key] = pair
                self.facts[f"{peer.label}/{mode}"] = pair.facts
            except Exception as e:  # whatever it was, this pair gives no figures and the others do
                self.pairs[key] = e
        if isinstance(self.pairs[key], Exception):
            raise Bad(f"pair did not verify: {self.pairs[key]}")
        return self.pairs[key]

    def add_latency_over_direct(self):
        """The cost of the pair above no pair at all, in the same round."""
        direct = next((p.label for p in self.peers if p.kind == "none"), None)
        for w in ("latency", "latency-at-rate"):
            base = {r["round"]: r["p50_us"] for r in self.results.get(w, {}).get(direct, []) if "p50_us" in r}
            for label, rounds in self.results.get(w, {}).items():
                for r in rounds:
                    if label != direct and "p50_us" in r and r["round"] in base:
                        r["added_p50_us"] = r["p50_us"] - base[r["round"]]

    def cells(self):
        return [r for w in self.results.values() for rounds in w.values() for r in rounds]

    def worst(self, what):
        return max([r.get(what, 0) for r in self.cells()] or [0])

    def head(self, net):
        cells, worst = self.cells(), [self.worst(k) for k in ("steal_pct", "foreign_pct")]
        return (f"Peers: {', '.join(p.label for p in self.peers)}. Rounds {self.args.rounds}, time scale {self.args.time_scale:g}, "
                f"{'pinned' if self.args.pin else 'not pinned'}; network: {net}, {machine().get('congestion_control')}; {now() - self.began:.0f} s in all. "
                f"Worst of any kept run: steal {worst[0]:.1f} %, CPU of other programs {worst[1]:.1f} %; "
                f"{sum(r.get('retries', 0) for r in cells)} runs repeated for noise.\n")

    def tls_table(self):
        rows = []
        for pair, f in self.facts.items():
            h = f.get("first") or {}
            rows.append([pair, f.get("tls") or h.get("version", "?"), str(h.get("cipher", "")), str(h.get("group", "")), str(f.get("resumed", ""))])
        return table(rows, ["pair", "version", "cipher", "key exchange", "resumed/handshakes"])

    def text(self, net, machine_limits):
        m = machine()
        parts = [f"Processor: {m['cores']} x {m['cpu']} ({m['model']}), with {', '.join(m['flags'] or ['none'])} of the features that decide; "
                 f"{m['mem_GB']} GB, Linux {m['kernel']}.\n", self.head(net)]
        if self.aead:
            rows = [[library, *(fmt(speed) for speed in speeds.values())] for library, speeds in self.aead.items()]
            parts.append("### AES-128-GCM alone, GB/s on one core\n\n" + table(rows, ["library", *next(iter(self.aead.values()))]) + "\n")
        label_of = {"floor": "floor"}
        for p in self.peers:
            label_of.setdefault(p.kind, p.label)
        if "lictor" in label_of or "lictor-http" in label_of:
            judged, count = verdicts(self.results, label_of, TARGETS)
            parts.append("### Targets: ratio to the other in the same round, median [min..max]\n\n" + judged + "\n")
            parts.append(f"{count['met']} met, {count['missed']} missed, {count['not measured']} not measured."
                         + (" Short runs: not for judging.\n" if self.args.quick else "\n"))
        if machine_limits:
            parts.append("### Machine limits\n\n" + table([[k, fmt(v)] for k, v in machine_limits.items()], ["what", "value"]) + "\n")
        if self.facts:
            parts.append("### TLS between the sidecars, as captured\n\n" + self.tls_table() + "\n")
        every = [p.label for p in self.peers]
        subjects = [p.label for p in self.peers if p.kind.startswith("lictor")] or every
        references = self.args.ref.split(",") if self.args.ref else [x for x in every if x not in subjects] or every
        if self.worst("steal_pct") > STEAL:
            parts.append(f"**Marked: more than {STEAL} % of the machine was stolen in a run that was kept. Absolute figures are left out.**\n")
        parts.append(report(self.results, self.peers, self.args.works, subjects, references, absolute=self.worst("steal_pct") <= STEAL))
        return "\n".join(parts)


def main():
    args = arguments()
    ctx, net = context(args)
    try:
        peers = peers_of(ctx, args, ["none", "relay", "consul", "envoy", "lictor", "envoy-http", "lictor-http"])
        machine_limits = limits(ctx.load) if args.limits else None
        run = Run(ctx, peers, args)
        run.everything()
        text = run.text(net, machine_limits)
        print(text)
        os.makedirs(args.out, exist_ok=True)
        with open(os.path.join(args.out, "report.md"), "w") as f:
            f.write(text + "\n")
        with open(os.path.join(args.out, "run.json"), "w") as f:
            kept = {k: v for k, v in vars(args).items() if k not in ("peers", "lictor", "consul", "envoy", "out", "aead")}
            json.dump({"machine": machine(), "net": net, "args": kept, "limits": machine_limits, "aead": run.aead, "tls": run.facts, "results": {WORKS[w].id: cells for w, cells in run.results.items()}, "failed": run.failed}, f, indent=1)
        print(f"# written to {os.path.relpath(args.out)}: report.md, run.json", file=sys.stderr)
    finally:
        ctx.end(args.keep)
    sys.exit(1 if run.failed else 0)


if __name__ == "__main__":
    main()
