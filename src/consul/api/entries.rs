//! Config entries that hold for the whole mesh.

use super::agent::{AccessLogs, Expose, MeshGateway};
use super::chain::{FailoverPolicy, PrioritizeByLocality};
use super::wire::Opaque;

wire! {
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
}
