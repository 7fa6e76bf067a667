//! Names that Consul gives to Envoy's resources, and values in protobuf's JSON form.

use std::time::Duration;

use serde_json::{Value, json};

use crate::observe::{listener_name, target_name};
use crate::snapshot::{Address, Bind, Host, LocalApp, OutboundListener, Resolver, Target};

/// The prefix of most message types.
pub(super) const TYPES: &str = "type.googleapis.com/envoy.";
/// The cluster of the local app.
pub(super) const LOCAL_APP: &str = "local_app";
/// The listener where the mesh reaches us.
pub(super) const PUBLIC_LISTENER: &str = "public_listener";

/// The id of an upstream, as in `db?dc=dc2`, of its destination as in `service:db?dc=dc2` (Consul 1.19.2,
/// `UpstreamID.EnvoyID`).
pub(super) fn upstream_id(listener: &OutboundListener) -> String {
    id_of(&listener.key.destination)
}

fn id_of(destination: &str) -> String {
    let name = listener_name(destination, "");
    let tenancy = match (name.partition.as_str(), name.namespace.as_str()) {
        ("default", "default") => String::new(),
        (partition, namespace) => format!("{partition}/{namespace}/"),
    };
    let datacenter = if name.datacenter.is_empty() { String::new() } else { format!("?dc={}", name.datacenter) };
    match name.service.strip_prefix("prepared_query_").filter(|_| destination.starts_with("query:")) {
        Some(query) => format!("prepared_query:{tenancy}{query}{datacenter}"),
        None => format!("{tenancy}{}{datacenter}", name.service),
    }
}

/// The prefix of an upstream's numbers, as in `upstream.db.default.default.dc1`.
pub(super) fn upstream_stats(listener: &OutboundListener, datacenter: &str) -> String {
    let name = listener_name(&listener.key.destination, datacenter);
    format!("upstream.{}.{}.{}.{}", name.service, name.namespace, name.partition, name.datacenter)
}

/// The cluster of a target, which is its SNI.
pub(super) fn target_cluster(target: &Target) -> String {
    target_name(target).cluster()
}

/// The cluster that a resolver leads to: that of its first target. It gathers the others where there are some.
pub(super) fn resolver_cluster(resolver: &Resolver) -> Option<String> {
    resolver.targets.first().map(|target| target_cluster(target))
}

/// The cluster of one of several targets that are tried in order.
pub(super) fn failover_cluster(primary: &str, place: usize) -> String {
    format!("failover-target~{place}~{primary}")
}

/// The cluster of an app that exposed paths lead to.
pub(super) fn exposed_cluster(app: &LocalApp) -> String {
    match app {
        LocalApp::Tcp(address) => format!("exposed_cluster_{}", address.port),
        LocalApp::Unix(path) => format!("exposed_cluster_{}", path.display()),
    }
}

/// The name of a listener: what it is for, and where it is.
pub(super) fn listener_at(what: &str, bind: &Bind) -> String {
    format!("{what}:{}", place(bind))
}

/// As `/listeners` has it.
pub(super) fn place(bind: &Bind) -> String {
    match bind {
        Bind::Tcp(address) => address.to_string(),
        Bind::Unix { path, .. } => path.display().to_string(),
    }
}

pub(super) fn bind_address(bind: &Bind) -> Value {
    match bind {
        Bind::Tcp(address) => socket_address(&address.ip().to_string(), address.port()),
        Bind::Unix { path, mode } => {
            json!({ "pipe": { "path": path.display().to_string(), "mode": mode.unwrap_or(0) } })
        }
    }
}

pub(super) fn dial_address(address: &Address) -> Value {
    let host = match &address.host {
        Host::Ip(ip) => ip.to_string(),
        Host::Name(name) => name.clone(),
    };
    socket_address(&host, address.port)
}

pub(super) fn app_address(app: &LocalApp) -> Value {
    match app {
        LocalApp::Tcp(address) => dial_address(address),
        LocalApp::Unix(path) => json!({ "pipe": { "path": path.display().to_string() } }),
    }
}

fn socket_address(host: &str, port: u16) -> Value {
    json!({ "socket_address": { "address": host, "port_value": port } })
}

/// A `Duration`, as in `5s`.
pub(super) fn duration(time: Duration) -> String {
    match (time.as_secs(), time.subsec_millis()) {
        (seconds, 0) => format!("{seconds}s"),
        (seconds, millis) => format!("{seconds}.{millis:03}s"),
    }
}

/// A time limit, of which zero is none.
pub(super) fn limit(time: Option<Duration>) -> String {
    duration(time.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstreams_have_the_ids_that_consul_gives_them() {
        for (destination, expected) in [
            ("service:db", "db"),
            ("service:db?dc=dc2", "db?dc=dc2"),
            ("service:db?dc=dc2&ns=x", "default/x/db?dc=dc2"),
            ("service:db?ns=default&partition=p", "p/default/db"),
            ("query:near", "prepared_query:near"),
            ("service:prepared_query_x", "prepared_query_x"),
        ] {
            assert_eq!(id_of(destination), expected, "{destination}");
        }
    }

    #[test]
    fn durations_are_those_of_protobuf() {
        assert_eq!(duration(Duration::from_secs(5)), "5s");
        assert_eq!(duration(Duration::from_millis(1_050)), "1.050s");
        assert_eq!((limit(None), limit(Some(Duration::from_millis(7)))), ("0s".to_owned(), "0.007s".to_owned()));
    }
}
