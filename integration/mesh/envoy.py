"""A statically configured Envoy as a sidecar: what Consul would send it over xDS for a tcp service."""

import importlib.util
import json
import os
import pathlib

from .process import Process
from .ports import is_listening
from .wait import eventually

TYPES = "type.googleapis.com/envoy.extensions."


def envoy_binary():
    found = importlib.util.find_spec("envoy")
    return pathlib.Path(found.submodule_search_locations[0]) / "_bin" / "envoy"


class Envoy(Process):
    """The sidecar of `service`: its public listener (with denied sources) and its upstreams to fixed endpoints."""

    def __init__(self, service, directory, denied=(), endpoints=None, tls=None):
        agent = service.mesh.agent
        self._agent, self._leaf, self._tls = agent, agent.leaf(service.name), tls
        listeners, clusters = [], []
        if service.public:
            listeners.append(self._listener("public", service.public, [rbac(denied), tcp_proxy("app")], self._server_tls()))
            clusters.append(cluster("app", [service.port]))
        for upstream in service.upstreams:
            name, ports = upstream.to, (endpoints or {}).get(upstream.to)
            listeners.append(self._listener(name, upstream.port, [tcp_proxy(name)]))
            clusters.append(cluster(name, ports, self._client_tls(name)))
        file = directory / f"envoy-{service.name}.json"
        file.write_text(json.dumps({
            "node": {"id": service.name, "cluster": service.name},
            "static_resources": {"listeners": listeners, "clusters": clusters},
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
        return {"tls_certificates": [own], "validation_context": trust, "tls_params": limits}

    def _server_tls(self):
        return {"@type": TYPES + "transport_sockets.tls.v3.DownstreamTlsContext", "common_tls_context": self._common_tls(), "require_client_certificate": True}

    def _client_tls(self, name):
        return {"@type": TYPES + "transport_sockets.tls.v3.UpstreamTlsContext", "sni": self._agent.sni(name),
                "common_tls_context": self._common_tls([self._agent.spiffe(name)])}

    def _listener(self, name, port, filters, tls=None):
        chain = {"filters": filters}
        if tls:
            chain["transport_socket"] = {"name": "tls", "typed_config": tls}
        return {"name": name, "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}, "filter_chains": [chain]}


def cluster(name, ports, tls=None):
    endpoints = [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}} for port in ports]
    made = {"name": name, "type": "STATIC", "connect_timeout": "5s",
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}}
    if tls:
        made["transport_socket"] = {"name": "tls", "typed_config": tls}
    return made


def tcp_proxy(name):
    return {"name": "envoy.filters.network.tcp_proxy",
            "typed_config": {"@type": TYPES + "filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": name, "cluster": name}}


def rbac(denied):
    principals = [{"authenticated": {"principal_name": {"safe_regex": {"regex": f"^spiffe://[^/]+/ns/default/dc/[^/]+/svc/{name}$"}}}}
                  for name in denied] or [{"not_id": {"any": True}}]
    rules = {"action": "DENY", "policies": {"intentions": {"permissions": [{"any": True}], "principals": principals}}}
    return {"name": "envoy.filters.network.rbac",
            "typed_config": {"@type": TYPES + "filters.network.rbac.v3.RBAC", "stat_prefix": "intentions", "rules": rules}}
