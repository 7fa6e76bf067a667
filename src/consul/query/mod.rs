//! Queries that go on: what comes of each answer, and what is asked next.
//!
//! The agent's rules, which this follows (Consul 1.8.7 to 1.22):
//!
//! * An index that is not in the agent's past blocks for the whole wait. After a restored server all are in
//!   its future. So an index is forgotten after any failure, and when a newer one is lower.
//! * A query that wakes need not have changed: only other bodies are passed on.
//! * A refusal can carry an index, which means nothing.
//! * An answer without an index cannot be blocked on, and is fetched periodically.

mod sink;
#[cfg(test)]
mod tests;

use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

pub use self::sink::Event;
pub(super) use self::sink::Gone;
use self::sink::{Sink, Typed};
use super::endpoint::{Flow, Priority, Request, Response, Table};
use super::failures::{Failing, Failures};
use super::pace::{Backoff, Bucket, random};
use super::progress::ProgressRecord;
use super::schedule::{Done, Role};
use super::token::Changes;
use super::{Client, Cursor, Error, ErrorKind, Pool, Query, table};

/// Interval between two requests of a query whose answer should have had an index and had none.
const NO_INDEX_PERIOD: Duration = Duration::from_secs(10);

/// A hot table can wake a query many times a second. It is asked again at once a few times, and then once in each of
/// these: what decides who may talk to whom is worth more of the agent's time.
const SPACING: Duration = Duration::from_millis(100);
const PROMPT_SPACING: Duration = Duration::from_millis(10);

/// Shortest interval between two wake-ups of a table watch, for which the agent reads whole tables.
const TABLE_SPACING: Duration = Duration::from_secs(1);

/// A query that is repeated.
pub(super) struct RunningQuery {
    /// As whom it is asked.
    client: Client,
    request: Arc<Request>,
    flow: Flow,
    priority: Priority,
    /// Absent for the watch of a table, whose index is all that matters.
    sink: Option<Box<dyn Sink>>,
    cursor: Cursor,
    /// Whether the agent is one before 1.9, whose matched lists of intentions have no index of their own,
    /// but block on that of the table.
    by_intentions_table: bool,
    /// The table's index, when it was asked for before the answer at hand.
    intentions_index: Option<u64>,
    /// Of a table watch: the last index, and when it came instead of another one.
    table_index: Option<u64>,
    table_changed: Option<Instant>,
    /// Fingerprint of the last answer that was passed on.
    seen: Option<u64>,
    covered: bool,
    fingerprint: RandomState,
    bucket: Bucket,
    backoff: Backoff,
    failing: Option<Failing>,
    progress: Arc<ProgressRecord>,
}

impl RunningQuery {
    pub(super) fn new<T, U, F>(client: Client, query: Query<T>, events: mpsc::Sender<U>, wrap: F) -> Self
    where
        T: Send + 'static,
        U: Send + 'static,
        F: Fn(Event<T>) -> U + Send + 'static,
    {
        let sink = Typed { decode: query.decode, covered: query.covered, events, wrap };
        let spacing = if query.priority == Priority::Upstream { SPACING } else { PROMPT_SPACING };
        Self::of(client, query.request, query.flow, query.priority, Some(Box::new(sink)), spacing)
    }

    /// The watch of a table.
    pub(super) fn watch(client: Client, table: &Table) -> Self {
        Self::of(client, table.request(), table.flow(), Priority::Upstream, None, TABLE_SPACING)
    }

    fn of(
        client: Client,
        request: Request,
        flow: Flow,
        priority: Priority,
        sink: Option<Box<dyn Sink>>,
        spacing: Duration,
    ) -> Self {
        let request = Arc::new(request);
        Self {
            progress: Arc::new(ProgressRecord::new(&request)),
            client,
            request,
            flow,
            priority,
            sink,
            cursor: Cursor::None,
            by_intentions_table: false,
            intentions_index: None,
            table_index: None,
            table_changed: None,
            seen: None,
            covered: true,
            fingerprint: RandomState::new(),
            bucket: Bucket::new(spacing),
            backoff: Backoff::default(),
            failing: None,
        }
    }

    /// For those who look on.
    pub(super) fn progress(&self) -> &Arc<ProgressRecord> {
        &self.progress
    }

    /// Tells of another token than that of this moment.
    pub(super) fn token_changes(&self) -> Changes {
        self.client.token_changes()
    }

    /// Sends its request; one that blocks for as long as `wait`, or a fetch.
    pub(super) async fn send(&mut self, pool: Pool, wait: Option<Duration>) -> Result<Response, Error> {
        let Some(wait) = wait else {
            self.cursor = Cursor::None;
            self.intentions_index = None;
            self.by_intentions_table |= self.flow == Flow::Intentions && self.client.is_before_1_9();
            if self.by_intentions_table {
                // The index before the list: what changes in between wakes the query that comes next.
                let table = table::intentions();
                self.intentions_index = self.client.send(pool, &table, &Cursor::None, Duration::ZERO).await?.index;
            }
            return self.client.send(pool, &self.request, &Cursor::None, Duration::ZERO).await;
        };
        self.client.send(pool, &self.request, &self.cursor, wait).await
    }

    /// Takes an answer, and passes it on if it is a new one. Says what is next, and whether it is the first answer
    /// after a failure, which shows that the agent is back.
    pub(super) async fn answered(&mut self, failures: &Failures, response: &Response) -> Result<(Done, bool), Gone> {
        let Some(sink) = self.sink.take() else {
            let back = self.recovered(response);
            return Ok((self.table_answered(response), back));
        };
        let fingerprint = self.fingerprint(response);
        if self.seen != Some(fingerprint) {
            match sink.decode(response) {
                Ok((sent, covered)) => {
                    self.seen = Some(fingerprint);
                    self.covered = covered;
                    sent.await?;
                }
                Err(cause) => {
                    self.sink = Some(sink);
                    let error = self.client.error(&self.request, ErrorKind::Decode(cause));
                    return Ok((self.failed(failures, error).await?, false));
                }
            }
        }
        self.sink = Some(sink);
        let back = self.recovered(response);
        Ok((self.advance(response), back))
    }

    fn recovered(&mut self, response: &Response) -> bool {
        self.progress.answered(response, response.index.or(self.intentions_index));
        self.backoff.reset();
        self.failing.take().is_some_and(|failing| failing.recover(&self.request))
    }

    /// Takes the cursor for the next request from an answer; says what is next.
    fn advance(&mut self, response: &Response) -> Done {
        let asked = std::mem::take(&mut self.cursor);
        let intentions_index = self.intentions_index.take();
        let next = match self.flow {
            Flow::Poll(period) => return Done::Fetch(period.mul_f64(0.9 + 0.2 * random())),
            Flow::Table => return Done::Member { covered: self.covered },
            Flow::Hash => response.hash.clone().map(Cursor::Hash),
            Flow::Index | Flow::Intentions => response.index.or(intentions_index).map(Cursor::Index),
        };
        match (&asked, next) {
            // Going backwards: the next request has no index.
            (Cursor::Index(asked), Some(Cursor::Index(index))) if index < *asked => Done::Fetch(self.bucket.take()),
            (_, Some(next)) => {
                self.cursor = next;
                Done::Block(self.bucket.take())
            }
            // The next request asks for the index of the table as well; unless this one did, in vain.
            (_, None) if self.flow == Flow::Intentions && (!self.by_intentions_table || asked != Cursor::None) => {
                self.by_intentions_table = true;
                Done::Fetch(self.bucket.take())
            }
            (_, None) => Done::Fetch(NO_INDEX_PERIOD.mul_f64(0.9 + 0.2 * random())),
        }
    }

    fn table_answered(&mut self, response: &Response) -> Done {
        let index = table::index(response);
        let before = std::mem::replace(&mut self.table_index, index);
        let changed = before != index;
        if changed && before.is_some() {
            self.table_changed = Some(Instant::now());
        }
        self.cursor = index.map_or(Cursor::None, Cursor::Index);
        let pause = match self.flow {
            Flow::Poll(_) => table::period(self.table_changed.map(|at| at.elapsed())),
            _ => self.bucket.take(),
        };
        Done::Table { index, changed, before_1_9: table::is_before_1_9(response), pause }
    }

    /// Takes a failure, and passes it on.
    pub(super) async fn failed(&mut self, failures: &Failures, error: Error) -> Result<Done, Gone> {
        self.progress.failed(&error);
        self.cursor = Cursor::None;
        self.table_index = None;
        self.failing = Some(failures.enter(self.failing.take(), &error));
        if error.is_rate_limited() {
            self.backoff.be_patient();
        }
        let cap = self.backoff_cap(&error);
        if let Some(sink) = &self.sink {
            sink.failed(error).await?;
        }
        Ok(Done::Failed(self.backoff.next(cap)))
    }

    /// The longest time between attempts.
    fn backoff_cap(&self, error: &Error) -> Duration {
        // A refused connection costs nothing, and a service that is not there yet is about to be: both
        // are what a start looks like. Who gets through wakes the others.
        let soon =
            error.is_unreachable() || error.is_not_found() || error.is_connection_limit() || error.is_unknown_token();
        match self.priority {
            // A denial must not wait.
            Priority::Authorization if error.is_connection_limit() => Duration::from_millis(500),
            Priority::Upstream => Backoff::CAP,
            _ if soon => Duration::from_secs(2),
            _ => Backoff::CAP,
        }
    }

    fn fingerprint(&self, response: &Response) -> u64 {
        let mut hasher = self.fingerprint.build_hasher();
        (response.status.as_u16(), &response.body, response.filtered_by_acls).hash(&mut hasher);
        if let Flow::Poll(_) = self.flow {
            response.default_policy.hash(&mut hasher);
        }
        hasher.finish()
    }
}

/// How a change of an answer is noticed. `tables` is whether table watches can be relied on.
pub(super) fn role<T>(query: &mut Query<T>, tables: bool) -> Role {
    match (query.priority, query.flow, &query.table) {
        (Priority::Authorization, _, _) => Role::Authorization,
        (_, Flow::Poll(_), _) => Role::Periodic,
        (_, Flow::Table, Some(table)) if tables => Role::Member(table.clone()),
        (_, Flow::Table, _) => {
            query.covered = |_| false;
            Role::Periodic
        }
        (_, flow, _) => Role::Own { prompt: flow == Flow::Hash },
    }
}
