//! The command line and the environment, turned into checked settings.

use std::net::SocketAddr;
use std::time::Duration;

use crate::{consul, telemetry};

/// What the process was asked to do.
#[derive(Debug)]
pub struct Config {
    pub mode: Mode,
    pub agent: consul::Settings,
    pub log: telemetry::Settings,
    /// How long open connections may go on after a first signal; default 10 s.
    pub drain_time: Duration,
}

/// Where the proxy's own definition comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// `-proxy-id`: the id of a registered proxy.
    ProxyId(String),
    /// `-sidecar-for`: the id of a service with exactly one sidecar.
    SidecarFor(String),
    /// `-service`: everything from flags.
    AdHoc(AdHoc),
}

/// A proxy that is defined by flags alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdHoc {
    pub service: String,
    pub upstreams: Vec<AdHocUpstream>,
    /// `-listen` with `-service-addr`: the public listener and the local app.
    pub public: Option<(SocketAddr, String)>,
    /// `-register`, with the `-register-id` suffix.
    pub register: Option<Register>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdHocUpstream {
    pub name: String,
    pub prepared_query: bool,
    pub bind: SocketAddr,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Register {
    pub id_suffix: Option<String>,
}
