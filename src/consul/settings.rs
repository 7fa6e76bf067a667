//! How the agent is reached, and as whom.

use std::fmt;
use std::path::PathBuf;

/// Fewest connections with which intentions do not wait for other requests.
pub const FEWEST_CONNECTIONS: usize = 2;

/// Default number of connections: three for blocking requests (intentions, registration, instances), one for all
/// others.
pub const DEFAULT_CONNECTIONS: usize = 4;

/// How to reach the agent, checked.
#[derive(Clone)]
pub struct Settings {
    pub address: Address,
    /// `user[:password]` of `CONSUL_HTTP_AUTH`.
    pub basic_auth: Option<(String, Option<String>)>,
    pub tls: TlsSettings,
    pub scope: Scope,
    /// Connections to the agent at one time, at least [`FEWEST_CONNECTIONS`]; default [`DEFAULT_CONNECTIONS`]. With
    /// `https`, requests share one connection.
    pub max_connections: usize,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("address", &self.address)
            .field("basic_auth", &self.basic_auth.as_ref().map(|(user, _)| user))
            .field("tls", &self.tls)
            .field("scope", &self.scope)
            .field("max_connections", &self.max_connections)
            .finish()
    }
}

/// As whom the agent is asked, and for what part of the mesh. Answers are shared within a scope and never between scopes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    pub token: Token,
    /// The datacenter that is asked about where a query names none; the agent's own by default.
    pub datacenter: Option<String>,
    /// Whether a server that is not the leader may answer.
    pub stale: bool,
    pub namespace: Option<String>,
    pub partition: Option<String>,
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

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { https, authority, prefix } => {
                write!(f, "{}://{authority}{prefix}", if *https { "https" } else { "http" })
            }
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// Where the ACL token comes from. Its `Debug` must never show a token.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Token {
    #[default]
    None,
    Fixed(String),
    File(PathBuf),
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Fixed(_) => f.write_str("Fixed(redacted)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct TlsSettings {
    pub ca_file: Option<PathBuf>,
    pub ca_path: Option<PathBuf>,
    pub client_cert: Option<PathBuf>,
    pub client_key: Option<PathBuf>,
    pub server_name: Option<String>,
    /// False only when `CONSUL_HTTP_SSL_VERIFY` says so.
    pub verify: bool,
}

impl Default for TlsSettings {
    fn default() -> Self {
        Self { ca_file: None, ca_path: None, client_cert: None, client_key: None, server_name: None, verify: true }
    }
}
