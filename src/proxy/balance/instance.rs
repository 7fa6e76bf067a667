//! State of one instance.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::latency::{Latency, Waiting};
use crate::observe::Destination;
use crate::proxy::codec::pool::Pool;
use crate::proxy::log_limit::Seldom;
use crate::proxy::tunnel::Sessions;
use crate::snapshot::{Address, PassiveHealthCheck, Target};
use crate::stats::{ClusterStats, Member, MemberState};

/// An instance of a target, with what is remembered of it across snapshots.
#[derive(Debug)]
pub struct Instance {
    pub address: Address,
    pub(super) weight: u32,
    pub(super) state: Arc<State>,
    /// Of the target.
    pub(super) stats: Arc<ClusterStats>,
}

/// Shared by all threads, without a lock. All times are milliseconds of the [`Clock`](super::Clock).
#[derive(Debug)]
pub(super) struct State {
    pub in_flight: AtomicU32,
    /// Connections that HTTP requests share.
    pool: Pool,
    /// Sessions that are free for connections.
    sessions: Arc<Sessions>,
    /// Lines about what it is not.
    refusals: Seldom,
    /// So much may be in flight, times the weight, before others are preferred. It is small and grows with each success
    /// where an instance comes new to others or is back, so that it is not run over.
    window: AtomicU32,
    pub latency: Latency,
    /// Requests that were not answered yet.
    pub waiting: Waiting,
    /// Shut for a while after it could not be reached.
    pub aside: Gate,
    /// A task sees when it can be reached again.
    watched: AtomicBool,
    /// Shut while it is ejected.
    pub circuit: Gate,
    /// In a row: connections that failed.
    unreachable: AtomicU32,
    /// In a row: connections that its sidecar took and ended without a byte.
    unanswered: AtomicU32,
    /// In a row: whatever failed.
    failures: AtomicU32,
    /// How often it was ejected, less one for each healthy interval.
    ejections: AtomicU32,
    /// When the last ejection ended.
    returned: AtomicU64,
}

impl Instance {
    /// As a place to send something to.
    #[must_use]
    pub fn destination(&self, target: &Arc<Target>) -> Destination {
        let (target, address, stats) = (Arc::clone(target), self.address.clone(), Arc::clone(&self.stats));
        Destination::Instance { target, address, stats }
    }

    /// Its state at `now`.
    pub(super) fn look(&self, now: u64) -> Member {
        let State { aside, circuit, .. } = &*self.state;
        let state = if !circuit.lets_in(now) {
            MemberState::Ejected
        } else if !aside.lets_in(now) {
            MemberState::Unreachable
        } else if circuit.is_open() && aside.is_open() {
            MemberState::Healthy
        } else {
            MemberState::Probed
        };
        Member {
            address: self.address.to_string(),
            weight: self.weight,
            state,
            in_flight: self.state.in_flight.load(Ordering::Relaxed),
            latency: self.state.latency.estimate(now),
        }
    }

    /// The numbers of its target.
    #[must_use]
    pub fn stats(&self) -> &Arc<ClusterStats> {
        &self.stats
    }

    /// Connections to it that are kept for HTTP requests.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.state.pool
    }

    /// For the line that says that what is there is not it.
    pub(in crate::proxy) fn refusals(&self) -> &Seldom {
        &self.state.refusals
    }

    /// Sessions with it that are kept for connections.
    #[must_use]
    pub fn sessions(&self) -> &Arc<Sessions> {
        &self.state.sessions
    }

    /// For a task that sees when it can be reached again; `None`: there is one.
    #[must_use]
    pub fn watch(&self) -> Option<Watched> {
        (!self.state.watched.swap(true, Ordering::Relaxed)).then(|| Watched(Arc::clone(&self.state)))
    }

    /// Keeps it aside for so long from `now` on; false: it is not put aside any more.
    #[must_use]
    pub fn stay_aside(&self, now: u64, time: Duration) -> bool {
        self.state.aside.stay_shut(now.saturating_add(millis(time)))
    }

    /// It can be reached again.
    pub fn is_back(&self) {
        self.state.reached();
    }

    /// Whether it may be picked, be it to see whether it is back.
    pub(super) fn is_fit(&self, now: u64) -> bool {
        self.state.aside.lets_in(now) && self.state.circuit.lets_in(now)
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.state, &other.state)
    }

    /// Whether one more would be better off here than at `other`: by requests in flight for the weight, and by how
    /// long answers take where that differs clearly.
    pub(super) fn beats(&self, other: &Self, by_latency: Option<u64>) -> bool {
        let (mine, others) = (self.load(), other.load());
        if self.is_full(mine) != other.is_full(others) {
            return other.is_full(others);
        }
        let estimates = by_latency
            .and_then(|now| self.latencies(other, now))
            .filter(|(mine, others)| *mine > others * CLEARLY || *others > mine * CLEARLY);
        match estimates {
            Some((my_latency, other_latency)) => {
                let cost = |latency: f32, load: u32, weight: u32| latency * (load + 1) as f32 / weight as f32;
                cost(my_latency, mine, self.weight) < cost(other_latency, others, other.weight)
            }
            // A tie is left to the draw, which is by weight already.
            None => u64::from(mine) * u64::from(other.weight) < u64::from(others) * u64::from(self.weight),
        }
    }

    /// What answers are expected to take here and at `other`, where that is known of both: of late, and at least as long
    /// as those who wait have waited. Where nothing was answered yet, that can only speak against it.
    pub(super) fn latencies(&self, other: &Self, now: u64) -> Option<(f32, f32)> {
        let (waited, others_waited) = (self.state.waited(now), other.state.waited(now));
        match (self.state.latency.estimate(now), other.state.latency.estimate(now)) {
            (Some(mine), Some(others)) => Some((mine.max(waited), others.max(others_waited))),
            (None, Some(others)) => Some((waited, others.max(others_waited))).filter(|(mine, others)| mine > others),
            (Some(mine), None) => Some((mine.max(waited), others_waited)).filter(|(mine, others)| others > mine),
            (None, None) => None,
        }
    }

    pub(super) fn load(&self) -> u32 {
        self.state.in_flight.load(Ordering::Relaxed)
    }

    fn is_full(&self, in_flight: u32) -> bool {
        in_flight >= self.state.window.load(Ordering::Relaxed).saturating_mul(self.weight)
    }
}

impl State {
    /// Of an instance that comes to others, which are at work already.
    pub(super) fn newcomer() -> Self {
        Self { window: AtomicU32::new(FIRST_WINDOW), ..Self::default() }
    }

    /// In microseconds: what those who wait for an answer have waited already, on average. Where answers come
    /// nevertheless, those who wait longer ask for more, and say nothing of others.
    fn waited(&self, now: u64) -> f32 {
        let waited = self.waiting.average(now).unwrap_or(0.0);
        self.latency.silence(now).map_or(waited, |silence| silence.min(waited))
    }

    /// An answer of any kind: it can be reached.
    pub(super) fn reached(&self) {
        if self.unreachable.load(Ordering::Relaxed) != 0 {
            self.unreachable.store(0, Ordering::Relaxed);
            self.window.store(FIRST_WINDOW, Ordering::Relaxed);
            self.aside.open();
        }
    }

    /// A good one.
    pub(super) fn succeeded(&self) {
        self.reached();
        for in_a_row in [&self.failures, &self.unanswered] {
            if in_a_row.load(Ordering::Relaxed) != 0 {
                in_a_row.store(0, Ordering::Relaxed);
            }
        }
        let window = self.window.load(Ordering::Relaxed);
        if window < UNLIMITED {
            let next = if window < LAST_WINDOW { window + 1 } else { UNLIMITED };
            self.window.store(next, Ordering::Relaxed);
        }
    }

    /// It could not be reached: it is put aside for 1 s, doubled with each time in a row up to 30 s. What fails
    /// while it is aside was under way already and says nothing new, unless it is the `probe` that was to tell.
    pub(super) fn could_not_be_reached(&self, now: u64, probe: bool) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        self.put_aside(now, probe);
        // What comes up there again may be another program.
        self.sessions.clear();
    }

    /// It took a connection and ended it at once without a byte, as a sidecar does whose app is not there. It is put aside
    /// as one that could not be reached, but not for a single time.
    pub(super) fn left_unanswered(&self, now: u64, probe: bool) {
        if self.unanswered.fetch_add(1, Ordering::Relaxed) + 1 >= UNANSWERED || probe {
            self.put_aside(now, probe);
        }
    }

    fn put_aside(&self, now: u64, probe: bool) {
        let doubled = self.unreachable.load(Ordering::Relaxed).min(5);
        let until = now.saturating_add(millis((ASIDE * 2_u32.pow(doubled)).min(ASIDE_LIMIT)));
        if self.aside.shut(now, until, probe) {
            self.unreachable.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a failure, and returns whether there are enough in a row for an ejection. Then the count begins anew.
    pub(super) fn fails_too_often(&self, maximum: u32) -> bool {
        let enough = self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= maximum;
        if enough {
            self.failures.store(0, Ordering::Relaxed);
        }
        enough
    }

    /// Opens the circuit and returns for how long: the base time for each ejection so far, at most 300 s (or the base
    /// time). Each interval since the last one ended takes one off, as in Envoy. The caller holds the target's lock.
    pub(super) fn eject(&self, now: u64, check: &PassiveHealthCheck, probe: bool) -> Duration {
        let healthy = now.saturating_sub(self.returned.load(Ordering::Relaxed)) / millis(check.interval).max(1);
        let forgiven = if probe { 0 } else { u32::try_from(healthy).unwrap_or(u32::MAX) };
        let ejections = self.ejections.load(Ordering::Relaxed).saturating_sub(forgiven).saturating_add(1);
        self.ejections.store(ejections, Ordering::Relaxed);
        let time = check.base_ejection_time.saturating_mul(ejections).min(check.base_ejection_time.max(EJECTION_LIMIT));
        self.circuit.shut(now, now.saturating_add(millis(time).max(1)), probe);
        time
    }

    /// The probe was answered well: the circuit is closed again.
    pub(super) fn returns(&self, now: u64) {
        self.returned.store(now, Ordering::Relaxed);
        self.failures.store(0, Ordering::Relaxed);
        self.window.store(FIRST_WINDOW, Ordering::Relaxed);
        self.circuit.open();
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            in_flight: AtomicU32::new(0),
            pool: Pool::default(),
            sessions: Arc::default(),
            refusals: Seldom::default(),
            window: AtomicU32::new(UNLIMITED),
            latency: Latency::default(),
            waiting: Waiting::default(),
            aside: Gate::default(),
            watched: AtomicBool::new(false),
            circuit: Gate::default(),
            unreachable: AtomicU32::new(0),
            unanswered: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            ejections: AtomicU32::new(0),
            returned: AtomicU64::new(0),
        }
    }
}

/// Lets all in, or nobody for a while and then one alone, whose fate tells how it goes on.
///
/// As a circuit: an open gate is the closed circuit, a shut gate the open one, and a gate that is due the
/// half-open one.
#[derive(Debug, Default)]
pub(super) struct Gate(AtomicU64);

impl Gate {
    /// Open, or due for a probe.
    pub(super) fn lets_in(&self, now: u64) -> bool {
        self.0.load(Ordering::Relaxed) <= now
    }

    /// It was not shut, or what was sent through since came back well.
    pub(super) fn is_open(&self) -> bool {
        self.0.load(Ordering::Relaxed) == OPEN
    }

    /// Goes in, as the only one if the gate is due; then `Some(true)`. `None`: another was faster.
    pub(super) fn enter(&self, now: u64) -> Option<bool> {
        match self.0.load(Ordering::Relaxed) {
            OPEN => Some(false),
            until if until > now => None,
            until => self.change(until, PROBED).then_some(true),
        }
    }

    /// When it is due; for the order alone.
    pub(super) fn due(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Tells whether it did: a gate that is shut already stays as it is, except for its probe.
    pub(super) fn shut(&self, now: u64, until: u64, probe: bool) -> bool {
        let shut = |current: u64| (current <= now || (probe && current == PROBED)).then_some(until);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, shut).is_ok()
    }

    pub(super) fn open(&self) {
        self.0.store(OPEN, Ordering::Relaxed);
    }

    /// Keeps it shut until then at least; false if it is open.
    pub(super) fn stay_shut(&self, until: u64) -> bool {
        let longer = |current: u64| (current != OPEN).then(|| current.max(until));
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, longer).is_ok()
    }

    /// The probe came to nothing: another may go.
    pub(super) fn abandon(&self) {
        self.change(PROBED, DUE);
    }

    fn change(&self, from: u64, to: u64) -> bool {
        self.0.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

const OPEN: u64 = 0;
/// The circuit is open, and its time is up.
const DUE: u64 = 1;
/// The circuit is open until the result of a probe.
const PROBED: u64 = u64::MAX;

/// Says that a task sees when the instance can be reached again, until it is dropped.
#[derive(Debug)]
pub struct Watched(Arc<State>);

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.watched.store(false, Ordering::Relaxed);
    }
}

/// Counts a connection or request of an instance until it is dropped.
#[derive(Debug)]
pub struct InFlight {
    instance: Arc<Instance>,
    /// When it began to wait for an answer, if it still does.
    waits_since: Option<u64>,
}

impl InFlight {
    pub(super) fn new(instance: &Arc<Instance>, now: u64) -> Self {
        instance.state.in_flight.fetch_add(1, Ordering::Relaxed);
        instance.state.waiting.begin(now);
        Self { instance: Arc::clone(instance), waits_since: Some(now) }
    }

    /// It waits no longer.
    pub(super) fn answered(&mut self) {
        if let Some(since) = self.waits_since.take() {
            self.instance.state.waiting.end(since);
        }
    }

    #[must_use]
    pub fn instance(&self) -> &Arc<Instance> {
        &self.instance
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.answered();
        self.instance.state.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX - 1).min(u64::MAX - 1)
}

const ASIDE: Duration = Duration::from_secs(1);
/// Unanswered connects in a row after which an instance is put aside.
const UNANSWERED: u32 = 2;
const ASIDE_LIMIT: Duration = Duration::from_secs(30);
/// Longest ejection: Envoy's `max_ejection_time`, which Consul does not set.
const EJECTION_LIMIT: Duration = Duration::from_secs(300);
/// Ratio below which two latencies count as equal, so that noise does not send all traffic to one of two like
/// instances.
const CLEARLY: f32 = 1.5;
const FIRST_WINDOW: u32 = 8;
/// Successes after which a new instance has no window any more.
const LAST_WINDOW: u32 = 256;
const UNLIMITED: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_that_is_due_lets_one_in_who_decides() {
        let gate = Gate::default();
        assert_eq!(gate.enter(0), Some(false));
        assert!(gate.shut(0, 100, false) && !gate.shut(50, 900, false));
        assert_eq!((gate.lets_in(99), gate.enter(99)), (false, None));
        assert_eq!((gate.lets_in(100), gate.enter(100)), (true, Some(true)));
        assert_eq!((gate.lets_in(100), gate.enter(100)), (false, None));
        assert!(!gate.shut(100, 200, false) && gate.shut(100, 200, true));
        assert_eq!(gate.enter(200), Some(true));
        gate.abandon();
        assert_eq!(gate.enter(201), Some(true));
        gate.open();
        gate.abandon();
        assert_eq!(gate.enter(0), Some(false));
    }

    #[test]
    fn time_aside_doubles_with_each_probe_that_fails_and_not_with_what_failed_together() {
        let state = State::default();
        for _ in 0..10 {
            state.could_not_be_reached(0, false);
        }
        let mut due = 1000;
        for seconds in [2, 4, 8, 16, 30, 30] {
            assert_eq!(state.aside.due(), due);
            assert_eq!(state.aside.enter(due), Some(true));
            state.could_not_be_reached(due, true);
            due += seconds * 1000;
        }
        state.reached();
        assert!(state.aside.lets_in(0));
        state.could_not_be_reached(5, false);
        assert_eq!(state.aside.due(), 1005);
    }

    #[test]
    fn ejections_grow_longer_up_to_a_limit_and_are_forgiven_in_time() {
        let check = PassiveHealthCheck::default();
        let state = State::default();
        let mut now = 0;
        let mut times = Vec::new();
        for _ in 0..12 {
            let time = state.eject(now, &check, now > 0);
            times.push(time.as_secs());
            now += millis(time);
            assert_eq!((state.circuit.lets_in(now - 1), state.circuit.enter(now)), (false, Some(true)));
        }
        assert_eq!(times, [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 300, 300]);
        state.returns(now);
        assert_eq!(state.eject(now + 90_000, &check, false).as_secs(), 120);
        let long = PassiveHealthCheck { base_ejection_time: Duration::from_secs(1000), ..check };
        assert_eq!(State::default().eject(0, &long, false).as_secs(), 1000);
    }

    #[test]
    fn successes_widen_the_window_until_there_is_none() {
        let address = Address { host: crate::snapshot::Host::Ip([127, 0, 0, 1].into()), port: 1 };
        let stats = Arc::new(ClusterStats::new(crate::stats::scope::Cluster::LocalApp));
        let instance = Instance { address, weight: 2, state: Arc::new(State::newcomer()), stats };
        assert!(instance.is_full(2 * FIRST_WINDOW) && !instance.is_full(2 * FIRST_WINDOW - 1));
        (0..300).for_each(|_| instance.state.succeeded());
        assert!(!instance.is_full(1_000_000));
        instance.state.could_not_be_reached(0, false);
        instance.state.reached();
        assert!(instance.is_full(2 * FIRST_WINDOW));
    }
}
