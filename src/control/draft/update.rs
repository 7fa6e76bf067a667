//! The inputs of a draft, and the queries that it needs in return.

use std::sync::Arc;

use super::super::jwks_fetcher::{Fetched, KeySource};
use super::super::query::{ChainQuery, EndpointsQuery, PreparedQuery, Query};
use super::super::translate::Notes;
use super::super::translate::endpoints::Instance;
use crate::consul::api;
use crate::snapshot::DefaultPolicy;

/// An answer of the agent, with its query.
#[derive(Debug)]
pub(in crate::control) enum Update {
    Service(Box<api::AgentService>),
    Roots(api::CaRoots),
    Leaf {
        service: String,
        leaf: Box<api::Leaf>,
    },
    Intentions {
        service: String,
        list: Vec<api::Intention>,
    },
    DefaultPolicy {
        service: String,
        policy: DefaultPolicy,
    },
    Chain(ChainQuery, Box<api::CompiledDiscoveryChain>),
    Endpoints {
        query: EndpointsQuery,
        instances: Arc<[Instance]>,
        filtered_by_acls: bool,
    },
    PreparedQuery(PreparedQuery, Box<api::PreparedQueryResult>),
    Mesh(Option<api::MeshConfig>),
    ProxyDefaults(Option<Box<api::ProxyDefaults>>),
    JwtProvider(String, Option<Box<api::JwtProvider>>),
    Keys(KeySource, Fetched),
    /// The query could not be answered; it goes on.
    Failed(Query),
}

impl Update {
    /// The query that brought it.
    pub(in crate::control) fn source(&self) -> Query {
        match self {
            Self::Service(service) => Query::Service(service.id.clone()),
            Self::Roots(_) => Query::Roots,
            Self::Leaf { service, .. } => Query::Leaf(service.clone()),
            Self::Intentions { service, .. } => Query::Intentions(service.clone()),
            Self::DefaultPolicy { service, .. } => Query::DefaultPolicy(service.clone()),
            Self::Chain(query, _) => Query::Chain(query.clone()),
            Self::Endpoints { query, .. } => Query::Endpoints(query.clone()),
            Self::PreparedQuery(query, _) => Query::PreparedQuery(query.clone()),
            Self::Mesh(_) => Query::Mesh,
            Self::ProxyDefaults(_) => Query::ProxyDefaults,
            Self::JwtProvider(name, _) => Query::JwtProvider(name.clone()),
            Self::Keys(source, _) => Query::Keys(source.clone()),
            Self::Failed(query) => query.clone(),
        }
    }
}

/// A change of the set of queries that should run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) enum Want {
    Start(Query),
    Stop(Query),
}

/// How soon a change must be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::control) enum Urgency {
    /// May be gathered with others for a moment.
    Soon,
    /// Decides who may talk to whom, or a connection waits for it.
    Now,
}

/// The effects of an update, gathered from the parts of a draft.
#[derive(Debug, Default)]
pub(super) struct Effects {
    pub(super) wants: Vec<Want>,
    /// How soon a new snapshot is needed; `None` if there is nothing to publish.
    pub(super) urgency: Option<Urgency>,
    pub(super) notes: Notes,
}

impl Effects {
    pub(super) fn publish(&mut self, urgency: Urgency) {
        self.urgency = self.urgency.max(Some(urgency));
    }

    /// Asks `now` in the place of `before`.
    pub(super) fn ask(&mut self, before: &[Query], now: Vec<Query>) {
        self.wants.extend(before.iter().filter(|query| !now.contains(query)).cloned().map(Want::Stop));
        self.wants.extend(now.into_iter().filter(|query| !before.contains(query)).map(Want::Start));
    }
}
