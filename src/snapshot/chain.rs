//! The discovery chain: which target a connection or request is for.

use std::sync::Arc;
use std::time::Duration;

use super::{Endpoints, Protocol};
use crate::tls;

/// A compiled discovery chain, checked: walking it always ends at a resolver.
#[derive(Debug)]
pub struct Chain {
    pub protocol: Protocol,
    /// For `tcp`: the only node. (Routers and splitters need an HTTP-like protocol.)
    pub start: Arc<Resolver>,
}

/// A resolver node: the target that is meant, then those to fail over to, in order.
#[derive(Debug)]
pub struct Resolver {
    /// Never empty; the first is the primary.
    pub targets: Vec<Arc<Target>>,
}

/// A service (subset, datacenter …) that a chain leads to.
#[derive(Debug)]
pub struct Target {
    /// The chain's opaque id, unique within it.
    pub id: String,
    pub service: String,
    pub datacenter: String,
    /// Ready to shake hands as us with this target: our leaf, its SNI, the identities it may show.
    pub tls: Arc<tls::Client>,
    /// TCP and TLS connect, per endpoint; Consul's default is 5 s.
    pub connect_timeout: Duration,
    pub endpoints: Arc<Endpoints>,
}

impl Chain {
    /// Every target that the chain can lead to, failover included.
    pub fn targets(&self) -> impl Iterator<Item = &Arc<Target>> {
        self.start.targets.iter()
    }
}
