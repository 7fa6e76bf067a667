//! Addresses to bind, and addresses to dial.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// The address of a listener.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Bind {
    Tcp(SocketAddr),
    Unix {
        path: PathBuf,
        /// File mode bits of the socket; `None` leaves what the umask gives.
        mode: Option<u32>,
    },
}

/// The address of the local app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalApp {
    Tcp(Address),
    Unix(PathBuf),
}

/// A host and port to dial. Hosts are usually literal addresses; names are resolved at each dial.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    pub host: Host,
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Host {
    Ip(IpAddr),
    Name(String),
}

/// An instance that may be dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub address: Address,
    /// 1 to 128, from the instance's weights and its health.
    pub weight: u32,
}

/// The instances of a target: those that may be used, and how many the catalog lists at all, so that an
/// error can say "none registered" or "none passing".
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Endpoints {
    pub usable: Vec<Endpoint>,
    pub registered: usize,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => write!(f, "{}", SocketAddr::from((*ip, self.port))),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

impl fmt::Display for LocalApp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix { path, .. } => write!(f, "unix://{}", path.display()),
        }
    }
}
