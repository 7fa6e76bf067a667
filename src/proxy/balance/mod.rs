//! Which instance of a target a connection or request goes to, and what is remembered of each.
//!
//! [`Balancers`] belong to an upstream and one snapshot; what they remember goes on to the next. A connection or a
//! try of a request takes five steps:
//!
//! 1. [`Balancers::in_order`]: the targets, those that are up first.
//! 2. [`Balancer::admit`]: a permit for each limit that it counts towards, held as long as it does.
//! 3. [`Balancer::pick`]: an instance that was not tried yet. None: [`Balancer::no_endpoint_reason`] tells why.
//! 4. [`Picked::report`], or for a relayed connection [`Picked::connected`] or [`Picked::closed_unanswered`]: how it went. A
//!    pick that is dropped without a word counts as nothing.
//! 5. Hold the [`InFlight`] to the end of the connection or of the response's body.
//!
//! Instances that do badly are kept from traffic in two ways. One that can't be reached is *put aside*: it comes last,
//! but it comes, as nothing was sent to it that could be lost; and `proxy/probe.rs` sees when it can be reached again. One that answers with errors is *ejected*: it gets
//! nothing for a while. After either, one connection or request alone probes it. Unless it was said how many may be
//! ejected ([`PassiveHealthCheck::max_ejection_percent`]), an ejection never makes things worse than the app's own
//! answers: the last instance that is usable is not ejected, and one that is comes after all others, but it comes.
//!
//! All of it is atomics, save a lock per target that is taken when an instance is ejected. A pick looks at a
//! few instances, however many there are, unless most of them are out. Time and randomness are arguments.

mod budget;
mod instance;
mod latency;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use self::instance::State;
pub use crate::observe::Clock;
use crate::observe::{Event, Observer, Overflowed, target_name};
use crate::proxy::limits::{Counts, Limit, Overflow, Permit};
use crate::snapshot::{
    Address, Endpoint, Endpoints, HashTable, Limits, OutboundListener, PassiveHealthCheck, Policy, Resolver, Target,
    Upstream,
};
use crate::stats::scope::Cluster;
use crate::stats::{ClusterStats, Members, MembersNow};

pub use budget::{Retry, RetryBudget};
pub use instance::{InFlight, Instance};

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

/// What is remembered of an upstream's targets.
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
        let mut by_target = HashMap::new();
        for (target, resolver) in primaries.chain(others) {
            if !by_target.contains_key(&target.id) {
                let previous = previous.and_then(|balancers| balancers.by_target.get(&target.id));
                let shared = || {
                    let cluster = Cluster::Target(Arc::new(target_name(target)));
                    let stats = observer.stats().cluster(&cluster);
                    Arc::new(Shared::new(target.id.clone(), stats, observer.clone()))
                };
                let shared = previous.map_or_else(shared, |previous| Arc::clone(&previous.shared));
                let settings = Settings::new(upstream, resolver);
                let balancer = Balancer::resume(&target.endpoints, settings, previous, shared);
                by_target.insert(target.id.clone(), balancer);
            }
        }
        Self { by_target, budget: previous.map(|balancers| Arc::clone(&balancers.budget)).unwrap_or_default() }
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
    fn new(upstream: &Upstream, resolver: &Resolver) -> Self {
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
    instances: Vec<Arc<Instance>>,
    /// Sum of the weights up to and including each instance; empty when all weights are equal.
    cumulated: Vec<u64>,
    /// From one turn to the next of a weighted round.
    stride: u64,
    table: Option<HashTable>,
    settings: Settings,
    endpoints: Arc<Endpoints>,
    shared: Arc<Shared>,
}

/// What is remembered of a target.
#[derive(Debug)]
struct Shared {
    /// The target's id, and who is told of its limits and ejections.
    target: String,
    stats: Arc<ClusterStats>,
    observer: Observer,
    counts: Arc<Counts>,
    /// Of round robin.
    turn: AtomicU64,
    /// Held to eject, so that not too many are at once.
    ejecting: Mutex<()>,
    /// When an instance was picked last, within [`NOTED`].
    used: AtomicU64,
    /// When a connection was last taken by an app, likewise.
    answered: AtomicU64,
    /// Probes of instances that are under way.
    probes: Arc<AtomicUsize>,
}

impl Shared {
    fn new(target: String, stats: Arc<ClusterStats>, observer: Observer) -> Self {
        Self {
            target,
            stats,
            observer,
            counts: Arc::default(),
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
        MembersNow { registered: self.endpoints.registered, usable }
    }
}

/// How a try of a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// An answer that is no fault of the instance, 4xx included.
    Success,
    /// A 5xx, or a gRPC status that says as much.
    ServerError,
    /// Connected, but no answer: reset, broken, timed out.
    Reset,
    /// No connection, so that nothing was sent.
    Unreachable,
}

/// An instance that was chosen, until it is known how it went.
#[derive(Debug)]
pub struct Picked {
    balancer: Arc<Balancer>,
    in_flight: InFlight,
    probe: Probe,
    /// Below 100: an ejection is enforced if its chance in percent is above.
    die: u64,
}

/// Which gates of its instance a pick alone may open. Dropped, it leaves them to another.
#[derive(Debug, Default)]
struct Probe {
    instance: Option<Arc<Instance>>,
    aside: bool,
    circuit: bool,
}

impl Balancer {
    /// Takes over what `previous` remembers of the instances that are still there. One that is new belongs to no target, and
    /// nobody is told of it.
    #[must_use]
    pub fn new(endpoints: &Arc<Endpoints>, settings: Settings, previous: Option<&Arc<Self>>) -> Arc<Self> {
        let nobody = || {
            let stats = Arc::new(ClusterStats::new(Cluster::LocalApp));
            Arc::new(Shared::new(String::new(), stats, Observer::default()))
        };
        let shared = previous.map_or_else(nobody, |previous| Arc::clone(&previous.shared));
        Self::resume(endpoints, settings, previous, shared)
    }

    fn resume(
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

    /// Who is told of what becomes of its instances.
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

    /// Picks an instance that is not among `tried`. `None`: there is none, or the others are ejected; who may
    /// send to the same instance again then asks without `tried`.
    ///
    /// `hash` counts with the policies that go by one; without it any instance will do. `random` gives numbers
    /// below its argument.
    #[must_use]
    pub fn pick(
        self: &Arc<Self>,
        now: u64,
        hash: Option<u64>,
        tried: &[Arc<Instance>],
        mut random: impl FnMut(u64) -> u64,
    ) -> Option<Picked> {
        note(&self.shared.used, now);
        let ask = Ask { now, tried };
        // Another thread may be faster at a probe. That is rare, and twice in a row rarer.
        for _ in 0..PROBES {
            let Some(instance) = self.choose(hash, &ask, &mut random) else { break };
            if let Some(picked) = self.take(instance, now, &mut random) {
                return Some(picked);
            }
        }
        self.last_resort(&ask, &mut random)
    }

    fn choose(&self, hash: Option<u64>, ask: &Ask<'_>, random: &mut impl FnMut(u64) -> u64) -> Option<&Arc<Instance>> {
        match self.settings.policy {
            Policy::Unset => self.least_loaded(2, self.settings.http, ask, random),
            Policy::LeastRequest { choices } => self.least_loaded(choices, false, ask, random),
            Policy::RoundRobin => self.next_in_turn(ask),
            Policy::Random => self.draw(ask, random),
            Policy::RingHash { .. } | Policy::Maglev => match (hash, &self.table) {
                (Some(hash), Some(table)) => self.hashed(hash, table, ask),
                _ => self.draw(ask, random),
            },
        }
    }

    /// Of so many that are drawn by weight, the least loaded.
    fn least_loaded(
        &self,
        choices: u32,
        by_latency: bool,
        ask: &Ask<'_>,
        random: &mut impl FnMut(u64) -> u64,
    ) -> Option<&Arc<Instance>> {
        let now = by_latency.then_some(ask.now);
        let better = |best, other: &Arc<Instance>| ask.fits(other) && other.beats(best, now);
        let mut best = self.draw(ask, random)?;
        if self.instances.len() <= choices.max(2) as usize {
            return Some(
                self.instances.iter().fold(best, |best, other| if better(best, other) { other } else { best }),
            );
        }
        for _ in 1..choices.max(2) {
            match self.draw_other(best, random) {
                Some(other) if better(best, other) => best = other,
                _ => {}
            }
        }
        Some(best)
    }

    /// One that fits, with a chance by its weight.
    fn draw(&self, ask: &Ask<'_>, random: &mut impl FnMut(u64) -> u64) -> Option<&Arc<Instance>> {
        let drawn = (0..DRAWS).find_map(|_| self.draw_any(random).filter(|instance| ask.fits(instance)));
        drawn.or_else(|| self.search(usize::try_from(random(self.instances.len().max(1) as u64)).unwrap_or(0), ask))
    }

    fn draw_any(&self, random: &mut impl FnMut(u64) -> u64) -> Option<&Arc<Instance>> {
        match self.cumulated.last() {
            Some(&total) => self.at(random(total)),
            None if self.instances.is_empty() => None,
            None => self.instances.get(usize::try_from(random(self.instances.len() as u64)).unwrap_or(0)),
        }
    }

    /// With a chance by its weight, but another one.
    fn draw_other(&self, first: &Arc<Instance>, random: &mut impl FnMut(u64) -> u64) -> Option<&Arc<Instance>> {
        let other = |instance: &&Arc<Instance>| !Arc::ptr_eq(instance, first);
        let drawn = (0..2).find_map(|_| self.draw_any(random).filter(other));
        drawn.or_else(|| {
            let start = usize::try_from(random(self.instances.len() as u64)).unwrap_or(0);
            let (before, after) = self.instances.split_at(start.min(self.instances.len()));
            after.iter().chain(before).find(other)
        })
    }

    /// The instance that a point below the sum of weights belongs to.
    fn at(&self, point: u64) -> Option<&Arc<Instance>> {
        self.instances.get(self.cumulated.partition_point(|&sum| sum <= point))
    }

    fn next_in_turn(&self, ask: &Ask<'_>) -> Option<&Arc<Instance>> {
        let next = || {
            let turn = self.shared.turn.fetch_add(1, Ordering::Relaxed);
            match self.cumulated.last() {
                Some(&total) => {
                    // The stride has no divisor in common with the total: each point has its turn once a round.
                    let point = u128::from(turn) * u128::from(self.stride) % u128::from(total);
                    self.at(u64::try_from(point).unwrap_or(0))
                }
                None => self.instances.get(usize::try_from(turn).unwrap_or(0).checked_rem(self.instances.len())?),
            }
        };
        let drawn = (0..DRAWS).find_map(|_| next().filter(|instance| ask.fits(instance)));
        drawn.or_else(|| {
            let turn = self.shared.turn.load(Ordering::Relaxed).checked_rem(self.instances.len() as u64)?;
            self.search(usize::try_from(turn).unwrap_or(0), ask)
        })
    }

    fn hashed(&self, hash: u64, table: &HashTable, ask: &Ask<'_>) -> Option<&Arc<Instance>> {
        let candidates = table.candidates(hash).take(CANDIDATES).filter_map(|index| self.instances.get(index));
        let mut fitting = candidates.filter(|instance| ask.fits(instance));
        fitting.next().or_else(|| {
            let start = hash.checked_rem(self.instances.len() as u64)?;
            self.search(usize::try_from(start).unwrap_or(0), ask)
        })
    }

    /// The first that fits, from a place on.
    fn search(&self, start: usize, ask: &Ask<'_>) -> Option<&Arc<Instance>> {
        let (before, after) = self.instances.split_at(start.min(self.instances.len()));
        after.iter().chain(before).find(|instance| ask.fits(instance))
    }

    /// Among those put aside, the one whose time is up first. Then, if there is none that could be used, one that is
    /// ejected, unless the configuration says how many may be.
    fn last_resort(self: &Arc<Self>, ask: &Ask<'_>, random: &mut impl FnMut(u64) -> u64) -> Option<Picked> {
        let untried = || self.instances.iter().filter(|instance| !ask.was_tried(instance));
        let aside = untried().filter(|instance| instance.state.circuit.lets_in(ask.now));
        if let Some(instance) = aside.min_by_key(|instance| instance.state.aside.due()) {
            let circuit = instance.state.circuit.enter(ask.now)?;
            return Some(self.picked(instance, Probe::new(instance, false, circuit), ask.now, random));
        }
        let panics = self.settings.passive_health_check.max_ejection_percent.is_none() && !self.is_up(ask.now);
        let ejected = untried().filter(|_| panics).min_by_key(|instance| instance.load());
        ejected.map(|instance| self.picked(instance, Probe::default(), ask.now, random))
    }

    /// `None`: another has just gone to probe it.
    fn take(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        now: u64,
        random: &mut impl FnMut(u64) -> u64,
    ) -> Option<Picked> {
        let aside = instance.state.aside.enter(now)?;
        let mut probe = Probe::new(instance, aside, false);
        if instance.state.circuit.enter(now)? {
            probe = probe.with_circuit(instance);
        }
        Some(self.picked(instance, probe, now, random))
    }

    fn picked(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        probe: Probe,
        now: u64,
        random: &mut impl FnMut(u64) -> u64,
    ) -> Picked {
        let certain = matches!(self.settings.passive_health_check.enforcing_consecutive_5xx, 0 | 100..);
        let die = if certain { 0 } else { random(100) };
        Picked { balancer: Arc::clone(self), in_flight: InFlight::new(instance, now), probe, die }
    }

    /// Ejects an instance, unless too many are.
    fn eject(&self, instance: &Instance, now: u64, probe: bool, gone: bool) {
        let _ejecting = self.shared.ejecting.lock().unwrap_or_else(PoisonError::into_inner);
        if !probe && !instance.state.circuit.lets_in(now) {
            return;
        }
        if !self.may_be_ejected(instance, now, gone) {
            if probe {
                instance.state.circuit.open();
            }
            return;
        }
        let time = instance.state.eject(now, &self.settings.passive_health_check, probe);
        tracing::warn!(target: "proxy.upstream", instance = %instance.address, seconds = time.as_secs(), "An instance is ejected for its errors");
        let Shared { observer, target, stats, .. } = &*self.shared;
        observer.observe(Event::Ejected { target, stats, instance: &instance.address, time });
    }

    /// Where nothing is said: as many as give no answer, but of those that answer with errors, which may be the requests'
    /// own, few. Never the last that can be used.
    fn may_be_ejected(&self, instance: &Instance, now: u64, gone: bool) -> bool {
        let others = || self.instances.iter().filter(|other| !other.is_same(instance));
        let ejected = 1 + others().filter(|other| !other.state.circuit.lets_in(now)).count();
        let within = |percent: u32| ejected * 100 <= self.instances.len().saturating_mul(percent as usize);
        match self.settings.passive_health_check.max_ejection_percent {
            Some(percent) => within(percent),
            None => (gone || ejected == 1 || within(EJECTED)) && others().any(|other| other.is_fit(now)),
        }
    }
}

/// Which instances will do.
struct Ask<'a> {
    now: u64,
    tried: &'a [Arc<Instance>],
}

impl Ask<'_> {
    fn fits(&self, instance: &Arc<Instance>) -> bool {
        instance.is_fit(self.now) && !self.was_tried(instance)
    }

    fn was_tried(&self, instance: &Arc<Instance>) -> bool {
        self.tried.iter().any(|tried| tried.is_same(instance))
    }
}

impl Picked {
    #[must_use]
    pub fn instance(&self) -> &Arc<Instance> {
        self.in_flight.instance()
    }

    /// A connection that is relayed was made, and the app has it. How it goes on says nothing of the instance.
    #[must_use]
    pub fn connected(self, now: u64) -> InFlight {
        note(&self.balancer.shared.answered, now);
        self.succeeded(now);
        self.over()
    }

    /// A connection that is relayed was made, and ended by the instance's side at once without a byte. That speaks
    /// against the instance only where others do otherwise: there are services that are like that.
    #[must_use]
    pub fn closed_unanswered(self, now: u64) -> InFlight {
        if is_of_late(&self.balancer.shared.answered, now) {
            self.in_flight.instance().state.left_unanswered(now, self.probe.aside);
        }
        self.over()
    }

    /// Nothing can be said of how it went.
    #[must_use]
    pub fn without_result(self) -> InFlight {
        self.over()
    }

    fn over(mut self) -> InFlight {
        self.in_flight.answered();
        self.in_flight
    }

    /// How a request went, and how long it took from being sent (on a connection that was ready, as connecting would
    /// make new instances look slow) to the head of its response. The result is to be held until the
    /// response's body is done.
    ///
    /// [`Report::ServerError`] and [`Report::Reset`] count towards an ejection. It is decided at once and not on a
    /// sweep. [`Report::Unreachable`] counts with them, but alone it only puts the instance aside.
    pub fn report(self, outcome: Report, latency: Duration, now: u64) -> InFlight {
        let instance = self.in_flight.instance();
        let state = &instance.state;
        match outcome {
            Report::Success => {
                state.latency.record(latency, now);
                self.succeeded(now);
            }
            Report::ServerError | Report::Reset => {
                state.latency.record_error(latency, now);
                state.reached();
                self.failed(now, outcome == Report::Reset);
            }
            Report::Unreachable => state.could_not_be_reached(now, self.probe.aside),
        }
        self.over()
    }

    fn succeeded(&self, now: u64) {
        let instance = self.in_flight.instance();
        instance.state.succeeded();
        // What was under way when it was ejected says nothing of now.
        if self.probe.circuit {
            instance.state.returns(now);
            tracing::info!(target: "proxy.upstream", instance = %instance.address, "An ejected instance is back");
        }
    }

    /// `gone`: there was no answer.
    fn failed(&self, now: u64, gone: bool) {
        let instance = self.in_flight.instance();
        let check = &self.balancer.settings.passive_health_check;
        let enforced = self.die < u64::from(check.enforcing_consecutive_5xx);
        if self.probe.circuit || (instance.state.fails_too_often(check.max_failures) && enforced) {
            self.balancer.eject(instance, now, self.probe.circuit, gone);
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

impl Probe {
    fn new(instance: &Arc<Instance>, aside: bool, circuit: bool) -> Self {
        Self { instance: (aside || circuit).then(|| Arc::clone(instance)), aside, circuit }
    }

    fn with_circuit(mut self, instance: &Arc<Instance>) -> Self {
        self.instance = Some(Arc::clone(instance));
        self.circuit = true;
        self
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if let Some(instance) = &self.instance {
            if self.aside {
                instance.state.aside.abandon();
            }
            if self.circuit {
                instance.state.circuit.abandon();
            }
        }
    }
}

/// Keeps the time at which something was last so.
fn note(time: &AtomicU64, now: u64) {
    let last = time.load(Ordering::Relaxed);
    if last == NEVER || now.saturating_sub(last) >= NOTED {
        time.store(now, Ordering::Relaxed);
    }
}

fn is_of_late(time: &AtomicU64, now: u64) -> bool {
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

/// Draws before all instances are searched for one that fits.
const DRAWS: usize = 8;
/// Places of a hash table that are tried before all instances are searched.
const CANDIDATES: usize = 128;
const PROBES: usize = 3;
/// Probes of a target's instances that may be under way at a time.
const PROBED_AT_ONCE: usize = 32;
/// In milliseconds: what was longer ago, is no more.
const OF_LATE: u64 = 60_000;
/// How exactly such a time is kept, in milliseconds, so that few have to write it.
const NOTED: u64 = 1_000;
const NEVER: u64 = u64::MAX;
/// Part in percent of the instances that may be ejected for errors where nothing is said; the default of Envoy.
const EJECTED: u32 = 10;

#[cfg(test)]
mod tests;
