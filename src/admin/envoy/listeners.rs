//! Listeners, and `/listeners`.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::super::query::Query;
use super::super::reply::{self, Reply};
use super::super::state::State;
use super::names::{
    LOCAL_APP, PUBLIC_LISTENER, TYPES, bind_address, listener_at, place, resolver_cluster, upstream_id, upstream_stats,
};
use super::{rbac, routes};
use crate::snapshot::{Bind, Exposed, InboundListener, Node, OutboundListener, Snapshot};

/// A listener with its message.
pub(super) struct Listener<'a> {
    pub(super) name: String,
    bind: &'a Bind,
    pub(super) message: Value,
}

/// All of them: the public one first, then upstreams, then exposed paths.
pub(super) fn all(snapshot: &Snapshot) -> Vec<Listener<'_>> {
    let own = snapshot.credentials.as_ref().map_or("", |credentials| credentials.id().datacenter.as_str());
    let inbound = snapshot.inbound.values().map(|listener| inbound(listener));
    let outbound = snapshot.outbound.values().map(|listener| outbound(listener, own));
    let exposed = snapshot.exposed.values().map(|listener| exposed(listener));
    inbound.chain(outbound).chain(exposed).collect()
}

fn inbound(listener: &InboundListener) -> Listener<'_> {
    let service = &listener.service;
    let filters = if service.protocol.is_http() {
        let routes = json!({ "route_config": routes::of_service(service) });
        vec![http(PUBLIC_LISTENER, &routes, &[rbac::http(service)])]
    } else {
        vec![rbac::network(service), tcp(PUBLIC_LISTENER, LOCAL_APP)]
    };
    let chain = json!({
        "filters": filters,
        "transport_socket": {
            "name": "tls",
            "typed_config": {
                "@type": format!("{TYPES}extensions.transport_sockets.tls.v3.DownstreamTlsContext"),
                "common_tls_context": {
                    "tls_certificates": [{ "private_key": { "inline_string": "[redacted]" } }],
                },
                "require_client_certificate": true,
            },
        },
    });
    made(listener_at(PUBLIC_LISTENER, &listener.bind), &listener.bind, "INBOUND", &[chain])
}

fn outbound<'a>(listener: &'a OutboundListener, own_datacenter: &str) -> Listener<'a> {
    let id = upstream_id(listener);
    let chain = filter(listener, &id, own_datacenter).map(|filter| json!({ "filters": [filter] }));
    let bind = &listener.key.bind;
    made(listener_at(&id, bind), bind, "OUTBOUND", chain.as_slice())
}

/// `None` where nothing is known of where it leads.
fn filter(listener: &OutboundListener, id: &str, own_datacenter: &str) -> Option<Value> {
    let chain = &listener.upstream.chain;
    let stats = upstream_stats(listener, own_datacenter);
    if !chain.protocol.is_http() {
        return match &chain.start {
            Node::Resolver(resolver) => Some(tcp(&stats, &resolver_cluster(resolver)?)),
            Node::Router(_) | Node::Splitter(_) => None,
        };
    }
    let routes = routes::of_upstream(listener)?;
    if !routes::are_their_own(listener) {
        return Some(http(&stats, &json!({ "route_config": routes }), &[]));
    }
    let source = json!({ "ads": {}, "resource_api_version": "V3" });
    Some(http(&stats, &json!({ "rds": { "config_source": source, "route_config_name": id } }), &[]))
}

fn exposed(listener: &Exposed) -> Listener<'_> {
    let name = exposed_name(listener);
    let routes = routes::of_exposed(&name, listener);
    let chain = json!({ "filters": [http(&name, &json!({ "route_config": routes }), &[])] });
    made(listener_at(&name, &listener.bind), &listener.bind, "INBOUND", &[chain])
}

/// As in `exposed_path_21500`, after where it listens: it may have several paths.
pub(super) fn exposed_name(listener: &Exposed) -> String {
    match &listener.bind {
        Bind::Tcp(address) => format!("exposed_path_{}", address.port()),
        Bind::Unix { path, .. } => format!("exposed_path_{}", path.display()),
    }
}

fn made<'a>(name: String, bind: &'a Bind, direction: &str, chains: &[Value]) -> Listener<'a> {
    let message = json!({
        "@type": format!("{TYPES}config.listener.v3.Listener"),
        "name": name,
        "address": bind_address(bind),
        "filter_chains": chains,
        "traffic_direction": direction,
    });
    Listener { name, bind, message }
}

fn tcp(stats: &str, cluster: &str) -> Value {
    json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": format!("{TYPES}extensions.filters.network.tcp_proxy.v3.TcpProxy"),
            "stat_prefix": stats,
            "cluster": cluster,
        },
    })
}

/// `before` are the filters that a request passes before it is routed.
fn http(stats: &str, routes: &Value, before: &[Value]) -> Value {
    let router = json!({
        "name": "envoy.filters.http.router",
        "typed_config": { "@type": format!("{TYPES}extensions.filters.http.router.v3.Router") },
    });
    let filters: Vec<&Value> = before.iter().chain([&router]).collect();
    let mut config = json!({
        "@type": format!("{TYPES}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": stats,
        "http_filters": filters,
    });
    if let (Some(config), Some(routes)) = (config.as_object_mut(), routes.as_object()) {
        config.extend(routes.clone());
    }
    json!({ "name": "envoy.filters.network.http_connection_manager", "typed_config": config })
}

/// `/listeners`, as lines or with `format=json`.
pub(in crate::admin) fn page(state: &State, query: &Query) -> Reply {
    let snapshot = state.snapshots.borrow().clone().unwrap_or_default();
    let listeners = all(&snapshot);
    if query.get("format").is_some_and(|format| format == "json") {
        let status = |one: &Listener<'_>| json!({ "name": one.name, "local_address": bind_address(one.bind) });
        return reply::json(&json!({ "listener_statuses": listeners.iter().map(status).collect::<Vec<_>>() }));
    }
    reply::text(listeners.iter().fold(String::new(), |mut text, one| {
        // A string takes whatever is written to it.
        let _ = writeln!(text, "{}::{}", one.name, place(one.bind));
        text
    }))
}
