//! Paths of the local app that are reached without the mesh, such as those of health checks and scrapes.

use std::collections::BTreeMap;
use std::time::Duration;

use super::address::{Bind, LocalApp};
use super::protocol::Protocol;

/// A plaintext listener, `Expose.Paths` of one port. It knows neither identities nor intentions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exposed {
    pub bind: Bind,
    /// By the exact path, without a query. Anything else is answered with 404.
    pub paths: BTreeMap<String, ExposedPath>,
    /// Time to connect to the local app; Consul's default is 5 s.
    pub connect_timeout: Duration,
    /// Whole answer of the local app; `None` is no limit; Consul's default is 15 s.
    pub request_timeout: Option<Duration>,
    /// Idle time of a stream to it; `None` is no limit; Consul's default is 5 min.
    pub idle_timeout: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExposedPath {
    pub app: LocalApp,
    /// [`Protocol::Http`], or [`Protocol::Http2`] for prior knowledge.
    pub protocol: Protocol,
}

impl Exposed {
    /// Where a request for this path (in its one spelling, without the query) goes, if anywhere.
    #[must_use]
    pub fn path(&self, path: &str) -> Option<&ExposedPath> {
        self.paths.get(path)
    }
}
