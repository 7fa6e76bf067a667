//! Clusters: what is sent to one name, and `/clusters`.

use std::collections::BTreeMap;
use std::fmt::{Arguments, Write as _};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::query::Query;
use super::super::reply::{self, Reply};
use super::super::state::State;
use super::names::{
    LOCAL_APP, TYPES, app_address, dial_address, duration, exposed_cluster, failover_cluster, resolver_cluster,
};
use crate::observe::target_name;
use crate::snapshot::{Endpoint, Limits, LocalApp, PassiveHealthCheck, Resolver, Snapshot, Target, Upstream};
use crate::stats::scope::Cluster as StatsName;
use crate::stats::{ClusterStats, Member, MemberState};

/// Something that is sent to.
pub(super) enum Cluster<'a> {
    App {
        app: &'a LocalApp,
        connect_timeout: Duration,
    },
    Target {
        target: &'a Target,
        upstream: &'a Upstream,
    },
    /// The clusters to try in this order.
    Failover(Vec<String>),
}

/// All of them by their names.
pub(super) fn all(snapshot: &Snapshot) -> BTreeMap<String, Cluster<'_>> {
    let mut clusters = BTreeMap::new();
    for listener in snapshot.inbound.values() {
        let service = &listener.service;
        let cluster = Cluster::App { app: &service.local_app, connect_timeout: service.local_connect_timeout };
        clusters.entry(LOCAL_APP.to_owned()).or_insert(cluster);
    }
    for exposed in snapshot.exposed.values() {
        for path in exposed.paths.values() {
            let cluster = Cluster::App { app: &path.app, connect_timeout: exposed.connect_timeout };
            clusters.entry(exposed_cluster(&path.app)).or_insert(cluster);
        }
    }
    for listener in snapshot.outbound.values() {
        for resolver in listener.upstream.chain.resolvers() {
            add(&mut clusters, &listener.upstream, resolver);
        }
    }
    clusters
}

fn add<'a>(clusters: &mut BTreeMap<String, Cluster<'a>>, upstream: &'a Upstream, resolver: &'a Resolver) {
    let Some(primary) = resolver_cluster(resolver) else { return };
    let own = |target: &'a Target| Cluster::Target { target, upstream };
    if let [target] = resolver.targets.as_slice() {
        // One that another upstream fails over from gathers more.
        clusters.entry(primary).or_insert_with(|| own(target));
        return;
    }
    let names: Vec<String> = (0..resolver.targets.len()).map(|place| failover_cluster(&primary, place)).collect();
    for (name, target) in names.iter().zip(&resolver.targets) {
        clusters.entry(name.clone()).or_insert_with(|| own(target));
    }
    clusters.insert(primary, Cluster::Failover(names));
}

/// The message `Cluster`.
pub(super) fn message(name: &str, cluster: &Cluster<'_>) -> Value {
    let mut message = json!({
        "@type": format!("{TYPES}config.cluster.v3.Cluster"),
        "name": name,
        "alt_stat_name": name,
    });
    let fields = match cluster {
        Cluster::App { app, connect_timeout } => json!({
            "type": "STATIC",
            "connect_timeout": duration(*connect_timeout),
            "load_assignment": app_assignment(name, app),
        }),
        Cluster::Target { target, upstream } => target_fields(target, upstream),
        Cluster::Failover(names) => json!({
            "connect_timeout": "5s",
            "lb_policy": "CLUSTER_PROVIDED",
            "cluster_type": {
                "name": "envoy.clusters.aggregate",
                "typed_config": {
                    "@type": format!("{TYPES}extensions.clusters.aggregate.v3.ClusterConfig"),
                    "clusters": names,
                },
            },
        }),
    };
    if let (Some(message), Value::Object(fields)) = (message.as_object_mut(), fields) {
        message.extend(fields);
    }
    message
}

fn target_fields(target: &Target, upstream: &Upstream) -> Value {
    let names = target.tls().expected().iter();
    let names = names.map(|id| json!({ "san_type": "URI", "matcher": { "exact": id.to_string() } }));
    json!({
        "type": "EDS",
        "eds_cluster_config": { "eds_config": { "ads": {}, "resource_api_version": "V3" } },
        "connect_timeout": duration(target.connect_timeout),
        "circuit_breakers": { "thresholds": [thresholds(upstream.limits)] },
        "outlier_detection": outlier_detection(&upstream.passive_health_check),
        "transport_socket": {
            "name": "tls",
            "typed_config": {
                "@type": format!("{TYPES}extensions.transport_sockets.tls.v3.UpstreamTlsContext"),
                "sni": target.tls().name().to_str(),
                "common_tls_context": {
                    "tls_certificates": [{ "private_key": { "inline_string": "[redacted]" } }],
                    "validation_context": { "match_typed_subject_alt_names": names.collect::<Vec<_>>() },
                },
            },
        },
    })
}

/// What is not the default. So Consul's Envoy has it, but for a default that is set.
fn outlier_detection(health: &PassiveHealthCheck) -> Value {
    let default = PassiveHealthCheck::default();
    let fields = [
        ("consecutive_5xx", json!(health.max_failures), health.max_failures != default.max_failures),
        ("interval", json!(duration(health.interval)), health.interval != default.interval),
        (
            "base_ejection_time",
            json!(duration(health.base_ejection_time)),
            health.base_ejection_time != default.base_ejection_time,
        ),
        (
            "enforcing_consecutive_5xx",
            json!(health.enforcing_consecutive_5xx),
            health.enforcing_consecutive_5xx != default.enforcing_consecutive_5xx,
        ),
        ("max_ejection_percent", json!(health.max_ejection_percent), health.max_ejection_percent.is_some()),
    ];
    fields.into_iter().filter(|(_, _, is_set)| *is_set).map(|(name, value, _)| (name.to_owned(), value)).collect()
}

/// Limits that are set; Envoy writes those that are not as the largest number.
fn thresholds(limits: Limits) -> Value {
    let [max_connections, max_pending_requests, max_requests] = numbers(limits);
    json!({
        "max_connections": max_connections,
        "max_pending_requests": max_pending_requests,
        "max_requests": max_requests,
    })
}

fn numbers(limits: Limits) -> [u32; 3] {
    let all = [limits.max_connections, limits.max_pending_requests, limits.max_concurrent_requests];
    all.map(|limit| limit.and_then(|limit| u32::try_from(limit).ok()).unwrap_or(u32::MAX))
}

/// The message `ClusterLoadAssignment`: the instances of a target, or the app; `None` for those that have none.
pub(super) fn assignment(name: &str, cluster: &Cluster<'_>) -> Option<Value> {
    match cluster {
        Cluster::App { app, .. } => Some(app_assignment(name, app)),
        Cluster::Target { target, .. } => {
            let endpoint = |endpoint: &Endpoint| {
                json!({
                    "endpoint": { "address": dial_address(&endpoint.address) },
                    "health_status": "HEALTHY",
                    "load_balancing_weight": endpoint.weight,
                })
            };
            let endpoints: Vec<Value> = target.endpoints.usable.iter().map(endpoint).collect();
            Some(json!({ "cluster_name": name, "endpoints": [{ "lb_endpoints": endpoints }] }))
        }
        Cluster::Failover(_) => None,
    }
}

fn app_assignment(name: &str, app: &LocalApp) -> Value {
    json!({ "cluster_name": name, "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": app_address(app) } }] }] })
}

/// An instance as it is now.
struct HostNow {
    /// As in `127.0.0.1:9090`.
    place: String,
    address: Value,
    weight: u32,
    is_ejected: bool,
    /// The state of its circuit breaker: `closed`, `open`, `half-open`. Envoy has no word for it here.
    breaker: &'static str,
    /// What is known of it. The numbers of a target's instances are its cluster's.
    stats: Vec<(&'static str, &'static str, u64)>,
}

/// `/clusters`, as lines or with `format=json`.
pub(in crate::admin) fn page(state: &State, query: &Query) -> Reply {
    let snapshot = state.snapshots.borrow().clone().unwrap_or_default();
    let (_, stats) = state.stats.groups();
    let clusters = all(&snapshot);
    let with_hosts = clusters.iter().map(|(name, cluster)| (name.as_str(), cluster, hosts(cluster, &stats)));
    if query.get("format").is_some_and(|format| format == "json") {
        let statuses: Vec<Value> = with_hosts.map(|(name, cluster, hosts)| status(name, cluster, &hosts)).collect();
        return reply::json(&json!({ "cluster_statuses": statuses }));
    }
    reply::text(with_hosts.fold(String::new(), |mut text, (name, cluster, hosts)| {
        lines(&mut text, name, cluster, &hosts);
        text
    }))
}

fn hosts(cluster: &Cluster<'_>, stats: &[Arc<ClusterStats>]) -> Vec<HostNow> {
    match cluster {
        Cluster::App { app, .. } => {
            let own = stats.iter().find(|stats| stats.cluster == StatsName::LocalApp);
            let stats = own.map(|stats| {
                vec![
                    ("cx_active", GAUGE, stats.connections_active.get()),
                    ("cx_connect_fail", COUNTER, stats.connect_failures.get()),
                    ("cx_total", COUNTER, stats.connections.get()),
                    ("rq_timeout", COUNTER, stats.timeouts.get()),
                    ("rq_total", COUNTER, stats.tries.get()),
                ]
            });
            let (place, address) = (app.to_string(), app_address(app));
            vec![HostNow {
                place,
                address,
                weight: 1,
                is_ejected: false,
                breaker: "closed",
                stats: stats.unwrap_or_default(),
            }]
        }
        Cluster::Target { target, upstream } => {
            let name = StatsName::Target(Arc::new(target_name(target)));
            let members = stats.iter().find(|stats| stats.cluster == name).map(|stats| stats.members());
            let members = members.unwrap_or_default().usable;
            let active = if upstream.chain.protocol.is_http() { "rq_active" } else { "cx_active" };
            let host = |endpoint: &Endpoint| {
                let place = endpoint.address.to_string();
                let member = members.iter().find(|member| member.address == place);
                HostNow {
                    address: dial_address(&endpoint.address),
                    weight: endpoint.weight,
                    is_ejected: member.is_some_and(|member: &Member| member.state == MemberState::Ejected),
                    breaker: member.map_or("closed", |member| member.state.breaker()),
                    stats: member.map(|member| (active, GAUGE, u64::from(member.in_flight))).into_iter().collect(),
                    place,
                }
            };
            target.endpoints.usable.iter().map(host).collect()
        }
        Cluster::Failover(_) => Vec::new(),
    }
}

const GAUGE: &str = "GAUGE";
const COUNTER: &str = "COUNTER";

/// Instances that fail their checks: the catalog's answer says how many there are, and no more is kept of them.
fn unusable(cluster: &Cluster<'_>) -> usize {
    match cluster {
        Cluster::Target { target, .. } => target.endpoints.registered.saturating_sub(target.endpoints.usable.len()),
        Cluster::App { .. } | Cluster::Failover(_) => 0,
    }
}

fn limits(cluster: &Cluster<'_>) -> Limits {
    match cluster {
        Cluster::Target { upstream, .. } => upstream.limits,
        Cluster::App { .. } | Cluster::Failover(_) => Limits::default(),
    }
}

/// The message `ClusterStatus`.
fn status(name: &str, cluster: &Cluster<'_>, hosts: &[HostNow]) -> Value {
    let without_address = json!({ "health_status": { "eds_health_status": "UNHEALTHY" } });
    let mut statuses: Vec<Value> = hosts.iter().map(host_status).collect();
    statuses.resize(hosts.len() + unusable(cluster), without_address);
    json!({
        "name": name,
        "observability_name": name,
        "added_via_api": true,
        "host_statuses": statuses,
        "circuit_breakers": { "thresholds": [thresholds(limits(cluster))] },
    })
}

fn host_status(host: &HostNow) -> Value {
    let stat = |(name, kind, value): &(&str, &str, u64)| {
        let mut stat = json!({ "name": name, "type": kind });
        // Protobuf leaves out what is 0 and writes 64 bits as text.
        if *value > 0 {
            stat["value"] = json!(value.to_string());
        }
        stat
    };
    let mut health = json!({ "eds_health_status": "HEALTHY" });
    if host.is_ejected {
        health["failed_outlier_check"] = json!(true);
    }
    json!({
        "address": host.address,
        "stats": host.stats.iter().map(stat).collect::<Vec<_>>(),
        "health_status": health,
        "breaker": host.breaker,
        "weight": host.weight,
        "locality": {},
    })
}

/// As in `cluster::key::value` and `cluster::ip:port::key::value`.
fn lines(text: &mut String, name: &str, cluster: &Cluster<'_>, hosts: &[HostNow]) {
    let mut line = |parts: Arguments<'_>| {
        // A string takes whatever is written to it.
        let _ = writeln!(text, "{name}::{parts}");
    };
    line(format_args!("observability_name::{name}"));
    let keys = ["max_connections", "max_pending_requests", "max_requests"];
    for (key, limit) in keys.iter().zip(numbers(limits(cluster))) {
        line(format_args!("default_priority::{key}::{limit}"));
    }
    line(format_args!("added_via_api::true"));
    for host in hosts {
        let place = &host.place;
        for (key, _, value) in &host.stats {
            line(format_args!("{place}::{key}::{value}"));
        }
        let flags = if host.is_ejected { "/failed_outlier_check" } else { "healthy" };
        line(format_args!("{place}::health_flags::{flags}"));
        line(format_args!("{place}::breaker::{}", host.breaker));
        line(format_args!("{place}::weight::{}", host.weight));
        line(format_args!("{place}::priority::0"));
        line(format_args!("{place}::success_rate::-1"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outlier_detection_has_what_was_set() {
        assert_eq!(outlier_detection(&PassiveHealthCheck::default()), json!({}));
        let health = PassiveHealthCheck {
            interval: Duration::from_secs(22),
            max_ejection_percent: Some(50),
            ..PassiveHealthCheck::default()
        };
        assert_eq!(outlier_detection(&health), json!({ "interval": "22s", "max_ejection_percent": 50 }));
    }
}
