"""A statically configured Envoy as a sidecar: what Consul would send it over xDS."""

import importlib.util
import json
import os
import pathlib

from .process import Process
from .ports import is_listening
from .wait import eventually

TYPES = "type.googleapis.com/envoy.extensions."


# ALPN of Envoy under Consul, by the protocol of the service.
ALPN = {"tcp": [], "http": ["http/1.1"], "http2": ["h2", "http/1.1"], "grpc": ["h2", "http/1.1"]}


def envoy_binary():
    found = importlib.util.find_spec("envoy")
    return pathlib.Path(found.submodule_search_locations[0]) / "_bin" / "envoy"


class Envoy(Process):
    """The sidecar of `service`: its public listener (with denied sources) and its upstreams to fixed endpoints.

    `zipkin`: the port of a collector that it sends spans to, as Consul has Envoy trace.
    """

    def __init__(self, service, directory, denied=(), endpoints=None, tls=None, protocol="tcp", zipkin=None):
        agent = service.mesh.agent
        self._agent, self._leaf, self._tls, self._protocol = agent, agent.leaf(service.name), tls, protocol
        listeners, clusters = [], []
        if service.public:
            listeners.append(self._listener("public", service.public, filters("app", protocol, denied, zipkin), self._server_tls()))
            clusters.append(cluster("app", [service.port], protocol=protocol))
        for upstream in service.upstreams:
            name, ports = upstream.to, (endpoints or {}).get(upstream.to)
            listeners.append(self._listener(name, upstream.port, filters(name, protocol, zipkin=zipkin)))
            clusters.append(cluster(name, ports, self._client_tls(name), protocol))
        if zipkin:
            clusters.append(cluster("zipkin", [zipkin]))
        file = directory / f"envoy-{service.name}.json"
        file.write_text(json.dumps({
            "node": {"id": service.name, "cluster": service.name},
            "static_resources": {"listeners": listeners, "clusters": clusters},
            # A span is sent as soon as it is there.
            "layered_runtime": {"layers": [{"name": "here", "static_layer": {"tracing.zipkin.min_flush_spans": 1}}]},
        }))
        # Envoy changes its user when it is root only if told so; a hot restart id would clash between sidecars.
        super().__init__([envoy_binary(), "-c", file, "--concurrency", "1", "--disable-hot-restart", "-l", "warning"],
                         directory, f"envoy-{service.name}", {"ENVOY_UID": os.getuid()})
        ports = [service.public] if service.public else []
        for port in ports + [upstream.port for upstream in service.upstreams]:
            eventually(lambda: is_listening(port) or not self.running(), what=f"envoy listens on {port}")
        assert self.running(), self.text()

    def _common_tls(self, uris=()):
        trust = {"trusted_ca": {"inline_string": self._agent.roots()}}
        if uris:
            trust["match_typed_subject_alt_names"] = [{"san_type": "URI", "matcher": {"exact": uri}} for uri in uris]
        own = {"certificate_chain": {"inline_string": self._leaf.cert_pem}, "private_key": {"inline_string": self._leaf.key_pem}}
        limits = {"tls_minimum_protocol_version": self._tls, "tls_maximum_protocol_version": self._tls} if self._tls else {}
        return {"tls_certificates": [own], "validation_context": trust, "tls_params": limits, "alpn_protocols": ALPN[self._protocol]}

    def _server_tls(self):
        return {"@type": TYPES + "transport_sockets.tls.v3.DownstreamTlsContext", "common_tls_context": self._common_tls(), "require_client_certificate": True}

    def _client_tls(self, name):
        return {"@type": TYPES + "transport_sockets.tls.v3.UpstreamTlsContext", "sni": self._agent.sni(name),
                "common_tls_context": self._common_tls([self._agent.spiffe(name)])}

    def _listener(self, name, port, filters, tls=None):
        chain = {"filters": filters}
        if tls:
            chain["transport_socket"] = {"name": "tls", "typed_config": tls}
        # It says whether a span is a server's.
        direction = "INBOUND" if name == "public" else "OUTBOUND"
        return {"name": name, "traffic_direction": direction, "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}, "filter_chains": [chain]}


def cluster(name, ports, tls=None, protocol="tcp"):
    endpoints = [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}} for port in ports]
    made = {"name": name, "type": "STATIC", "connect_timeout": "5s",
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}}
    if tls:
        made["transport_socket"] = {"name": "tls", "typed_config": tls}
    if protocol in ("http2", "grpc"):
        made["typed_extension_protocol_options"] = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": TYPES + "upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": {"http2_protocol_options": {}}}}
    return made


def filters(name, protocol, denied=None, zipkin=None):
    """The filters that lead to the cluster of this name; with `denied`, after the intentions; with `zipkin`, traced."""
    if protocol == "tcp":
        return [*([] if denied is None else [network_rbac(denied)]), tcp_proxy(name)]
    http = [] if protocol != "grpc" else [
        {"name": "envoy.filters.http.grpc_stats",
         "typed_config": {"@type": TYPES + "filters.http.grpc_stats.v3.FilterConfig", "stats_for_all_methods": True}},
        {"name": "envoy.filters.http.grpc_http1_bridge", "typed_config": {"@type": TYPES + "filters.http.grpc_http1_bridge.v3.Config"}},
    ]
    if denied is not None:
        http.append({"name": "envoy.filters.http.rbac", "typed_config": {"@type": TYPES + "filters.http.rbac.v3.RBAC", "rules": rules(denied)}})
    http.append({"name": "envoy.filters.http.router", "typed_config": {"@type": TYPES + "filters.http.router.v3.Router"}})
    hosts = [{"name": name, "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": name}}]}]
    manager = {"@type": TYPES + "filters.network.http_connection_manager.v3.HttpConnectionManager", "stat_prefix": name, "codec_type": "AUTO",
               "upgrade_configs": [{"upgrade_type": "websocket"}], "http_filters": http, "route_config": {"name": name, "virtual_hosts": hosts}}
    if zipkin:
        manager["tracing"] = {"random_sampling": {"value": 0}, "provider": {"name": "envoy.tracers.zipkin", "typed_config": {
            "@type": "type.googleapis.com/envoy.config.trace.v3.ZipkinConfig", "collector_cluster": "zipkin", "collector_endpoint": "/api/v2/spans",
            "collector_endpoint_version": "HTTP_JSON", "shared_span_context": False, "trace_id_128bit": True}}}
    return [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]


def tcp_proxy(name):
    return {"name": "envoy.filters.network.tcp_proxy",
            "typed_config": {"@type": TYPES + "filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": name, "cluster": name}}


def network_rbac(denied):
    return {"name": "envoy.filters.network.rbac",
            "typed_config": {"@type": TYPES + "filters.network.rbac.v3.RBAC", "stat_prefix": "intentions", "rules": rules(denied)}}


def rules(denied):
    principals = [{"authenticated": {"principal_name": {"safe_regex": {"regex": f"^spiffe://[^/]+/ns/default/dc/[^/]+/svc/{name}$"}}}}
                  for name in denied] or [{"not_id": {"any": True}}]
    return {"action": "DENY", "policies": {"intentions": {"permissions": [{"any": True}], "principals": principals}}}
