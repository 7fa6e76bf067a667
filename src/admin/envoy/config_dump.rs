//! `/config_dump`: the newest snapshot, section by section. No key is in it, and no token.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde_json::{Value, json};

use super::super::query::Query;
use super::super::reply::{self, Reply};
use super::super::state::State;
use super::clusters::{self, Cluster};
use super::names::{TYPES, duration, upstream_id};
use super::{listeners, routes};
use crate::snapshot::Snapshot;
use crate::tls::CertificateInfo;

/// Envoy's sections in Envoy's order, by which some readers find them. `include_eds` adds the instances.
pub(in crate::admin) fn page(state: &State, query: &Query) -> Reply {
    let published = state.published_at();
    let snapshot = state.snapshots.borrow().clone().unwrap_or_default();
    let dump = Dump { snapshot: &snapshot, updated: reply::timestamp(published) };
    let mut sections = vec![dump.bootstrap(state.started_at), dump.clusters()];
    if query.contains_key("include_eds") {
        sections.push(dump.endpoints());
    }
    sections.extend([dump.listeners(), section("ScopedRoutesConfigDump", json!({})), dump.routes(), dump.secrets()]);
    reply::json(&json!({ "configs": sections }))
}

struct Dump<'a> {
    snapshot: &'a Snapshot,
    /// When it was published.
    updated: String,
}

fn section(kind: &str, mut fields: Value) -> Value {
    fields["@type"] = json!(format!("{TYPES}admin.v3.{kind}"));
    fields
}

impl Dump<'_> {
    /// With its version, which is the snapshot's.
    fn versioned(&self, key: &str, message: Value) -> Value {
        let mut dynamic = self.dated(key, message);
        dynamic["version_info"] = json!(self.snapshot.version.to_string());
        dynamic
    }

    fn dated(&self, key: &str, message: Value) -> Value {
        let mut value = json!({ "last_updated": self.updated });
        value[key] = message;
        value
    }

    fn bootstrap(&self, started: SystemTime) -> Value {
        let node = self.snapshot.credentials.as_ref().map(|credentials| {
            let id = credentials.id();
            json!({
                "id": self.snapshot.proxy_id,
                "cluster": id.service,
                "metadata": { "namespace": id.namespace, "partition": id.partition },
                "user_agent_name": "lictor",
            })
        });
        let flush = duration(self.snapshot.metrics.flush_interval);
        let bootstrap = json!({ "node": node.unwrap_or_else(|| json!({})), "stats_flush_interval": flush });
        let fields = json!({ "bootstrap": bootstrap, "last_updated": reply::timestamp(started) });
        section("BootstrapConfigDump", fields)
    }

    fn clusters(&self) -> Value {
        let clusters = clusters::all(self.snapshot);
        let message =
            |(name, cluster): (&String, &Cluster<'_>)| self.versioned("cluster", clusters::message(name, cluster));
        let version = self.snapshot.version.to_string();
        let active = clusters.iter().map(message).collect::<Vec<_>>();
        section("ClustersConfigDump", json!({ "version_info": version, "dynamic_active_clusters": active }))
    }

    fn endpoints(&self) -> Value {
        let (mut fixed, mut dynamic) = (Vec::new(), Vec::new());
        for (name, cluster) in &clusters::all(self.snapshot) {
            let Some(mut assignment) = clusters::assignment(name, cluster) else { continue };
            assignment["@type"] = json!(format!("{TYPES}config.endpoint.v3.ClusterLoadAssignment"));
            let is_fixed = matches!(cluster, Cluster::App { .. });
            let list = if is_fixed { &mut fixed } else { &mut dynamic };
            list.push(self.dated("endpoint_config", assignment));
        }
        let fields = json!({ "static_endpoint_configs": fixed, "dynamic_endpoint_configs": dynamic });
        section("EndpointsConfigDump", fields)
    }

    fn listeners(&self) -> Value {
        let listener = |listener: listeners::Listener<'_>| {
            let state = self.versioned("listener", listener.message);
            json!({ "name": listener.name, "active_state": state })
        };
        let version = self.snapshot.version.to_string();
        let dynamic = listeners::all(self.snapshot).into_iter().map(listener).collect::<Vec<_>>();
        section("ListenersConfigDump", json!({ "version_info": version, "dynamic_listeners": dynamic }))
    }

    /// Those that listeners hold are called static, as they are by Envoy.
    fn routes(&self) -> Value {
        let mut fixed = Vec::new();
        // By the name: two listeners of one upstream have the same.
        let mut dynamic = BTreeMap::new();
        for listener in self.snapshot.inbound.values() {
            if listener.service.protocol.is_http() {
                fixed.push(self.dated("route_config", routes::of_service(&listener.service)));
            }
        }
        for listener in self.snapshot.outbound.values() {
            if !listener.upstream.chain.protocol.is_http() {
                continue;
            }
            let Some(message) = routes::of_upstream(listener) else { continue };
            if routes::are_their_own(listener) {
                dynamic.insert(upstream_id(listener), self.versioned("route_config", message));
            } else {
                fixed.push(self.dated("route_config", message));
            }
        }
        for exposed in self.snapshot.exposed.values() {
            fixed.push(self.dated("route_config", routes::of_exposed(&listeners::exposed_name(exposed), exposed)));
        }
        let dynamic: Vec<Value> = dynamic.into_values().collect();
        let fields = json!({ "static_route_configs": fixed, "dynamic_route_configs": dynamic });
        section("RoutesConfigDump", fields)
    }

    /// The leaf, without its key, and the roots.
    fn secrets(&self) -> Value {
        let secret = |name: &str, key: &str, value: Value| {
            let mut message = json!({ "name": name });
            message["@type"] = json!(format!("{TYPES}extensions.transport_sockets.tls.v3.Secret"));
            message[key] = value;
            let mut secret = self.versioned("secret", message);
            secret["name"] = json!(name);
            secret
        };
        let secrets = self.snapshot.credentials.as_ref().map(|credentials| {
            let about = credentials.describe();
            let pem = |all: &[CertificateInfo]| json!({ "inline_string": all.iter().map(|one| &*one.pem).collect::<String>() });
            let own = json!({
                "certificate_chain": pem(&about.chain),
                "private_key": { "inline_string": "[redacted]" },
            });
            let trusted = json!({ "trusted_ca": pem(&about.roots) });
            vec![secret("leaf", "tls_certificate", own), secret("roots", "validation_context", trusted)]
        });
        section("SecretsConfigDump", json!({ "dynamic_active_secrets": secrets.unwrap_or_default() }))
    }
}
