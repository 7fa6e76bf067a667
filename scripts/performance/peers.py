"""The proxies that are compared: how a pair of sidecars of each kind is configured and started."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time

from system import NA, Bad, alive, listening, now, tail


class Pair:
    tls = True
    client = server = None
    agent = None
    public = upstream = None
    facts = None
    denied = ["denied"]  # sources, where the configuration is static
    listen = "127.0.0.1"  # the public listener's address, likewise
    followed = False  # likewise: the public listener and the upstream's endpoints are read again when their files are replaced
    endpoints = None  # of the client's upstream, likewise; its public port alone when None

    def pids(self):
        return [p.pid for p in (self.client, self.server) if p]

    def procs(self):
        return [p for p in (self.client, self.server) if p]


class Peer:
    """kind, label, path, options; start(mode) gives a Pair."""
    l4 = True
    l7 = False
    tls = True

    def __init__(self, ctx, kind, label, path, opts):
        self.ctx, self.kind, self.label, self.path, self.opts = ctx, kind, label, path, opts
        self.seq = 0

    def mode(self):
        return "tcp" if self.l4 else "http"

    def name(self, mode):
        self.seq += 1
        return re.sub(r"[^a-z0-9]+", "-", f"{self.label}-{mode}-{self.seq}".lower()).strip("-")

    def size(self):
        return os.path.getsize(os.path.realpath(self.path)) if self.path else 0

    def wait_port(self, port, proc, secs=20):
        end = now() + secs
        while port not in listening():
            alive(proc)
            if now() > end:
                raise Bad(f"{self.label}: {proc.label} never listened on {port}: {tail(proc)}")
            time.sleep(0.01)


class NonePeer(Peer):
    tls = False

    def start(self, mode):
        p = Pair()
        p.tls, p.upstream = False, self.ctx.origin_port
        return p


class RelayPeer(Peer):
    """Two plain relays in a row: what two hops cost with no TLS at all."""
    tls = False

    def start(self, mode):
        p = Pair()
        p.tls = False
        how = "splice" if self.kind.endswith("splice") else "rw"
        p.public, p.upstream = self.ctx.ports.take(), self.ctx.ports.take()
        for who, a, b in (("server", p.public, self.ctx.origin_port), ("client", p.upstream, p.public)):
            pr = self.ctx.procs.start([self.ctx.load, "relay", str(a), str(b), how], f"{self.label}-{who}", self.ctx.pin_proxy)
            setattr(p, who, pr)
            self.wait_port(a, pr)
        return p


class ConsulPeer(Peer):
    """consul connect proxy, and lictor, which takes the same command line."""

    def __init__(self, *a):
        super().__init__(*a)
        self.l7 = self.kind.endswith("-http")
        self.l4 = not self.l7

    def agent(self):
        return self.ctx.agent(self.opts.get("agent") or (self.path if self.kind == "consul" else None))

    def argv(self, agent_port, sid):
        return [self.path, "connect", "proxy", "-sidecar-for", sid, "-http-addr", f"127.0.0.1:{agent_port}", "-log-level", "warn"]

    def spawn(self, agent, sid, who):
        return self.ctx.procs.start(self.argv(agent.http, sid), f"{self.label}-{who}", self.ctx.pin_proxy)

    def prepare(self, mode):
        """Register the two services; nothing runs yet."""
        p, a, n, t = Pair(), self.agent(), self.name(mode), self.ctx.ports.take
        p.agent, p.app, p.cli = a, f"app-{n}", f"cli-{n}"
        p.public, p.upstream, p.cpublic = t(), t(), t()
        if mode != "tcp":
            for s in (p.app, p.cli):
                a.protocol(s, mode)
        a.register(p.app, self.ctx.origin_port, p.public)
        a.register(p.cli, t(), p.cpublic, [(p.app, p.upstream)])
        a.wait_endpoint(p.app, p.public)
        p.sid = p.app
        return p

    def start_server(self, p):
        p.server = self.spawn(p.agent, p.app, "server")

    def start_client(self, p):
        p.client = self.spawn(p.agent, p.cli, "client")

    def start(self, mode):
        p = self.prepare(mode)
        self.start_server(p)
        self.start_client(p)
        for port, pr in ((p.public, p.server), (p.upstream, p.client)):
            self.wait_port(port, pr)
        return p


class ManagedEnvoyPeer(ConsulPeer):
    """Envoy as Consul starts and configures it, over xDS. Needs an agent that knows this Envoy."""

    def argv(self, agent_port, sid):
        agent, admin = self.agent(), self.ctx.ports.take()
        if agent.ver() < (1, 14):
            raise NA(f"Consul {agent.version} speaks no xDS of this Envoy")
        return [agent.path, "connect", "envoy", "-sidecar-for", sid, "-envoy-binary", self.path, "-ignore-envoy-compatibility",
                "-admin-bind", f"127.0.0.1:{admin}", "-http-addr", f"127.0.0.1:{agent_port}", "-grpc-addr", f"127.0.0.1:{agent.grpc}",
                "--", "-l", "error", "--concurrency", str(self.opts.get("concurrency", os.cpu_count()))]


class LeafPeer(Peer):
    """Peers configured statically with leaves that Consul issued."""

    def agent(self):
        return self.ctx.agent(self.opts.get("agent"))

    def prepare(self, mode):
        p, a, n, t = Pair(), self.agent(), self.name(mode), self.ctx.ports.take
        p.agent, p.app, p.cli, p.mode = a, f"app-{n}", f"cli-{n}", mode
        p.public, p.upstream = t(), t()
        p.dir = tempfile.mkdtemp(dir=self.ctx.tmp)
        p.leaf_app, p.leaf_cli = a.leaf(p.app), a.leaf(p.cli)
        return p

    def file(self, p, name, text):
        f = os.path.join(p.dir, name)
        with open(f, "w") as h:
            h.write(text)
        return f

    def start(self, mode):
        p = self.prepare(mode)
        self.start_server(p)
        self.start_client(p)
        for port, pr in ((p.public, p.server), (p.upstream, p.client)):
            self.wait_port(port, pr)
        return p

    def start_server(self, p):
        p.server = self.ctx.procs.start(self.server_argv(p), f"{self.label}-server", self.ctx.pin_proxy)

    def start_client(self, p):
        p.client = self.ctx.procs.start(self.client_argv(p), f"{self.label}-client", self.ctx.pin_proxy)


class EnvoyPeer(LeafPeer):
    """Envoy, given statically what Consul would send it over xDS."""

    def __init__(self, *a):
        super().__init__(*a)
        self.l7 = self.kind.endswith("-http")
        self.l4 = not self.l7

    T = "type.googleapis.com/envoy.extensions."

    def common_tls(self, a, leaf, san=None):
        v = {"trusted_ca": {"inline_string": a.roots}}
        if san:
            v["match_typed_subject_alt_names"] = [{"san_type": "URI", "matcher": {"exact": s}} for s in san]
        c = {"tls_certificates": [{"certificate_chain": {"inline_string": leaf["CertPEM"]}, "private_key": {"inline_string": leaf["PrivateKeyPEM"]}}],
             "validation_context": v, "tls_params": {}}
        if self.opts.get("tls") == "1.3":
            c["tls_params"] = {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"}
        return c

    def cluster(self, name, eps, h2=False, tls=None, http=False):
        c = {"name": name, "type": "STATIC", "connect_timeout": "5s",
             # Envoy's default, which Consul leaves alone, is 1024 of each: too few for idle-connections
             "circuit_breakers": {"thresholds": [{"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000}]},
             "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [
                 {"endpoint": {"address": {"socket_address": {"address": h, "port_value": p}}}} for h, p in eps]}]}}
        if tls:
            c["transport_socket"] = {"name": "tls", "typed_config": {"@type": self.T + "transport_sockets.tls.v3.UpstreamTlsContext", **tls}}
            c["outlier_detection"] = {}
            c["common_lb_config"] = {"healthy_panic_threshold": {"value": 0}}
        if http:
            c["typed_extension_protocol_options"] = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": self.T + "upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}} if h2 else {"http_protocol_options": {}}}}
        return c

    def rbac(self, a, denied):
        return {"action": "DENY", "policies": {"consul-intentions-layer4": {
            "permissions": [{"any": True}],
            "principals": [{"authenticated": {"principal_name": {"safe_regex": {
                "regex": f"^spiffe://[^/]+/ns/default/dc/[^/]+/svc/{d}$"}}}} for d in denied]}}}

    def filters(self, a, mode, cluster, stat, denied=None, retry=False):
        if mode == "tcp":
            out = []
            if denied is not None:
                out.append({"name": "envoy.filters.network.rbac", "typed_config": {
                    "@type": self.T + "filters.network.rbac.v3.RBAC", "stat_prefix": "connect_authz", "rules": self.rbac(a, denied)}})
            return out + [{"name": "envoy.filters.network.tcp_proxy", "typed_config": {
                "@type": self.T + "filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": stat, "cluster": cluster}}]
        hf = []
        if mode == "grpc":
            hf += [{"name": "envoy.filters.http.grpc_stats", "typed_config": {"@type": self.T + "filters.http.grpc_stats.v3.FilterConfig", "stats_for_all_methods": True}},
                   {"name": "envoy.filters.http.grpc_http1_bridge", "typed_config": {"@type": self.T + "filters.http.grpc_http1_bridge.v3.Config"}}]
        if denied is not None:
            hf.append({"name": "envoy.filters.http.rbac", "typed_config": {"@type": self.T + "filters.http.rbac.v3.RBAC", "rules": self.rbac(a, denied)}})
        hf.append({"name": "envoy.filters.http.router", "typed_config": {"@type": self.T + "filters.http.router.v3.Router"}})
        action = {"cluster": cluster, "timeout": "15s"}
        if retry:
            action["retry_policy"] = {"retry_on": "connect-failure,retriable-status-codes", "num_retries": 2, "retriable_status_codes": [503]}
        hcm = {"@type": self.T + "filters.network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": stat, "codec_type": "AUTO",
               "http_filters": hf, "route_config": {"name": stat, "virtual_hosts": [{"name": stat, "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": action}]}]}}
        if mode == "grpc" or self.opts.get("mesh") == "h2":
            hcm["http2_protocol_options"] = {}
        return [{"name": "envoy.filters.network.http_connection_manager", "typed_config": hcm}]

    def listener(self, name, host, port, filters, tls=None):
        fc = {"filters": filters}
        if tls:
            fc["transport_socket"] = {"name": "tls", "typed_config": {"@type": self.T + "transport_sockets.tls.v3.DownstreamTlsContext", **tls}}
        return {"name": name, "address": {"socket_address": {"address": host, "port_value": port}}, "filter_chains": [fc]}

    def resources(self, p, name, kind, resources):
        """A file of dynamic resources, replaced at once: Envoy reads it again when it is moved to."""
        path = os.path.join(p.dir, f"{name}.json")
        with open(path + ".new", "w") as f:
            json.dump({"resources": [{"@type": f"type.googleapis.com/envoy.config.{kind}", **r} for r in resources]}, f)
        os.rename(path + ".new", path)
        return {"path_config_source": {"path": path}, "resource_api_version": "V3"}

    def tell_endpoints(self, p, endpoints):
        lb = [{"endpoint": {"address": {"socket_address": {"address": h, "port_value": n}}}} for h, n in endpoints]
        return self.resources(p, "endpoints", "endpoint.v3.ClusterLoadAssignment", [{"cluster_name": "mesh", "endpoints": [{"lb_endpoints": lb}]}])

    def tell_intentions(self, p, denied):
        return self.resources(p, "listeners", "listener.v3.Listener", [self.public_listener(p, denied)])

    def argv(self, p, name, listeners, clusters, dynamic=None):
        static = {"static_resources": {"listeners": listeners, "clusters": clusters}, **({"dynamic_resources": dynamic} if dynamic else {})}
        f = self.file(p, name + ".json", json.dumps({"node": {"id": name, "cluster": name}, **static}))
        return [self.path, "-c", f, "--concurrency", str(self.opts.get("concurrency", os.cpu_count())), "--disable-hot-restart", "-l", "error"]

    def public_listener(self, p, denied):
        tls = {"common_tls_context": self.common_tls(p.agent, p.leaf_app), "require_client_certificate": True}
        return self.listener("public_listener", p.listen, p.public, self.filters(p.agent, p.mode, "local_app", "public_listener", denied), tls)

    def server_argv(self, p):
        app = self.cluster("local_app", [("127.0.0.1", self.ctx.origin_port)], p.mode == "grpc", http=p.mode != "tcp")
        if p.followed:
            return self.argv(p, "server", [], [app], {"lds_config": self.tell_intentions(p, p.denied)})
        return self.argv(p, "server", [self.public_listener(p, p.denied)], [app])

    def client_argv(self, p):
        a = p.agent
        h2 = p.mode == "grpc" or (p.mode == "http" and self.opts.get("mesh") == "h2")
        tls = {"common_tls_context": self.common_tls(a, p.leaf_cli, [a.spiffe(p.app)]), "sni": a.sni(p.app)}
        endpoints = p.endpoints or [("127.0.0.1", p.public)]
        mesh = self.cluster("mesh", endpoints, h2, tls, http=p.mode != "tcp")
        if p.followed:
            del mesh["load_assignment"]
            mesh |= {"type": "EDS", "eds_cluster_config": {"eds_config": self.tell_endpoints(p, endpoints)}}
        return self.argv(p, "client", [self.listener("upstream", "127.0.0.1", p.upstream, self.filters(a, p.mode, "mesh", "upstream", retry=True))], [mesh])

    def big(self, p, each, intentions, ups):
        """One sidecar with upstreams of `each` endpoints and as many denied sources as `intentions`."""
        a, ls, cs = p.agent, [], []
        tls = {"common_tls_context": self.common_tls(a, p.leaf_app), "require_client_certificate": True}
        ls.append(self.listener("public_listener", "127.0.0.1", p.public, self.filters(a, "tcp", "local_app", "public_listener", [f"src-{i}" for i in range(intentions)] or ["denied"]), tls))
        cs.append(self.cluster("local_app", [("127.0.0.1", self.ctx.origin_port)]))
        for i, (svc, port) in enumerate(ups):
            eps = [("127.0.0.1", p.public)] if svc == p.app else [(f"127.9.{i % 250}.{k % 250 + 1}", 9000 + k) for k in range(each)]
            ctls = {"common_tls_context": self.common_tls(a, p.leaf_app, [a.spiffe(svc)]), "sni": a.sni(svc)}
            cs.append(self.cluster(f"up-{svc}", eps, tls=ctls))
            ls.append(self.listener(f"up-{svc}", "127.0.0.1", port, self.filters(a, "tcp", f"up-{svc}", f"up-{svc}")))
        return self.argv(p, "big", ls, cs)


class HaproxyPeer(LeafPeer):
    COMMON = """global
  maxconn {maxconn}
  nbthread {threads}
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
"""

    def conf(self, p, who, body):
        f = self.file(p, who + ".cfg", self.COMMON.format(
            threads=self.opts.get("concurrency", os.cpu_count()), maxconn=(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200) // 2) + body)
        return [self.path, "-db", "-f", f]

    def pem(self, p, who, leaf):
        return self.file(p, who + ".pem", leaf["CertPEM"] + "\n" + leaf["PrivateKeyPEM"]), self.file(p, "roots.pem", p.agent.roots)

    def server_argv(self, p):
        crt, ca = self.pem(p, "server", p.leaf_app)
        return self.conf(p, "server", f"""frontend public
  bind 127.0.0.1:{p.public} ssl crt {crt} ca-file {ca} verify required
  default_backend app
backend app
  server app 127.0.0.1:{self.ctx.origin_port}
""")

    def client_argv(self, p):
        # no sni: HAProxy would then want that name in the certificate, and Consul leaves carry a URI only
        crt, ca = self.pem(p, "client", p.leaf_cli)
        return self.conf(p, "client", f"""frontend upstream
  bind 127.0.0.1:{p.upstream}
  default_backend mesh
backend mesh
  server mesh 127.0.0.1:{p.public} ssl crt {crt} ca-file {ca} verify required
""")


KINDS = {"none": NonePeer, "relay": RelayPeer, "relay-splice": RelayPeer, "consul": ConsulPeer, "lictor": ConsulPeer,
         "lictor-http": ConsulPeer, "envoy": EnvoyPeer, "managed-envoy": ManagedEnvoyPeer, "envoy-http": EnvoyPeer, "haproxy": HaproxyPeer}


def parse_peer(ctx, spec, taken):
    m = re.match(r"^(?:([A-Za-z0-9_.-]+):)?([a-z-]+)(?:=([^,]*))?((?:,[a-z]+=[^,]+)*)$", spec)
    if not m or m[2] not in KINDS:
        sys.exit(f"bad peer {spec!r}; kinds: {', '.join(KINDS)}; form [label:]kind[=PATH][,option=value]")
    label, kind, path = m[1], m[2], m[3]
    opts = dict(o.split("=", 1) for o in m[4].split(",")[1:])
    if kind == "haproxy" and not path:
        path = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/sbin")
    if kind not in ("none", "relay", "relay-splice"):
        if not path or not os.access(path, os.X_OK):
            sys.exit(f"peer {spec!r}: no executable there")
        path = os.path.abspath(path)
    if not label:
        label = kind
        if kind == "consul":
            v = subprocess.run([path, "version"], capture_output=True, text=True, timeout=30).stdout
            label += "-" + v.split("\n")[0].split()[-1].lstrip("v")
        for o, v in opts.items():
            if o != "agent":
                label += f"-{o[0]}{v}"
    while label in taken:
        label += "+"
    taken.add(label)
    return KINDS[kind](ctx, kind, label, path, opts)
