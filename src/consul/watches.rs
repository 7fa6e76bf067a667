//! Queries that are kept up to date, with what they share.
//!
//! There is one way to ask. A *worker* has one request under way at a time: the first asks for intentions and nothing
//! else, the others take from the [`Schedule`] what is most urgent. How many of these work is up to the [`Budget`].

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::budget::Budget;
use super::endpoint::{Response, Table};
use super::failures::Failures;
use super::pace::{Backoff, random};
use super::progress::{Progress, ProgressRecord};
use super::query::{self, Event, Gone, RunningQuery};
pub use super::schedule::ScopeId;
use super::schedule::{Done, Id, Job, Next, Role, Room, Schedule, Worker};
use super::{Client, Error, Pool, Query, Scope};

/// Number of shared workers, most of which are idle.
const SHARED: usize = 7;

/// An agent without a connection left refuses within this time.
const PROMPT_REFUSAL: Duration = Duration::from_secs(1);

/// How often a sidecar finds out whether the agent has a connection left for other programs, where there have been too few, and
/// how long it waits once there was none, for its own and those of others to end.
const LEAVE_ROOM: Duration = Duration::from_secs(20);
const ROOM_IS_MADE: Duration = Duration::from_secs(60);

/// Longest pause of a worker after a failed connection, where nothing listens at the agent's address.
const UNREACHABLE_PAUSE: Duration = Duration::from_secs(2);
/// Longest pause of a worker after a failed connection, otherwise.
const REFUSED_PAUSE: Duration = Duration::from_secs(8);
/// Longest pause of the worker for intentions after a failed connection.
const AUTHORIZATION_PAUSE: Duration = Duration::from_millis(500);

/// Queries of one scope. Those of all scopes share workers and connections. Dropping the last clone leaves running queries alone.
#[derive(Clone)]
pub struct Watches {
    scope: Arc<FollowedScope>,
    running: Arc<Running>,
}

/// A query that is kept up to date. Dropping it ends that.
#[must_use = "a query ends when its handle is dropped"]
pub struct Watch {
    id: Id,
    progress: Arc<ProgressRecord>,
    /// Queries start anew with another token for as long as this lives.
    _scope: Arc<FollowedScope>,
    running: Arc<Running>,
}

/// Workers and what else runs. It ends with the last query and the last [`Watches`].
struct Running {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

/// A scope that is in use, and the task that follows its token.
struct FollowedScope {
    id: ScopeId,
    client: Client,
    follower: JoinHandle<()>,
}

/// The scopes that are in use, by number.
#[derive(Default)]
struct Scopes {
    used: Vec<Weak<FollowedScope>>,
    next: u64,
}

struct Shared {
    /// For what concerns the transport alone.
    client: Client,
    scopes: Mutex<Scopes>,
    /// The queries in boxes, as all entries are looked through again and again.
    schedule: Mutex<Schedule<Box<RunningQuery>>>,
    /// Of the watches of tables, by what is said of them.
    tables: Mutex<Vec<(Table, Weak<ProgressRecord>)>>,
    /// Something may be there to ask.
    work: Notify,
    /// Shared workers that wait for it.
    waiting: AtomicUsize,
    /// Something is there to ask, and nobody waits for it.
    urgent: Notify,
    /// Tells those that pause that the agent is back.
    recovered: Notify,
    failures: Failures,
    budget: Budget,
}

impl Watches {
    /// Starts the workers, for queries of the client's scope at first. Must be called within a runtime.
    #[must_use]
    pub fn new(client: Client) -> Self {
        let shared = Arc::new(Shared {
            budget: Budget::new(client.transport.max_connections),
            client: client.clone(),
            scopes: Mutex::default(),
            schedule: Mutex::new(Schedule::new(Instant::now())),
            tables: Mutex::default(),
            work: Notify::new(),
            waiting: AtomicUsize::new(0),
            urgent: Notify::new(),
            recovered: Notify::new(),
            failures: Failures::default(),
        });
        let mut tasks = vec![
            tokio::spawn(authorization_worker(shared.clone())),
            tokio::spawn(follow(shared.clone())),
            tokio::spawn(follow_room(shared.clone())),
        ];
        tasks.extend((0..SHARED).map(|number| tokio::spawn(shared_worker(shared.clone(), number))));
        let scope = shared.scope(client);
        Self { scope, running: Arc::new(Running { shared, tasks }) }
    }

    /// The same workers for the queries of another scope.
    ///
    /// # Errors
    /// When the scope's token can't be read or used.
    pub fn for_scope(&self, scope: Scope) -> anyhow::Result<Self> {
        let scope = match self.running.shared.used_scope(&scope) {
            Some(used) => used,
            None => self.running.shared.scope(self.client().for_scope(scope)?),
        };
        Ok(Self { scope, running: Arc::clone(&self.running) })
    }

    #[must_use]
    pub fn client(&self) -> &Client {
        &self.scope.client
    }

    /// Equal for equal scopes, for as long as one of them is in use.
    #[must_use]
    pub fn scope_id(&self) -> ScopeId {
        self.scope.id
    }

    /// Asks `query` from now on, and sends what `wrap` makes of its events. That ends with the handle or with the
    /// receiver.
    pub fn watch<T, U, F>(&self, mut query: Query<T>, events: mpsc::Sender<U>, wrap: F) -> Watch
    where
        T: Send + 'static,
        U: Send + 'static,
        F: Fn(Event<T>) -> U + Send + 'static,
    {
        let shared = &self.running.shared;
        let role = query::role(&mut query, self.client().has_tables());
        let running = Box::new(RunningQuery::new(self.client().clone(), query, events, wrap));
        let progress = Arc::clone(running.progress());
        let nobody_waits = shared.waiting.load(Ordering::Relaxed) == 0;
        let now = Instant::now();
        let mut schedule = shared.lock();
        let id =
            schedule.add(self.scope.id, role, running, now, |table| shared.watch_table(self.client().clone(), table));
        let interrupts = nobody_waits && schedule.may_interrupt(now);
        drop(schedule);
        shared.work.notify_waiters();
        if interrupts {
            shared.urgent.notify_waiters();
        }
        Watch { id, progress, _scope: Arc::clone(&self.scope), running: Arc::clone(&self.running) }
    }

    /// The watches of tables, each with what it watches: `instances`, `config entries`.
    #[must_use]
    pub fn tables(&self) -> Vec<(String, Progress)> {
        let now = Instant::now();
        let shared = &self.running.shared;
        let kept = shared.tables.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let tables = kept.iter().filter_map(|(table, progress)| Some((table, progress.upgrade()?)));
        let role = |table: &Table| Role::Table(table.clone());
        tables.map(|(table, progress)| (table.to_string(), progress.get(&role(table), None, now))).collect()
    }

    /// How many connections to the agent there may be, and whether they have been enough of late.
    #[must_use]
    pub fn connections(&self) -> AgentConnections {
        let usage = *self.running.shared.budget.follow().borrow();
        AgentConnections {
            allowed: usage.shared() + 1,
            room: match usage.room(Instant::now()) {
                Room::Enough => "enough",
                Room::Crowded => "crowded",
                Room::Scarce => "scarce",
            },
        }
    }

    #[cfg(test)]
    pub(super) fn is_known(&self, table: &Table) -> bool {
        self.running.shared.lock().is_known(self.scope.id, table)
    }
}

/// How the agent is asked at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgentConnections {
    /// Requests that may be under way at one time.
    pub allowed: usize,
    /// `enough`, `crowded`: too few for all programs of this host of late, or `scarce`: intentions may soon have the only one.
    pub room: &'static str,
}

impl Watch {
    /// How it is asked, and what it was answered.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let (role, next) = self.running.shared.lock().timing(self.id);
        self.progress.get(&role, next, Instant::now())
    }

    /// Its first answer is waited for: it is asked before those of others.
    pub fn hurry(&self) {
        self.running.shared.lock().await_first(self.id);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.running.shared.lock().remove(self.id);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Drop for FollowedScope {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

/// Follows the files that the transport was made from.
async fn follow(shared: Arc<Shared>) {
    shared.client.follow_transport().await;
}

/// Follows the file of a scope's token. Another token sees other things.
async fn follow_token(shared: Arc<Shared>, id: ScopeId, client: Client) {
    let mut tokens = client.token_changes();
    let start_anew = async {
        while tokens.changed().await.is_ok() {
            shared.lock().start_anew(id, Instant::now());
            shared.work.notify_waiters();
        }
    };
    tokio::join!(client.follow_token(), start_anew);
}

/// Learns whether there is room for other programs.
async fn follow_room(shared: Arc<Shared>) {
    let (budget, client) = (&shared.budget, &shared.client);
    leave_room(budget, || client.is_crowded()).await;
}

/// Whoever keeps its connections is refused none, while the programs are that make new ones. So where there have been too few
/// lately, this makes a new one now and then, to know of it. Elsewhere, the ones that are made anew each minute tell.
async fn leave_room<F: Future<Output = Option<bool>>>(budget: &Budget, is_crowded: impl Fn() -> F) {
    let mut pause = LEAVE_ROOM;
    loop {
        budget.shortage().await;
        tokio::time::sleep(pause.mul_f64(0.5 + random())).await;
        match is_crowded().await {
            Some(true) => {
                budget.refused(random());
                pause = ROOM_IS_MADE;
            }
            Some(false) => pause = LEAVE_ROOM,
            None => return,
        }
    }
}

async fn authorization_worker(shared: Arc<Shared>) {
    let mut usage = shared.budget.follow();
    let mut pause = Backoff::default();
    loop {
        let (alone, room) = {
            let usage = usage.borrow_and_update();
            (usage.shared() == 0, usage.room(Instant::now()))
        };
        let job = tokio::select! {
            biased;
            job = shared.next(Worker::Authorization { alone, room }) => job,
            _ = usage.changed() => continue,
        };
        if let Some(error) = shared.perform(job, Pool::Authorization).await {
            shared.pause(&mut pause, &error, AUTHORIZATION_PAUSE).await;
        } else {
            pause.reset();
        }
    }
}

async fn shared_worker(shared: Arc<Shared>, number: usize) {
    let mut usage = shared.budget.follow();
    let mut pause = Backoff::default();
    loop {
        shared.budget.reserve(number, &mut usage, random).await;
        let (of, room) = {
            let usage = usage.borrow_and_update();
            (usage.shared(), usage.room(Instant::now()))
        };
        let job = tokio::select! {
            biased;
            job = shared.next(Worker::Shared { of, room }) => job,
            _ = usage.changed() => continue,
        };
        if let Some(error) = shared.perform(job, Pool::Shared).await {
            let longest = if error.is_unreachable() { UNREACHABLE_PAUSE } else { REFUSED_PAUSE };
            shared.pause(&mut pause, &error, longest).await;
        } else {
            pause.reset();
        }
    }
}

/// Counts a worker that waits.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// A scope that is in use already.
    fn used_scope(&self, scope: &Scope) -> Option<Arc<FollowedScope>> {
        let scopes = self.scopes.lock().unwrap_or_else(PoisonError::into_inner);
        scopes.used.iter().filter_map(Weak::upgrade).find(|used| used.client.scope() == scope)
    }

    /// The scope of a client, which is in use from now on.
    fn scope(self: &Arc<Self>, client: Client) -> Arc<FollowedScope> {
        let mut scopes = self.scopes.lock().unwrap_or_else(PoisonError::into_inner);
        let id = ScopeId(scopes.next);
        scopes.next += 1;
        let follower = tokio::spawn(follow_token(Arc::clone(self), id, client.clone()));
        let scope = Arc::new(FollowedScope { id, client, follower });
        scopes.used.retain(|used| used.strong_count() > 0);
        scopes.used.push(Arc::downgrade(&scope));
        scope
    }

    fn watch_table(&self, client: Client, table: &Table) -> Box<RunningQuery> {
        let watch = Box::new(RunningQuery::watch(client, table));
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        tables.retain(|(_, progress)| progress.strong_count() > 0);
        tables.push((table.clone(), Arc::downgrade(watch.progress())));
        watch
    }

    /// Waits for something to ask.
    async fn next(&self, worker: Worker) -> Job<Box<RunningQuery>> {
        loop {
            let work = self.work.notified();
            tokio::pin!(work);
            // What comes from here on is noticed.
            work.as_mut().enable();
            let later = match self.lock().next(worker, Instant::now()) {
                Next::Job(job) => return job,
                Next::Later(at) => at,
            };
            let _waiting = matches!(worker, Worker::Shared { .. }).then(|| Waiting::new(&self.waiting));
            tokio::select! {
                () = work => {}
                () = tokio::time::sleep_until(later.unwrap_or_else(Instant::now)), if later.is_some() => {}
            }
        }
    }

    /// Asks, and deals with the answer; gives the error that concerns the connection rather than the query.
    async fn perform(&self, mut job: Job<Box<RunningQuery>>, pool: Pool) -> Option<Error> {
        let mut tokens = job.work.token_changes();
        let requested = Instant::now();
        let cancelled = job.cancelled.clone();
        let _under_way = job.work.progress().sent(job.wait, job.rotates);
        let result = tokio::select! {
            biased;
            // The sender lives in the query's client, so this cannot fail.
            _ = tokens.changed() => {
                self.done(job, Done::Fetch(Duration::ZERO));
                return None;
            }
            () = cancelled.notified() => {
                self.done(job, Done::Fetch(Duration::ZERO));
                return None;
            }
            // The agent is busy with what is given up here for a few seconds more, and no longer.
            () = self.urgent.notified(), if pool == Pool::Shared && job.rotates => {
                self.done(job, Done::Block(Duration::ZERO));
                return None;
            }
            result = job.work.send(pool, job.wait) => result,
        };
        self.budget.set_multiplexed(self.client.is_multiplexed());
        let (outcome, error) = match result {
            Ok(response) => (self.answered(&mut job, &response).await, None),
            Err(error) => {
                let prompt = requested.elapsed() < PROMPT_REFUSAL;
                // One that hangs up on a request that has waited for long is stopping.
                if error.is_connection_limit() && prompt {
                    self.budget.refused(random());
                }
                let of_connection = error.is_transport() || error.is_rate_limited();
                let kept = of_connection.then(|| error.clone());
                (job.work.failed(&self.failures, error).await, kept)
            }
        };
        match outcome {
            Ok(done) => self.done(job, done),
            // Nobody takes the answers any more.
            Err(Gone) => self.lock().remove(job.id),
        }
        error
    }

    async fn answered(&self, job: &mut Job<Box<RunningQuery>>, response: &Response) -> Result<Done, Gone> {
        let (done, back) = job.work.answered(&self.failures, response).await?;
        if back {
            // Other queries that wait for the agent need not wait longer.
            self.lock().recovered(Instant::now());
            self.recovered.notify_waiters();
        }
        Ok(done)
    }

    fn done(&self, job: Job<Box<RunningQuery>>, done: Done) {
        self.lock().done(job, done, Instant::now(), random());
        self.work.notify_waiters();
    }

    /// Lets time pass after a connection failed, unless another worker gets through.
    async fn pause(&self, backoff: &mut Backoff, error: &Error, longest: Duration) {
        if error.is_rate_limited() || error.is_connection_limit() {
            backoff.be_patient();
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next(longest)) => {}
            () = self.recovered.notified() => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Schedule<Box<RunningQuery>>> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use serde_json::json;

    use super::*;
    use crate::consul::schedule::{LONG_WAIT, MOST_REFETCHES};
    use crate::consul::{Instances, Settings, Token};
    use crate::testing::{Agent, CONFIG_ENTRIES, Fault, INSTANCES};

    const SERVICES: usize = 300;
    const MATCH: &str = "/v1/connect/intentions/match";
    const SERVICE: &str = "/v1/agent/service/web-sidecar-proxy";

    fn path(number: usize) -> String {
        format!("/v1/health/connect/s{number}")
    }

    fn watches(settings: &Settings) -> Watches {
        Watches::new(Client::new(settings).expect("the settings are good"))
    }

    /// A sidecar with upstreams: what it asks, and what it hears.
    struct Sidecar {
        events: mpsc::Receiver<(usize, Option<usize>)>,
        all: Vec<Watch>,
        watches: Watches,
    }

    /// The number of the query for intentions among the events.
    const INTENTIONS: usize = usize::MAX;

    impl Sidecar {
        fn start(agent: &Agent, settings: &Settings, services: usize) -> Self {
            agent.set(MATCH, json!({ "web": [] }));
            agent.set(SERVICE, json!({ "Port": 1 }));
            agent.set("/v1/agent/connect/ca/roots", json!({ "ActiveRootID": "a" }));
            agent.set("/v1/agent/connect/ca/leaf/web", json!({}));
            for number in 0..services {
                agent.set(&path(number), json!([{}]));
                agent.set(&format!("/v1/discovery-chain/s{number}"), json!({ "Chain": {} }));
            }
            let watches = watches(settings);
            let (sender, events) = mpsc::channel(64);
            let count = |number: usize| {
                move |event: Event<Vec<crate::consul::api::CheckServiceNode>>| match event {
                    Event::Value(answer) => (number, Some(answer.value.len())),
                    Event::Failed(_) => (number, None),
                }
            };
            let mut all: Vec<_> = (0..services)
                .flat_map(|number| {
                    let instances = Instances { service: format!("s{number}"), ..Instances::default() };
                    let chain = crate::consul::Chain { service: format!("s{number}"), ..Default::default() };
                    let (quiet, mut received) = mpsc::channel(1);
                    tokio::spawn(async move { while received.recv().await.is_some() {} });
                    [
                        watches.watch(Query::health_connect(&instances), sender.clone(), count(number)),
                        watches.watch(Query::discovery_chain(&chain), quiet, drop),
                    ]
                })
                .collect();
            let (quiet, mut received) = mpsc::channel(1);
            tokio::spawn(async move { while received.recv().await.is_some() {} });
            all.push(watches.watch(Query::agent_service("web-sidecar-proxy"), quiet.clone(), drop));
            all.push(watches.watch(Query::ca_roots(), quiet.clone(), drop));
            all.push(watches.watch(Query::ca_leaf("web"), quiet.clone(), drop));
            all.push(watches.watch(Query::intentions("web"), sender, |event| match event {
                Event::Value(answer) => (INTENTIONS, Some(answer.value.len())),
                Event::Failed(_) => (INTENTIONS, None),
            }));
            Self { events, all, watches }
        }

        /// Waits for the first answers.
        async fn ready(&mut self, services: usize) {
            for _ in 0..=services {
                self.value().await;
            }
        }

        /// The next value, whatever failures come before it.
        async fn value(&mut self) -> (usize, usize) {
            loop {
                let event = tokio::time::timeout(LONG_WAIT * 120, self.events.recv()).await.expect("an event in time");
                if let (number, Some(count)) = event.expect("running queries") {
                    return (number, count);
                }
            }
        }

        /// Another number of instances of one service, and how long it took to be seen.
        async fn change(&mut self, agent: &Agent, number: usize, count: usize) -> Duration {
            let start = Instant::now();
            agent.set(&path(number), json!(vec![json!({}); count]));
            assert_eq!(self.value().await, (number, count));
            start.elapsed()
        }

        /// Another number of intentions, and how long it took to be seen.
        async fn deny(&mut self, agent: &Agent, count: usize) -> Duration {
            let start = Instant::now();
            agent.set(MATCH, json!({ "web": vec![json!({ "Action": "deny" }); count] }));
            while self.value().await != (INTENTIONS, count) {}
            start.elapsed()
        }

        fn knows_instances(&self) -> bool {
            self.watches.is_known(&Table::Instances(None))
        }
    }

    async fn settle() {
        tokio::time::sleep(Duration::from_secs(90)).await;
    }

    async fn many() -> (Agent, Sidecar) {
        let agent = Agent::start();
        let mut sidecar = Sidecar::start(&agent, &agent.settings(), SERVICES);
        sidecar.ready(SERVICES).await;
        (agent, sidecar)
    }

    #[tokio::test(start_paused = true)]
    async fn changes_are_seen_at_once_and_silence_costs_little() {
        let (agent, mut sidecar) = many().await;
        settle().await;
        assert!(agent.open_connections() <= 4, "{} connections at rest", agent.open_connections());
        let before = agent.count(|_| true);
        tokio::time::sleep(Duration::from_secs(600)).await;
        // Two a second of those that are looked at or rotate, a few that block, and each of all once in an hour.
        let requested = agent.count(|_| true) - before;
        assert!((400..800).contains(&requested), "{requested} requests");
        for number in 0..4 {
            let took = sidecar.change(&agent, 100 + number, 2).await;
            assert!(took < Duration::from_secs(1), "{took:?}");
            settle().await;
        }
        assert!(agent.most_connections() <= 4, "{} connections", agent.most_connections());
        assert_eq!(agent.refused_connections(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn few_queries_are_followed_in_the_same_way() {
        let agent = Agent::start();
        let mut sidecar = Sidecar::start(&agent, &agent.settings(), 2);
        sidecar.ready(2).await;
        settle().await;
        assert!(sidecar.change(&agent, 1, 2).await < Duration::from_secs(1));
        // As many more settle as soon as if they had been there from the start.
        drop(sidecar);
        let mut grown = Sidecar::start(&agent, &agent.settings(), 200);
        let start = Instant::now();
        grown.ready(200).await;
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        assert!(grown.change(&agent, 150, 3).await < Duration::from_secs(1));
        assert!(agent.most_connections() <= 8, "{} connections", agent.most_connections());
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_that_no_table_tells_of_is_found_in_time() {
        let (agent, mut sidecar) = many().await;
        settle().await;
        let start = Instant::now();
        agent.set_untold(&path(7), json!([{}, {}]));
        assert_eq!(sidecar.value().await, (7, 2));
        let took = start.elapsed();
        assert!(took > Duration::from_secs(1) && took <= Duration::from_secs(75 * 60), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn tables_that_change_all_the_time_cost_a_bounded_rate() {
        let (agent, mut sidecar) = many().await;
        settle().await;
        let before = agent.count(|_| true);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(300) {
            agent.touch_table(INSTANCES);
            agent.touch_table(CONFIG_ENTRIES);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let requested = agent.count(|_| true) - before;
        let most = 300 * MOST_REFETCHES as usize + 5 * 2 * SERVICES + 900;
        assert!((most / 3..=most).contains(&requested), "{requested} requests");
        // All of both tables once, and what is left of the time before.
        let took = sidecar.change(&agent, 7, 2).await;
        assert!(took < Duration::from_secs(65), "{took:?}");
        assert!(sidecar.deny(&agent, 3).await < Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_no_table_tells_of_is_fetched_periodically() {
        let agent = Agent::start();
        agent.without_tables(true);
        let mut sidecar = Sidecar::start(&agent, &agent.settings(), SERVICES);
        sidecar.ready(SERVICES).await;
        settle().await;
        assert!(!sidecar.knows_instances());
        assert!(sidecar.change(&agent, 7, 2).await < Duration::from_secs(40));
        // And as soon as there is one, it tells.
        agent.without_tables(false);
        settle().await;
        assert!(sidecar.knows_instances());
        assert!(sidecar.change(&agent, 8, 2).await < Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn stale_answers_and_other_namespaces_have_no_tables() {
        for (stale, namespace) in [(true, None), (false, Some("team".to_string()))] {
            let agent = Agent::start();
            let settings = Settings { scope: Scope { stale, namespace, ..Scope::default() }, ..agent.settings() };
            let mut sidecar = Sidecar::start(&agent, &settings, 30);
            sidecar.ready(30).await;
            settle().await;
            assert_eq!(agent.requests(INSTANCES).len(), 0);
            assert!(sidecar.change(&agent, 7, 2).await < Duration::from_secs(10));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_was_away_is_asked_for_everything() {
        let (agent, mut sidecar) = many().await;
        settle().await;
        agent.fault(Some(Fault::Status(500, "No cluster leader")));
        agent.disconnect();
        tokio::time::sleep(Duration::from_secs(5)).await;
        // Its indexes are as they were, as those of another agent can be by chance.
        agent.set_untold(&path(7), json!([]));
        agent.fault(None);
        let start = Instant::now();
        assert_eq!(sidecar.value().await, (7, 0));
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        settle().await;
        assert!(sidecar.knows_instances());
    }

    #[tokio::test(start_paused = true)]
    async fn indexes_that_go_backwards_are_noticed() {
        let (agent, mut sidecar) = many().await;
        settle().await;
        agent.go_backwards();
        let start = Instant::now();
        agent.set(&path(7), json!([]));
        assert_eq!(sidecar.value().await, (7, 0));
        // A request with an index of the future ends with its wait.
        assert!(start.elapsed() < LONG_WAIT * 2, "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn everything_ends_with_the_last_handle() {
        let (agent, mut sidecar) = many().await;
        sidecar.all.truncate(10);
        settle().await;
        assert!(sidecar.change(&agent, 3, 2).await < Duration::from_secs(1));
        drop(sidecar);
        let gone = async {
            while agent.open_connections() > 0 {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(300), gone).await.expect("nothing is left that asks");
    }

    /// Whatever the settings and however many connections the agent has, a denial comes within a second.
    #[tokio::test(start_paused = true)]
    async fn a_denial_is_seen_within_a_second() {
        for (limit, max_connections) in [(200, 2), (200, 4), (200, 128), (3, 4), (2, 8), (1, 4)] {
            let agent = Agent::start();
            agent.limit_connections(limit);
            let settings = Settings { max_connections, ..agent.settings() };
            let mut sidecar = Sidecar::start(&agent, &settings, 100);
            sidecar.ready(100).await;
            let mut denials = 0;
            for seconds in [0, 1, 30] {
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                for _ in 0..4 {
                    denials += 1;
                    let took = sidecar.deny(&agent, denials).await;
                    assert!(took < Duration::from_secs(1), "limit {limit}, {max_connections}: {took:?}");
                    tokio::time::sleep(Duration::from_millis(170)).await;
                }
            }
            let took = sidecar.change(&agent, 7, 2).await;
            assert!(took < Duration::from_secs(10), "limit {limit}, {max_connections}: {took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn room_for_others_is_looked_for_only_where_there_has_been_too_little() {
        let budget = Budget::new(4);
        let (requested, none_left) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let ask = || {
            requested.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Some(none_left.load(Ordering::Relaxed) > 0))
        };
        let within = async |seconds| {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            requested.swap(0, Ordering::Relaxed)
        };
        let looks = leave_room(&budget, ask);
        let story = async {
            assert_eq!(within(24 * 3600).await, 0);
            budget.refused(0.5);
            let often = within(600).await;
            assert!((20..=60).contains(&often), "{often}");
            none_left.store(1, Ordering::Relaxed);
            let seldom = within(600).await;
            assert!((6..=21).contains(&seldom) && budget.usage().shared() == 0, "{seldom}");
            none_left.store(0, Ordering::Relaxed);
            within(2 * 3600).await;
            assert_eq!(within(24 * 3600).await, 0);
        };
        tokio::select! {
            () = looks => unreachable!("connections are what the agent runs out of"),
            () = story => {}
        }
    }

    /// Where sidecars want more connections than the agent has, they come to use fewer, and leave some to others.
    #[tokio::test(start_paused = true)]
    async fn many_sidecars_share_the_connections_of_an_agent() {
        const SIDECARS: usize = 6;
        const LIMIT: usize = 15;
        let agent = Agent::start();
        agent.limit_connections(LIMIT);
        let mut sidecars: Vec<_> = (0..SIDECARS).map(|_| Sidecar::start(&agent, &agent.settings(), 3)).collect();
        for sidecar in &mut sidecars {
            sidecar.ready(3).await;
        }
        tokio::time::sleep(Duration::from_secs(120)).await;
        let before = agent.refused_connections();
        let mut most = 0;
        for _ in 0..120 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            most = most.max(agent.open_connections());
        }
        let refused = agent.refused_connections() - before;
        assert!(refused <= SIDECARS, "{refused} refusals in two minutes");
        assert!(most <= LIMIT, "{most} connections");
        let mut took = HashMap::new();
        for (number, sidecar) in sidecars.iter_mut().enumerate() {
            took.insert(number, sidecar.deny(&agent, number + 1).await);
        }
        assert!(took.values().all(|took| *took < Duration::from_secs(1)), "{took:?}");
    }

    /// What the roots of one scope's token say, again and again.
    async fn roots_with(watches: &Watches, token: &str) -> (Watch, mpsc::Receiver<String>) {
        let scope = Scope { token: Token::Fixed(token.into()), ..Scope::default() };
        let of_scope = watches.for_scope(scope).expect("the token is good");
        let (sender, events) = mpsc::channel(4);
        let watch = of_scope.watch(Query::ca_roots(), sender, |event| match event {
            Event::Value(answer) => answer.value.active_root_id,
            Event::Failed(error) => error.to_string(),
        });
        (watch, events)
    }

    #[tokio::test(start_paused = true)]
    async fn scopes_share_workers_but_no_answer() {
        const ROOTS: &str = "/v1/agent/connect/ca/roots";
        let agent = Agent::start();
        agent.set(ROOTS, json!({ "ActiveRootID": "a" }));
        agent.only_tokens(&["alpha", "beta"]);
        let watches = watches(&agent.settings());
        for token in ["alpha", "beta", "gamma"] {
            let (_watch, mut events) = roots_with(&watches, token).await;
            let event = events.recv().await.expect("an event");
            assert_eq!(event == "a", token != "gamma", "{event}");
            let requested = agent.count(|seen| seen.path == ROOTS && seen.token() == Some(token));
            assert!(requested > 0, "{token} asks for itself");
        }
        let scope = Scope { token: Token::Fixed("alpha".into()), ..Scope::default() };
        let [one, same] = [(); 2].map(|()| watches.for_scope(scope.clone()).expect("the token is good"));
        assert!(one.scope_id() == same.scope_id() && one.scope_id() != watches.scope_id());
        assert!(!format!("{scope:?}").contains("alpha"), "{scope:?}");
        assert!(agent.most_connections() <= 4, "{} connections", agent.most_connections());
    }

    /// One worker asks for the intentions of all services.
    #[tokio::test(start_paused = true)]
    async fn a_denial_of_each_of_several_services_is_seen_within_a_second() {
        const SERVICES: usize = 4;
        let agent = Agent::start();
        let path = |number: usize| format!("{MATCH}?by=destination&name=s{number}");
        let watches = watches(&agent.settings());
        let (sender, mut events) = mpsc::channel(64);
        let mut all = Vec::new();
        for number in 0..SERVICES {
            agent.set(&path(number), json!({ "s": [] }));
            // Each comes while the requests of those before it block.
            tokio::time::sleep(Duration::from_secs(5)).await;
            let start = Instant::now();
            all.push(watches.watch(
                Query::intentions(&format!("s{number}")),
                sender.clone(),
                move |event| match event {
                    Event::Value(answer) => (number, answer.value.len()),
                    Event::Failed(error) => panic!("{error}"),
                },
            ));
            assert_eq!(events.recv().await, Some((number, 0)));
            assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        }
        for round in 1..=2 {
            for number in 0..SERVICES {
                let start = Instant::now();
                agent.set(&path(number), json!({ "s": vec![json!({ "Action": "deny" }); round] }));
                assert_eq!(events.recv().await, Some((number, round)));
                assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
            }
        }
    }
}
