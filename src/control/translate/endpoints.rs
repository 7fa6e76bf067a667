//! Rows of the health endpoints: who may be dialled, where, and with which weight.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::chain::{Identity, Prepared};
use super::{host, or_default};
use crate::consul::api;
use crate::snapshot::{Address, Endpoint, Endpoints};

/// Consul caps weights here for Envoy, whose sums would overflow otherwise.
const MAX_WEIGHT: i64 = 128;

/// An instance as the catalog lists it. Which address and which checks count depends on who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) struct Instance {
    /// Where to dial from the same datacenter and partition, and from others.
    lan: Option<Address>,
    wan: Option<Address>,
    health: Health,
    /// The service that its certificate speaks for, spelled as its registration spells it; empty for a gateway.
    pub(in crate::control) service: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    /// With the weight that it has then; `None` for less than one, which takes it out.
    Passing(Option<u32>),
    Warning(Option<u32>),
    Critical,
}

/// Which of the instances' properties count for a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::control) struct View {
    /// The target is in another datacenter or partition.
    pub(in crate::control) wan: bool,
    pub(in crate::control) only_passing: bool,
}

pub(in crate::control) fn instances<'a>(rows: impl IntoIterator<Item = &'a api::CheckServiceNode>) -> Arc<[Instance]> {
    rows.into_iter().map(instance).collect()
}

pub(in crate::control) fn endpoints(instances: &[Instance], view: View) -> Endpoints {
    let usable = instances.iter().filter_map(|instance| {
        let weight = match instance.health {
            Health::Passing(weight) => weight,
            Health::Warning(weight) if !view.only_passing => weight,
            Health::Warning(_) | Health::Critical => None,
        }?;
        let address = if view.wan { &instance.wan } else { &instance.lan };
        Some(Endpoint { address: address.clone()?, weight })
    });
    Endpoints { usable: usable.collect(), registered: instances.len() }
}

fn instance(row: &api::CheckServiceNode) -> Instance {
    // An instance with a socket can be reached on its own host alone, and we can't know that it is ours.
    let reachable = row.service.socket_path.is_empty();
    let (lan, wan) = (lan(row).filter(|_| reachable), wan(row).filter(|_| reachable));
    Instance { lan, wan, health: health(row), service: service(row).unwrap_or_default().to_owned() }
}

/// The service that an instance shows the certificate of; `None` for a gateway, which stands in front of many.
fn service(row: &api::CheckServiceNode) -> Option<&str> {
    match row.service.kind.as_str() {
        "connect-proxy" => row.service.proxy.as_ref().map(|proxy| proxy.destination_service_name.as_str()),
        // A mesh-native instance is itself.
        "" => Some(&row.service.service),
        _ => None,
    }
}

/// `CheckServiceNode.BestAddress` of Consul 1.19.2: the service's address, else its node's.
fn lan(row: &api::CheckServiceNode) -> Option<Address> {
    let host = host(&row.service.address).or_else(|| host(&row.node.address))?;
    Some(Address { host, port: row.service.port.get()? })
}

/// As [`lan`], with the addresses tagged `wan` before those that are not.
fn wan(row: &api::CheckServiceNode) -> Option<Address> {
    let tagged = row.service.tagged_addresses.get("wan");
    if let Some((tagged, host)) = tagged.and_then(|tagged| Some((tagged, host(&tagged.address)?))) {
        return Some(Address { host, port: tagged.port.get().or(row.service.port.get())? });
    }
    let node = || row.node.tagged_addresses.get("wan").and_then(|address| host(address));
    let host = host(&row.service.address).or_else(node).or_else(|| host(&row.node.address))?;
    Some(Address { host, port: row.service.port.get()? })
}

/// `calculateEndpointHealthAndWeight` of Consul 1.19.2; a status of no known kind counts as critical.
fn health(row: &api::CheckServiceNode) -> Health {
    let weight = |weight: i64| u32::try_from(weight.min(MAX_WEIGHT)).ok().filter(|weight| *weight > 0);
    let (passing, warning) = row.service.weights.as_ref().map_or((1, 1), |w| (w.passing, w.warning));
    let mut health = Health::Passing(weight(passing));
    for check in &row.checks {
        match check.status.as_str() {
            "passing" => {}
            "warning" => health = Health::Warning(weight(warning)),
            _ => return Health::Critical,
        }
    }
    health
}

/// Whom the rows of a prepared query's answer may be: the service that each stands in front of.
pub(in crate::control) fn prepared(result: &api::PreparedQueryResult) -> Prepared {
    let identity = |row: &api::CheckServiceNode| {
        // A terminating gateway shows the certificate of the service that was asked for.
        let is_gateway = !matches!(row.service.kind.as_str(), "" | "connect-proxy");
        let service = if is_gateway { Some(result.service.as_str()) } else { service(row) };
        let service = service.filter(|service| !service.is_empty())?.to_owned();
        let datacenter = [&row.node.datacenter, &result.datacenter].into_iter().find(|text| !text.is_empty())?.clone();
        Some(Identity {
            partition: or_default(&row.service.partition),
            namespace: or_default(&row.service.namespace),
            datacenter,
            service,
        })
    };
    let all: BTreeSet<Identity> = result.nodes.iter().filter_map(identity).collect();
    Prepared { identities: all.into_iter().collect(), datacenter: result.datacenter.clone() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const LAN: View = View { wan: false, only_passing: false };

    /// Addresses with weights, as seen by `view`.
    fn seen(row: Value, view: View) -> Vec<String> {
        let row: api::CheckServiceNode = serde_json::from_value(row).unwrap();
        let endpoints = endpoints(&instances([&row]), view);
        assert_eq!(endpoints.registered, 1);
        endpoints.usable.iter().map(|endpoint| format!("{}*{}", endpoint.address, endpoint.weight)).collect()
    }

    #[test]
    fn health_and_weight_follow_consuls_rules() {
        let weights = json!({"Passing": 10, "Warning": 2});
        for (weights, checks, expected, only_passing) in [
            (weights.clone(), &[][..], Some(10), Some(10)),
            (Value::Null, &["passing"][..], Some(1), Some(1)),
            (weights.clone(), &["passing", "passing"][..], Some(10), Some(10)),
            (weights.clone(), &["passing", "warning"][..], Some(2), None),
            (Value::Null, &["warning"][..], Some(1), None),
            (weights.clone(), &["warning", "critical"][..], None, None),
            (weights.clone(), &["critical", "warning", "passing"][..], None, None),
            (weights.clone(), &["maintenance"][..], None, None),
            (weights, &["odd"][..], None, None),
            (json!({"Passing": 1000, "Warning": 1}), &[][..], Some(128), Some(128)),
            (json!({"Passing": 0, "Warning": 1}), &[][..], None, None),
            (json!({"Passing": -5}), &[][..], None, None),
            (json!({"Passing": 5}), &["warning"][..], None, None),
        ] {
            let checks: Vec<Value> = checks.iter().map(|status| json!({ "Status": status })).collect();
            let row = json!({"Service": {"Address": "10.0.0.5", "Port": 1, "Weights": weights}, "Checks": checks});
            let text = |weight: Option<u32>| weight.map(|w| format!("10.0.0.5:1*{w}")).into_iter().collect::<Vec<_>>();
            assert_eq!(seen(row.clone(), LAN), text(expected), "{row}");
            assert_eq!(seen(row.clone(), View { only_passing: true, ..LAN }), text(only_passing), "{row}");
        }
    }

    #[test]
    fn the_address_depends_on_where_we_are() {
        let node = json!({"Address": "10.0.0.1", "TaggedAddresses": {"wan": "203.0.113.1"}});
        let bare = json!({"Address": "10.0.0.1"});
        let wan = |address: &str, port: u16| json!({"wan": {"Address": address, "Port": port}});
        for (node, service, lan_address, wan_address) in [
            (&node, json!({"Address": "10.0.0.5", "Port": 1}), Some("10.0.0.5:1"), Some("10.0.0.5:1")),
            (&node, json!({"Port": 1}), Some("10.0.0.1:1"), Some("203.0.113.1:1")),
            (&bare, json!({"Port": 1}), Some("10.0.0.1:1"), Some("10.0.0.1:1")),
            (
                &node,
                json!({"Address": "10.0.0.5", "Port": 1, "TaggedAddresses": wan("203.0.113.5", 2)}),
                Some("10.0.0.5:1"),
                Some("203.0.113.5:2"),
            ),
            (
                &node,
                json!({"Address": "fd00::5", "Port": 1, "TaggedAddresses": wan("wan.example", 0)}),
                Some("[fd00::5]:1"),
                Some("wan.example:1"),
            ),
            (&node, json!({"Port": 1, "TaggedAddresses": wan("", 2)}), Some("10.0.0.1:1"), Some("203.0.113.1:1")),
            (&node, json!({"Address": "10.0.0.5", "Port": 0}), None, None),
            (&node, json!({"Address": "10.0.0.5", "Port": 1, "SocketPath": "/run/x"}), None, None),
            (&Value::Null, json!({"Port": 1}), None, None),
        ] {
            let row = json!({"Node": node, "Service": service});
            let text = |address: Option<&str>| address.map(|a| format!("{a}*1")).into_iter().collect::<Vec<_>>();
            assert_eq!(seen(row.clone(), LAN), text(lan_address), "{row}");
            assert_eq!(seen(row.clone(), View { wan: true, ..LAN }), text(wan_address), "{row}");
        }
    }

    #[test]
    fn the_rows_of_a_prepared_query_tell_whom_to_expect() {
        let row = |kind: &str, service: &str, datacenter: &str| {
            json!({
                "Node": {"Datacenter": datacenter},
                "Service": {"Kind": kind, "Service": service, "Proxy": {"DestinationServiceName": format!("{service}!")}},
            })
        };
        let result: api::PreparedQueryResult = serde_json::from_value(json!({
            "Service": "db", "Datacenter": "dc2", "Nodes": [
                row("connect-proxy", "db", "dc1"), row("connect-proxy", "db", "dc1"), row("", "native", ""),
                row("terminating-gateway", "gateway", "dc2"), {"Service": {"Kind": "connect-proxy"}},
            ],
        }))
        .unwrap();
        let prepared = prepared(&result);
        let found: Vec<_> = prepared
            .identities
            .iter()
            .map(|identity| format!("{}.{}", identity.service, identity.datacenter))
            .collect();
        assert_eq!(found, ["db!.dc1", "db.dc2", "native.dc2"]);
        assert_eq!(prepared.datacenter, "dc2");
    }
}
