//! Compiled discovery chains: checked once, so that walking one always ends.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::definition::CONNECT_TIMEOUT;
use super::{Bad, Notes, or_default, tenancy};
use crate::consul::api;
use crate::control::query::{EndpointsQuery, PreparedQuery, Query};
use crate::snapshot::{Chain, Node, Protocol, Resolver, Target};

/// A chain but for the credentials and the endpoints of its targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) struct ChainPlan {
    protocol: Protocol,
    start: ResolverPlan,
    /// Those that a walk can reach.
    pub(in crate::control) targets: Vec<TargetPlan>,
}

/// Places in the plan's `targets`: the one that is meant, then those to fail over to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ResolverPlan {
    targets: Vec<usize>,
}

/// What there is to know of a target from the chain alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) struct TargetPlan {
    pub(in crate::control) id: String,
    pub(in crate::control) service: String,
    pub(in crate::control) partition: String,
    pub(in crate::control) datacenter: String,
    pub(in crate::control) sni: Sni,
    /// Whom its instances may be.
    pub(in crate::control) identities: Vec<Identity>,
    pub(in crate::control) connect_timeout: Duration,
    pub(in crate::control) only_passing: bool,
    /// Empty, `none`, `local` or `remote`; it means something for other datacenters and partitions alone.
    pub(in crate::control) gateway_mode: String,
    /// What tells its instances; `None` for a target that cannot be reached at all.
    pub(in crate::control) instances: Option<Query>,
}

/// The server name to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::control) enum Sni {
    Given(String),
    /// Chains do not know prepared queries, so that their names have to be put together.
    Query(PreparedQuery),
}

/// What the answer to a prepared query says besides its instances.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::control) struct Prepared {
    pub(in crate::control) identities: Vec<Identity>,
    /// Where the rows come from; empty before the first answer.
    pub(in crate::control) datacenter: String,
}

/// A service within our trust domain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::control) struct Identity {
    pub(in crate::control) partition: String,
    pub(in crate::control) namespace: String,
    pub(in crate::control) datacenter: String,
    pub(in crate::control) service: String,
}

impl ChainPlan {
    /// The one target of a prepared query, in the place of a chain.
    pub(in crate::control) fn of_query(
        query: &PreparedQuery,
        prepared: &Prepared,
        protocol: Protocol,
        connect_timeout: Duration,
    ) -> Self {
        let target = TargetPlan {
            id: query.name.clone(),
            service: query.name.clone(),
            partition: "default".to_owned(),
            datacenter: prepared.datacenter.clone(),
            sni: Sni::Query(query.clone()),
            identities: prepared.identities.clone(),
            connect_timeout,
            only_passing: false,
            gateway_mode: String::new(),
            instances: Some(Query::PreparedQuery(query.clone())),
        };
        Self { protocol, start: ResolverPlan { targets: vec![0] }, targets: vec![target] }
    }

    /// The chain, with a target for each of the plan's, in their order.
    pub(in crate::control) fn build(&self, targets: &[Arc<Target>]) -> Chain {
        let pick = |index: &usize| targets.get(*index).map(Arc::clone);
        Chain {
            protocol: self.protocol,
            start: Node::Resolver(Arc::new(Resolver::new(self.start.targets.iter().filter_map(pick).collect()))),
        }
    }
}

/// Reads a chain.
///
/// # Errors
/// When it names a node or target that it does not hold, or has a node of a kind that is not known.
pub(in crate::control) fn plan(
    wire: &api::CompiledDiscoveryChain,
    enterprise: bool,
    notes: &mut Notes,
) -> Result<ChainPlan, Bad> {
    let mut walk = Walk { wire, enterprise, notes, targets: Vec::new(), places: BTreeMap::new() };
    let start = walk.start()?;
    let targets = walk.targets;
    Ok(ChainPlan { protocol: Protocol::parse(&wire.protocol), start, targets })
}

/// Visits what is reachable and numbers the targets as they come.
struct Walk<'a> {
    wire: &'a api::CompiledDiscoveryChain,
    enterprise: bool,
    notes: &'a mut Notes,
    targets: Vec<TargetPlan>,
    places: BTreeMap<&'a str, usize>,
}

impl<'a> Walk<'a> {
    fn start(&mut self) -> Result<ResolverPlan, Bad> {
        let start = &self.wire.start_node;
        let node =
            self.wire.nodes.get(start).ok_or_else(|| Bad(format!("it has no node {start:?}, where it starts")))?;
        match (node.kind.as_str(), &node.resolver) {
            ("resolver", Some(resolver)) => self.resolver(resolver),
            ("resolver", None) => Err(Bad(format!("resolver {start:?} is empty"))),
            (kind, _) => Err(Bad(format!("node {start:?} is of the kind {kind:?}, which is not supported"))),
        }
    }

    fn resolver(&mut self, resolver: &'a api::ChainResolver) -> Result<ResolverPlan, Bad> {
        let failover = resolver.failover.iter().flat_map(|failover| &failover.targets);
        let ids = std::iter::once(&resolver.target).chain(failover);
        let targets = ids.map(|id| self.target(id, resolver)).collect::<Result<_, _>>()?;
        Ok(ResolverPlan { targets })
    }

    fn target(&mut self, id: &'a str, resolver: &api::ChainResolver) -> Result<usize, Bad> {
        if let Some(place) = self.places.get(id) {
            return Ok(*place);
        }
        let wire = self.wire.targets.get(id).ok_or_else(|| Bad(format!("it has no target {id:?}")))?;
        let target = self.target_plan(id, wire, resolver)?;
        let place = self.targets.len();
        self.targets.push(target);
        self.places.insert(id, place);
        Ok(place)
    }

    fn target_plan(
        &mut self,
        id: &str,
        wire: &api::ChainTarget,
        resolver: &api::ChainResolver,
    ) -> Result<TargetPlan, Bad> {
        // A target of a peer has no datacenter.
        let missing = [("service", wire.service.is_empty()), ("SNI", wire.sni.is_empty())]
            .into_iter()
            .chain([("datacenter", wire.datacenter.is_empty() && wire.peer.is_empty())])
            .find(|(_, missing)| *missing);
        if let Some((what, _)) = missing {
            return Err(Bad(format!("its target {id:?} has no {what}")));
        }
        if !wire.peer.is_empty() {
            self.notes.push(format!(
                "target {} of peer {}: not supported, as the agent's HTTP API does not offer a peer's roots",
                wire.service, wire.peer
            ));
        }
        Ok(TargetPlan {
            id: id.to_owned(),
            service: wire.service.clone(),
            partition: or_default(&wire.partition),
            datacenter: wire.datacenter.clone(),
            sni: Sni::Given(wire.sni.clone()),
            identities: vec![Identity {
                partition: or_default(&wire.partition),
                namespace: or_default(&wire.namespace),
                datacenter: wire.datacenter.clone(),
                service: wire.service.clone(),
            }],
            connect_timeout: wire
                .connect_timeout
                .positive()
                .or_else(|| resolver.connect_timeout.positive())
                .unwrap_or(CONNECT_TIMEOUT),
            only_passing: wire.subset.only_passing,
            // A service outside the mesh is never reached through a gateway.
            gateway_mode: if wire.external { String::new() } else { wire.mesh_gateway.mode.clone() },
            instances: wire.peer.is_empty().then(|| {
                Query::Endpoints(EndpointsQuery {
                    service: wire.service.clone(),
                    datacenter: Some(wire.datacenter.clone()),
                    namespace: tenancy(&wire.namespace, self.enterprise),
                    partition: tenancy(&wire.partition, self.enterprise),
                    peer: None,
                    filter: Some(wire.subset.filter.clone()).filter(|filter| !filter.is_empty()),
                })
            }),
        })
    }
}
