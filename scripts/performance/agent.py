"""A Consul agent in dev mode, and the few calls of its API that the measurements need."""

import http.client
import json
import re
import subprocess
import threading
import time

from system import Bad, alive, now, tail


class Agent:
    def __init__(self, ctx, path):
        self.ctx, self.path = ctx, path
        self.thread = threading.local()  # a connection for each, which is kept
        self.version = subprocess.run([path, "version"], capture_output=True, text=True, timeout=30).stdout.split("\n")[0].split()[-1].lstrip("v")
        t = ctx.ports.take
        self.http, self.grpc, ports = t(), t(), [t() for _ in range(3)]
        self.proc = ctx.procs.start(
            [path, "agent", "-dev", "-bind", "127.0.0.1", "-client", "127.0.0.1", "-node", "bench", "-log-level", "err",
             "-http-port", str(self.http), "-dns-port", "-1", "-grpc-port", str(self.grpc if self.ver() >= (1, 14) else -1), "-server-port", str(ports[0]),
             "-serf-lan-port", str(ports[1]), "-serf-wan-port", str(ports[2])], f"agent-{self.version}")
        end = now() + 30
        while True:
            alive(self.proc)
            try:
                if self.get("/v1/status/leader") and self.get("/v1/agent/connect/ca/roots")["Roots"]:
                    break
            except (OSError, Bad, http.client.HTTPException):
                pass
            if now() > end:
                raise Bad(f"agent {path} did not come up: {tail(self.proc)}")
            time.sleep(0.1)
        r = self.get("/v1/agent/connect/ca/roots")
        self.trust = r["TrustDomain"]
        self.roots = "".join(x["RootCert"].rstrip("\n") + "\n" for x in r["Roots"])
        self.instances, self.denials = {}, {}

    def ver(self):
        return tuple(int(x) for x in re.findall(r"\d+", self.version)[:2])

    def call(self, method, path, body=None):
        for again in (0, 1):
            conn = getattr(self.thread, "conn", None)
            if conn is None:
                conn = self.thread.conn = http.client.HTTPConnection("127.0.0.1", self.http, timeout=20)
            try:
                conn.request(method, path, None if body is None else json.dumps(body))
                r = conn.getresponse()
                data = r.read()
                break
            except (http.client.HTTPException, OSError):
                self.thread.conn = None
                if again:
                    raise
        if r.status >= 300:
            raise Bad(f"agent: {method} {path}: {r.status} {data[:200]!r}")
        try:
            return json.loads(data) if data else None
        except ValueError:
            return data.decode()

    def get(self, p):
        return self.call("GET", p)

    def put(self, p, b=None):
        return self.call("PUT", p, b)

    def leaf(self, service):
        return self.get(f"/v1/agent/connect/ca/leaf/{service}")

    def sni(self, service):
        return f"{service}.default.dc1.internal.{self.trust}"

    def spiffe(self, service):
        return f"spiffe://{self.trust}/ns/default/dc/dc1/svc/{service}"

    def register(self, name, port, public, upstreams=(), sid=None, proxy=None):
        sid = sid or name
        self.put("/v1/agent/service/register", {
            "ID": sid, "Name": name, "Port": port,
            "Connect": {"SidecarService": {
                "Port": public, "Check": {"Name": "alias", "AliasService": sid},
                "Proxy": {"Upstreams": [{"DestinationName": n, "LocalBindPort": p} for n, p in upstreams], **(proxy or {})}}}})

    def wait_endpoint(self, name, port):
        end = now() + 15
        while now() < end:
            if any(e["Service"]["Port"] == port for e in self.get(f"/v1/health/connect/{name}?passing=1")):
                return
            time.sleep(0.05)
        raise Bad(f"{name} never became healthy in the catalogue")

    def protocol(self, name, proto):
        self.put("/v1/config", {"Kind": "service-defaults", "Name": name, "Protocol": proto})

    def intention(self, src, dst, action):
        """Returns a function that takes the intention away again."""
        if self.ver() >= (1, 9):
            q = f"/v1/connect/intentions/exact?source={src}&destination={dst}"
            self.put(q, {"Action": action})
            return lambda: self.call("DELETE", q)
        i = self.call("POST", "/v1/connect/intentions", {"SourceName": src, "DestinationName": dst, "Action": action})["ID"]
        return lambda: self.call("DELETE", f"/v1/connect/intentions/{i}")


    def ensure_instances(self, wanted):
        """Instances of services in the catalog, by service name: sidecars at these addresses and ports."""
        for service, addresses in wanted.items():
            have = self.instances.setdefault(service, 0)
            for k, (address, port) in list(enumerate(addresses))[have:]:
                self.add_sidecar(service, f"{service}-{k}", address, port)
            self.instances[service] = max(have, len(addresses))
            if len(self.get(f"/v1/health/connect/{service}")) < len(addresses):
                raise Bad(f"the catalog has not got the {len(addresses)} instances of {service}")

    def add_sidecar(self, service, sid, address, port):
        """Puts a sidecar of a service into the catalog. A transaction would do the same in one request for many, but agents
        before 1.9 leave out there what makes a service a sidecar."""
        self.put("/v1/catalog/register", {"Node": f"ext-{address}", "Address": address, "Service": {
            "Kind": "connect-proxy", "ID": sid, "Service": f"{service}-sidecar-proxy", "Address": address, "Port": port,
            "Proxy": {"DestinationServiceName": service, "DestinationServiceID": sid}}})

    def remove_sidecar(self, sid, address):
        self.put("/v1/catalog/deregister", {"Node": f"ext-{address}", "ServiceID": sid})

    def ensure_denials(self, destination, count):
        """Denies the sources src-0 to src-`count` of a destination."""
        have = self.denials.get(destination, 0)
        if count <= have:
            return
        if self.ver() >= (1, 9):
            sources = [{"Name": f"src-{i}", "Action": "deny"} for i in range(count)]
            self.put("/v1/config", {"Kind": "service-intentions", "Name": destination, "Sources": sources})
        else:
            for i in range(have, count):
                self.call("POST", "/v1/connect/intentions", {"SourceName": f"src-{i}", "DestinationName": destination, "Action": "deny"})
        self.denials[destination] = count
