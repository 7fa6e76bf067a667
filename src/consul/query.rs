//! Keeps asking: the loop of blocking queries, within a bounded number of connections.
//!
//! The agent's rules, which the loop follows (Consul 1.8.7 to 1.22):
//!
//! * An index that is not in the agent's past blocks for the whole wait. After a restored server all are in
//!   its future. So an index is forgotten after any failure, and when a newer one is lower.
//! * A query that wakes need not have changed: only other bodies are passed on.
//! * A refusal can carry an index, which means nothing.
//! * An answer without an index cannot be blocked on, and is polled.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant;

use super::alarm::{Alarms, Rest};
use super::endpoint::{Flow, Request, Response};
use super::pace::{Backoff, Bucket, random};
use super::slots::{Claim, Kind, Member, Slot, Slots};
use super::token::Changes;
use super::{Answer, Client, Cursor, Error, Query};

/// How often something is asked for that should have been blocked on, but came without an index.
const NO_INDEX_PERIOD: Duration = Duration::from_secs(10);

/// A hot table can wake a query many times a second. It is asked again at once a few times, and then once in each of
/// these: what decides who may talk to whom is worth more of the agent's time.
const SPACING: Duration = Duration::from_millis(100);
const PROMPT_SPACING: Duration = Duration::from_millis(10);

/// An alarm that rings all the time has the agent look through whole tables.
const ALARM_SPACING: Duration = Duration::from_secs(1);

/// How often watches that failed or poll are told that the agent is back.
const RECOVERY_SPACING: Duration = Duration::from_secs(1);

/// An agent that has no connection left says so within this time.
const PROMPT_REFUSAL: Duration = Duration::from_secs(1);

/// What watches share.
pub(super) struct Asker {
    pub client: Client,
    slots: Arc<Slots>,
    failures: Failures,
    /// Tells those who wait before they try again that somebody got through.
    recovered: Notify,
    /// Absent where alarms cannot be relied on.
    pub alarms: Option<Arc<Alarms>>,
    /// Those that follow the token file and keep the alarms.
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// What a watch has to say.
#[derive(Debug)]
pub enum Event<T> {
    /// The first value, or one that differs from the last.
    Value(Answer<T>),
    /// The agent could not be asked, or refused, or answered rubbish. The watch goes on trying, and tells
    /// of each failure. The last value is as good as it was.
    Failed(Error),
}

/// A running watch. Dropping it ends the watch.
#[must_use = "a watch ends when its handle is dropped"]
#[derive(Debug)]
pub struct Watch {
    task: AbortHandle,
    hurry: Arc<Notify>,
}

impl Watch {
    /// Its first answer is waited for: it is asked before those of others.
    pub fn hurry(&self) {
        self.hurry.notify_one();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Asker {
    /// `tasks` end with it.
    pub fn new(client: Client, slots: Arc<Slots>, alarms: Option<Arc<Alarms>>, tasks: Vec<JoinHandle<()>>) -> Self {
        Self { client, slots, failures: Failures::default(), recovered: Notify::new(), alarms, tasks }
    }

    /// Asks `query` from now on, and sends what `wrap` makes of its events. The watch ends with its handle
    /// or with the receiver.
    pub fn watch<T, U, F>(self: &Arc<Self>, query: Query<T>, events: mpsc::Sender<U>, wrap: F) -> Watch
    where
        T: Send + 'static,
        U: Send + 'static,
        F: Fn(Event<T>) -> U + Send + 'static,
    {
        let hurry = Arc::<Notify>::default();
        let rest = match (&self.alarms, &query.class) {
            (Some(alarms), Some(class)) => Some(alarms.join(class)),
            _ => None,
        };
        let spacing = match query.flow {
            Flow::Alarm => ALARM_SPACING,
            _ if query.always => PROMPT_SPACING,
            _ => SPACING,
        };
        let worker = Worker {
            asker: self.clone(),
            hurry: hurry.clone(),
            bucket: Bucket::new(spacing),
            rest,
            query,
            events,
            wrap,
            cursor: Cursor::None,
            table: false,
            table_index: None,
            seen: None,
            fingerprint: RandomState::new(),
            backoff: Backoff::default(),
            failing: None,
        };
        Watch { task: tokio::spawn(worker.run()).abort_handle(), hurry }
    }
}

struct Worker<T, U, F> {
    asker: Arc<Asker>,
    /// Notified when its first answer is waited for.
    hurry: Arc<Notify>,
    query: Query<T>,
    events: mpsc::Sender<U>,
    wrap: F,
    rest: Option<Rest>,
    cursor: Cursor,
    /// Whether the agent is one before 1.9, whose matched lists of intentions have no index of their own,
    /// but block on that of the table.
    table: bool,
    /// The table's index, when it was asked for before the answer at hand.
    table_index: Option<u64>,
    /// Fingerprint of the last answer that was passed on.
    seen: Option<u64>,
    fingerprint: RandomState,
    bucket: Bucket,
    backoff: Backoff,
    /// The class of failure that this watch is counted in.
    failing: Option<String>,
}

enum Outcome {
    Answered(Result<Response, Error>),
    /// Another token is in force.
    NewToken,
    /// Somebody else needs the connection more.
    AskedFor,
}

/// The receiver of events is gone.
struct Gone;

impl<T, U, F> Worker<T, U, F>
where
    T: Send + 'static,
    U: Send + 'static,
    F: Fn(Event<T>) -> U + Send + 'static,
{
    async fn run(mut self) {
        let member = self.asker.slots.join(match self.query.flow {
            Flow::Alarm => Kind::Alarm,
            _ if self.query.always => Kind::Always,
            _ => Kind::Turn,
        });
        let mut tokens = self.asker.client.inner.token.changes();
        let mut kept = None;
        while self.turn(&member, &mut tokens, &mut kept).await.is_ok() {}
    }

    /// Asks once, and deals with the answer.
    async fn turn(&mut self, member: &Member, tokens: &mut Changes, kept: &mut Option<Slot>) -> Result<(), Gone> {
        let asker = self.asker.clone();
        let sweep = self.rest(member, tokens).await;
        let claim = self.claim(sweep.is_some());
        let mut slot = match kept.take().filter(|_| claim == Claim::Always) {
            Some(slot) => slot,
            None => match self.acquire(claim).await {
                Some(slot) => slot,
                None => return Ok(()),
            },
        };
        let asked = Instant::now();
        let result = match self.ask_within(&mut slot, asker.slots.wait(claim), tokens).await {
            Outcome::AskedFor => return Ok(()),
            Outcome::NewToken => {
                self.start_anew();
                return Ok(());
            }
            Outcome::Answered(result) => result,
        };
        slot.end();
        drop(sweep);
        match result.and_then(|response| Ok((asker.client.decode(&self.query, &response)?, response))) {
            Ok((answer, response)) => {
                *kept = self.answered(answer, &response, Some(slot).filter(|_| claim == Claim::Always), tokens).await?;
                Ok(())
            }
            Err(error) => {
                // One that hangs up on a request that has waited for long is stopping.
                if error.is_connection_limit() && asked.elapsed() < PROMPT_REFUSAL {
                    slot.withhold();
                } else {
                    drop(slot);
                }
                self.failed(error, tokens).await
            }
        }
    }

    /// Sends the request, and gives it up for a reason that comes first.
    async fn ask_within(&mut self, slot: &mut Slot, wait: Duration, tokens: &mut Changes) -> Outcome {
        if self.blocks() {
            slot.begin(wait);
        }
        if let Some(rest) = &mut self.rest {
            rest.asks();
        }
        tokio::select! {
            biased;
            // The sender lives in the client, so this cannot fail.
            _ = tokens.changed() => Outcome::NewToken,
            result = self.ask(wait) => Outcome::Answered(result),
            () = slot.asked_for() => Outcome::AskedFor,
        }
    }

    /// Passes an answer on and lets the time pass until the next request. Gives back what of `slot`, which is always
    /// ours, is still needed for that.
    async fn answered(
        &mut self,
        answer: Answer<T>,
        response: &Response,
        slot: Option<Slot>,
        tokens: &mut Changes,
    ) -> Result<Option<Slot>, Gone> {
        let pause = self.advance(response);
        if let Some(rest) = &mut self.rest {
            rest.answered((self.query.covered)(&answer.value));
        }
        let mut slot = slot.filter(|_| self.blocks());
        self.succeeded(response, answer).await?;
        self.pause(pause, tokens, &mut slot).await;
        Ok(slot)
    }

    /// A slot, or `None` where there is no need to take turns any more.
    async fn acquire(&mut self, claim: Claim) -> Option<Slot> {
        let slots = &self.asker.slots;
        match (claim, &self.rest) {
            (Claim::Prompt, _) => tokio::select! {
                biased;
                slot = slots.acquire(claim) => Some(slot),
                () = self.hurry.notified() => Some(slots.acquire(Claim::Always).await),
            },
            (Claim::Turn, Some(rest)) => tokio::select! {
                biased;
                slot = slots.acquire(claim) => Some(slot),
                () = rest.set() => None,
            },
            _ => Some(slots.acquire(claim).await),
        }
    }

    /// Waits for an alarm, where the last answer is one that alarms watch over.
    async fn rest(&mut self, member: &Member, tokens: &mut Changes) -> Option<OwnedSemaphorePermit> {
        if !self.blocks() {
            return None;
        }
        let rest = self.rest.as_mut()?;
        let sweep = tokio::select! {
            biased;
            _ = tokens.changed() => {
                self.start_anew();
                return None;
            }
            sweep = rest.until_alarm(member) => sweep,
        };
        if sweep.is_some() {
            self.cursor = Cursor::None;
        }
        sweep
    }

    fn claim(&self, sweeps: bool) -> Claim {
        if self.query.always && self.asker.slots.always_fits() {
            Claim::Always
        } else if sweeps {
            Claim::Sweep
        } else if self.blocks() {
            Claim::Turn
        } else {
            Claim::Prompt
        }
    }

    /// Whether the next request waits for a change.
    fn blocks(&self) -> bool {
        self.cursor != Cursor::None
    }

    /// As though nothing had been asked yet: the next answer comes at once.
    fn start_anew(&mut self) {
        self.cursor = Cursor::None;
        self.backoff.reset();
    }

    async fn ask(&mut self, wait: Duration) -> Result<Response, Error> {
        let client = &self.asker.client;
        if self.table && !self.blocks() {
            // The index before the list: what changes in between wakes the query that comes next.
            let table = Request::new(reqwest::Method::GET, &["connect", "intentions"]);
            self.table_index = client.send(&table, &Cursor::None, wait).await?.index;
        }
        client.send(&self.query.request, &self.cursor, wait).await
    }

    /// Takes the cursor for the next request from an answer; says how long to wait before it.
    fn advance(&mut self, response: &Response) -> Pause {
        let asked = std::mem::take(&mut self.cursor);
        let table_index = self.table_index.take();
        let next = match self.query.flow {
            Flow::Poll(period) => return Pause::Poll(period),
            Flow::Hash => response.hash.clone().map(Cursor::Hash),
            Flow::Index | Flow::Intentions | Flow::Alarm => response.index.or(table_index).map(Cursor::Index),
        };
        match (&asked, next) {
            // Going backwards: the next request has no index.
            (Cursor::Index(asked), Some(Cursor::Index(index))) if index < *asked => Pause::Bucket,
            (_, Some(next)) => {
                self.cursor = next;
                Pause::Bucket
            }
            // The next request asks for the index of the table as well; unless this one did, in vain.
            (_, None) if self.query.flow == Flow::Intentions && (!self.table || asked != Cursor::None) => {
                self.table = true;
                Pause::Bucket
            }
            (_, None) => Pause::Poll(NO_INDEX_PERIOD),
        }
    }

    /// Passes the answer on if it is a new one.
    async fn succeeded(&mut self, response: &Response, answer: Answer<T>) -> Result<(), Gone> {
        if let Some(class) = self.failing.take()
            && self.asker.failures.leave(&class, &self.query.request)
        {
            // Whoever else waits for the agent to be back need not wait longer.
            self.asker.recovered.notify_waiters();
        }
        self.backoff.reset();
        let fingerprint = self.fingerprint(response);
        if self.seen == Some(fingerprint) {
            return Ok(());
        }
        self.seen = Some(fingerprint);
        self.send(Event::Value(answer)).await
    }

    fn fingerprint(&self, response: &Response) -> u64 {
        let mut hasher = self.fingerprint.build_hasher();
        (response.status.as_u16(), &response.body, response.filtered_by_acls).hash(&mut hasher);
        match self.query.flow {
            Flow::Poll(_) => response.default_policy.hash(&mut hasher),
            Flow::Alarm => (response.index, response.stale).hash(&mut hasher),
            Flow::Index | Flow::Hash | Flow::Intentions => {}
        }
        hasher.finish()
    }

    async fn failed(&mut self, error: Error, tokens: &mut Changes) -> Result<(), Gone> {
        self.cursor = Cursor::None;
        self.note(&error);
        if error.is_rate_limited() {
            self.backoff.be_patient();
        }
        let cap = self.backoff_cap(&error);
        self.send(Event::Failed(error)).await?;
        let delay = self.backoff.next(cap);
        self.pause(Pause::Retry(delay), tokens, &mut None).await;
        Ok(())
    }

    fn note(&mut self, error: &Error) {
        if self.query.flow == Flow::Alarm {
            // Nothing is amiss without it. The next answer is news even if it is what the last one was.
            self.seen = None;
            return;
        }
        let class = error.class();
        if self.failing.as_ref() == Some(&class) {
            tracing::debug!("{error}");
            return;
        }
        if let Some(former) = self.failing.replace(class.clone()) {
            self.asker.failures.leave_quietly(&former);
        }
        self.asker.failures.enter(class, error);
    }

    /// The longest time between attempts.
    fn backoff_cap(&self, error: &Error) -> Duration {
        // A refused connection costs nothing, and a service that is not there yet is about to be: both
        // are what a start looks like. Who gets through wakes the others.
        let urgent = self.query.always && self.query.flow != Flow::Alarm;
        let soon = urgent && (error.is_unreachable() || error.is_not_found());
        if soon { Duration::from_secs(2) } else { Backoff::CAP }
    }

    /// Lets time pass, unless a reason comes to ask at once.
    async fn pause(&mut self, pause: Pause, tokens: &mut Changes, slot: &mut Option<Slot>) {
        let delay = match pause {
            Pause::Bucket => self.bucket.take(),
            Pause::Poll(period) => period.mul_f64(0.9 + 0.2 * random()),
            Pause::Retry(delay) => delay,
        };
        if delay.is_zero() {
            return;
        }
        let recovered = !matches!(pause, Pause::Bucket);
        if recovered {
            *slot = None;
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            _ = tokens.changed() => self.start_anew(),
            () = self.asker.recovered.notified(), if recovered => {}
        }
    }

    async fn send(&mut self, event: Event<T>) -> Result<(), Gone> {
        self.events.send((self.wrap)(event)).await.map_err(|_| Gone)
    }
}

impl<T, U, F> Drop for Worker<T, U, F> {
    fn drop(&mut self) {
        if let Some(class) = self.failing.take() {
            self.asker.failures.leave_quietly(&class);
        }
    }
}

/// Why time is let pass before the next request.
#[derive(Debug, Clone, Copy)]
enum Pause {
    /// To bound the rate.
    Bucket,
    /// The answer cannot be blocked on.
    Poll(Duration),
    /// The last attempt failed.
    Retry(Duration),
}

/// The failures that go on, so that one that hits many watches is logged once.
#[derive(Default)]
struct Failures {
    state: Mutex<FailuresState>,
}

#[derive(Default)]
struct FailuresState {
    /// Watches by the class of their failure.
    watches: HashMap<String, usize>,
    recovered: Option<Instant>,
}

impl Failures {
    fn enter(&self, class: String, error: &Error) {
        let mut state = self.lock();
        let count = state.watches.entry(class).or_default();
        *count += 1;
        if *count == 1 {
            tracing::warn!("{error}");
        } else {
            tracing::debug!("{error}");
        }
    }

    /// True when this is news of the agent being back. An agent that comes and goes is not news each time,
    /// for others ask at once when they hear it.
    fn leave(&self, class: &str, request: &Request) -> bool {
        if self.leave_quietly(class) {
            tracing::info!("The agent answers again: {request}");
        }
        let mut state = self.lock();
        let now = Instant::now();
        let news = state.recovered.is_none_or(|last| now.saturating_duration_since(last) >= RECOVERY_SPACING);
        if news {
            state.recovered = Some(now);
        }
        news
    }

    /// True when no watch is left in the class.
    fn leave_quietly(&self, class: &str) -> bool {
        let mut state = self.lock();
        let Some(count) = state.watches.get_mut(class) else { return false };
        *count -= 1;
        if *count > 0 {
            return false;
        }
        state.watches.remove(class);
        true
    }

    fn lock(&self) -> MutexGuard<'_, FailuresState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::consul::watches::Watches;
    use crate::consul::{Instances, Settings, Token, api};
    use crate::testing::{Agent, Fault, TempFile};

    const ROOTS: &str = "/v1/agent/connect/ca/roots";
    const MATCH: &str = "/v1/connect/intentions/match";
    const LIMIT: Duration = Duration::from_secs(300);

    fn watches(settings: &Settings) -> Watches {
        Watches::new(Client::new(settings).expect("the settings are good"))
    }

    fn roots(active: &str) -> serde_json::Value {
        json!({ "ActiveRootID": active })
    }

    struct Roots {
        events: mpsc::Receiver<Event<api::CaRoots>>,
        _watch: Watch,
    }

    fn watch_roots(watches: &Watches) -> Roots {
        let (sender, events) = mpsc::channel(16);
        Roots { events, _watch: watches.watch(Query::ca_roots(), sender, |event| event) }
    }

    impl Roots {
        async fn event(&mut self) -> Event<api::CaRoots> {
            tokio::time::timeout(LIMIT, self.events.recv()).await.expect("an event in time").expect("a running watch")
        }

        async fn value(&mut self) -> String {
            match self.event().await {
                Event::Value(answer) => answer.value.active_root_id,
                Event::Failed(error) => panic!("failed: {error}"),
            }
        }

        async fn failure(&mut self) -> Error {
            match self.event().await {
                Event::Value(answer) => panic!("no failure: {answer:?}"),
                Event::Failed(error) => error,
            }
        }

        /// The next value, whatever failures come before it.
        async fn value_at_last(&mut self) -> String {
            loop {
                if let Event::Value(answer) = self.event().await {
                    return answer.value.active_root_id;
                }
            }
        }
    }

    /// Waits until `condition` holds.
    async fn until(mut condition: impl FnMut() -> bool) {
        let wait = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, wait).await.expect("it happens in time");
    }

    fn last_index(agent: &Agent, path: &str) -> Option<String> {
        agent.requests(path).last().and_then(|seen| seen.param("index").map(str::to_string))
    }

    #[tokio::test(start_paused = true)]
    async fn passes_on_what_changes_and_nothing_else() {
        let agent = Agent::start().await;
        agent.set(ROOTS, roots("a"));
        let mut watch = watch_roots(&watches(&agent.settings()));
        assert_eq!(watch.value().await, "a");
        for _ in 0..3 {
            let before = agent.requests(ROOTS).len();
            agent.touch(ROOTS);
            until(|| agent.requests(ROOTS).len() > before).await;
        }
        agent.set(ROOTS, roots("b"));
        assert_eq!(watch.value().await, "b");
        assert!(watch.events.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn ends_with_its_handle() {
        let agent = Agent::start().await;
        agent.set(ROOTS, roots("a"));
        let watches = watches(&agent.settings());
        let mut watch = watch_roots(&watches);
        watch.value().await;
        until(|| last_index(&agent, ROOTS).is_some()).await;
        assert_eq!(agent.open_connections(), 1);
        drop(watch);
        until(|| agent.open_connections() == 0).await;
    }

    #[tokio::test(start_paused = true)]
    async fn starts_over_when_indexes_go_backwards() {
        let agent = Agent::start().await;
        for _ in 0..10 {
            agent.set(ROOTS, roots("a"));
        }
        let mut watch = watch_roots(&watches(&agent.settings()));
        assert_eq!(watch.value().await, "a");
        until(|| last_index(&agent, ROOTS).is_some()).await;
        agent.go_backwards();
        // The index is in the agent's future now, so the query ends with its wait.
        until(|| last_index(&agent, ROOTS).as_deref() == Some("2")).await;
        assert!(agent.requests(ROOTS).iter().skip(1).any(|seen| seen.param("index").is_none()));
        agent.set(ROOTS, roots("b"));
        assert_eq!(watch.value().await, "b");
    }

    #[tokio::test(start_paused = true)]
    async fn survives_refusals_and_rubbish() {
        let agent = Agent::start().await;
        agent.set(ROOTS, roots("a"));
        let mut watch = watch_roots(&watches(&agent.settings()));
        assert_eq!(watch.value().await, "a");
        for (fault, says) in [
            (
                Fault::Status(500, "No cluster leader"),
                "answered GET /v1/agent/connect/ca/roots with 500: No cluster leader",
            ),
            (Fault::Status(503, ""), "answered GET /v1/agent/connect/ca/roots with 503"),
            (Fault::Rubbish, "something unreadable"),
        ] {
            until(|| last_index(&agent, ROOTS).is_some()).await;
            let before = agent.requests(ROOTS).len();
            // A query that waits does not see the fault until it is woken.
            agent.fault(Some(fault));
            let text = watch.failure().await.to_string();
            assert!(text.contains(says), "{text}");
            watch.failure().await;
            // The index that comes with a refusal is not taken.
            let after = agent.requests(ROOTS);
            assert!(after[before..].iter().all(|seen| seen.param("index").is_none()));
            agent.fault(None);
            until(|| last_index(&agent, ROOTS).is_some()).await;
        }
        agent.set(ROOTS, roots("b"));
        assert_eq!(watch.value_at_last().await, "b");
    }

    #[tokio::test(start_paused = true)]
    async fn reopens_a_request_that_is_stuck() {
        let agent = Agent::start().await;
        agent.set(ROOTS, roots("a"));
        let mut watch = watch_roots(&watches(&agent.settings()));
        assert_eq!(watch.value().await, "a");
        until(|| last_index(&agent, ROOTS).is_some()).await;
        let start = Instant::now();
        agent.fault(Some(Fault::Silent));
        let error = watch.failure().await;
        assert!(error.is_transport() && !error.is_unreachable(), "{error}");
        assert!((Duration::from_secs(60)..Duration::from_secs(80)).contains(&start.elapsed()), "{:?}", start.elapsed());
        agent.fault(None);
        agent.set(ROOTS, roots("b"));
        assert_eq!(watch.value_at_last().await, "b");
    }

    #[tokio::test(start_paused = true)]
    async fn is_back_as_soon_as_the_agent_is() {
        let agent = Agent::start().await;
        agent.set(ROOTS, roots("a"));
        let mut watch = watch_roots(&watches(&agent.settings()));
        assert_eq!(watch.value().await, "a");
        until(|| last_index(&agent, ROOTS).is_some()).await;
        agent.disconnect();
        assert!(watch.failure().await.is_transport());
        agent.set(ROOTS, roots("b"));
        assert_eq!(watch.value_at_last().await, "b");
    }

    #[tokio::test(start_paused = true)]
    async fn a_hot_table_is_asked_at_a_bounded_rate() {
        let agent = Agent::start().await;
        agent.set(ROOTS, roots("a"));
        let mut watch = watch_roots(&watches(&agent.settings()));
        watch.value().await;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            agent.touch(ROOTS);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // Ten at once and then one each 10 ms: roots are of what is followed promptly.
        let asked = agent.requests(ROOTS).len();
        assert!((400..=515).contains(&asked), "{asked} requests");
    }

    #[tokio::test(start_paused = true)]
    async fn blocks_on_the_hash_of_a_service() {
        const PATH: &str = "/v1/agent/service/web-sidecar-proxy";
        let agent = Agent::start().await;
        let watches = watches(&agent.settings());
        let (sender, mut events) = mpsc::channel(16);
        let _watch = watches.watch(Query::agent_service("web-sidecar-proxy"), sender, |event| match event {
            Event::Value(answer) => answer.value.port.get(),
            Event::Failed(error) => {
                assert!(error.is_not_found());
                None
            }
        });
        assert_eq!(events.recv().await, Some(None));
        agent.set(PATH, json!({ "Port": 1 }));
        while events.recv().await.expect("a running watch") != Some(1) {}
        until(|| agent.requests(PATH).last().is_some_and(|seen| seen.param("hash").is_some())).await;
        agent.set(PATH, json!({ "Port": 2 }));
        assert_eq!(events.recv().await, Some(Some(2)));
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_config_entries_that_are_missing() {
        const PATH: &str = "/v1/config/proxy-defaults/global";
        let agent = Agent::start().await;
        let watches = watches(&agent.settings());
        let (sender, mut events) = mpsc::channel(16);
        let _watch = watches.watch(Query::proxy_defaults(), sender, |event| match event {
            Event::Value(answer) => answer.value.map(|entry| entry.mode),
            Event::Failed(error) => panic!("{error}"),
        });
        assert_eq!(events.recv().await, Some(None));
        until(|| last_index(&agent, PATH).is_some()).await;
        agent.set(PATH, json!({ "Mode": "transparent" }));
        assert_eq!(events.recv().await, Some(Some("transparent".into())));
        agent.remove(PATH);
        assert_eq!(events.recv().await, Some(None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_kind_that_the_agent_does_not_know_is_missing() {
        let agent = Agent::start().await;
        agent.fault(Some(Fault::Status(500, "invalid config entry kind: mesh")));
        let client = Client::new(&agent.settings()).expect("the settings are good");
        assert_eq!(client.ask(&Query::mesh_config()).await.expect("an answer").value, None);
    }

    async fn intentions_reach_us(before_1_9: bool) {
        let agent = Agent::start().await;
        if before_1_9 {
            agent.before_1_9();
        }
        agent.set(MATCH, json!({ "db": null }));
        let watches = watches(&agent.settings());
        let (sender, mut events) = mpsc::channel(16);
        let _watch = watches.watch(Query::intentions("db"), sender, |event| match event {
            Event::Value(answer) => answer.value.len(),
            Event::Failed(error) => panic!("{error}"),
        });
        assert_eq!(events.recv().await, Some(0));
        for count in 1..5 {
            // Also when it changes while the table's index is being asked for.
            if count % 2 == 0 {
                until(|| last_index(&agent, MATCH).is_some()).await;
            }
            let start = Instant::now();
            agent.set(MATCH, json!({ "db": vec![json!({ "Action": "deny" }); count] }));
            assert_eq!(events.recv().await, Some(count));
            assert!(start.elapsed() < Duration::from_millis(300), "{:?}", start.elapsed());
        }
        // Changes of others wake us, and must not make us spin.
        let before = agent.requests(MATCH).len();
        agent.set("/v1/connect/intentions", json!([{}]));
        tokio::time::sleep(Duration::from_secs(300)).await;
        let asked = agent.requests(MATCH).len() - before;
        assert!((4..20).contains(&asked), "{asked} requests");
        assert!(events.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn intentions_reach_us_by_their_own_index() {
        intentions_reach_us(false).await;
    }

    #[tokio::test(start_paused = true)]
    async fn intentions_reach_us_by_the_index_of_the_table() {
        intentions_reach_us(true).await;
    }

    #[tokio::test]
    async fn an_answer_about_no_name_is_no_empty_list_of_intentions() {
        let agent = Agent::start().await;
        let client = Client::new(&agent.settings()).expect("the settings are good");
        for body in [json!({}), json!(null), json!({ "db": [], "web": [] })] {
            agent.set(MATCH, body);
            assert!(client.ask(&Query::intentions("db")).await.is_err());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn many_watches_share_few_connections() {
        const SERVICES: usize = 300;
        let agent = Agent::start().await;
        let path = |number: usize| format!("/v1/health/connect/s{number}");
        let rows = |count: usize| json!(vec![json!({}); count]);
        agent.set(ROOTS, roots("a"));
        for number in 0..SERVICES {
            agent.set(&path(number), rows(1));
        }
        let settings = agent.settings();
        let watches = watches(&settings);
        let mut always = watch_roots(&watches);
        let (sender, mut events) = mpsc::channel(16);
        let start = Instant::now();
        let _watches: Vec<_> = (0..SERVICES)
            .map(|number| {
                let instances = Instances { service: format!("s{number}"), ..Instances::default() };
                watches.watch(Query::health_connect(&instances), sender.clone(), move |event| match event {
                    Event::Value(answer) => (number, answer.value.len()),
                    Event::Failed(error) => panic!("{error}"),
                })
            })
            .collect();
        for _ in 0..SERVICES {
            assert_eq!(events.recv().await.expect("running watches").1, 1);
        }
        assert_eq!(always.value().await, "a");
        assert!(start.elapsed() < Duration::from_secs(1), "first answers took {:?}", start.elapsed());
        // Each of them sees a change when its turn comes, and those that are always on at once.
        let start = Instant::now();
        for number in 0..SERVICES {
            agent.set(&path(number), rows(2));
        }
        for _ in 0..SERVICES {
            assert_eq!(events.recv().await.expect("running watches").1, 2);
        }
        assert!(start.elapsed() < Duration::from_secs(25), "a cycle took {:?}", start.elapsed());
        until(|| last_index(&agent, ROOTS).is_some()).await;
        let start = Instant::now();
        agent.set(ROOTS, roots("b"));
        assert_eq!(always.value().await, "b");
        assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());
        let most = agent.most_connections();
        assert!(most <= settings.max_connections, "{most} connections");
    }

    #[tokio::test(start_paused = true)]
    async fn makes_do_with_the_connections_that_the_agent_has() {
        const SERVICES: usize = 40;
        let agent = Agent::start().await;
        agent.limit_connections(10);
        agent.set(ROOTS, roots("a"));
        agent.set("/v1/health/connect/db", json!([]));
        let watches = watches(&agent.settings());
        let (sender, mut events) = mpsc::channel(16);
        let _watches: Vec<_> = (0..SERVICES)
            .map(|number| {
                let query = Query::health_connect(&Instances { service: "db".into(), ..Instances::default() });
                watches.watch(query, sender.clone(), move |event| matches!(event, Event::Value(_)).then_some(number))
            })
            .collect();
        let mut always = watch_roots(&watches);
        assert_eq!(always.value_at_last().await, "a");
        let mut served = std::collections::HashSet::new();
        while served.len() < SERVICES {
            served.extend(events.recv().await.expect("running watches"));
        }
        // From here on it is enough to take turns, whatever tries out whether there are more by now.
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        let mut slowest = Duration::ZERO;
        for round in 0..20 {
            tokio::time::sleep(Duration::from_secs(5)).await;
            let start = Instant::now();
            agent.set(ROOTS, roots(&round.to_string()));
            assert_eq!(always.value_at_last().await, round.to_string());
            slowest = slowest.max(start.elapsed());
        }
        assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_watch_need_not_wait_for_those_that_block() {
        let agent = Agent::start().await;
        let mut settings = agent.settings();
        settings.max_connections = 4;
        agent.set(ROOTS, roots("a"));
        agent.set("/v1/health/connect/a", json!([]));
        agent.set("/v1/health/connect/b", json!([]));
        let watches = watches(&settings);
        let (sender, mut events) = mpsc::channel(16);
        let instances = |name: &str| Query::health_connect(&Instances { service: name.into(), ..Instances::default() });
        let _blocking = ["a", "b"].map(|name| watches.watch(instances(name), sender.clone(), |_| ()));
        events.recv().await.expect("running watches");
        events.recv().await.expect("running watches");
        until(|| ["a", "b"].iter().all(|name| last_index(&agent, &format!("/v1/health/connect/{name}")).is_some()))
            .await;
        let start = Instant::now();
        let mut watch = watch_roots(&watches);
        assert_eq!(watch.value().await, "a");
        assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn what_somebody_waits_for_is_asked_first() {
        const SERVICES: usize = 50;
        let agent = Agent::start().await;
        let mut settings = agent.settings();
        settings.max_connections = 4;
        agent.set("/v1/health/connect/db", json!([]));
        let watches = watches(&settings);
        let (sender, mut events) = mpsc::channel(SERVICES);
        let query = || Query::health_connect(&Instances { service: "db".into(), ..Instances::default() });
        let all: Vec<_> = (0..SERVICES)
            .map(|number| {
                watches.watch(query(), sender.clone(), move |event| matches!(event, Event::Value(_)).then_some(number))
            })
            .collect();
        all[SERVICES - 1].hurry();
        let mut before = 0;
        while events.recv().await.expect("running watches").expect("an answer") != SERVICES - 1 {
            before += 1;
        }
        assert!(before < 5, "{before} were asked before it");
    }

    #[tokio::test(start_paused = true)]
    async fn another_token_starts_queries_anew() {
        let agent = Agent::start().await;
        let file = TempFile::new("first");
        let mut settings = agent.settings();
        settings.token = Token::File(file.path().to_path_buf());
        agent.set(ROOTS, roots("a"));
        let mut watch = watch_roots(&watches(&settings));
        assert_eq!(watch.value().await, "a");
        until(|| last_index(&agent, ROOTS).is_some()).await;
        file.write(" second\n");
        let with =
            |token: &'static str| agent.requests(ROOTS).into_iter().filter(move |seen| seen.token() == Some(token));
        until(|| with("second").next().is_some()).await;
        assert!(with("second").next().expect("one came").param("index").is_none());
        // Neither an empty file nor a missing one is another token.
        file.write("");
        tokio::time::sleep(Duration::from_secs(3)).await;
        std::fs::remove_file(file.path()).expect("it was there");
        tokio::time::sleep(Duration::from_secs(3)).await;
        agent.set(ROOTS, roots("b"));
        assert_eq!(watch.value().await, "b");
        until(|| agent.requests(ROOTS).last().is_some_and(|seen| seen.token() == Some("second"))).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_token_is_read_again() {
        let agent = Agent::start().await;
        agent.only_tokens(&["second"]);
        agent.set(ROOTS, roots("a"));
        let file = TempFile::new("first");
        let mut settings = agent.settings();
        settings.token = Token::File(file.path().to_path_buf());
        let client = Client::new(&settings).expect("the settings are good");
        let error = client.ask(&Query::ca_roots()).await.expect_err("the token is not known");
        assert!(error.is_forbidden() && !error.to_string().contains("first"), "{error}");
        file.write("second");
        assert_eq!(client.ask(&Query::ca_roots()).await.expect("an answer").value.active_root_id, "a");
    }

    #[tokio::test(start_paused = true)]
    async fn the_default_policy_is_that_of_the_probe_else_of_the_header_else_deny() {
        const AUTHORIZE: &str = "/v1/agent/connect/authorize";
        let agent = Agent::start().await;
        let client = Client::new(&agent.settings()).expect("the settings are good");
        let by_intention = json!({ "Authorized": true, "Reason": "Matched intention: ALLOW default/* => default/db" });
        for (answer, header, allow) in [
            (json!({ "Authorized": false, "Reason": "Default intention policy" }), Some("allow"), false),
            (json!({ "Authorized": true, "Reason": "Default intention policy" }), Some("deny"), true),
            (json!({ "Authorized": true, "Reason": "Default behavior configured by ACLs" }), None, true),
            (json!({ "Authorized": true, "Reason": "Default behavior configured by ACLs" }), Some("deny"), false),
            (json!({ "Authorized": false, "Reason": "Default behavior configured by ACLs" }), Some("allow"), false),
            (
                json!({ "Authorized": true, "Reason": "ACLs disabled, access is allowed by default" }),
                Some("deny"),
                false,
            ),
            (by_intention.clone(), None, false),
            (by_intention.clone(), Some("allow"), true),
            (by_intention, Some("deny"), false),
        ] {
            let case = format!("{answer} {header:?}");
            agent.set(AUTHORIZE, answer);
            agent.default_policy(header.unwrap_or(""));
            let policy = client.ask(&Query::default_policy("db")).await.expect("an answer").value;
            assert_eq!(policy.allow, allow, "{case}");
        }
    }
}
