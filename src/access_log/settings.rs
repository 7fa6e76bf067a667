//! Settings of the access log.

use std::path::PathBuf;

use super::format::Format;

/// `AccessLogs` of the proxy-defaults config entry, once enabled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub sink: Sink,
    pub format: Format,
    /// Whether connections are logged too that never came as far as a service, with the flag `NR`.
    pub refused_connections: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sink {
    Stdout,
    Stderr,
    /// Opened for appending, and opened again when another file has its name.
    File(PathBuf),
}
