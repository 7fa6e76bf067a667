//! The agent's HTTP API, nothing about proxying.

pub mod api;

use std::path::PathBuf;

/// How to reach the agent, checked.
#[derive(Debug, Clone)]
pub struct Settings {
    pub address: Address,
    pub token: Token,
    /// `user[:password]` of `CONSUL_HTTP_AUTH`.
    pub basic_auth: Option<(String, Option<String>)>,
    pub tls: TlsSettings,
    pub datacenter: Option<String>,
    pub stale: bool,
    pub namespace: Option<String>,
    pub partition: Option<String>,
    /// Connections to the agent at one time; default 24.
    pub max_connections: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `authority` is host:port; `prefix` is a path put before `/v1`, without a slash at its end.
    Tcp {
        https: bool,
        authority: String,
        prefix: String,
    },
    Unix(PathBuf),
}

/// Where the ACL token comes from. Its `Debug` must never show a token.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    None,
    Fixed(String),
    File(PathBuf),
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Fixed(_) => f.write_str("Fixed(redacted)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

#[derive(Debug, Clone, Default)]
pub struct TlsSettings {
    pub ca_file: Option<PathBuf>,
    pub ca_path: Option<PathBuf>,
    pub client_cert: Option<PathBuf>,
    pub client_key: Option<PathBuf>,
    pub server_name: Option<String>,
    /// False only when `CONSUL_HTTP_SSL_VERIFY` says so.
    pub verify: bool,
}
