//! The discovery chain: which target a connection or request is for.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::hash::LoadBalancer;
use super::route::{Next, Node, REQUEST_TIMEOUT, Splitter};
use super::{Endpoints, Protocol};
use crate::tls;

/// A compiled discovery chain, checked: walking it always ends at a resolver.
#[derive(Debug)]
pub struct Chain {
    pub protocol: Protocol,
    /// For `tcp`: a resolver. (Routers and splitters need an HTTP-like protocol.)
    pub start: Node,
}

/// A resolver node: the target that is meant, then those to fail over to, in order.
#[derive(Debug)]
pub struct Resolver {
    /// Never empty; the first is the primary.
    pub targets: Vec<Arc<Target>>,
    pub load_balancer: LoadBalancer,
    /// The whole request, HTTP only, where the chain starts with this node; `None` is no limit.
    pub request_timeout: Option<Duration>,
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

/// For the log.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "service {:?} in {}", self.service, self.datacenter)
    }
}

impl Chain {
    /// Every target that the chain can lead to, failover included. One that several nodes share comes several
    /// times.
    pub fn targets(&self) -> impl Iterator<Item = &Arc<Target>> {
        self.resolvers().flat_map(|resolver| &resolver.targets)
    }

    /// Every resolver that the chain can lead to. One that several nodes share comes several times.
    pub fn resolvers(&self) -> impl Iterator<Item = &Resolver> {
        self.start.resolvers().into_iter()
    }

    /// The targets of a connection that is not looked into, in the order to try them: none where it would take
    /// a request to choose.
    #[must_use]
    pub fn connection_targets(&self) -> &[Arc<Target>] {
        match &self.start {
            Node::Resolver(resolver) => &resolver.targets,
            Node::Router(_) | Node::Splitter(_) => &[],
        }
    }
}

impl Node {
    fn resolvers(&self) -> Vec<&Resolver> {
        match self {
            Self::Router(routes) => routes.iter().flat_map(|route| route.next.resolvers()).collect(),
            Self::Splitter(splitter) => splitter.resolvers().collect(),
            Self::Resolver(resolver) => vec![resolver],
        }
    }
}

impl Next {
    fn resolvers(&self) -> Vec<&Resolver> {
        match self {
            Self::Splitter(splitter) => splitter.resolvers().collect(),
            Self::Resolver(resolver) => vec![resolver],
        }
    }
}

impl Splitter {
    fn resolvers(&self) -> impl Iterator<Item = &Resolver> {
        self.legs().iter().map(|leg| &*leg.resolver)
    }
}

impl Resolver {
    /// With what holds where nothing is set.
    #[must_use]
    pub fn new(targets: Vec<Arc<Target>>) -> Self {
        Self { targets, load_balancer: LoadBalancer::default(), request_timeout: Some(REQUEST_TIMEOUT) }
    }
}
