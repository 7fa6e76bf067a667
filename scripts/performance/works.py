"""The workloads: each has a name that says what it does, and a short id for tables."""

import dataclasses
import json
import os
import re
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable

from peers import ConsulPeer, EnvoyPeer, Pair
from proof import body_ok, http_get, mtls_get, tls_ctx, verify
from system import FAULTS, NA, Bad, alive, cpu, listening, med, mem, now, tail


def must_have_worked(pair, r, per=None):
    """Both sidecars must have burnt CPU in proportion, else the traffic went elsewhere."""
    if pair.client is None:
        return
    n = per or 1
    for k in ("cpu_client", "cpu_server"):
        # A sidecar that gathers many messages into one write takes less than a microsecond for each.
        if r[k] / n < 1e-7:
            raise Bad(f"{k} hardly moved: the traffic did not pass this sidecar")


# ------------------------------------------------------------------ workloads
def bulk(ctx, peer, pair):
    out, moved, took, burnt = {}, 0, 0, 0
    for d, nm in (("D", "down"), ("U", "up")):
        r = ctx.run_load(["bulk", pair.upstream, ctx.args.streams, ctx.t(2.5), d], pair)
        gb = r["bytes_total"] / 1e9
        if r["origin_bulk"] < 0.5 * r["bytes_total"]:
            raise Bad("the origin did not see these bytes")
        if pair.client and min(r["cpu_client"], r["cpu_server"]) / gb < 0.01:
            raise Bad("a sidecar hardly used CPU: bypassed")
        out[f"{nm}_GBps"] = r["gbps"]
        out[f"{nm}_cpu_s_per_GB"] = r["cpu"] / gb
        out[f"{nm}_client_s_per_GB"] = r["cpu_client"] / gb
        out[f"{nm}_server_s_per_GB"] = r["cpu_server"] / gb
        out[f"{nm}_sys_share"] = r["sys_share"]
        moved, took, burnt = moved + r["bytes_total"], took + r["bytes_total"] / 1e9 / r["gbps"], burnt + r["cpu"]
        noise(out, r, pair)
    out["GBps"] = moved / 1e9 / took
    if pair.client:
        out["cpu_s_per_GB"] = burnt / moved * 1e9
    return out


def noise(out, r, pair):
    for k in ("steal_pct", "foreign_pct"):
        out[k] = max(out.get(k, 0), r[k])
    if pair.client is None:  # direct: there is no proxy whose CPU could be counted
        for k in [k for k in out if "cpu" in k or "client" in k or "server" in k or k in ("sys_share", "cores", "agent_ms") or k.endswith("_sys_share")]:
            del out[k]


def http_out(pair, r):
    must_have_worked(pair, r, r["total"])
    if r["origin_requests"] < r["total"]:
        raise Bad(f"the origin served {r['origin_requests']} of {r['total']} requests")
    out = {"rps": r["rps"], "p50_us": r["p50_us"], "p99_us": r["p99_us"], "p999_us": r["p999_us"],
           "cpu_us_per_req": 1e6 * r["cpu"] / r["total"], "client_us": 1e6 * r["cpu_client"] / r["total"],
           "server_us": 1e6 * r["cpu_server"] / r["total"], "sys_share": r["sys_share"], "cores": r["cpu"] / r["wall"]}
    noise(out, r, pair)
    return out


def requests(ctx, peer, pair, size=1024, secs=4):
    return http_out(pair, ctx.run_load(["http", pair.upstream, 64, ctx.t(secs), size, 0], pair))


def requests_of_64k(ctx, peer, pair):
    return requests(ctx, peer, pair, 65536, 3)


def grpc(ctx, peer, pair):
    return http_out(pair, ctx.run_load(["h2", pair.upstream, 16, 4, ctx.t(4)], pair))


def connections(ctx, peer, pair):
    r = ctx.run_load(["churn", pair.upstream, ctx.args.churn, ctx.t(3), 1024], pair)
    must_have_worked(pair, r, r["total"])
    if r["origin_accepted"] < r["total"]:
        raise Bad(f"the origin accepted {r['origin_accepted']} connections for {r['total']}: they were pooled")
    out = {"conn_s": r["rps"], "p50_us": r["p50_us"], "p99_us": r["p99_us"], "cpu_ms_per_conn": 1e3 * r["cpu"] / r["total"],
           "client_ms": 1e3 * r["cpu_client"] / r["total"], "server_ms": 1e3 * r["cpu_server"] / r["total"],
           "agent_ms": 1e3 * r["cpu_agent"] / r["total"], "sys_share": r["sys_share"]}
    noise(out, r, pair)
    return out


def idle_connections(ctx, peer, _):
    """Fresh pair; n idle connections held through it."""
    pair = peer.start(peer.mode())
    openers = []
    try:
        verify(ctx, peer, pair, peer.mode())
        time.sleep(ctx.t(2))

        def both():
            m = [mem(p.pid) for p in pair.procs()]
            return {k: sum(x[k] for x in m) for k in m[0]}, m

        idle, each = both()
        out = {"idle_rss_MB": idle["rss"] / 1e6, "idle_pss_MB": idle["pss"] / 1e6, "idle_anon_MB": idle["anon"] / 1e6}
        held = 0
        for n in ctx.args.idle:
            p = subprocess.Popen([ctx.load, "idle", str(pair.upstream), str(n - held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            killer = threading.Timer(120, p.kill)
            killer.start()
            try:
                r = json.loads(p.stdout.readline() or b'{"ready":0,"why":"died or timed out"}')
            finally:
                killer.cancel()
            openers.append(p)
            if not r.get("ready"):
                raise Bad(f"{n} idle connections: {r.get('why')}")
            held = n
            if ctx.stats()["open"] < n and peer.l4:
                raise Bad("the origin holds fewer connections than the client")
            time.sleep(ctx.t(3))
            m, e = both()
            out[f"c{n}_rss_MB"], out[f"c{n}_pss_MB"] = m["rss"] / 1e6, m["pss"] / 1e6
            out[f"c{n}_KB_per_conn"] = (m["pss"] - idle["pss"]) / n / 1e3
            out[f"c{n}_client_KB"] = (e[0]["pss"] - each[0]["pss"]) / n / 1e3
            out[f"c{n}_server_KB"] = (e[1]["pss"] - each[1]["pss"]) / n / 1e3
        for p in openers:  # every held connection must still answer
            p.stdin.write(b"go\n")
            p.stdin.flush()
            r = json.loads(p.stdout.readline() or b'{"errors":1,"why":"died"}')
            if r["errors"]:
                raise Bad(f"idle: {r['why']}")
        for p in openers:
            p.wait(20)
        time.sleep(ctx.t(3))
        m, _e = both()
        out["after_rss_MB"] = m["rss"] / 1e6
        return out
    finally:
        for p in openers:
            if p.poll() is None:
                p.kill()
            p.wait()
        for p in pair.procs():
            ctx.procs.stop(p)


def first_answer(ctx, peer, pair, tls):
    """Starts the server sidecar; returns the seconds from its exec to a complete mTLS request through it."""
    began = now()
    peer.start_server(pair)
    while True:
        try:
            if not body_ok(mtls_get(pair, tls, timeout=5)[0], 1024):
                raise Bad("wrong body at start-up")
            return now() - began
        except (OSError, ssl.SSLError):
            alive(pair.server)
            if now() - began > 60:
                raise Bad(f"not ready after 60 s: {tail(pair.server)}")
            time.sleep(0.001)


def start(ctx, peer, _):
    pair = peer.prepare(peer.mode())
    tls = tls_ctx(ctx, pair.agent, pair.agent.leaf(pair.cli))
    out = {"binary_MB": peer.size() / 1e6}
    # Cold: the agent has not issued this leaf yet (Consul peers). Warm starts are short and so taken several times.
    for what, times in (("cold", 1), ("warm", 2 if ctx.args.quick else 5)):
        took, burnt = [], []
        for _ in range(times):
            try:
                took.append(1e3 * first_answer(ctx, peer, pair, tls))
                burnt.append(1e3 * cpu(pair.server.pid))
            finally:
                if pair.server:
                    ctx.procs.stop(pair.server)
        out[f"{what}_ms"], out[f"{what}_cpu_ms"] = med(took), med(burnt)
    return out


DENIALS, OPEN_ONES = 20, 4  # how often in a round, and with how many of them a connection is open
REST = 0.1  # seconds between a change that has been seen and the next one


def deny(ctx, peer, pair):
    if not isinstance(peer, ConsulPeer):
        raise NA("static configuration")
    deny, allow, cuts = [], [], []

    def ok():
        try:
            return body_ok(http_get(pair.upstream, "/64", 3), 64)
        except (OSError, Bad):
            return False

    def reached(allowed, since):
        """The milliseconds until new connections are allowed, or are no longer."""
        while ok() != allowed:
            if now() - since > 15:
                raise Bad(f"new connections are still {'refused' if allowed else 'allowed'} after 15 s")
            time.sleep(0.001)
        return 1e3 * (now() - since)

    for number in range(4 if ctx.args.quick else DENIALS):
        if not ok():
            raise Bad("not allowed at the start")
        held = OpenConnection(pair.upstream) if number < OPEN_ONES else None
        time.sleep(REST)
        began = now()
        undo = pair.agent.intention(pair.cli, pair.app, "deny")
        try:
            deny.append(reached(False, began))
            if held:
                cuts.append(held.ended(began))
            time.sleep(REST)
        finally:
            began = now()
            undo()
        allow.append(reached(True, began))
    out = {"deny_ms": med(deny), "deny_max_ms": max(deny), "allow_ms": med(allow), "open_ones_cut": f"{sum(c is not None for c in cuts)} of {len(cuts)}"}
    if all(c is not None for c in cuts):
        out["cut_ms"] = med(cuts)
    return out


class OpenConnection:
    """One that says nothing more, and that somebody else may end."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), 5)
        if not body_ok(http_get(0, "/64", 5, self.socket, keep=True), 64):
            raise Bad("held connection")
        self.at = None
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def _watch(self):
        self.socket.settimeout(30)
        try:
            self.socket.recv(1)
        except OSError:
            pass
        self.at = now()

    def ended(self, since):
        """The milliseconds after which it was ended; `None` if it is open for 3 s more. It is closed then."""
        self.watcher.join(3)
        took = self.at and 1e3 * (self.at - since)
        if took is None:
            self.socket.shutdown(socket.SHUT_RDWR)
            self.watcher.join()
        self.socket.close()
        return took


def latency(ctx, peer, pair):
    r = ctx.run_load(["http", pair.upstream, 1, ctx.t(2), 0, 0], pair)
    o = http_out(pair, r)
    return {k: o[k] for k in ("p50_us", "p99_us", "p999_us", "cpu_us_per_req", "steal_pct", "foreign_pct") if k in o}


def latency_at_rate(ctx, peer, pair):
    """Open loop at one fixed rate for all peers."""
    rate = ctx.args.rate
    r = ctx.run_load(["http", pair.upstream, 64, ctx.t(3), 1024, rate], pair)
    o = http_out(pair, r)
    if r["rps"] < 0.97 * rate:
        raise Bad(f"could not keep {rate}/s: {r['rps']:.0f}/s")
    return {k: o[k] for k in ("rps", "p50_us", "p99_us", "p999_us", "cpu_us_per_req", "steal_pct", "foreign_pct") if k in o}


def control_state(ctx, peer, _):
    """One sidecar that has many upstreams, endpoints and intentions: its start, and its size."""
    if not isinstance(peer, (ConsulPeer, EnvoyPeer)) or not peer.l4:
        raise NA("not built for this peer")
    upstreams, endpoints, intentions = ctx.args.control
    hub = Hub(ctx, peer, "big", upstreams, endpoints // max(1, upstreams - 1), intentions)
    try:
        return {**hub.start(), **hub.settle(ctx.t(5), ctx.t(8))}
    finally:
        hub.stop()


class Hub:
    """One service whose sidecar has many upstreams, the last of which is the service itself, so that it can be
    used. The others have `each` endpoints, none of which is alive."""

    def __init__(self, ctx, peer, label, upstreams, each, intentions):
        self.ctx, self.peer, self.agent = ctx, peer, peer.agent()
        self.sid, self.each, self.intentions = peer.name(label), each, intentions
        self.pair, self.proc = Pair(), None
        self.pair.agent, self.pair.app, self.pair.cli = self.agent, f"{label}-web", f"{label}-cli"
        self.pair.public = ctx.ports.take()
        others = [f"{label}-{each}-{i}" for i in range(upstreams - 1)]
        self.upstreams = [(name, ctx.ports.take()) for name in [*others, self.pair.app]]
        self.pair.upstream = self.upstreams[-1][1]
        self.agent.ensure_instances({name: [(f"127.9.{i % 250}.{k % 250 + 1}", 9000 + k) for k in range(each)] for i, name in enumerate(others)})
        self.agent.ensure_denials(self.pair.app, intentions)
        if isinstance(peer, ConsulPeer):
            self.agent.register(self.pair.app, ctx.origin_port, self.pair.public, self.upstreams, sid=self.sid)
            self.agent.wait_endpoint(self.pair.app, self.pair.public)
        else:
            self.pair.leaf_app, self.pair.dir = self.agent.leaf(self.pair.app), tempfile.mkdtemp(dir=ctx.tmp)

    def argv(self, agent_port=None):
        if isinstance(self.peer, ConsulPeer):
            return self.peer.argv(agent_port or self.agent.http, self.sid)
        return self.peer.big(self.pair, self.each, self.intentions, self.upstreams)

    def start(self, agent_port=None, within=60):
        """Starts the sidecar; returns the milliseconds to each of its marks."""
        tls = tls_ctx(self.ctx, self.agent, self.agent.leaf(self.pair.cli))
        argv = self.argv(agent_port)
        self.agent_cpu, self.began = cpu(self.agent.proc.pid), now()
        self.proc = self.ctx.procs.start(argv, f"{self.peer.label}-hub", self.ctx.pin_proxy)
        marks = {
            "public_ms": lambda: body_ok(mtls_get(self.pair, tls)[0], 1024),
            "listen_ms": lambda: not {port for _, port in self.upstreams} - listening(),
            "traffic_ms": lambda: body_ok(http_get(self.pair.upstream, "/1024", 3), 1024),
        }
        out = {}
        while len(out) < len(marks):
            alive(self.proc)
            for mark, reached in marks.items():
                if mark not in out and (mark != "traffic_ms" or len(out) == 2) and holds(reached):
                    out[mark] = 1e3 * (now() - self.began)
            if now() - self.began > within:
                raise Bad(f"not there after {within} s: {', '.join(set(marks) - set(out))}; {tail(self.proc)}")
            time.sleep(0.002)
        return out

    def settle(self, quiet, idle):
        """The cost after `quiet` seconds more, and the idle cost, measured over `idle` seconds."""
        time.sleep(quiet)
        m = mem(self.proc.pid)
        out = {"rss_MB": m["rss"] / 1e6, "anon_MB": m["anon"] / 1e6, "cpu_ms": 1e3 * cpu(self.proc.pid),
               "agent_cpu_ms": 1e3 * (cpu(self.agent.proc.pid) - self.agent_cpu)}
        c0, t0 = cpu(self.proc.pid), now()
        time.sleep(idle)
        out["idle_cpu_pct"] = 100 * (cpu(self.proc.pid) - c0) / (now() - t0)
        out["fds"] = len(os.listdir(f"/proc/{self.proc.pid}/fd"))
        return out

    def halt(self):
        if self.proc:
            self.ctx.procs.stop(self.proc)
            self.proc = None

    def stop(self):
        self.halt()
        if isinstance(self.peer, ConsulPeer):
            self.agent.put(f"/v1/agent/service/deregister/{self.sid}")


def holds(reached):
    try:
        return reached()
    except (OSError, ssl.SSLError, Bad):
        return False


ENDPOINT_CHANGES, INTENTION_CHANGES = 100, 10  # a second
SECOND_ADDRESS = "127.0.0.2"


CHURN_HELD = 0.95  # of the changes, or of the requests, that are wanted


class Churn:
    """An instance of the app that comes and goes in the catalog, and an intention that is made and deleted. Where the
    configuration is static, the peer is told by its files as well; the agent has the same work for every peer."""

    def __init__(self, peer, pair):
        self.peer, self.pair = peer, pair
        self._made, self._began, self._undo, self._end, self._fault = {}, now(), None, threading.Event(), None
        changes = ((self._endpoint, ENDPOINT_CHANGES), (self._intention, INTENTION_CHANGES))
        self._threads = [threading.Thread(target=self._repeat, args=args, daemon=True) for args in changes]

    def __enter__(self):
        self._began = now()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join()
        if self._fault:
            raise Bad(f"churn: {self._fault}")

    def rates(self):
        """Changes a second that were really made: of instances, and of intentions."""
        took = now() - self._began
        return [self._made.get(change, 0) / took for change in (self._endpoint, self._intention)]

    def _repeat(self, change, rate):
        try:
            made = 0
            while not self._end.wait(max(0, self._began + made / rate - now())):
                change(made % 2 == 0)
                made += 1
                self._made[change] = made
            if made % 2:
                change(False)
        except FAULTS as e:
            self._fault = f"{type(e).__name__}: {e}"

    def _intention(self, there):
        if there:
            self._undo = self.pair.agent.intention("churn", self.pair.app, "deny")
        else:
            self._undo()
        if self.peer.kind == "envoy-http":
            self.peer.tell_intentions(self.pair, ["denied", *(["churn"] if there else [])])

    def _endpoint(self, there):
        agent, app, port = self.pair.agent, self.pair.app, self.pair.public
        if there:
            agent.add_sidecar(app, f"{app}-second", SECOND_ADDRESS, port)
        else:
            agent.remove_sidecar(f"{app}-second", SECOND_ADDRESS)
        if self.peer.kind == "envoy-http":
            self.peer.tell_endpoints(self.pair, [("127.0.0.1", port), *([(SECOND_ADDRESS, port)] if there else [])])


def requests_amid_changes(ctx, peer, _):
    """Requests over L7 at one fixed rate for all peers, at rest, and again while instances come and go and intentions
    change. At its full rate the load would leave the agent no CPU to make the changes with."""
    if peer.kind not in ("lictor-http", "envoy-http"):
        raise NA("not built for this peer")
    pair = peer.prepare("http")
    pair.listen, pair.followed = "0.0.0.0", True
    load = lambda: http_out(pair, ctx.run_load(["http", pair.upstream, 64, ctx.t(4), 1024, ctx.args.rate], pair))
    # Otherwise the agent decides, which all peers have the same work for: on its cores a request waits for a slice of time.
    with ctx.agent_apart(pair.agent):
        return amid_changes(ctx, peer, pair, load)


def amid_changes(ctx, peer, pair, load):
    try:
        peer.start_server(pair)
        peer.start_client(pair)
        for port, proc in ((pair.public, pair.server), (pair.upstream, pair.client)):
            peer.wait_port(port, proc)
        verify(ctx, peer, pair, "http")
        quiet = load()
        with Churn(peer, pair) as churn:
            busy = load()
            instances, intentions = churn.rates()
        out = {"quiet_p99_us": quiet["p99_us"], "quiet_rps": quiet["rps"], "rps": busy["rps"], "changes_s": instances, "intentions_s": intentions}
        held = min(busy["rps"] / ctx.args.rate, quiet["rps"] / ctx.args.rate, instances / ENDPOINT_CHANGES, intentions / INTENTION_CHANGES)
        if held < CHURN_HELD:
            busy = {"not_measured": "too few changes or requests", **{k: busy[k] for k in ("steal_pct", "foreign_pct")}}
        return out | busy
    finally:
        for proc in pair.procs():
            ctx.procs.stop(proc)


MESSAGES = 10  # of each stream, a second


def open_calls(ctx, peer, pair):
    """1,000 gRPC calls that stay open, with small messages: both ways, then from the server alone."""
    out = {}
    for kind, name in (("E", "bidi"), ("P", "push")):
        r = ctx.run_load(["streams", pair.upstream, 10, 100, ctx.t(4), MESSAGES, kind], pair)
        must_have_worked(pair, r, r["total"])
        if r["rps"] < 0.6 * 1000 * MESSAGES:
            raise Bad(f"{name}: {r['rps']:.0f} messages a second of {1000 * MESSAGES}")
        out |= {f"{name}_messages_s": r["rps"], f"{name}_p50_us": r["p50_us"], f"{name}_p99_us": r["p99_us"], f"{name}_cpu_us_per_message": 1e6 * r["cpu"] / r["total"]}
        noise(out, r, pair)
    return out


def connections_without_tunnel(ctx, peer, _):
    """New connections where no connection is carried by a tunnel, which is what Lictor does towards other kinds of sidecars."""
    pair = peer.prepare(peer.mode())
    try:
        if peer.kind == "lictor":
            off = {"Config": {"lictor_tunnel": False}}
            pair.agent.register(pair.app, ctx.origin_port, pair.public, proxy=off)
            pair.agent.register(pair.cli, ctx.ports.take(), pair.cpublic, [(pair.app, pair.upstream)], proxy=off)
            pair.agent.wait_endpoint(pair.app, pair.public)
        peer.start_server(pair)
        peer.start_client(pair)
        for port, proc in ((pair.public, pair.server), (pair.upstream, pair.client)):
            peer.wait_port(port, proc)
        verify(ctx, peer, pair, peer.mode())
        return connections(ctx, peer, pair)
    finally:
        for proc in pair.procs():
            ctx.procs.stop(proc)


def handshakes(ctx, peer, pair):
    """Full handshakes with the server's sidecar alone: openssl keeps no session and knows no tunnel."""
    leaf = pair.agent.leaf(pair.cli)
    files = {"cert": leaf["CertPEM"], "key": leaf["PrivateKeyPEM"], "CAfile": pair.agent.roots}
    with tempfile.TemporaryDirectory(dir=ctx.tmp) as directory:
        argv = ["openssl", "s_time", "-connect", f"127.0.0.1:{pair.public}", "-new", "-www", "/64", "-time", str(max(1, round(ctx.t(4))))]
        for name, text in files.items():
            path = os.path.join(directory, name)
            with open(path, "w") as f:
                f.write(text)
            argv += [f"-{name}", path]
        began, burnt = now(), cpu(pair.server.pid)
        run = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        took, burnt = now() - began, cpu(pair.server.pid) - burnt
    made = re.search(r"(\d+) connections in (\d+) real seconds, \d+ bytes read per connection", run.stdout)
    if run.returncode or not made or int(made[1]) < 10:
        raise Bad(f"openssl s_time: {(run.stderr or run.stdout).strip()[-200:]}")
    return {"conn_s": int(made[1]) / took, "cpu_ms_per_conn": 1e3 * burnt / int(made[1])}


BODY = 48 << 20


def bulk_bodies(ctx, peer, pair):
    """Bodies of 48 MiB over HTTP/1.1, down then up, two at a time."""
    out, moved, took, burnt = {}, 0, 0, 0
    for how, name in (("http", "down"), ("put", "up")):
        r = ctx.run_load([how, pair.upstream, 2, ctx.t(3), BODY, *([0] if how == "http" else [])], pair)
        rate = r["rps"] * BODY / 1e9 if how == "http" else r["gbps"]
        bytes_total = r["total"] * BODY
        out[f"{name}_GBps"], out[f"{name}_cpu_s_per_GB"] = rate, r["cpu"] / bytes_total * 1e9
        moved, took, burnt = moved + bytes_total, took + bytes_total / 1e9 / rate, burnt + r["cpu"]
        noise(out, r, pair)
    out["GBps"] = moved / 1e9 / took
    if pair.client:
        out["cpu_s_per_GB"] = burnt / moved * 1e9
    return out


LONG_PATH_MS = 25


def long_path(ctx, peer, _):
    """One stream each way over a path between the sidecars that takes 25 ms each way."""
    if peer.kind == "consul":
        raise NA("its public listener is where it is registered, and that is the far end of the path")
    mode = "tcp" if peer.l4 else "http"
    pair, delay = peer.prepare(mode), None
    far = ctx.ports.take()
    try:
        delay = ctx.procs.start([ctx.load, "delay", str(far), str(pair.public), str(LONG_PATH_MS)], f"{peer.label}-delay", ctx.pin_load)
        if isinstance(peer, ConsulPeer):
            pair.agent.register(pair.app, ctx.origin_port, far, proxy={"Config": {"bind_port": pair.public}})
            pair.agent.wait_endpoint(pair.app, far)
        pair.endpoints = [("127.0.0.1", far)]
        peer.start_server(pair)
        peer.start_client(pair)
        for port, proc in ((far, delay), (pair.public, pair.server), (pair.upstream, pair.client)):
            peer.wait_port(port, proc)
        verify(ctx, peer, pair, mode)
        if mode == "tcp":
            loads = {"down": ["bulk", pair.upstream, 1, ctx.t(6), "D"], "up": ["bulk", pair.upstream, 1, ctx.t(6), "U"]}
            rate = lambda r: r["gbps"]
        else:
            loads = {"down": ["http", pair.upstream, 1, ctx.t(6), 256 << 20, 0], "up": ["put", pair.upstream, 1, ctx.t(6), 256 << 20]}
            rate = lambda r: r["gbps"] if "gbps" in r else r["total"] * (256 << 20) / 1e9 / r["wall"]
        return {f"{name}_GBps": rate(ctx.run_load(argv, pair)) for name, argv in loads.items()}
    finally:
        for proc in [*pair.procs(), *([delay] if delay else [])]:
            ctx.procs.stop(proc)


L4, L7 = "l4", "l7"


@dataclasses.dataclass(frozen=True)
class Work:
    id: str
    title: str
    run: Callable
    modes: dict  # the service protocol by layer; None leaves it to the peer
    main: tuple = ()  # the figures that ratios are taken of
    fresh: bool = False  # starts sidecars of its own
    for_direct: bool = True  # makes sense without sidecars


REQUESTS = ("rps", "p50_us", "p99_us", "p999_us", "cpu_us_per_req")
LATENCY = ("p50_us", "added_p50_us", "p99_us", "cpu_us_per_req")
WORKS = {
    "bulk": Work("W1", "bulk TCP, both directions", bulk, {L4: "tcp"},
                 ("GBps", "cpu_s_per_GB", "down_GBps", "up_GBps", "down_cpu_s_per_GB", "up_cpu_s_per_GB")),
    "http-over-l4": Work("W2", "HTTP/1.1 keep-alive, 64 connections, 1 KiB, over L4", requests, {L4: "tcp"}, REQUESTS),
    "http-over-l4-64k": Work("W2b", "HTTP/1.1 keep-alive, 64 connections, 64 KiB, over L4", requests_of_64k, {L4: "tcp"}, REQUESTS),
    "http-over-l7": Work("W3", "HTTP/1.1, 64 connections, 1 KiB, L7 (service protocol http)", requests, {L7: "http"}, REQUESTS),
    "grpc": Work("W3b", "gRPC shaped HTTP/2, 16 connections x 4 streams, 1 KiB, L7 (protocol grpc)", grpc, {L7: "grpc"}, REQUESTS),
    "connections": Work("W4", "connection churn: a new connection per 1 KiB request", connections, {L4: "tcp"},
                        ("conn_s", "p50_us", "p99_us", "cpu_ms_per_conn")),
    "idle-connections": Work("W5", "memory with idle connections, both sidecars together", idle_connections, {L4: None, L7: None},
                             fresh=True, for_direct=False),
    "start": Work("W6", "start-up of the server sidecar: exec to a complete mTLS request", start, {L4: None, L7: None},
                  ("cold_ms", "warm_ms", "binary_MB"), fresh=True, for_direct=False),
    "deny": Work("W7", "intention deny: PUT to the first refused new connection", deny, {L4: "tcp"}, ("deny_ms", "allow_ms", "cut_ms"), for_direct=False),
    "latency": Work("W8", "latency, 1 connection, 0-byte body, closed loop", latency, {L4: "tcp", L7: "http"}, LATENCY),
    "latency-at-rate": Work("W8r", "latency at a fixed rate, open loop, 64 connections, 1 KiB", latency_at_rate, {L4: "tcp", L7: "http"}, LATENCY),
    "control-state": Work("W9", "control-plane scale", control_state, {L4: None}, ("traffic_ms", "rss_MB", "anon_MB", "cpu_ms"), fresh=True, for_direct=False),
    "churn": Work("W10", "HTTP/1.1, 64 connections, 1 KiB, L7, while instances and intentions change", requests_amid_changes, {L7: None},
                  ("p99_us", "quiet_p99_us", "rps", "cpu_us_per_req"), fresh=True, for_direct=False),
    "open-calls": Work("W12", "gRPC calls that stay open: 1,000 streams with 10 messages of 64 bytes a second each", open_calls, {L7: "grpc"},
                       ("bidi_cpu_us_per_message", "push_cpu_us_per_message", "bidi_p99_us", "push_p99_us")),
    "handshakes": Work("W13", "full handshakes with the server's sidecar, without resumption or tunnel", handshakes, {L4: "tcp"},
                       ("conn_s", "cpu_ms_per_conn"), for_direct=False),
    "connections-without-tunnel": Work("W14", "connection churn without a tunnel", connections_without_tunnel, {L4: None},
                                       ("conn_s", "p50_us", "p99_us", "cpu_ms_per_conn"), fresh=True, for_direct=False),
    "bulk-bodies": Work("W15", "bulk bodies over HTTP/1.1, 48 MiB, 2 connections, L7 (service protocol http)", bulk_bodies, {L7: "http"},
                        ("GBps", "cpu_s_per_GB", "down_GBps", "up_GBps")),
    "long-path": Work("W16", "one stream over a path of 50 ms round trip", long_path, {L4: None, L7: None}, ("down_GBps", "up_GBps"),
                      fresh=True, for_direct=False),
}
BY_ID = {work.id: name for name, work in WORKS.items()}
HIDE = {"steal_pct", "foreign_pct", "retries", "down_client_s_per_GB", "down_server_s_per_GB", "up_client_s_per_GB", "up_server_s_per_GB"}


def applies(name, peer):
    """The service protocol that a workload runs with at a peer; None where it says nothing there."""
    work = WORKS[name]
    if peer.kind == "none" or not peer.tls:
        if not work.for_direct:
            return None
        return "grpc" if work.modes.get(L7) == "grpc" else "tcp"
    if peer.l4 and L4 in work.modes:
        return work.modes[L4] or peer.mode()
    if peer.l7 and L7 in work.modes:
        return work.modes[L7] or peer.mode()
    return None
