"""The environment of a measurement: a directory, the origin, agents, and the load generator."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time

from agent import Agent
from proof import http_get
from system import HZ, Bad, Ports, Procs, alive, cpu, keep_to, listening, machine_ticks, now, usersys

HERE = os.path.dirname(os.path.abspath(__file__))


class Context:
    """`args`: port_base, no_sniff, pin, time_scale (what durations are multiplied by), and what the workloads read."""

    def __init__(self, args):
        self.args = args
        self.tmp = tempfile.mkdtemp(prefix="bench-")
        self.ports = Ports(args.port_base)
        self.procs = Procs(self.tmp)
        self.agents = {}
        self.default_agent = None
        self.sniff = not args.no_sniff
        self.pin_proxy = {1} if args.pin else None
        self.pin_load = {0} if args.pin else None
        src = os.path.join(HERE, "load.c")
        h = hashlib.sha256(open(src, "rb").read()).hexdigest()[:12]
        self.load = os.path.join(tempfile.gettempdir(), f"bench-load-{h}")
        if not os.path.exists(self.load):
            cc = os.environ.get("CC", "cc")
            subprocess.run([cc, "-O2", "-o", self.load + ".new", src], check=True)
            os.rename(self.load + ".new", self.load)
        self.origin_port = self.ports.take()
        self.origin = self.procs.start([self.load, "origin", str(self.origin_port)], "origin", self.pin_load)
        end = now() + 5
        while self.origin_port not in listening():
            alive(self.origin)
            if now() > end:
                raise Bad("origin did not start")
            time.sleep(0.01)

    @contextlib.contextmanager
    def agent_apart(self, agent):
        """The agent and this program on one core, load, origin and sidecars that are started meanwhile on another: what the agent
        does takes no CPU from them, whichever peer it is for."""
        allowed, pins = sorted(os.sched_getaffinity(0)), (self.pin_proxy, self.pin_load)
        if len(allowed) < 2:
            yield
            return
        try:
            self.pin_proxy = self.pin_load = {allowed[1]}
            for pid, core in ((os.getpid(), allowed[0]), (agent.proc.pid, allowed[0]), (self.origin.pid, allowed[1])):
                keep_to(pid, {core})
            yield
        finally:
            self.pin_proxy, self.pin_load = pins
            for pid in (os.getpid(), agent.proc.pid):
                keep_to(pid, allowed)
            keep_to(self.origin.pid, self.pin_load or allowed)

    def t(self, seconds):
        return seconds * self.args.time_scale

    def end(self, keep=False):
        self.procs.stop_all()
        if keep:
            print(f"# kept {self.tmp}", file=sys.stderr)
        else:
            shutil.rmtree(self.tmp, ignore_errors=True)

    def agent(self, path=None):
        path = path or self.default_agent
        if not path:
            raise Bad("this peer needs a Consul agent: give --agent PATH or a consul=PATH peer")
        if path not in self.agents:
            self.agents[path] = Agent(self, path)
        return self.agents[path]

    def stats(self):
        return json.loads(http_get(self.origin_port, "/stats"))

    def run_load(self, argv, pair=None, during=None, timeout=None):
        """Runs one load; returns its JSON with CPU figures of the pair added."""
        p = subprocess.Popen([self.load] + [str(a) for a in argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             preexec_fn=(lambda: os.sched_setaffinity(0, self.pin_load)) if self.pin_load else None)
        killer = threading.Timer(timeout or 90, p.kill)
        killer.start()
        try:
            first = p.stdout.readline()
            r = json.loads(first or b'{"ready":0,"why":"load tool died or timed out"}')
            if not r.get("ready"):
                raise Bad("load: " + str(r.get("why")))
            if during:
                during()
            procs = pair.procs() if pair else []
            agent = pair.agent.proc.pid if pair and pair.agent else None
            st0, m0, t0 = self.stats(), machine_ticks(), now()
            c0 = [cpu(x.pid) for x in procs]
            us0 = [usersys(x.pid) for x in procs]
            a0 = cpu(agent) if agent else 0
            o0 = cpu(self.origin.pid)
            p.stdin.write(b"go\n")
            p.stdin.flush()
            line = p.stdout.readline()
            for x in procs:
                alive(x)
            c1 = [cpu(x.pid) for x in procs]
            us1 = [usersys(x.pid) for x in procs]
            a1 = cpu(agent) if agent else 0
            st1, m1, t1 = self.stats(), machine_ticks(), now()
            if not line:
                raise Bad("load tool died or timed out")
            out = json.loads(line)
            p.wait(10)
        finally:
            killer.cancel()
            if p.poll() is None:
                p.kill()
            p.wait()
            p.stdin.close()
            p.stdout.close()
        if out["errors"]:
            raise Bad(f"load: {out['errors']} errors, first: {out['why']}")
        d = [b - a for a, b in zip(c0, c1)]
        out["cpu_client"], out["cpu_server"] = (d + [0, 0])[:2]
        out["cpu"] = sum(d)
        usr, sy = sum(b[0] - a[0] for a, b in zip(us0, us1)), sum(b[1] - a[1] for a, b in zip(us0, us1))
        out["sys_share"] = sy / (usr + sy) if usr + sy else 0
        out["cpu_agent"] = a1 - a0
        out["wall"] = t1 - t0
        out["origin_requests"] = st1["requests"] - st0["requests"] - 1
        out["origin_accepted"] = st1["accepted"] - st0["accepted"] - 1
        out["origin_bulk"] = st1["bulk"] - st0["bulk"]
        if st1["bad"] != st0["bad"]:
            raise Bad("the sink got wrong bulk data")
        tot = max(1, m1[0] - m0[0])
        out["steal_pct"] = 100 * (m1[2] - m0[2]) / tot
        ours = out["cpu"] + out["cpu_agent"] + (cpu(self.origin.pid) - o0) + out.get("load_cpu", 0)
        out["foreign_pct"] = max(0.0, 100 * ((m1[1] - m0[1]) / HZ - ours) / (out["wall"] * os.cpu_count()))
        return out

