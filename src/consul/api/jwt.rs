//! Config entries `jwt-provider`.

use super::value::{GoDuration, Unknown};
use super::wire::Opaque;

wire! {
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
        /// Whether the TLS handshake with the server of the keys has an SNI; it always has.
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
