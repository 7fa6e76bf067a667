//! The agent's JSON, spelled as the agent spells it.
//!
//! Decoding is lenient, because shapes change with every Consul line and Go drops empty fields or sends
//! them as `null`: every field has a default, `null` is the default, and unknown fields are ignored. The
//! exception are the parts of an intention that decide who may do what: those keep the names of fields they
//! do not know ([`Unknown`]), so that a reader can fail closed on a matcher newer than this code.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// Configuration that Consul passes on without looking at it.
pub type Opaque = serde_json::Map<String, serde_json::Value>;

/// Declares a wire type: every field defaulted, `null` taken as the default, names in the agent's spelling.
macro_rules! wire {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, Deserialize)]
        #[serde(rename_all = "PascalCase", default)]
        pub struct $name {
            $($(#[$field_meta])* #[serde(deserialize_with = "null_is_default")] pub $field: $type,)*
        }
    )*};
}

fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

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

    /// The config entry `mesh`.
    pub struct MeshConfig {
        pub transparent_proxy: MeshTransparentProxy,
        #[serde(rename = "AllowEnablingPermissiveMutualTLS")]
        pub allow_enabling_permissive_mutual_tls: bool,
        #[serde(rename = "TLS")]
        pub tls: Option<MeshTls>,
        #[serde(rename = "HTTP")]
        pub http: Option<MeshHttp>,
    }

    pub struct MeshTransparentProxy {
        pub mesh_destinations_only: bool,
    }

    pub struct MeshTls {
        pub incoming: Option<MeshTlsDirection>,
        pub outgoing: Option<MeshTlsDirection>,
    }

    pub struct MeshTlsDirection {
        #[serde(rename = "TLSMinVersion")]
        pub tls_min_version: String,
        #[serde(rename = "TLSMaxVersion")]
        pub tls_max_version: String,
        pub cipher_suites: Vec<String>,
    }

    pub struct MeshHttp {
        pub sanitize_x_forwarded_client_cert: bool,
        pub incoming: Option<MeshHttpIncoming>,
    }

    pub struct MeshHttpIncoming {
        pub request_normalization: Option<RequestNormalization>,
    }

    pub struct RequestNormalization {
        pub insecure_disable_path_normalization: bool,
        pub merge_slashes: bool,
        pub path_with_escaped_slashes_action: String,
        pub headers_with_underscores_action: String,
    }

    /// The config entry `proxy-defaults` of name `global`.
    pub struct ProxyDefaults {
        pub config: Opaque,
        pub mode: String,
        pub mesh_gateway: MeshGateway,
        pub expose: Expose,
        pub access_logs: Option<AccessLogs>,
        #[serde(rename = "MutualTLSMode")]
        pub mutual_tls_mode: String,
        pub failover_policy: Option<FailoverPolicy>,
        pub prioritize_by_locality: Option<PrioritizeByLocality>,
    }

    pub struct JwksRetryPolicy {
        pub num_retries: u32,
        pub retry_policy_back_off: Option<JwksBackOff>,
    }

    pub struct JwksBackOff {
        pub base_interval: GoDuration,
        pub max_interval: GoDuration,
    }

    pub struct JwtCacheConfig {
        pub size: i64,
    }
}

/// Declares a wire type that remembers which fields it did not know.
macro_rules! strict_wire {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, Deserialize)]
        #[serde(rename_all = "PascalCase", default)]
        pub struct $name {
            $($(#[$field_meta])* #[serde(deserialize_with = "null_is_default")] pub $field: $type,)*
            #[serde(flatten)]
            pub unknown: Unknown,
        }
    )*};
}

strict_wire! {
    /// A config entry `jwt-provider`.
    pub struct JwtProvider {
        pub name: String,
        pub issuer: String,
        pub audiences: Vec<String>,
        #[serde(rename = "JSONWebKeySet")]
        pub json_web_key_set: Option<JsonWebKeySet>,
        pub locations: Vec<JwtLocation>,
        pub forwarding: Option<JwtForwarding>,
        pub clock_skew_seconds: i64,
        pub cache_config: Option<JwtCacheConfig>,
    }

    pub struct JsonWebKeySet {
        pub local: Option<LocalJwks>,
        pub remote: Option<RemoteJwks>,
    }

    pub struct LocalJwks {
        /// Base64 of the key set's JSON.
        #[serde(rename = "JWKS")]
        pub jwks: String,
        /// A file on the proxy's host.
        pub filename: String,
    }

    pub struct RemoteJwks {
        #[serde(rename = "URI")]
        pub uri: String,
        pub request_timeout_ms: i64,
        pub cache_duration: GoDuration,
        pub fetch_asynchronously: bool,
        /// Whether the server of the keys is told its name; it always is.
        #[serde(rename = "UseSNI")]
        pub use_sni: bool,
        pub retry_policy: Option<JwksRetryPolicy>,
        #[serde(rename = "JWKSCluster")]
        pub jwks_cluster: Option<JwksCluster>,
    }

    pub struct JwksCluster {
        pub discovery_type: String,
        pub connect_timeout: GoDuration,
        #[serde(rename = "TLSCertificates")]
        pub tls_certificates: Option<JwksTls>,
    }

    pub struct JwksTls {
        pub ca_certificate_provider_instance: Option<Opaque>,
        #[serde(rename = "TrustedCA")]
        pub trusted_ca: Option<JwksTrustedCa>,
    }

    pub struct JwksTrustedCa {
        pub filename: String,
        pub environment_variable: String,
        pub inline_string: String,
        /// Base64.
        pub inline_bytes: String,
    }

    pub struct JwtLocation {
        pub header: Option<JwtHeaderLocation>,
        pub query_param: Option<JwtNamedLocation>,
        pub cookie: Option<JwtNamedLocation>,
    }

    pub struct JwtHeaderLocation {
        pub name: String,
        pub value_prefix: String,
        pub forward: bool,
    }

    pub struct JwtNamedLocation {
        pub name: String,
    }

    pub struct JwtForwarding {
        pub header_name: String,
        pub pad_forward_payload_header: bool,
    }

    /// A row of an intentions list.
    pub struct Intention {
        /// Empty for an intention that lives in a config entry.
        #[serde(rename = "ID")]
        pub id: String,
        pub description: String,
        #[serde(rename = "SourceNS")]
        pub source_ns: String,
        pub source_name: String,
        pub source_partition: String,
        /// Not empty for a source in another cluster.
        pub source_peer: String,
        pub source_sameness_group: String,
        /// `consul` is the only type there is.
        pub source_type: String,
        #[serde(rename = "DestinationNS")]
        pub destination_ns: String,
        pub destination_name: String,
        pub destination_partition: String,
        /// `allow`, `deny`, or empty where `permissions` decide.
        pub action: String,
        pub permissions: Vec<IntentionPermission>,
        #[serde(rename = "JWT")]
        pub jwt: Option<IntentionJwt>,
        pub precedence: i64,
    }

    pub struct IntentionPermission {
        pub action: String,
        #[serde(rename = "HTTP")]
        pub http: Option<IntentionHttp>,
        #[serde(rename = "JWT")]
        pub jwt: Option<IntentionJwt>,
    }

    /// All parts that are present must match.
    pub struct IntentionHttp {
        pub path_exact: String,
        pub path_prefix: String,
        pub path_regex: String,
        pub header: Vec<IntentionHeader>,
        pub methods: Vec<String>,
    }

    pub struct IntentionHeader {
        pub name: String,
        pub present: bool,
        pub exact: String,
        pub prefix: String,
        pub suffix: String,
        pub contains: String,
        pub regex: String,
        pub invert: bool,
        pub ignore_case: bool,
    }

    pub struct IntentionJwt {
        /// Any one of them is enough.
        pub providers: Vec<IntentionJwtProvider>,
    }

    pub struct IntentionJwtProvider {
        pub name: String,
        /// All of them must hold.
        pub verify_claims: Vec<IntentionJwtClaim>,
    }

    pub struct IntentionJwtClaim {
        pub path: Vec<String>,
        pub value: String,
    }
}

/// Fields that every config entry has.
const OF_ENTRIES: [&str; 7] = ["Kind", "Meta", "Hash", "CreateIndex", "ModifyIndex", "Namespace", "Partition"];

impl JwtProvider {
    /// The name of some field, here or further in, that this code does not know. It may narrow which tokens are good or
    /// whose keys are trusted, so that such an entry can't be used.
    pub fn unknown_field(&self) -> Option<&str> {
        let own = self.unknown.iter().find(|name| !OF_ENTRIES.contains(name));
        let keys = || self.json_web_key_set.as_ref().and_then(JsonWebKeySet::unknown_field);
        let locations = || self.locations.iter().find_map(JwtLocation::unknown_field);
        let forwarding = || self.forwarding.as_ref().and_then(|forwarding| forwarding.unknown.first());
        own.or_else(keys).or_else(locations).or_else(forwarding)
    }
}

impl JsonWebKeySet {
    fn unknown_field(&self) -> Option<&str> {
        let local = || self.local.as_ref().and_then(|local| local.unknown.first());
        let remote = || self.remote.as_ref().and_then(RemoteJwks::unknown_field);
        self.unknown.first().or_else(local).or_else(remote)
    }
}

impl RemoteJwks {
    fn unknown_field(&self) -> Option<&str> {
        let cluster = self.jwks_cluster.as_ref();
        let tls = cluster.and_then(|cluster| cluster.tls_certificates.as_ref());
        let trusted = tls.and_then(|tls| tls.trusted_ca.as_ref());
        let parts = [cluster.map(|it| &it.unknown), tls.map(|it| &it.unknown), trusted.map(|it| &it.unknown)];
        self.unknown.first().or_else(|| parts.into_iter().flatten().find_map(Unknown::first))
    }
}

impl JwtLocation {
    fn unknown_field(&self) -> Option<&str> {
        let named = [&self.query_param, &self.cookie].into_iter().flatten().find_map(|named| named.unknown.first());
        let header = || self.header.as_ref().and_then(|header| header.unknown.first());
        self.unknown.first().or(named).or_else(header)
    }
}

/// Fields of an intention that restrict nobody (Consul 1.8.7 to 1.22, `agent/structs/intention.go`).
const INERT: [&str; 10] = [
    "DefaultAddr",
    "DefaultPort",
    "Meta",
    "LegacyMeta",
    "LegacyID",
    "CreatedAt",
    "UpdatedAt",
    "Hash",
    "CreateIndex",
    "ModifyIndex",
];

impl Intention {
    /// The name of some field of the intention itself that this code does not know. It may restrict whom the
    /// intention is about, so that one with such a field must not allow anybody.
    pub fn unknown_field(&self) -> Option<&str> {
        self.unknown.iter().find(|name| !INERT.contains(name))
    }
}

impl IntentionPermission {
    /// The name of some field, here or further in, that this code does not know; such a permission cannot
    /// be evaluated, and must not allow anything.
    pub fn unknown_field(&self) -> Option<&str> {
        let http = self.http.as_ref().and_then(IntentionHttp::unknown_field);
        let jwt = || self.jwt.as_ref().and_then(IntentionJwt::unknown_field);
        self.unknown.first().or(http).or_else(jwt)
    }
}

impl IntentionHttp {
    fn unknown_field(&self) -> Option<&str> {
        self.unknown.first().or_else(|| self.header.iter().find_map(|header| header.unknown.first()))
    }
}

impl IntentionJwt {
    /// As [`IntentionPermission::unknown_field`], for a requirement on the whole intention.
    pub fn unknown_field<'a>(&'a self) -> Option<&'a str> {
        let in_provider = |provider: &'a IntentionJwtProvider| {
            let in_claims = || provider.verify_claims.iter().find_map(|claim| claim.unknown.first());
            provider.unknown.first().or_else(in_claims)
        };
        self.unknown.first().or_else(|| self.providers.iter().find_map(in_provider))
    }
}

/// Names of fields that were present, carried a value, and are not known to this code.
///
/// A field with Go's zero value (`null`, `false`, `0`, `""`, `[]`, `{}`) says nothing and is not kept, as
/// an agent without `omitempty` on a new field sends it everywhere.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Unknown(Vec<String>);

impl Unknown {
    pub fn first(&self) -> Option<&str> {
        self.iter().next()
    }

    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl<'de> Deserialize<'de> for Unknown {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = BTreeMap::<String, Meaning>::deserialize(deserializer)?;
        Ok(Self(fields.into_iter().filter(|(_, value)| value.0).map(|(name, _)| name).collect()))
    }
}

/// Whether a JSON value is something else than Go's zero value of its type.
struct Meaning(bool);

impl<'de> Deserialize<'de> for Meaning {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MeaningVisitor)
    }
}

struct MeaningVisitor;

impl<'de> Visitor<'de> for MeaningVisitor {
    type Value = Meaning;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Meaning, E> {
        Ok(Meaning(false))
    }

    fn visit_none<E>(self) -> Result<Meaning, E> {
        Ok(Meaning(false))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Meaning, E> {
        Ok(Meaning(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Meaning, E> {
        Ok(Meaning(value != 0))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Meaning, E> {
        Ok(Meaning(value != 0))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Meaning, E> {
        Ok(Meaning(value != 0.0))
    }

    fn visit_str<E>(self, value: &str) -> Result<Meaning, E> {
        Ok(Meaning(!value.is_empty()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Meaning, A::Error> {
        let mut some = false;
        while items.next_element::<IgnoredAny>()?.is_some() {
            some = true;
        }
        Ok(Meaning(some))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Meaning, A::Error> {
        let mut some = false;
        while fields.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            some = true;
        }
        Ok(Meaning(some))
    }
}

/// A port as the agent gives it. Zero and numbers that are no port decode as "none", so that one odd row
/// does not make a whole list unreadable.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port(u16);

impl Port {
    pub fn new(port: u16) -> Self {
        Self(port)
    }

    /// `None` for zero, which Consul takes as "no port".
    pub fn get(self) -> Option<u16> {
        (self.0 != 0).then_some(self.0)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = serde_json::Number::deserialize(deserializer)?;
        Ok(Self(number.as_u64().and_then(|number| u16::try_from(number).ok()).unwrap_or(0)))
    }
}

/// Text that must not be seen in logs, such as a private key.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: String) -> Self {
        Self(text)
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "Secret(empty)" } else { "Secret(redacted)" })
    }
}

/// A duration as Go writes it: text such as `1m30s`, or a number of nanoseconds. Consul mixes both, at
/// times for the same setting (a resolver's `ConnectTimeout` is text, its `RequestTimeout` a number).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GoDuration {
    nanoseconds: i64,
}

impl GoDuration {
    pub fn from_nanoseconds(nanoseconds: i64) -> Self {
        Self { nanoseconds }
    }

    pub fn nanoseconds(self) -> i64 {
        self.nanoseconds
    }

    /// `None` for zero, which Consul takes as "not set", and for less.
    pub fn positive(self) -> Option<Duration> {
        u64::try_from(self.nanoseconds).ok().filter(|nanoseconds| *nanoseconds > 0).map(Duration::from_nanos)
    }
}

/// The text or number is no duration, or is too long for one (about 292 years).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadDuration;

impl fmt::Display for BadDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a duration such as 10s, 500ms or 1m30s, or too long")
    }
}

impl std::error::Error for BadDuration {}

impl FromStr for GoDuration {
    type Err = BadDuration;

    /// As Go's `time.ParseDuration`, and empty text is zero.
    fn from_str(text: &str) -> Result<Self, BadDuration> {
        let (negative, mut rest) = match text.as_bytes().first() {
            None => return Ok(Self::default()),
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            Some(_) => (false, text),
        };
        if rest == "0" {
            return Ok(Self::default());
        }
        if rest.is_empty() {
            return Err(BadDuration);
        }
        let mut total: i128 = 0;
        while !rest.is_empty() {
            let (part, after) = duration_part(rest)?;
            total += part;
            if total > i128::from(i64::MAX) + i128::from(negative) {
                return Err(BadDuration);
            }
            rest = after;
        }
        let total = if negative { -total } else { total };
        i64::try_from(total).map(Self::from_nanoseconds).map_err(|_| BadDuration)
    }
}

/// Reads one number with its unit; gives nanoseconds and the rest of the text.
fn duration_part(text: &str) -> Result<(i128, &str), BadDuration> {
    let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (whole, rest) = text.split_at(digits(text));
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(digits(rest)),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(BadDuration);
    }
    let (unit, rest) = rest.split_at(rest.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(rest.len()));
    let scale = unit_nanoseconds(unit)?;
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse::<i64>().map_err(|_| BadDuration)?.into() };
    Ok((whole * scale + fraction_nanoseconds(fraction, scale), rest))
}

fn unit_nanoseconds(unit: &str) -> Result<i128, BadDuration> {
    match unit {
        "ns" => Ok(1),
        // The micro sign and the Greek letter are two characters that look alike; Go takes both.
        "us" | "\u{b5}s" | "\u{3bc}s" => Ok(1_000),
        "ms" => Ok(1_000_000),
        "s" => Ok(1_000_000_000),
        "m" => Ok(60_000_000_000),
        "h" => Ok(3_600_000_000_000),
        _ => Err(BadDuration),
    }
}

fn fraction_nanoseconds(fraction: &str, scale: i128) -> i128 {
    // An hour is 3.6e12 ns: digits past the fifteenth stay below a nanosecond whatever the unit.
    let digits = &fraction[..fraction.len().min(15)];
    let value = digits.bytes().fold(0_i128, |sum, digit| sum * 10 + i128::from(digit - b'0'));
    let divisor = (0..digits.len()).fold(1_i128, |product, _| product * 10);
    value * scale / divisor
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(DurationVisitor)
    }
}

struct DurationVisitor;

impl Visitor<'_> for DurationVisitor {
    type Value = GoDuration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a duration, as text or as a number of nanoseconds")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<GoDuration, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, nanoseconds: i64) -> Result<GoDuration, E> {
        Ok(GoDuration::from_nanoseconds(nanoseconds))
    }

    fn visit_u64<E: de::Error>(self, nanoseconds: u64) -> Result<GoDuration, E> {
        i64::try_from(nanoseconds).map(GoDuration::from_nanoseconds).map_err(|_| E::custom(BadDuration))
    }

    fn visit_f64<E: de::Error>(self, nanoseconds: f64) -> Result<GoDuration, E> {
        // The bound is 2^63, which is exact in a float; the cast below it loses nothing but a fraction.
        let in_range = nanoseconds.is_finite() && nanoseconds.abs() < 9_223_372_036_854_775_808.0;
        in_range.then(|| GoDuration::from_nanoseconds(nanoseconds as i64)).ok_or_else(|| E::custom(BadDuration))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn decode<T: for<'de> Deserialize<'de>>(json: &str) -> T {
        serde_json::from_str(json).expect("a recorded answer decodes")
    }

    #[test]
    fn reads_a_service_of_1_8() {
        let service: AgentService = decode(include_str!("testdata/1.8-agent_service.json"));
        assert_eq!(service.id, "web-sidecar-proxy");
        assert_eq!(service.kind, "connect-proxy");
        assert_eq!(service.content_hash, "4479404b0c275d0c");
        let proxy = service.proxy.expect("a proxy");
        assert_eq!(proxy.local_service_port.get(), Some(8080));
        assert_eq!(proxy.config["local_connect_timeout_ms"], 1000);
        assert_eq!(proxy.upstreams[0].config["limits"]["max_connections"], 7);
        assert_eq!(proxy.upstreams[1].destination_type, "prepared_query");
        assert_eq!(proxy.expose.paths[0].local_path_port.get(), Some(8080));
    }

    #[test]
    fn reads_a_service_of_1_19() {
        let service: AgentService = decode(include_str!("testdata/1.19-agent_service.json"));
        let proxy = service.proxy.expect("a proxy");
        assert!(proxy.access_logs.expect("access logs").enabled);
        let cache = proxy.upstreams.iter().find(|upstream| upstream.destination_name == "cache").expect("cache");
        assert_eq!(cache.local_bind_socket_path, "/tmp/cache.sock");
        assert_eq!(cache.local_bind_port.get(), None);
    }

    #[test]
    fn reads_health_rows_and_queries() {
        let rows: Vec<CheckServiceNode> = decode(include_str!("testdata/1.8-health.json"));
        assert_eq!(rows[0].service.weights, Some(Weights { passing: 10, warning: 1 }));
        assert_eq!(rows[0].service.address, "10.0.0.5");
        assert_eq!(rows[0].node.tagged_addresses["lan"], "127.0.0.1");
        assert!(rows[0].checks.iter().any(|check| check.check_id == "serfHealth" && check.status == "passing"));
        let result: PreparedQueryResult = decode(include_str!("testdata/1.8-query.json"));
        assert_eq!((result.service.as_str(), result.datacenter.as_str()), ("db", "dc1"));
    }

    #[test]
    fn reads_roots_and_leaf() {
        let roots: CaRoots = decode(include_str!("testdata/1.19-roots.json"));
        assert!(roots.trust_domain.ends_with(".consul"));
        assert!(roots.roots[0].active && roots.roots[0].intermediate_certs.is_empty());
        let leaf: Leaf = decode(r#"{"CertPEM":"a","PrivateKeyPEM":"sekret","ServiceURI":"spiffe://x/svc/web"}"#);
        assert_eq!(leaf.private_key_pem.expose(), "sekret");
        assert!(!format!("{leaf:?}").contains("sekret"));
    }

    #[test]
    fn reads_intentions() {
        type Matched = BTreeMap<String, Option<Vec<Intention>>>;
        let old: Matched = decode(include_str!("testdata/1.8-match.json"));
        assert_eq!(old["nope"], None);
        assert_eq!(old["db"].as_ref().expect("rows")[0].action, "allow");
        let new: Matched = decode(include_str!("testdata/1.19-match.json"));
        let row = &new["db"].as_ref().expect("rows")[0];
        assert_eq!((row.action.as_str(), row.precedence), ("", 9));
        let permission = &row.permissions[0];
        assert_eq!(permission.unknown_field(), None);
        assert!(permission.http.as_ref().expect("http").header[0].invert);
        let claims = &permission.jwt.as_ref().expect("jwt").providers[0].verify_claims;
        assert_eq!((claims[0].path[0].as_str(), claims[0].value.as_str()), ("role", "admin"));
        assert_eq!(row.jwt.as_ref().expect("jwt").unknown_field(), None);
    }

    #[test]
    fn notices_matchers_it_does_not_know() {
        for (json, unknown) in [
            (r#"{"Action":"allow","HTTP":{"PathExact":"/a"}}"#, None),
            (r#"{"Action":"allow","HTTP":{"PathGlob":"/a*"}}"#, Some("PathGlob")),
            (r#"{"Action":"allow","HTTP":{"PathGlob":"","New":null,"Old":[],"Map":{},"No":false,"Zero":0}}"#, None),
            (
                r#"{"Action":"allow","HTTP":{"Header":[{"Name":"x","Present":true},{"Name":"y","Range":[1]}]}}"#,
                Some("Range"),
            ),
            (r#"{"Action":"allow","GRPC":{"Service":"x"}}"#, Some("GRPC")),
            (r#"{"Action":"allow","JWT":{"Providers":[{"Name":"x","Scopes":["a"]}]}}"#, Some("Scopes")),
            (r#"{"Action":"allow","JWT":{"Providers":[{"VerifyClaims":[{"Regex":"a"}]}]}}"#, Some("Regex")),
        ] {
            let permission: IntentionPermission = decode(json);
            assert_eq!(permission.unknown_field(), unknown, "{json}");
        }
    }

    #[test]
    fn reads_chains() {
        for json in [include_str!("testdata/1.8-chain.json"), include_str!("testdata/1.19-chain.json")] {
            let chain = decode::<DiscoveryChainResponse>(json).chain.expect("a chain");
            let start = &chain.nodes[&chain.start_node];
            assert_eq!(start.kind, "router");
            let destination = start.routes[0].definition.destination.as_ref().expect("a destination");
            assert_eq!(destination.request_timeout.positive(), Some(Duration::from_secs(15)));
            assert_eq!((destination.num_retries, &destination.retry_on_status_codes[..]), (3, &[503][..]));
            let http = start.routes[0].definition.matches.http.as_ref().expect("a match");
            assert!(http.header[0].present && http.header[0].invert);
            let splitter = &chain.nodes[&start.routes[1].next_node];
            assert_eq!(splitter.splits[0].weight, 90.5);
            let resolver = chain.nodes[&splitter.splits[0].next_node].resolver.as_ref().expect("a resolver");
            assert_eq!(resolver.connect_timeout.positive(), Some(Duration::from_millis(2500)));
            assert!(chain.targets[&resolver.target].subset.only_passing);
            assert_eq!(resolver.failover.as_ref().expect("failover").targets.len(), 1);
        }
    }

    #[test]
    fn reads_what_only_newer_chains_have() {
        let chain = decode::<DiscoveryChainResponse>(include_str!("testdata/1.19-chain.json")).chain.expect("a chain");
        let node = &chain.nodes["resolver:v1.db.default.default.dc1"];
        assert_eq!(
            node.resolver.as_ref().expect("a resolver").request_timeout.positive(),
            Some(Duration::from_secs(7))
        );
        let policies = &node.load_balancer.as_ref().expect("a load balancer").hash_policies;
        let cookie = policies[0].cookie_config.as_ref().expect("a cookie");
        assert_eq!(cookie.ttl.positive(), Some(Duration::from_secs(30)));
        assert!(policies[1].source_ip && policies[1].terminal);
    }

    #[test]
    fn reads_config_entries() {
        let mesh: MeshConfig = decode(include_str!("testdata/1.19-mesh.json"));
        assert_eq!(mesh.tls.expect("tls").incoming.expect("incoming").tls_min_version, "TLSv1_2");
        let defaults: ProxyDefaults = decode(include_str!("testdata/1.19-proxy_defaults.json"));
        assert_eq!(defaults.config["protocol"], "http");
        let provider: JwtProvider = decode(include_str!("testdata/1.19-jwt_provider.json"));
        let remote = provider.json_web_key_set.expect("keys").remote.expect("remote keys");
        assert_eq!(remote.cache_duration.positive(), Some(Duration::from_secs(300)));
        assert_eq!(provider.clock_skew_seconds, 30);
    }

    #[test]
    fn takes_null_for_nothing_and_ignores_the_unknown() {
        let json = r#"{"ID":null,"Tags":null,"Meta":null,"Port":null,"Weights":null,"Connect":null,"New":{"a":[1]},
            "Proxy":{"Config":null,"Upstreams":null,"MeshGateway":null,"Expose":null,"TransparentProxy":null}}"#;
        let expected = AgentService { proxy: Some(Proxy::default()), ..AgentService::default() };
        assert_eq!(decode::<AgentService>(json), expected);
    }

    #[test]
    fn a_number_that_is_no_port_is_no_port() {
        for (json, port) in [("0", None), ("65535", Some(65535)), ("65536", None), ("-1", None), ("1.5", None)] {
            assert_eq!(decode::<Port>(json).get(), port, "{json}");
        }
    }

    #[test]
    fn reads_durations_as_go_does() {
        const SECOND: i64 = 1_000_000_000;
        for (json, nanoseconds) in [
            (r#""""#, Some(0)),
            (r#""0""#, Some(0)),
            (r#""3s""#, Some(3 * SECOND)),
            (r#""1m30s""#, Some(90 * SECOND)),
            (r#""1.5h""#, Some(5400 * SECOND)),
            (r#"".5s""#, Some(SECOND / 2)),
            (r#""5.s""#, Some(5 * SECOND)),
            (r#""250µs""#, Some(250_000)),
            (r#""-2s""#, Some(-2 * SECOND)),
            (r#""2562047h47m16.854775807s""#, Some(i64::MAX)),
            (r#""-2562047h47m16.854775808s""#, Some(i64::MIN)),
            (r#""2562047h47m16.854775808s""#, None),
            (r#""9999999999999999999h""#, None),
            (r#""9223372036854775807h9223372036854775807h""#, None),
            (r#""3""#, None),
            (r#""s""#, None),
            (r#"".s""#, None),
            (r#""-""#, None),
            (r#""3 s""#, None),
            (r#""3d""#, None),
            (r#""1sé""#, None),
            ("7000000000", Some(7 * SECOND)),
            ("9223372036854775808", None),
            ("1.5e9", Some(1_500_000_000)),
            ("1e300", None),
            ("true", None),
        ] {
            let duration = serde_json::from_str::<GoDuration>(json).ok().map(GoDuration::nanoseconds);
            assert_eq!(duration, nanoseconds, "{json}");
        }
    }

    #[test]
    fn overrides_are_sent_only_when_set() {
        let text = |overrides: &ChainOverrides| serde_json::to_string(overrides).expect("plain JSON");
        assert_eq!(text(&ChainOverrides::default()), "{}");
        let all = ChainOverrides {
            protocol: Some("http".into()),
            mesh_gateway_mode: Some("local".into()),
            connect_timeout: Some(Duration::from_millis(2500)),
        };
        assert_eq!(
            text(&all),
            r#"{"OverrideConnectTimeout":"2500ms","OverrideMeshGateway":{"Mode":"local"},"OverrideProtocol":"http"}"#
        );
    }
}
