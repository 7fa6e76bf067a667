//! Progress of the queries to the agent, for the admin server.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::endpoint::{Request, Response, Table};
use super::schedule::Role;
use super::{Error, ErrorKind};

/// Kinds of requests to the agent. There are few, so that each may have series of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Registration,
    Roots,
    Leaf,
    Intentions,
    DefaultPolicy,
    Chain,
    Instances,
    PreparedQuery,
    ConfigEntry,
    /// A watch that stands for many answers.
    Table,
    /// What is asked once, such as a registration of ours.
    Once,
}

impl Kind {
    pub const ALL: [Self; 11] = [
        Self::Registration,
        Self::Roots,
        Self::Leaf,
        Self::Intentions,
        Self::DefaultPolicy,
        Self::Chain,
        Self::Instances,
        Self::PreparedQuery,
        Self::ConfigEntry,
        Self::Table,
        Self::Once,
    ];

    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Registration => "registration",
            Self::Roots => "roots",
            Self::Leaf => "leaf",
            Self::Intentions => "intentions",
            Self::DefaultPolicy => "default_policy",
            Self::Chain => "chain",
            Self::Instances => "instances",
            Self::PreparedQuery => "prepared_query",
            Self::ConfigEntry => "config_entry",
            Self::Table => "table",
            Self::Once => "once",
        }
    }

    /// By the path after `/v1`.
    pub(super) fn of(request: &Request) -> Self {
        let path: Vec<&str> = request.path.iter().map(String::as_str).collect();
        match path[..] {
            ["agent", "service", "register" | "deregister", ..] => Self::Once,
            ["agent", "service", _] => Self::Registration,
            ["agent", "connect", "ca", "roots"] => Self::Roots,
            ["agent", "connect", "ca", "leaf", _] => Self::Leaf,
            ["connect", "intentions", ..] => Self::Intentions,
            ["agent", "connect", "authorize"] => Self::DefaultPolicy,
            ["discovery-chain", _] => Self::Chain,
            ["health", ..] => Self::Instances,
            ["query", ..] => Self::PreparedQuery,
            ["config", _, _] => Self::ConfigEntry,
            ["config", _] | ["internal", ..] => Self::Table,
            _ => Self::Once,
        }
    }
}

/// The result of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestResult {
    /// With what was asked for, or that there is none.
    Answered,
    /// The agent answered with an error.
    Refused,
    /// There was a connection, but no whole answer came in time.
    Broken,
    /// No connection could be made.
    Unreachable,
    /// Nobody waited for its answer any more.
    Cancelled,
}

impl RequestResult {
    pub const ALL: [Self; 5] = [Self::Answered, Self::Refused, Self::Broken, Self::Unreachable, Self::Cancelled];

    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::Broken => "broken",
            Self::Unreachable => "unreachable",
            Self::Cancelled => "cancelled",
        }
    }

    pub(super) fn of<T>(answer: &Result<T, ErrorKind>) -> Self {
        match answer {
            Ok(_) | Err(ErrorKind::Decode(_)) => Self::Answered,
            Err(ErrorKind::Status { .. } | ErrorKind::Name(_)) => Self::Refused,
            Err(ErrorKind::Transport(_)) => Self::Broken,
            Err(ErrorKind::Unreachable(_)) => Self::Unreachable,
        }
    }
}

/// Counts requests by kind and result.
#[derive(Debug, Default)]
pub(super) struct Requests {
    over: [[AtomicU64; RequestResult::ALL.len()]; Kind::ALL.len()],
    active: AtomicU64,
}

/// Requests that were sent to the agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestCounts {
    /// Those that are over, where there were any.
    pub over: Vec<(Kind, RequestResult, u64)>,
    /// Those under way, most of which block.
    pub active: u64,
}

/// One that is under way until it is dropped, and counted then.
pub(super) struct Active<'a> {
    requests: &'a Requests,
    kind: Kind,
    result: RequestResult,
}

impl Requests {
    pub(super) fn begin(&self, kind: Kind) -> Active<'_> {
        self.active.fetch_add(1, Ordering::Relaxed);
        Active { requests: self, kind, result: RequestResult::Cancelled }
    }

    pub(super) fn get(&self) -> RequestCounts {
        let all = Kind::ALL.into_iter().flat_map(|kind| RequestResult::ALL.map(|result| (kind, result)));
        let counted =
            all.map(|(kind, result)| (kind, result, self.over[kind as usize][result as usize].load(Ordering::Relaxed)));
        RequestCounts {
            over: counted.filter(|(_, _, count)| *count > 0).collect(),
            active: self.active.load(Ordering::Relaxed),
        }
    }
}

impl Active<'_> {
    pub(super) fn end(mut self, result: RequestResult) {
        self.result = result;
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.requests.active.fetch_sub(1, Ordering::Relaxed);
        self.requests.over[self.kind as usize][self.result as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// How a change of a query's answer is noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// Its own request blocks until there is something newer.
    Blocks,
    /// A watch of the table that its answer is made from, as in `instances` or `config entries`.
    Table(String),
    /// Time.
    Periodic,
}

impl How {
    pub(super) fn of(role: &Role) -> Self {
        match role {
            Role::Authorization | Role::Own { .. } | Role::Table(Table::Instances(_)) => Self::Blocks,
            // Nothing blocks on the index of all config entries.
            Role::Table(Table::ConfigEntries) | Role::Periodic => Self::Periodic,
            Role::Member(table) => Self::Table(table.to_string()),
        }
    }
}

/// The origin of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnsweredBy {
    /// The agent, of what it knows itself.
    Agent,
    /// The agent, of what it keeps up to date for all who ask.
    AgentCache,
    /// A server, by way of the agent.
    Servers,
}

impl AnsweredBy {
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::AgentCache => "agent_cache",
            Self::Servers => "servers",
        }
    }
}

/// How a query is asked and what it was answered, at one instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Method and path.
    pub request: String,
    pub kind: Kind,
    pub how: How,
    /// The request under way, if there is one.
    pub under_way: Option<UnderWay>,
    /// Until it is asked again, as far as that is known.
    pub next: Option<Duration>,
    /// Since the last answer that could be used.
    pub age: Option<Duration>,
    /// Of that answer.
    pub index: Option<u64>,
    pub answered_by: Option<AnsweredBy>,
    /// The last failure, and how long ago it was. It is over where an answer came since.
    pub error: Option<(String, Duration)>,
    pub is_failing: bool,
    pub requests: u64,
    pub errors: u64,
}

/// A request that waits for its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnderWay {
    pub since: Duration,
    /// How long the agent may wait for something newer; `None`: it is to answer at once.
    pub blocks_for: Option<Duration>,
    /// It blocks for a moment only, as others have a turn.
    pub rotates: bool,
}

/// Says that a request is under way, whatever becomes of it.
pub(super) struct Sent(Arc<ProgressRecord>);

impl Drop for Sent {
    fn drop(&mut self) {
        self.0.lock().under_way = None;
    }
}

/// Keeps the progress of one query.
#[derive(Debug)]
pub(super) struct ProgressRecord {
    request: Arc<Request>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    under_way: Option<(Instant, Option<Duration>, bool)>,
    answered: Option<Instant>,
    index: Option<u64>,
    answered_by: Option<AnsweredBy>,
    /// In memory of its own, as most queries never fail.
    error: Option<Box<(String, Instant)>>,
    is_failing: bool,
    requests: u32,
    errors: u32,
}

impl ProgressRecord {
    pub(super) fn new(request: &Arc<Request>) -> Self {
        Self { request: Arc::clone(request), state: Mutex::default() }
    }

    /// A request is under way, until what is given back is dropped.
    pub(super) fn sent(self: &Arc<Self>, blocks_for: Option<Duration>, rotates: bool) -> Sent {
        let mut state = self.lock();
        state.under_way = Some((Instant::now(), blocks_for, rotates));
        state.requests = state.requests.wrapping_add(1);
        Sent(Arc::clone(self))
    }

    /// With an answer that can be used.
    /// `index` is what is blocked on next.
    pub(super) fn answered(&self, response: &Response, index: Option<u64>) {
        let is_of_agent = self.request.path.first().is_some_and(|first| first == "agent");
        let mut state = self.lock();
        state.answered = Some(Instant::now());
        state.index = index;
        state.answered_by = Some(match (response.from_cache, is_of_agent) {
            (true, _) => AnsweredBy::AgentCache,
            (false, true) => AnsweredBy::Agent,
            (false, false) => AnsweredBy::Servers,
        });
        state.is_failing = false;
    }

    pub(super) fn failed(&self, error: &Error) {
        let mut state = self.lock();
        state.error = Some(Box::new((error.to_string(), Instant::now())));
        state.is_failing = true;
        state.errors = state.errors.wrapping_add(1);
    }

    /// As it is at `now`; `role` and `next` are the schedule's.
    pub(super) fn get(&self, role: &Role, next: Option<Instant>, now: Instant) -> Progress {
        let state = self.lock();
        let since = |at: Instant| now.saturating_duration_since(at);
        Progress {
            request: self.request.to_string(),
            kind: Kind::of(&self.request),
            how: How::of(role),
            under_way: state.under_way.map(|(sent, blocks_for, rotates)| UnderWay {
                since: since(sent),
                blocks_for,
                rotates,
            }),
            next: next.map(|at| at.saturating_duration_since(now)),
            age: state.answered.map(since),
            index: state.index,
            answered_by: state.answered_by,
            error: state.error.as_deref().map(|(error, at)| (error.clone(), since(*at))),
            is_failing: state.is_failing,
            requests: u64::from(state.requests),
            errors: u64::from(state.errors),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consul::Query;

    #[test]
    fn kinds_are_told_by_what_is_asked() {
        for (request, kind) in [
            (Query::agent_service("web-sidecar-proxy").request, Kind::Registration),
            (Query::ca_roots().request, Kind::Roots),
            (Query::ca_leaf("web").request, Kind::Leaf),
            (Query::intentions("web").request, Kind::Intentions),
            (Query::default_policy("web").request, Kind::DefaultPolicy),
            (Query::discovery_chain(&crate::consul::Chain::default()).request, Kind::Chain),
            (Query::health_connect(&crate::consul::Instances::default()).request, Kind::Instances),
            (Query::prepared_query("near", None).request, Kind::PreparedQuery),
            (Query::jwt_provider("okta").request, Kind::ConfigEntry),
            (Query::mesh_config().request, Kind::ConfigEntry),
            (Table::ConfigEntries.request(), Kind::Table),
            (Table::Instances(None).request(), Kind::Table),
        ] {
            assert_eq!(Kind::of(&request), kind, "{request}");
        }
        for (place, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, place);
        }
    }
}
