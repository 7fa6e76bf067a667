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
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::Query;
use super::endpoint::{Class, Flow, Request, Response};
use super::query::{Event, Watch, Watches, random};
use super::slots::{CYCLE, Load, Member, SWEEPERS, Slots};

/// What rings together is swept together, and not by all sidecars of a host at the same instant.
const GATHER: Duration = Duration::from_millis(100);

/// Sweeps ask no more than so many queries a second for long, which is what taking turns asks at its most.
const MOST_QUERIES: f64 = 20.0;

/// So many sweeps of all watches begin without a pause after a quiet time.
const BURST: f64 = 4.0;

/// A watch that rests asks now and then even so, one in each of these on the whole…
const PATROL: Duration = Duration::from_secs(2);

/// …and each within these bounds.
const PATROL_BOUNDS: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(600));

/// How often it is judged anew whether alarms are worth their connections, apart from when watches come and go.
const REVIEW: Duration = Duration::from_secs(30);

/// Connections that sweeps use at the most, for they are idle afterwards.
const MOST_SWEEPERS: usize = 8;

impl Class {
    /// The queries that wake when an answer of this class may have changed.
    fn alarms(&self) -> Vec<Query<Option<u64>>> {
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
struct Bell {
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
    fn members(&self) -> usize {
        self.members.load(Ordering::Relaxed)
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

    /// Sets alarms where and while they are worth it. `watches` gives what to ask through; `None` is the end.
    pub(super) async fn keep<W: Fn() -> Option<Watches>>(self: Arc<Self>, watches: W) {
        let mut set: HashMap<Class, Set> = HashMap::new();
        loop {
            tokio::select! {
                () = self.review.notified() => {}
                () = self.slots.shrunk.notified() => {}
                () = tokio::time::sleep(REVIEW), if !self.lock().is_empty() => {}
            }
            let wanted = self.wanted();
            set.retain(|class, _| wanted.contains_key(class));
            for (class, bell) in wanted {
                if set.contains_key(&class) {
                    continue;
                }
                let Some(watches) = watches() else { return };
                let ringing = ring(class.clone(), bell, self.clone(), watches);
                set.insert(class, Set { task: tokio::spawn(ringing) });
            }
        }
    }

    /// The classes whose alarms are worth their connections.
    fn wanted(&self) -> HashMap<Class, Arc<Bell>> {
        let mut bells = self.lock();
        bells.retain(|_, bell| bell.members() > 0);
        let sizes = bells.iter().map(|(class, bell)| (class, bell.members())).collect();
        let worth = worthwhile(&self.slots.load(), sizes).into_iter().cloned().collect::<Vec<_>>();
        worth.into_iter().filter_map(|class| bells.get(&class).cloned().map(|bell| (class, bell))).collect()
    }

    /// Takes what a sweep costs, or says when it can be had.
    fn afford(&self, queries: usize) -> Result<(), Instant> {
        let mut budget = self.budget.lock().unwrap_or_else(PoisonError::into_inner);
        budget.take(queries, self.slots.load().turns.max(queries), Instant::now())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Class, Arc<Bell>>> {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bell {
    fn new() -> Arc<Self> {
        Arc::new(Self { sweep: watch::Sender::default(), members: AtomicUsize::new(0) })
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

/// Alarms that are set, or about to be.
struct Set {
    task: JoinHandle<()>,
}

impl Drop for Set {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn ring(class: Class, bell: Arc<Bell>, alarms: Arc<Alarms>, watches: Watches) {
    let queries = class.alarms();
    let (sender, mut events) = mpsc::channel(queries.len());
    let mut ringer = Ringer { class, bell, armed: vec![false; queries.len()], due: None, told: false };
    let _asking: Vec<Watch> = queries
        .into_iter()
        .enumerate()
        .map(|(number, query)| watches.watch(query, sender.clone(), move |event| (number, event)))
        .collect();
    loop {
        let due = ringer.due;
        tokio::select! {
            Some((number, event)) = events.recv() => ringer.heard(number, event),
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                match alarms.afford(ringer.bell.members()) {
                    Ok(()) => ringer.sweep(),
                    Err(later) => ringer.due = Some(later),
                }
            }
        }
    }
}

/// The alarms of a class, which are unset with it.
struct Ringer {
    class: Class,
    bell: Arc<Bell>,
    /// By alarm: whether it has an index that it blocks on.
    armed: Vec<bool>,
    /// When a sweep begins.
    due: Option<Instant>,
    /// Whether it is logged that the alarms cannot be set.
    told: bool,
}

impl Ringer {
    fn heard(&mut self, number: usize, event: Event<Option<u64>>) {
        self.armed[number] = match &event {
            Event::Value(answer) => answer.value.is_some(),
            Event::Failed(_) => false,
        };
        if !self.armed[number] {
            self.unset();
            self.tell(&event);
        } else if self.armed.iter().all(|armed| *armed) {
            // The first time, nobody rests yet, and the sooner the fewer answers come too early to rest on.
            let first = self.bell.sweep.borrow().number == 0;
            let gather = if first { Duration::ZERO } else { GATHER.mul_f64(random()) };
            self.due.get_or_insert(Instant::now() + gather);
        }
    }

    fn sweep(&mut self) {
        self.due = None;
        self.told = false;
        self.bell.sweep.send_modify(|sweep| *sweep = Sweep { number: sweep.number + 1, set: true });
    }

    fn unset(&mut self) {
        self.due = None;
        self.bell.sweep.send_if_modified(|sweep| std::mem::take(&mut sweep.set));
    }

    fn tell(&mut self, event: &Event<Option<u64>>) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        let class = &self.class;
        match event {
            Event::Failed(error) => tracing::info!("Changes of {class} are looked for in turns: {error}"),
            Event::Value(_) => {
                tracing::info!("Changes of {class} are looked for in turns: answers are stale or filtered")
            }
        }
    }
}

impl Drop for Ringer {
    fn drop(&mut self) {
        self.unset();
    }
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

    use serde_json::json;

    use super::*;
    use crate::consul::slots::LONG_WAIT;
    use crate::consul::{Chain, Client, Instances, Settings};
    use crate::testing::{Agent, Fault};

    const SERVICES: usize = 300;
    const CHECKS: &str = "/v1/health/state/any";
    const ALARMS: [&str; 4] = [CHECKS, "/v1/catalog/services", "/v1/catalog/nodes", "/v1/config/terminating-gateway"];

    fn path(number: usize) -> String {
        format!("/v1/health/connect/s{number}")
    }

    /// Watches of the instances of many services.
    struct Many {
        agent: Agent,
        events: mpsc::Receiver<(usize, Option<usize>)>,
        all: Vec<Watch>,
        watches: Watches,
    }

    impl Many {
        async fn of(agent: Agent, settings: &Settings, services: usize) -> Self {
            for number in 0..services {
                agent.set(&path(number), json!([{}]));
            }
            let watches = Watches::new(Client::new(settings).expect("the settings are good"));
            let (sender, events) = mpsc::channel(16);
            let all = (0..services)
                .map(|number| {
                    let instances = Instances { service: format!("s{number}"), ..Instances::default() };
                    watches.watch(Query::health_connect(&instances), sender.clone(), move |event| match event {
                        Event::Value(answer) => (number, Some(answer.value.len())),
                        Event::Failed(_) => (number, None),
                    })
                })
                .collect();
            let mut many = Self { agent, events, all, watches };
            for _ in 0..services {
                assert_eq!(many.value().await.1, 1);
            }
            many
        }

        async fn start(services: usize) -> Self {
            let agent = agent_with_alarms().await;
            let settings = agent.settings();
            Self::of(agent, &settings, services).await
        }

        /// The next value, whatever failures come before it.
        async fn value(&mut self) -> (usize, usize) {
            loop {
                let event = tokio::time::timeout(LONG_WAIT * 20, self.events.recv()).await.expect("an event in time");
                if let (number, Some(instances)) = event.expect("running watches") {
                    return (number, instances);
                }
            }
        }

        /// Another number of instances of one service, and how long it took to be seen.
        async fn change(&mut self, number: usize, instances: usize, rings: Option<&str>) -> Duration {
            let start = Instant::now();
            self.agent.set(&path(number), json!(vec![json!({}); instances]));
            if let Some(alarm) = rings {
                self.agent.touch(alarm);
            }
            assert_eq!(self.value().await, (number, instances));
            start.elapsed()
        }

        /// Lets the watches come to rest.
        async fn settle(&self) {
            tokio::time::sleep(Duration::from_secs(40)).await;
        }

        fn resting(&self) -> bool {
            let alarms = self.watches.alarms().expect("alarms are on");
            alarms.lock().values().any(|bell| bell.sweep.borrow().set)
        }
    }

    async fn agent_with_alarms() -> Agent {
        let agent = Agent::start().await;
        for alarm in ALARMS {
            agent.set(alarm, json!([]));
        }
        agent
    }

    #[tokio::test(start_paused = true)]
    async fn what_rings_is_seen_at_once_and_silence_costs_little() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        let before = many.agent.count(|_| true);
        tokio::time::sleep(Duration::from_secs(600)).await;
        // Four alarms a minute, and each watch once in seven to ten; taking turns would ask 12 000 times.
        let asked = many.agent.count(|_| true) - before;
        assert!((300..700).contains(&asked), "{asked} requests");
        for (number, alarm) in ALARMS.into_iter().enumerate() {
            let took = many.change(100 + number, 2, Some(alarm)).await;
            assert!(took < Duration::from_secs(1), "{alarm}: {took:?}");
            many.settle().await;
        }
        let most = many.agent.most_connections();
        assert!(most <= 32, "{most} connections");
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_that_rings_nothing_is_found_by_the_patrol() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        let took = many.change(7, 2, None).await;
        assert!(took > Duration::from_secs(1) && took <= PATROL_BOUNDS.1, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn alarms_that_ring_all_the_time_cost_no_more_than_turns() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        let before = many.agent.count(|_| true);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(300) {
            many.agent.touch(CHECKS);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let asked = many.agent.count(|_| true) - before;
        let most = 300 * MOST_QUERIES as usize + 5 * SERVICES + 300;
        assert!((most / 2..=most).contains(&asked), "{asked} requests");
        // A sweep of all, and what is left of the one before it.
        let took = many.change(7, 2, Some(CHECKS)).await;
        assert!(took < Duration::from_secs(20), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn without_one_of_its_alarms_a_class_takes_turns() {
        for missing in ALARMS {
            let agent = agent_with_alarms().await;
            agent.remove(missing);
            let settings = agent.settings();
            let mut many = Many::of(agent, &settings, SERVICES).await;
            many.settle().await;
            assert!(!many.resting());
            let took = many.change(7, 2, None).await;
            assert!(took < Duration::from_secs(25), "{missing}: {took:?}");
            // And as soon as it is back, it rings.
            many.agent.set(missing, json!([]));
            many.settle().await;
            assert!(many.resting());
            let took = many.change(8, 2, Some(missing)).await;
            assert!(took < Duration::from_secs(1), "{missing}: {took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_was_away_is_asked_for_everything() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        many.agent.fault(Some(Fault::Status(500, "No cluster leader")));
        many.agent.disconnect();
        tokio::time::sleep(Duration::from_secs(5)).await;
        // Its indexes are as they were, as those of another agent can be by chance.
        many.agent.set(&path(7), json!([]));
        many.agent.fault(None);
        let start = Instant::now();
        assert_eq!(many.value().await, (7, 0));
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        many.settle().await;
        assert!(many.resting());
    }

    #[tokio::test(start_paused = true)]
    async fn indexes_that_go_backwards_ring() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        many.agent.go_backwards();
        let start = Instant::now();
        many.agent.set(&path(7), json!([]));
        assert_eq!(many.value().await, (7, 0));
        // A query with an index of the future ends with its wait.
        assert!(start.elapsed() < LONG_WAIT * 2, "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_have_a_connection_each_set_no_alarms() {
        let mut many = Many::start(20).await;
        many.settle().await;
        assert!(many.change(7, 2, None).await < Duration::from_millis(100));
        assert_eq!(many.agent.requests(CHECKS).len(), 0);
        many.all.truncate(5);
    }

    #[tokio::test(start_paused = true)]
    async fn alarms_end_with_the_crowd() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        assert!(many.resting());
        many.all.truncate(10);
        many.settle().await;
        assert!(!many.resting());
        assert!(many.change(7, 2, None).await < Duration::from_millis(100));
        drop(many.all);
        drop(many.watches);
        let gone = async {
            while many.agent.open_connections() > 0 {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(300), gone).await.expect("nothing is left that asks");
    }

    #[tokio::test(start_paused = true)]
    async fn stale_answers_and_other_namespaces_have_no_alarms() {
        for (stale, namespace) in [(true, None), (false, Some("team".to_string()))] {
            let agent = agent_with_alarms().await;
            let settings = Settings { stale, namespace, ..agent.settings() };
            let mut many = Many::of(agent, &settings, 100).await;
            many.settle().await;
            assert_eq!(many.agent.requests(CHECKS).len(), 0);
            assert!(many.change(7, 2, None).await < Duration::from_secs(25));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_rested_on_only_if_the_alarms_were_set_before_it_was_asked_for() {
        let slots = Slots::new(8);
        let alarms = Alarms::new(slots.clone());
        let member = slots.join(super::super::slots::Kind::Turn);
        let mut rest = alarms.join(&Class::Chains);
        let bell = rest.bell.clone();
        let mut ringer = Ringer { class: Class::Chains, bell, armed: vec![false; 2], due: None, told: false };
        let index = || Event::Value(crate::consul::Answer { value: Some(7), filtered_by_acls: false });
        let rests = async |rest: &mut Rest| {
            let second = tokio::time::timeout(Duration::from_secs(1), rest.until_alarm(&member)).await;
            second.is_err()
        };

        // Asked for before the alarms were set, answered after: asked for once more, without blocking.
        rest.asks();
        ringer.heard(0, index());
        assert!(ringer.due.is_none(), "one of two alarms is not enough");
        ringer.heard(1, index());
        ringer.sweep();
        rest.answered(true);
        assert!(rest.until_alarm(&member).await.is_some());
        rest.asks();
        rest.answered(true);
        assert!(rests(&mut rest).await);

        // An alarm between the request and its answer.
        rest.asks();
        ringer.heard(0, index());
        ringer.sweep();
        rest.answered(true);
        assert!(rest.until_alarm(&member).await.is_some());

        // The alarms were away in between.
        rest.asks();
        rest.answered(true);
        ringer.heard(1, Event::Value(crate::consul::Answer { value: None, filtered_by_acls: true }));
        assert!(rest.until_alarm(&member).await.is_none(), "without alarms it takes turns");
        ringer.heard(1, index());
        ringer.sweep();
        assert!(rest.until_alarm(&member).await.is_some());

        // An answer that the alarms do not cover.
        rest.asks();
        rest.answered(false);
        assert!(rest.until_alarm(&member).await.is_none());
        assert_eq!(slots.load().turns, 1);
        drop((rest, member));
        assert_eq!(slots.load().turns, 0);
    }

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
