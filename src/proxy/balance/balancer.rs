//! The instances of one target, and what is remembered of it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::budget::RetryBudget;
use super::instance::{Instance, State};
use crate::observe::{Event, Observer, Overflowed};
use crate::proxy::limits::{Counts, Limit, Overflow, Permit};
use crate::snapshot::{
    Address, Endpoint, Endpoints, HashTable, Limits, PassiveHealthCheck, Policy, Resolver, Upstream,
};
use crate::stats::scope::Cluster;
use crate::stats::{ClusterStats, Members, MembersNow};

/// How the instances of a target are balanced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    pub policy: Policy,
    /// Answers are timed, so that latency is something to go by.
    pub http: bool,
    pub limits: Limits,
    pub passive_health_check: PassiveHealthCheck,
}

impl Settings {
    pub(super) fn new(upstream: &Upstream, resolver: &Resolver) -> Self {
        Self {
            policy: resolver.load_balancer.policy,
            http: upstream.chain.protocol.is_http(),
            limits: upstream.limits,
            passive_health_check: upstream.passive_health_check,
        }
    }
}

/// The instances of one target.
#[derive(Debug)]
pub struct Balancer {
    pub(super) instances: Vec<Arc<Instance>>,
    /// Sum of the weights up to and including each instance; empty when all weights are equal.
    pub(super) cumulated: Vec<u64>,
    /// From one turn to the next of a weighted round.
    pub(super) stride: u64,
    pub(super) table: Option<HashTable>,
    pub(super) settings: Settings,
    pub(super) endpoints: Arc<Endpoints>,
    pub(super) shared: Arc<Shared>,
}

/// State of a target.
#[derive(Debug)]
pub(super) struct Shared {
    /// The target's id, and the observer of its limits and ejections.
    pub(super) target: String,
    pub(super) stats: Arc<ClusterStats>,
    pub(super) observer: Observer,
    counts: Arc<Counts>,
    /// Of the upstream, for those who look on.
    budget: Arc<RetryBudget>,
    /// Of round robin.
    pub(super) turn: AtomicU64,
    /// Held to eject, so that not too many are at once.
    pub(super) ejecting: Mutex<()>,
    /// When an instance was picked last, within [`NOTED`].
    pub(super) used: AtomicU64,
    /// When a connection was last taken by an app, likewise.
    pub(super) answered: AtomicU64,
    /// Probes of instances that are under way.
    probes: Arc<AtomicUsize>,
}

impl Shared {
    pub(super) fn new(target: String, stats: Arc<ClusterStats>, budget: Arc<RetryBudget>, observer: Observer) -> Self {
        Self {
            target,
            stats,
            observer,
            counts: Arc::default(),
            budget,
            turn: AtomicU64::new(0),
            ejecting: Mutex::default(),
            used: AtomicU64::new(NEVER),
            answered: AtomicU64::new(NEVER),
            probes: Arc::default(),
        }
    }
}

impl Members for Balancer {
    fn look(&self) -> MembersNow {
        let now = self.shared.observer.clock().now();
        let usable = self.instances.iter().map(|instance| instance.look(now)).collect();
        let limit = |limit| self.shared.counts.look(limit, &self.settings.limits);
        MembersNow {
            registered: self.endpoints.registered,
            usable,
            connections: limit(Limit::Connections),
            pending_requests: limit(Limit::PendingRequests),
            requests: limit(Limit::ConcurrentRequests),
            retries_are_refused: self.shared.budget.refuses(now),
        }
    }
}

impl Balancer {
    /// Takes over what `previous` remembers of the instances that are still there. One that is new belongs to no target, and
    /// nobody is told of it.
    #[must_use]
    pub fn new(endpoints: &Arc<Endpoints>, settings: Settings, previous: Option<&Arc<Self>>) -> Arc<Self> {
        let nobody = || {
            let stats = Arc::new(ClusterStats::new(Cluster::LocalApp));
            Arc::new(Shared::new(String::new(), stats, Arc::default(), Observer::default()))
        };
        let shared = previous.map_or_else(nobody, |previous| Arc::clone(&previous.shared));
        Self::resume(endpoints, settings, previous, shared)
    }

    pub(super) fn resume(
        endpoints: &Arc<Endpoints>,
        settings: Settings,
        previous: Option<&Arc<Self>>,
        shared: Arc<Shared>,
    ) -> Arc<Self> {
        let is_same =
            |previous: &&Arc<Self>| Arc::ptr_eq(&previous.endpoints, endpoints) && previous.settings == settings;
        if let Some(same) = previous.filter(is_same) {
            return Arc::clone(same);
        }
        let known: HashMap<&Address, &Arc<Instance>> =
            previous.iter().flat_map(|balancer| &balancer.instances).map(|i| (&i.address, i)).collect();
        let new = || Arc::new(if known.is_empty() { State::default() } else { State::newcomer() });
        let instance = |endpoint: &Endpoint| {
            let state = known.get(&endpoint.address).map_or_else(new, |known| Arc::clone(&known.state));
            let (address, weight) = (endpoint.address.clone(), endpoint.weight.max(1));
            Arc::new(Instance { address, weight, state, stats: Arc::clone(&shared.stats) })
        };
        let instances: Vec<Arc<Instance>> = endpoints.usable.iter().map(instance).collect();
        let cumulated = cumulated(&instances);
        let balancer = Arc::new(Self {
            stride: cumulated.last().map_or(1, |total| stride(*total)),
            cumulated,
            instances,
            table: HashTable::new(settings.policy, &endpoints.usable),
            settings,
            endpoints: Arc::clone(endpoints),
            shared,
        });
        let weak: Weak<Self> = Arc::downgrade(&balancer);
        balancer.shared.stats.set_members(weak);
        balancer
    }

    /// The numbers of its target.
    #[must_use]
    pub fn stats(&self) -> &Arc<ClusterStats> {
        &self.shared.stats
    }

    /// The observer of its instances.
    #[must_use]
    pub fn observer(&self) -> &Observer {
        &self.shared.observer
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.instances.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.instances.is_empty()
    }

    /// Whether an instance could be picked that is neither put aside nor ejected.
    #[must_use]
    pub fn is_up(&self, now: u64) -> bool {
        self.instances.iter().any(|instance| instance.is_fit(now))
    }

    /// Whether this is still one of the instances.
    #[must_use]
    pub fn has(&self, instance: &Instance) -> bool {
        self.instances.iter().any(|one| one.is_same(instance))
    }

    /// Whether an instance was picked of late.
    #[must_use]
    pub fn is_used(&self, now: u64) -> bool {
        is_of_late(&self.shared.used, now)
    }

    /// For one probe of an instance; `None`: there are enough at a time.
    #[must_use]
    pub fn probe_permit(&self) -> Option<ProbePermit> {
        let permit = ProbePermit(Arc::clone(&self.shared.probes));
        (permit.0.fetch_add(1, Ordering::Relaxed) < PROBED_AT_ONCE).then_some(permit)
    }

    /// Counts something towards a limit of the target until the permit is dropped. To be asked for also where no limit
    /// is set, as one may be later.
    ///
    /// # Errors
    /// The limit is reached. Zero lets nothing through.
    pub fn admit(&self, limit: Limit) -> Result<Permit, Overflow> {
        let Shared { counts, observer, target, stats, .. } = &*self.shared;
        counts.admit(limit, &self.settings.limits).inspect_err(|overflow| {
            observer.observe(Event::Overflowed(Overflowed::Target { target, stats, limit: overflow.limit.name() }));
        })
    }

    /// Why there is no instance to pick, for the log.
    #[must_use]
    pub fn no_endpoint_reason(&self) -> String {
        match (self.instances.len(), self.endpoints.registered) {
            (0, 0) => {
                "no instance is registered with a sidecar (or the token may not see it: node:read and service:read)"
                    .into()
            }
            (0, count) => format!("none of {count} registered instances is passing its checks"),
            (count, _) => format!("all {count} instances are ejected for their errors, or were tried"),
        }
    }
}

/// Counts a probe until it is dropped.
#[derive(Debug)]
pub struct ProbePermit(Arc<AtomicUsize>);

impl Drop for ProbePermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keeps the time at which something was last so.
pub(super) fn note(time: &AtomicU64, now: u64) {
    let last = time.load(Ordering::Relaxed);
    if last == NEVER || now.saturating_sub(last) >= NOTED {
        time.store(now, Ordering::Relaxed);
    }
}

pub(super) fn is_of_late(time: &AtomicU64, now: u64) -> bool {
    let last = time.load(Ordering::Relaxed);
    last != NEVER && now.saturating_sub(last) < OF_LATE
}

fn cumulated(instances: &[Arc<Instance>]) -> Vec<u64> {
    if instances.windows(2).all(|pair| pair[0].weight == pair[1].weight) {
        return Vec::new();
    }
    let mut sum = 0;
    let add = |instance: &Arc<Instance>| {
        sum += u64::from(instance.weight);
        sum
    };
    instances.iter().map(add).collect()
}

/// A number without a divisor in common with the total, near its golden section: turns that follow each other
/// lie far apart, so that a heavy instance does not have all of its turns in a row.
fn stride(total: u64) -> u64 {
    let golden = total.saturating_mul(618) / 1000;
    (golden.max(1)..=total).find(|stride| greatest_common_divisor(*stride, total) == 1).unwrap_or(1)
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Concurrent probes of a target's instances.
pub(super) const PROBED_AT_ONCE: usize = 32;
/// Time in milliseconds for which an event counts as recent.
const OF_LATE: u64 = 60_000;
/// Resolution of such a time in milliseconds, so that few threads have to write it.
const NOTED: u64 = 1_000;
const NEVER: u64 = u64::MAX;
