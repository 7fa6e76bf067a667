//! The upstreams of a registration that have a listener.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;

use super::super::opaque::Opaque;
use super::super::{Notes, tenancy};
use super::options::{above_zero, bind_ip, expose_cause, limits, passive_health_check, tunnel, upgrades};
use super::plan::{CONNECT_TIMEOUT, Source, UpstreamPlan};
use crate::consul::api;
use crate::control::query::{ChainQuery, PreparedQuery};
use crate::snapshot::{Bind, OutboundKey, Protocol, RequestSettings};

pub(super) fn upstreams(
    proxy: &api::Proxy,
    enterprise: bool,
    notes: &mut Notes,
) -> BTreeMap<OutboundKey, UpstreamPlan> {
    let mut bound = BTreeSet::new();
    let mut plans = BTreeMap::new();
    let tunnel = tunnel(Opaque::new(Some(&proxy.config), "proxy config"), notes).unwrap_or(true);
    for wire in &proxy.upstreams {
        let Some((key, plan)) = upstream(wire, &proxy.mesh_gateway.mode, tunnel, enterprise, notes) else { continue };
        if bound.insert(key.bind.clone()) {
            plans.insert(key, plan);
        } else {
            notes.push(format!("upstream {}: another one has the same address, so it is left out", plan.name));
        }
    }
    plans
}

/// One upstream; `None` for one that has no listener or cannot be served, the latter with a note.
fn upstream(
    wire: &api::Upstream,
    proxy_mode: &str,
    proxy_tunnel: bool,
    enterprise: bool,
    notes: &mut Notes,
) -> Option<(OutboundKey, UpstreamPlan)> {
    let name = &wire.destination_name;
    let bind = upstream_bind(wire, notes)?;
    if !wire.destination_peer.is_empty() {
        let peer = &wire.destination_peer;
        notes.push(format!(
            "upstream {name} of peer {peer}: not supported, as the agent's HTTP API does not offer a peer's roots"
        ));
        return None;
    }
    let place = format!("upstream {name}");
    let config = Opaque::new(Some(&wire.config), &place);
    for key in ["envoy_listener_json", "envoy_cluster_json"] {
        if config.has(key) {
            notes.push(format!("{place}: {key} is for Envoy and ignored"));
        }
    }
    let (kind, source) = match wire.destination_type.as_str() {
        "" | "service" => ("service", chain_source(wire, config, proxy_mode, enterprise, notes)),
        "prepared_query" => ("query", query_source(wire, config, notes)),
        other => {
            notes.push(format!("{place}: its type {other:?} is not known, so it is left out"));
            return None;
        }
    };
    let key = OutboundKey { destination: destination(kind, wire), bind };
    let plan = UpstreamPlan {
        name: name.clone(),
        source,
        limits: limits(config, notes),
        passive_health_check: passive_health_check(config, notes),
        requests: RequestSettings {
            per_try_timeout: above_zero(config.milliseconds("lictor_per_try_timeout_ms", notes)),
            expose_cause: expose_cause(config, notes),
            upgrades: upgrades(config, notes),
        },
        tunnel: tunnel(config, notes).unwrap_or(proxy_tunnel),
    };
    Some((key, plan))
}

/// `None`, without a note, for an entry that only carries settings for transparent proxies.
fn upstream_bind(wire: &api::Upstream, notes: &mut Notes) -> Option<Bind> {
    let name = &wire.destination_name;
    if !wire.local_bind_socket_path.is_empty() {
        let mode = &wire.local_bind_socket_mode;
        let parsed = socket_mode(mode);
        if parsed.is_none() && !mode.is_empty() {
            notes.push(format!("upstream {name}: socket mode {mode:?} is not an octal number, so it is ignored"));
        }
        return Some(Bind::Unix { path: PathBuf::from(&wire.local_bind_socket_path), mode: parsed });
    }
    let port = wire.local_bind_port.get()?;
    let address = if wire.local_bind_address.is_empty() { "127.0.0.1" } else { &wire.local_bind_address };
    let Some(address) = bind_ip(address) else {
        notes.push(format!("upstream {name}: {address:?} is not an IP address to bind, so it is left out"));
        return None;
    };
    Some(Bind::Tcp(SocketAddr::new(address, port)))
}

/// Consul reads `600` as decimal, which nobody means: here it is octal too.
fn socket_mode(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0o").or_else(|| text.strip_prefix("0O")).unwrap_or(text);
    u32::from_str_radix(digits, 8).ok().filter(|mode| *mode <= 0o777)
}

fn destination(kind: &str, wire: &api::Upstream) -> String {
    let parts =
        [("dc", &wire.datacenter), ("ns", &wire.destination_namespace), ("partition", &wire.destination_partition)];
    let mut text = format!("{kind}:{}", wire.destination_name);
    let given = parts.into_iter().filter(|(_, value)| !value.is_empty());
    for (separator, (key, value)) in std::iter::once('?').chain(std::iter::repeat('&')).zip(given) {
        text.extend([separator.to_string().as_str(), key, "=", value]);
    }
    text
}

fn chain_source(
    wire: &api::Upstream,
    config: Opaque<'_>,
    proxy_mode: &str,
    enterprise: bool,
    notes: &mut Notes,
) -> Source {
    let merged = config.nested("mesh_gateway", config.place(), notes).text("mode", notes).unwrap_or_default();
    let modes = [wire.mesh_gateway.mode.as_str(), &merged, proxy_mode];
    let overrides = api::ChainOverrides {
        protocol: config.text("protocol", notes).filter(|p| !p.is_empty()).map(|p| p.to_ascii_lowercase()),
        mesh_gateway_mode: modes.into_iter().find(|mode| !mode.is_empty()).map(str::to_owned),
        connect_timeout: above_zero(config.milliseconds("connect_timeout_ms", notes)),
    };
    Source::Chain(ChainQuery {
        service: wire.destination_name.clone(),
        // Our own servers compile it, as though for that datacenter, which need not be alive for it.
        datacenter: Some(wire.datacenter.clone()).filter(|datacenter| !datacenter.is_empty()),
        namespace: tenancy(&wire.destination_namespace, enterprise),
        partition: tenancy(&wire.destination_partition, enterprise),
        overrides,
    })
}

fn query_source(wire: &api::Upstream, config: Opaque<'_>, notes: &mut Notes) -> Source {
    let datacenter = Some(wire.datacenter.clone()).filter(|datacenter| !datacenter.is_empty());
    Source::PreparedQuery {
        query: PreparedQuery { name: wire.destination_name.clone(), datacenter },
        protocol: config.text("protocol", notes).map_or(Protocol::Tcp, |protocol| Protocol::parse(&protocol)),
        connect_timeout: above_zero(config.milliseconds("connect_timeout_ms", notes)).unwrap_or(CONNECT_TIMEOUT),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::super::fixture::{sidecar, upstream_of};
    use super::super::plan::Definition;
    use super::*;

    fn chain_query(wire: Value) -> ChainQuery {
        match upstream_of(wire).0.unwrap().1.source {
            Source::Chain(query) => query,
            other => panic!("not a chain: {other:?}"),
        }
    }

    #[test]
    fn upstreams_are_bound_to_a_port_or_a_socket_or_left_out() {
        let unix = |mode| Some(Bind::Unix { path: "/run/db".into(), mode });
        let tcp = |address: &str| Some(Bind::Tcp(address.parse().unwrap()));
        for (wire, expected, noted) in [
            (json!({"LocalBindPort": 9191}), tcp("127.0.0.1:9191"), false),
            (json!({"LocalBindPort": 9191, "LocalBindAddress": "::1"}), tcp("[::1]:9191"), false),
            (json!({"LocalBindPort": 9191, "LocalBindAddress": "localhost"}), tcp("127.0.0.1:9191"), false),
            (json!({"LocalBindPort": 9191, "LocalBindAddress": "db.local"}), None, true),
            (json!({"LocalBindSocketPath": "/run/db"}), unix(None), false),
            (json!({"LocalBindSocketPath": "/run/db", "LocalBindSocketMode": "0600"}), unix(Some(0o600)), false),
            (json!({"LocalBindSocketPath": "/run/db", "LocalBindSocketMode": "600"}), unix(Some(0o600)), false),
            (json!({"LocalBindSocketPath": "/run/db", "LocalBindSocketMode": "rw"}), unix(None), true),
            (json!({"LocalBindSocketPath": "/run/db", "LocalBindSocketMode": "07777"}), unix(None), true),
            (json!({}), None, false),
            (json!({"LocalBindPort": 9191, "DestinationPeer": "east"}), None, true),
            (json!({"LocalBindPort": 9191, "DestinationType": "wormhole"}), None, true),
        ] {
            let mut wire = wire;
            wire["DestinationName"] = "db".into();
            let (upstream, notes) = upstream_of(wire.clone());
            assert_eq!(upstream.map(|(key, _)| key.bind), expected, "{wire}");
            assert_eq!(notes.len(), usize::from(noted), "{wire}: {notes:?}");
        }
    }

    #[test]
    fn a_place_is_given_to_the_first_that_asks_for_it() {
        let (definition, notes) = sidecar(
            json!({}),
            json!({"Upstreams": [
                {"DestinationName": "db", "LocalBindPort": 9191},
                {"DestinationName": "db", "LocalBindPort": 9191},
                {"DestinationName": "cache", "LocalBindPort": 9191},
                {"DestinationName": "db", "LocalBindPort": 9192},
                {"DestinationName": "db", "LocalBindPort": 9193, "Datacenter": "dc2", "DestinationNamespace": "x"},
                {"DestinationType": "prepared_query", "DestinationName": "db", "LocalBindPort": 9194},
            ]}),
        );
        let keys: Vec<_> =
            definition.upstreams.keys().map(|key| format!("{} {:?}", key.destination, key.bind)).collect();
        assert_eq!(
            keys,
            [
                "query:db Tcp(127.0.0.1:9194)",
                "service:db Tcp(127.0.0.1:9191)",
                "service:db Tcp(127.0.0.1:9192)",
                "service:db?dc=dc2&ns=x Tcp(127.0.0.1:9193)",
            ]
        );
        assert_eq!(notes.len(), 2, "{notes:?}");
    }

    #[test]
    fn a_chain_is_asked_for_with_what_the_upstream_overrides() {
        let plain = ChainQuery { service: "db".into(), ..ChainQuery::default() };
        assert_eq!(chain_query(json!({"DestinationName": "db", "LocalBindPort": 1})), plain);
        let all = json!({
            "DestinationName": "db", "LocalBindPort": 1, "Datacenter": "dc2", "DestinationNamespace": "default",
            "DestinationPartition": "part", "MeshGateway": {"Mode": "remote"},
            "Config": {"Protocol": "HTTP", "connect_timeout_ms": 3000.0, "mesh_gateway": {"Mode": "local"}},
        });
        let expected = ChainQuery {
            datacenter: Some("dc2".into()),
            // The community edition refuses the parameter, and `default` is what it means anyway.
            namespace: None,
            partition: Some("part".into()),
            overrides: api::ChainOverrides {
                protocol: Some("http".into()),
                mesh_gateway_mode: Some("remote".into()),
                connect_timeout: Some(Duration::from_secs(3)),
            },
            ..plain
        };
        assert_eq!(chain_query(all), expected);
        let merged =
            json!({"DestinationName": "db", "LocalBindPort": 1, "Config": {"mesh_gateway": {"Mode": "local"}}});
        assert_eq!(chain_query(merged).overrides.mesh_gateway_mode.as_deref(), Some("local"));
        let (definition, _) = sidecar(
            json!({}),
            json!({"MeshGateway": {"Mode": "none"}, "Upstreams": [{"DestinationName": "db", "LocalBindPort": 1}]}),
        );
        let inherited = definition.upstreams.into_values().next().unwrap().source;
        assert!(matches!(inherited, Source::Chain(q) if q.overrides.mesh_gateway_mode.as_deref() == Some("none")));
    }

    #[test]
    fn an_upstream_uses_the_tunnel_unless_it_or_the_proxy_says_otherwise() {
        let upstreams = json!([
            {"DestinationName": "a", "LocalBindPort": 1},
            {"DestinationName": "b", "LocalBindPort": 2, "Config": {"lictor_tunnel": true}},
            {"DestinationName": "c", "LocalBindPort": 3, "Config": {"LictorTunnel": false}},
        ]);
        for (config, public, expected) in [
            (json!({}), true, [true, true, false]),
            (json!({"lictor_tunnel": false}), false, [false, true, false]),
            (json!({"lictor_tunnel": "true"}), true, [true, true, false]),
        ] {
            let (mut definition, _) = sidecar(json!({}), json!({"Config": config, "Upstreams": upstreams}));
            let seen = |definition: &Definition| -> Vec<bool> {
                definition.upstreams.values().map(|upstream| upstream.tunnel).collect()
            };
            assert_eq!((definition.public.as_ref().unwrap().tunnel, seen(&definition)), (public, expected.to_vec()));
            definition.restrict_tunnel(false);
            assert_eq!((definition.public.as_ref().unwrap().tunnel, seen(&definition)), (false, vec![false; 3]));
        }
    }
}
