//! The discovery chain: which target a connection or request is for.

use std::sync::Arc;

use super::protocol::Protocol;
use super::request::RequestView;
use super::resolver::{Resolver, Target};
use super::route::{Next, Node, Routed, Splitter};

/// A compiled discovery chain, checked: walking it always ends at a resolver.
#[derive(Debug)]
pub struct Chain {
    /// Whose chain it is, or the prepared query's name: whose config entries decide.
    pub service: String,
    pub protocol: Protocol,
    /// For `tcp`: a resolver. (Routers and splitters need an HTTP-like protocol.)
    pub start: Node,
}

impl Chain {
    /// Routes a request; `random` decides splits and is uniform over all its values. The same number takes the
    /// same leg as long as the weights stay. `None` if no route matches, which Consul's compiler rules out.
    #[must_use]
    pub fn route<'a>(&'a self, request: &RequestView<'_>, random: u64) -> Option<Routed<'a>> {
        self.start.routed(request, random)
    }

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
