//! Compiled discovery chains, and what they are compiled with.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::agent::{Locality, MeshGateway};
use super::value::GoDuration;

wire! {
    /// `GET` or `POST /v1/discovery-chain/:service`.
    pub struct DiscoveryChainResponse {
        pub chain: Option<CompiledDiscoveryChain>,
    }

    /// Keys of `nodes` and `targets` are opaque: looked up, never parsed.
    pub struct CompiledDiscoveryChain {
        pub service_name: String,
        pub namespace: String,
        pub partition: String,
        pub datacenter: String,
        pub customization_hash: String,
        pub protocol: String,
        /// A key of `nodes`.
        pub start_node: String,
        pub nodes: BTreeMap<String, ChainNode>,
        pub targets: BTreeMap<String, ChainTarget>,
        #[serde(rename = "AutoVirtualIPs")]
        pub auto_virtual_ips: Vec<String>,
        #[serde(rename = "ManualVirtualIPs")]
        pub manual_virtual_ips: Vec<String>,
    }

    pub struct ChainNode {
        /// `router`, `splitter` or `resolver`.
        #[serde(rename = "Type")]
        pub kind: String,
        pub name: String,
        pub routes: Vec<ChainRoute>,
        pub splits: Vec<ChainSplit>,
        pub resolver: Option<ChainResolver>,
        pub load_balancer: Option<LoadBalancer>,
    }

    pub struct ChainRoute {
        pub definition: RouteDefinition,
        pub next_node: String,
    }

    pub struct RouteDefinition {
        /// Absent or empty: any request.
        #[serde(rename = "Match")]
        pub matches: RouteMatch,
        pub destination: Option<RouteDestination>,
    }

    pub struct RouteMatch {
        #[serde(rename = "HTTP")]
        pub http: Option<RouteHttpMatch>,
    }

    pub struct RouteHttpMatch {
        pub path_exact: String,
        pub path_prefix: String,
        pub path_regex: String,
        pub case_insensitive: bool,
        pub header: Vec<RouteHeaderMatch>,
        pub query_param: Vec<RouteQueryMatch>,
        pub methods: Vec<String>,
    }

    pub struct RouteHeaderMatch {
        pub name: String,
        pub present: bool,
        pub exact: String,
        pub prefix: String,
        pub suffix: String,
        pub regex: String,
        pub invert: bool,
    }

    pub struct RouteQueryMatch {
        pub name: String,
        pub present: bool,
        pub exact: String,
        pub regex: String,
    }

    pub struct RouteDestination {
        pub service: String,
        pub service_subset: String,
        pub namespace: String,
        pub partition: String,
        pub prefix_rewrite: String,
        pub request_timeout: GoDuration,
        pub idle_timeout: GoDuration,
        pub num_retries: u32,
        pub retry_on_connect_failure: bool,
        pub retry_on_status_codes: Vec<u16>,
        pub retry_on: Vec<String>,
        pub request_headers: Option<HeaderModifiers>,
        pub response_headers: Option<HeaderModifiers>,
    }

    pub struct HeaderModifiers {
        pub add: BTreeMap<String, String>,
        pub set: BTreeMap<String, String>,
        pub remove: Vec<String>,
    }

    pub struct ChainSplit {
        /// Per cent.
        pub weight: f64,
        pub next_node: String,
        pub definition: Option<SplitDefinition>,
    }

    pub struct SplitDefinition {
        pub weight: f64,
        pub service: String,
        pub service_subset: String,
        pub namespace: String,
        pub partition: String,
        pub request_headers: Option<HeaderModifiers>,
        pub response_headers: Option<HeaderModifiers>,
    }

    pub struct ChainResolver {
        #[serde(rename = "Default")]
        pub is_default: bool,
        pub connect_timeout: GoDuration,
        pub request_timeout: GoDuration,
        /// A key of the chain's `targets`.
        pub target: String,
        pub failover: Option<ChainFailover>,
    }

    pub struct ChainFailover {
        /// Keys of the chain's `targets`, tried in order.
        pub targets: Vec<String>,
        pub policy: Option<FailoverPolicy>,
    }

    pub struct FailoverPolicy {
        pub mode: String,
        pub regions: Vec<String>,
    }

    pub struct LoadBalancer {
        pub policy: String,
        pub ring_hash_config: Option<RingHashConfig>,
        pub least_request_config: Option<LeastRequestConfig>,
        pub hash_policies: Vec<HashPolicy>,
    }

    pub struct RingHashConfig {
        pub minimum_ring_size: u64,
        pub maximum_ring_size: u64,
    }

    pub struct LeastRequestConfig {
        pub choice_count: u32,
    }

    pub struct HashPolicy {
        /// `header`, `cookie`, `query_parameter`, or empty with `source_ip`.
        pub field: String,
        pub field_value: String,
        pub cookie_config: Option<CookieConfig>,
        #[serde(rename = "SourceIP")]
        pub source_ip: bool,
        pub terminal: bool,
    }

    pub struct CookieConfig {
        pub session: bool,
        #[serde(rename = "TTL")]
        pub ttl: GoDuration,
        pub path: String,
    }

    pub struct ChainTarget {
        #[serde(rename = "ID")]
        pub id: String,
        pub service: String,
        pub service_subset: String,
        pub namespace: String,
        pub partition: String,
        pub datacenter: String,
        pub peer: String,
        pub mesh_gateway: MeshGateway,
        pub subset: TargetSubset,
        pub connect_timeout: GoDuration,
        pub external: bool,
        /// What to send as the server name.
        #[serde(rename = "SNI")]
        pub sni: String,
        /// The server name within the mesh, before an override for an external service.
        pub name: String,
        pub locality: Option<Locality>,
        pub prioritize_by_locality: Option<PrioritizeByLocality>,
    }

    pub struct TargetSubset {
        pub filter: String,
        pub only_passing: bool,
    }

    pub struct PrioritizeByLocality {
        pub mode: String,
    }
}

/// What to compile a discovery chain with, instead of what the config entries say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct ChainOverrides {
    pub protocol: Option<String>,
    pub mesh_gateway_mode: Option<String>,
    pub connect_timeout: Option<Duration>,
}

impl ChainOverrides {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Serialize for ChainOverrides {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut body = serde_json::Map::new();
        if let Some(protocol) = &self.protocol {
            body.insert("OverrideProtocol".into(), protocol.as_str().into());
        }
        if let Some(mode) = &self.mesh_gateway_mode {
            body.insert("OverrideMeshGateway".into(), serde_json::json!({ "Mode": mode }));
        }
        if let Some(timeout) = self.connect_timeout {
            body.insert("OverrideConnectTimeout".into(), format!("{}ms", timeout.as_millis()).into());
        }
        body.serialize(serializer)
    }
}
