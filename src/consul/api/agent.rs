//! The agent's own state and the catalog's: registrations, certificates, instances.

use std::collections::BTreeMap;

use super::value::{Port, Secret};
use super::wire::Opaque;

wire! {
    /// `GET /v1/agent/service/:id`, a value of `GET /v1/agent/services`, or the `Service` of a health row.
    pub struct AgentService {
        pub kind: String,
        #[serde(rename = "ID")]
        pub id: String,
        /// The name of the service.
        pub service: String,
        pub tags: Vec<String>,
        pub meta: BTreeMap<String, String>,
        /// Empty means the address of the node.
        pub address: String,
        pub port: Port,
        /// Instead of address and port; Consul 1.10 and later.
        pub socket_path: String,
        pub tagged_addresses: BTreeMap<String, ServiceAddress>,
        /// Absent means 1 for passing and 1 for warning.
        pub weights: Option<Weights>,
        /// Only from `GET /v1/agent/service/:id`.
        pub content_hash: String,
        pub proxy: Option<Proxy>,
        pub connect: ServiceConnect,
        pub datacenter: String,
        pub namespace: String,
        pub partition: String,
        pub peer_name: String,
        pub locality: Option<Locality>,
    }

    pub struct ServiceAddress {
        pub address: String,
        pub port: Port,
    }

    pub struct Weights {
        pub passing: i64,
        pub warning: i64,
    }

    pub struct ServiceConnect {
        pub native: bool,
        /// Name and identity of an instance imported from a peering.
        pub peer_meta: Option<PeerMeta>,
    }

    pub struct PeerMeta {
        #[serde(rename = "SNI")]
        pub sni: Vec<String>,
        #[serde(rename = "SpiffeID")]
        pub spiffe_id: Vec<String>,
        pub protocol: String,
    }

    pub struct Locality {
        pub region: String,
        pub zone: String,
    }

    pub struct Proxy {
        /// Whose leaf and intentions the proxy uses.
        pub destination_service_name: String,
        /// Whose local app the proxy stands in front of.
        #[serde(rename = "DestinationServiceID")]
        pub destination_service_id: String,
        pub local_service_address: String,
        pub local_service_port: Port,
        /// Beats address and port; Consul 1.10 and later.
        pub local_service_socket_path: String,
        /// Empty, `direct` or `transparent`.
        pub mode: String,
        pub transparent_proxy: Option<TransparentProxy>,
        pub config: Opaque,
        pub upstreams: Vec<Upstream>,
        pub mesh_gateway: MeshGateway,
        pub expose: Expose,
        pub access_logs: Option<AccessLogs>,
    }

    pub struct TransparentProxy {
        pub outbound_listener_port: Port,
        pub dialed_directly: bool,
    }

    pub struct MeshGateway {
        /// Empty (inherit), `none`, `local` or `remote`.
        pub mode: String,
    }

    pub struct Expose {
        pub checks: bool,
        pub paths: Vec<ExposePath>,
    }

    pub struct ExposePath {
        pub listener_port: Port,
        pub path: String,
        pub local_path_port: Port,
        /// Empty means `http`.
        pub protocol: String,
        pub parsed_from_check: bool,
    }

    pub struct AccessLogs {
        pub enabled: bool,
        pub disable_listener_logs: bool,
        /// Empty, `stdout`, `stderr` or `file`.
        #[serde(rename = "Type")]
        pub kind: String,
        pub path: String,
        #[serde(rename = "JSONFormat")]
        pub json_format: String,
        pub text_format: String,
    }

    pub struct Upstream {
        /// Empty or `service`, or `prepared_query`.
        pub destination_type: String,
        pub destination_name: String,
        pub destination_namespace: String,
        pub destination_partition: String,
        pub destination_peer: String,
        /// Empty means our own.
        pub datacenter: String,
        /// Empty means 127.0.0.1.
        pub local_bind_address: String,
        pub local_bind_port: Port,
        pub local_bind_socket_path: String,
        /// An octal number as text, such as `0600`.
        pub local_bind_socket_mode: String,
        pub config: Opaque,
        pub mesh_gateway: MeshGateway,
    }

    /// `GET /v1/agent/connect/ca/roots`.
    pub struct CaRoots {
        #[serde(rename = "ActiveRootID")]
        pub active_root_id: String,
        pub trust_domain: String,
        pub roots: Vec<CaRoot>,
    }

    pub struct CaRoot {
        #[serde(rename = "ID")]
        pub id: String,
        pub name: String,
        pub external_trust_domain: String,
        pub not_before: String,
        pub not_after: String,
        /// PEM.
        pub root_cert: String,
        /// PEM each. They complete chains and are no trust anchors.
        pub intermediate_certs: Vec<String>,
        /// Every listed root is trusted, active or not.
        pub active: bool,
        pub private_key_type: String,
        pub private_key_bits: i64,
    }

    /// `GET /v1/agent/connect/ca/leaf/:service`.
    pub struct Leaf {
        pub serial_number: String,
        /// The leaf, followed by the intermediates.
        #[serde(rename = "CertPEM")]
        pub cert_pem: String,
        #[serde(rename = "PrivateKeyPEM")]
        pub private_key_pem: Secret,
        pub service: String,
        #[serde(rename = "ServiceURI")]
        pub service_uri: String,
        /// RFC 3339.
        pub valid_after: String,
        /// RFC 3339.
        pub valid_before: String,
    }

    /// A row of `GET /v1/health/connect/:service` and its kin.
    pub struct CheckServiceNode {
        pub node: Node,
        pub service: AgentService,
        pub checks: Vec<HealthCheck>,
    }

    pub struct Node {
        #[serde(rename = "ID")]
        pub id: String,
        #[serde(rename = "Node")]
        pub name: String,
        pub address: String,
        pub datacenter: String,
        pub partition: String,
        pub peer_name: String,
        pub tagged_addresses: BTreeMap<String, String>,
        pub meta: BTreeMap<String, String>,
        pub locality: Option<Locality>,
    }

    pub struct HealthCheck {
        #[serde(rename = "CheckID")]
        pub check_id: String,
        pub name: String,
        /// `passing`, `warning` or `critical`.
        pub status: String,
        /// Empty for a check of the node.
        #[serde(rename = "ServiceID")]
        pub service_id: String,
        pub service_name: String,
    }

    /// `POST /v1/agent/connect/authorize`.
    pub struct Authorization {
        pub authorized: bool,
        pub reason: String,
    }

    /// `GET /v1/query/:name/execute`.
    pub struct PreparedQueryResult {
        pub service: String,
        pub nodes: Vec<CheckServiceNode>,
        /// Where the rows come from: another datacenter after a failover of the query.
        pub datacenter: String,
        pub failovers: i64,
    }
}
