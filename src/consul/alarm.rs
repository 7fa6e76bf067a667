//! Alarms: a few queries that tell many watches when to ask again.
//!
//! Where there are more watches than connections, taking turns costs the agent and us queries for ever, and a
//! change is noticed when its turn comes. So there, a few queries that always block tell that something of a
//! class may have changed, and the watches of that class rest, without a connection, until an alarm rings.
//! Then all of them ask once, without blocking: a sweep.
//!
//! What keeps a change from being lost: **a watch rests on an answer only if it was asked for after every alarm
//! of its class had an index to block on, and after the last sweep began.** Whatever changes later is past those
//! indexes, rings, and begins another sweep. An answer that was asked for earlier is asked for once more.
//! That the alarm and the watch speak of the same state takes answers of the leader: whoever asks for stale
//! ones, or is given them by the agent's own configuration, takes turns.
//!
//! An alarm that fails, or cannot be relied on, unsets its class, whose watches take turns until it is back.
//! Tried with Consul 1.8.7, 1.19.2 and 1.22, with and without ACLs: each of these queries wakes although
//! its filter leaves nothing and the token may see nothing of what changed; but for the lists of config entries,
//! which from 1.19 at the latest do not wake for entries that the token may not read, and say so.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reqwest::Method;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

use super::Query;
use super::endpoint::{Class, Flow, Request, Response};
use super::pace::random;
use super::slots::{CYCLE, Load, Member, SWEEPERS, Slots};

/// Sweeps ask no more than so many queries a second for long, which is what taking turns asks at its most.
pub(super) const MOST_QUERIES: f64 = 20.0;

/// So many sweeps of all watches begin without a pause after a quiet time.
const BURST: f64 = 4.0;

/// A watch that rests asks now and then even so, one in each of these on the whole…
const PATROL: Duration = Duration::from_secs(2);

/// …and each within these bounds.
pub(super) const PATROL_BOUNDS: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(600));

/// How often it is judged anew whether alarms are worth their connections, apart from when watches come and go.
const REVIEW: Duration = Duration::from_secs(30);

/// Connections that sweeps use at the most, for they are idle afterwards.
const MOST_SWEEPERS: usize = 8;

impl Class {
    /// The queries that wake when an answer of this class may have changed.
    pub(super) fn alarms(&self) -> Vec<Query<Option<u64>>> {
        match self {
            Self::Instances(datacenter) => {
                let of = |path: &[&str], filter| {
                    let request = Request::new(Method::GET, path).param("dc", datacenter.as_deref());
                    alarm(request.param("filter", filter), unless_stale)
                };
                vec![
                    of(&["health", "state", "any"], Some("CheckID == \"\"")),
                    // An address, weights or meta. Agents before 1.14 know no filter here, and ignore it.
                    of(&["catalog", "services"], Some("ServiceName == \"\"")),
                    of(&["catalog", "nodes"], Some("Node == \"\"")),
                    // Which gateways stand for a service. One that may not be read is in no list of instances.
                    of(&["config", "terminating-gateway"], None),
                ]
            }
            Self::Chains => {
                ["proxy-defaults", "service-defaults", "service-resolver", "service-router", "service-splitter"]
                    .map(|kind| alarm(Request::new(Method::GET, &["config", kind]), unless_filtered))
                    .into()
            }
        }
    }
}

/// A query for an index alone; `None` where it cannot be relied on.
fn alarm(request: Request, decode: fn(&Response) -> Result<Option<u64>, String>) -> Query<Option<u64>> {
    Query { request, flow: Flow::Alarm, always: true, class: None, covered: |_| true, decode }
}

fn unless_stale(response: &Response) -> Result<Option<u64>, String> {
    Ok(response.index.filter(|_| !response.stale))
}

fn unless_filtered(response: &Response) -> Result<Option<u64>, String> {
    Ok(response.index.filter(|_| !response.stale && !response.filtered_by_acls))
}

/// The alarms of all watches that share connections.
pub(super) struct Alarms {
    slots: Arc<Slots>,
    bells: Mutex<HashMap<Class, Arc<Bell>>>,
    /// Watches came or went.
    review: Notify,
    budget: Mutex<Budget>,
    sweepers: Arc<Semaphore>,
}

/// What the watches of a class go by.
pub(super) struct Bell {
    sweep: watch::Sender<Sweep>,
    /// Watches of this class.
    members: AtomicUsize,
}

/// How things stand with a class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sweep {
    /// How many have begun.
    number: u64,
    /// Whether every alarm has an index that it blocks on, and has had one since before this sweep began.
    set: bool,
}

impl Bell {
    fn new() -> Arc<Self> {
        Arc::new(Self { sweep: watch::Sender::default(), members: AtomicUsize::new(0) })
    }

    pub(super) fn members(&self) -> usize {
        self.members.load(Ordering::Relaxed)
    }

    /// Whether a sweep has begun.
    pub(super) fn has_rung(&self) -> bool {
        self.sweep.borrow().number > 0
    }

    /// Begins a sweep. From now on answers may be rested on.
    pub(super) fn ring(&self) {
        self.sweep.send_modify(|sweep| *sweep = Sweep { number: sweep.number + 1, set: true });
    }

    /// No answer is rested on until the next sweep.
    pub(super) fn unset(&self) {
        self.sweep.send_if_modified(|sweep| std::mem::take(&mut sweep.set));
    }
}

/// The alarm of one watch.
pub(super) struct Rest {
    alarms: Arc<Alarms>,
    bell: Arc<Bell>,
    sweep: watch::Receiver<Sweep>,
    /// How things stood when the request under way was sent…
    asked: Sweep,
    /// …and the one that was answered last.
    answered: Sweep,
    /// Whether the class's alarms ring for all that the last answer depends on.
    covered: bool,
}

impl Drop for Rest {
    fn drop(&mut self) {
        self.bell.members.fetch_sub(1, Ordering::Relaxed);
        self.alarms.review.notify_one();
    }
}

impl Rest {
    /// To be called before a request is sent.
    pub(super) fn asks(&mut self) {
        self.asked = *self.sweep.borrow_and_update();
    }

    pub(super) fn answered(&mut self, covered: bool) {
        self.answered = self.asked;
        self.covered = covered;
    }

    /// Ends when the alarms are set for an answer that may be rested on.
    pub(super) async fn set(&self) {
        let mut sweep = self.sweep.clone();
        match self.covered {
            // The sender lives in the bell, so this cannot fail.
            true => drop(sweep.wait_for(|sweep| sweep.set).await),
            false => std::future::pending().await,
        }
    }

    /// Rests while nothing rings, until it is time to ask without blocking. `None` where the watch has to take
    /// turns.
    pub(super) async fn until_alarm(&mut self, member: &Member) -> Option<OwnedSemaphorePermit> {
        let sweep = *self.sweep.borrow_and_update();
        let rests = self.covered && sweep.set;
        member.rest(rests);
        if !rests {
            return None;
        }
        if self.answered == sweep {
            let patrol = self.alarms.patrol();
            tokio::select! {
                // The sender lives in the bell, so this cannot fail.
                _ = self.sweep.changed() => {}
                () = tokio::time::sleep(patrol) => {}
            }
        }
        // It is never closed.
        let permit = self.alarms.sweepers.clone().acquire_owned().await.ok();
        let set = self.sweep.borrow().set;
        member.rest(set);
        permit.filter(|_| set)
    }
}

impl Alarms {
    pub(super) fn new(slots: Arc<Slots>) -> Arc<Self> {
        let sweepers = Arc::new(Semaphore::new(MOST_SWEEPERS));
        Arc::new(Self { slots, bells: Mutex::default(), review: Notify::new(), budget: Mutex::default(), sweepers })
    }

    pub(super) fn join(self: &Arc<Self>, class: &Class) -> Rest {
        let bell = self.lock().entry(class.clone()).or_insert_with(Bell::new).clone();
        bell.members.fetch_add(1, Ordering::Relaxed);
        self.review.notify_one();
        let sweep = bell.sweep.subscribe();
        let (asked, answered) = (Sweep::default(), Sweep::default());
        Rest { alarms: self.clone(), bell, sweep, asked, answered, covered: false }
    }

    /// When a watch asks that no alarm woke.
    fn patrol(&self) -> Duration {
        let (shortest, longest) = PATROL_BOUNDS;
        let watches = u32::try_from(self.slots.load().turns).unwrap_or(u32::MAX);
        PATROL.saturating_mul(watches).clamp(shortest, longest).mul_f64(0.5 + 0.5 * random())
    }

    /// Waits until alarms may be worth more or less than they were.
    pub(super) async fn to_be_reviewed(&self) {
        tokio::select! {
            () = self.review.notified() => {}
            () = self.slots.shrunk.notified() => {}
            () = tokio::time::sleep(REVIEW), if !self.lock().is_empty() => {}
        }
    }

    /// The classes whose alarms are worth their connections.
    pub(super) fn wanted(&self) -> HashMap<Class, Arc<Bell>> {
        let mut bells = self.lock();
        bells.retain(|_, bell| bell.members() > 0);
        let sizes = bells.iter().map(|(class, bell)| (class, bell.members())).collect();
        let worth = worthwhile(&self.slots.load(), sizes).into_iter().cloned().collect::<Vec<_>>();
        worth.into_iter().filter_map(|class| bells.get(&class).cloned().map(|bell| (class, bell))).collect()
    }

    /// Takes what a sweep costs, or says when it can be had.
    pub(super) fn afford(&self, queries: usize) -> Result<(), Instant> {
        let mut budget = self.budget.lock().unwrap_or_else(PoisonError::into_inner);
        budget.take(queries, self.slots.load().turns.max(queries), Instant::now())
    }

    #[cfg(test)]
    pub(super) fn any_set(&self) -> bool {
        self.lock().values().any(|bell| bell.sweep.borrow().set)
    }

    #[cfg(test)]
    pub(super) fn bell(&self, class: &Class) -> Arc<Bell> {
        self.lock()[class].clone()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Class, Arc<Bell>>> {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Chooses classes by their number of watches: the largest first, until the rest have a connection each. None
/// that makes those that are left take turns more slowly than without it.
fn worthwhile<'c>(load: &Load, mut classes: Vec<(&'c Class, usize)>) -> Vec<&'c Class> {
    let mut chosen = Vec::new();
    let (mut watches, mut slots) = (load.turns, load.total.saturating_sub(load.always));
    classes.sort_by_key(|&(class, members)| (std::cmp::Reverse(members), class));
    for (class, members) in classes {
        let sweepers = if chosen.is_empty() { 0 } else { SWEEPERS };
        if watches + sweepers <= slots {
            break;
        }
        let alarms = class.alarms().len();
        let left = watches.saturating_sub(members);
        let fits = members > alarms && alarms + SWEEPERS <= slots;
        if fits && left * slots <= watches * (slots - alarms) {
            chosen.push(class);
            (watches, slots) = (left, slots - alarms);
        }
    }
    chosen
}

/// Lets sweeps begin at once after a quiet time, and bounds how much they ask in the long run.
#[derive(Debug, Default)]
struct Budget {
    /// Queries that were asked and are not paid for yet.
    debt: f64,
    since: Option<Instant>,
}

impl Budget {
    /// For some of so many `watches` that rest: those may ask a few times each without a pause, and once in
    /// every [`CYCLE`] for ever, but for the bound on all together.
    fn take(&mut self, queries: usize, watches: usize, now: Instant) -> Result<(), Instant> {
        let (queries, watches) = (queries as f64, watches.max(1) as f64);
        let rate = (watches / CYCLE.as_secs_f64()).min(MOST_QUERIES);
        let since = self.since.replace(now).unwrap_or(now);
        self.debt = (self.debt - rate * now.saturating_duration_since(since).as_secs_f64()).max(0.0);
        let excess = self.debt + queries - BURST * watches;
        if excess > 0.0 {
            // A little more, so that rounding does not ask for the same again.
            return Err(now + Duration::from_secs_f64(excess / rate) + Duration::from_millis(1));
        }
        self.debt += queries;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::consul::{Chain, Instances};

    #[test]
    fn only_what_the_alarms_tell_of_has_a_class() {
        let plain = Instances { service: "db".into(), ..Instances::default() };
        let some = || Some("other".to_string());
        assert_eq!(Query::health_connect(&plain).class, Some(Class::Instances(None)));
        let elsewhere = Instances { datacenter: some(), ..plain.clone() };
        assert_eq!(Query::health_service(&elsewhere).class, Some(Class::Instances(some())));
        for other in [
            Instances { namespace: some(), ..plain.clone() },
            Instances { partition: some(), ..plain.clone() },
            Instances { peer: some(), ..plain.clone() },
        ] {
            assert_eq!(Query::health_connect(&other).class, None);
        }
        assert_eq!(Query::discovery_chain(&Chain::default()).class, Some(Class::Chains));
        let chain = Query::discovery_chain(&Chain { namespace: some(), ..Chain::default() });
        assert_eq!(chain.class, None);
        for (namespace, covered) in [("default", true), ("", true), ("other", false)] {
            let target = crate::consul::api::ChainTarget { namespace: namespace.into(), ..Default::default() };
            let targets = BTreeMap::from([("db".to_string(), target)]);
            let answer = crate::consul::api::CompiledDiscoveryChain { targets, ..Default::default() };
            assert_eq!((chain.covered)(&answer), covered);
        }
    }

    #[test]
    fn a_datacenter_is_asked_by_its_own_alarms() {
        for query in Class::Instances(Some("dc2".into())).alarms() {
            assert!(query.request.params.contains(&("dc", "dc2".to_string())), "{}", query.request);
        }
    }

    #[test]
    fn alarms_are_chosen_where_nobody_is_worse_off() {
        let (home, away) = (Class::Instances(None), Class::Instances(Some("dc2".into())));
        let load = |total, turns| Load { total, always: 5, turns };
        let chosen = |load, sizes: &[(&'static str, usize)]| {
            let class = |name: &str| match name {
                "home" => &home,
                "away" => &away,
                _ => &Class::Chains,
            };
            let sizes = sizes.iter().map(|&(name, size)| (class(name), size)).collect();
            worthwhile(&load, sizes).into_iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(chosen(load(22, 401), &[("home", 200), ("chains", 200)]), ["instances", "discovery chains"]);
        // Everyone has a connection.
        assert_eq!(chosen(load(22, 17), &[("home", 8), ("chains", 8)]), [""; 0]);
        // One class makes enough room for the rest.
        assert_eq!(chosen(load(22, 20), &[("home", 14), ("chains", 6)]), ["instances"]);
        // Those that have no alarm would wait longer.
        assert_eq!(chosen(load(22, 250), &[("home", 50), ("chains", 0)]), [""; 0]);
        // There is no room for as many alarms.
        assert_eq!(chosen(load(12, 400), &[("home", 200), ("chains", 200)]), [""; 0]);
        assert_eq!(chosen(load(14, 400), &[("home", 200), ("chains", 200)]), ["instances"]);
        assert_eq!(chosen(load(4, 400), &[("home", 200), ("chains", 200)]), [""; 0]);
    }

    #[test]
    fn a_budget_lets_sweeps_be_prompt_but_not_endless() {
        let mut budget = Budget::default();
        let start = Instant::now();
        assert!(budget.take(200, 400, start).is_ok());
        assert!((0..7).all(|_| budget.take(200, 400, start).is_ok()));
        let later = budget.take(200, 400, start).expect_err("it is spent");
        assert!((Duration::from_secs(10)..Duration::from_secs(11)).contains(&(later - start)));
        assert!(budget.take(200, 400, later).is_ok());
        assert!(budget.take(200, 400, later).is_err());
        // Fewer watches are asked once in a cycle.
        let mut budget = Budget::default();
        assert!((0..4).all(|_| budget.take(40, 40, start).is_ok()));
        let later = budget.take(40, 40, start).expect_err("it is spent");
        assert!((CYCLE..CYCLE + Duration::from_secs(1)).contains(&(later - start)));
    }
}
