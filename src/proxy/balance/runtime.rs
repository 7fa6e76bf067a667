//! Upstreams with what is remembered of their instances from one snapshot to the next.

use std::collections::HashMap;
use std::sync::Arc;

use super::balancer::{Balancer, Settings, Shared};
use super::budget::RetryBudget;
use crate::observe::{Observer, target_name};
use crate::snapshot::{OutboundListener, Resolver, Target, Upstream};
use crate::stats::scope::Cluster;

/// What an outbound listener and its connections go by. Where one listener leads to many upstreams, their states are
/// kept in the place of this one.
#[derive(Debug)]
pub struct OutboundRuntime {
    pub listener: Arc<OutboundListener>,
    pub upstream: Arc<UpstreamRuntime>,
}

impl OutboundRuntime {
    /// Takes over what `previous` remembers.
    #[must_use]
    pub fn new(listener: Arc<OutboundListener>, previous: Option<&Self>, observer: &Observer) -> Self {
        let previous = previous.map(|previous| &*previous.upstream);
        let upstream = Arc::new(UpstreamRuntime::new(Arc::clone(&listener.upstream), previous, observer));
        Self { listener, upstream }
    }
}

/// An upstream with what is remembered of its instances.
#[derive(Debug)]
pub struct UpstreamRuntime {
    pub upstream: Arc<Upstream>,
    pub balancers: Balancers,
}

impl UpstreamRuntime {
    /// Takes over what `previous` remembers.
    #[must_use]
    pub fn new(upstream: Arc<Upstream>, previous: Option<&Self>, observer: &Observer) -> Self {
        let balancers = Balancers::new(&upstream, previous.map(|plan| &plan.balancers), observer);
        Self { upstream, balancers }
    }
}

/// State of an upstream's targets.
#[derive(Debug)]
pub struct Balancers {
    /// By the target's id.
    by_target: HashMap<String, Arc<Balancer>>,
    pub budget: Arc<RetryBudget>,
}

impl Balancers {
    /// Takes over what `previous` remembers. A target that several resolvers share is balanced as that resolver says
    /// whose primary it is.
    #[must_use]
    pub fn new(upstream: &Upstream, previous: Option<&Self>, observer: &Observer) -> Self {
        let resolvers: Vec<&Resolver> = upstream.chain.resolvers().collect();
        let primaries = resolvers.iter().flat_map(|resolver| resolver.targets.iter().take(1).zip([*resolver]));
        let others = resolvers.iter().flat_map(|resolver| resolver.targets.iter().skip(1).map(|t| (t, *resolver)));
        let budget: Arc<RetryBudget> = previous.map(|balancers| Arc::clone(&balancers.budget)).unwrap_or_default();
        let mut by_target = HashMap::new();
        for (target, resolver) in primaries.chain(others) {
            if !by_target.contains_key(&target.id) {
                let previous = previous.and_then(|balancers| balancers.by_target.get(&target.id));
                let shared = || {
                    let cluster = Cluster::Target(Arc::new(target_name(target)));
                    let stats = observer.stats().cluster(&cluster);
                    Arc::new(Shared::new(target.id.clone(), stats, Arc::clone(&budget), observer.clone()))
                };
                let shared = previous.map_or_else(shared, |previous| Arc::clone(&previous.shared));
                let settings = Settings::new(upstream, resolver);
                let balancer = Balancer::resume(&target.endpoints, settings, previous, shared);
                by_target.insert(target.id.clone(), balancer);
            }
        }
        Self { by_target, budget }
    }

    /// By the id of the target.
    #[must_use]
    pub fn get(&self, target: &str) -> Option<&Arc<Balancer>> {
        self.by_target.get(target)
    }

    /// The targets of a resolver in the order to try them: as they are, but those without an instance that is up
    /// wait behind the others.
    #[must_use]
    pub fn in_order<'a>(&'a self, targets: &'a [Arc<Target>], now: u64) -> Vec<(&'a Arc<Target>, &'a Arc<Balancer>)> {
        let balanced = |target: &'a Arc<Target>| Some((target, self.by_target.get(&target.id)?));
        let mut order: Vec<_> = targets.iter().filter_map(balanced).collect();
        if order.len() > 1 {
            order.sort_by_cached_key(|(_, balancer)| !balancer.is_up(now));
        }
        order
    }
}
