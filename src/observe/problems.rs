//! The last denials and failures, for those who ask what went wrong just now.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use super::connection::{ConnectionInfo, ConnectionRecord, Listener};
use super::outcome::Outcome;
use super::request::RequestRecord;
use crate::access_log::Secrets;

/// Problems that are kept, the newest ones.
pub const KEPT: usize = 256;

/// Longest text of a problem, in bytes: a client chooses its method and path, of up to 60 KiB, and `/events` sends all
/// problems each second.
const LONGEST: usize = 512;

/// A connection or a request that was denied or failed, other than by its own client.
#[derive(Debug, Clone)]
pub struct Problem {
    /// Counts up by one with each.
    pub number: u64,
    pub at: SystemTime,
    /// `inbound`, `outbound` or `exposed`.
    pub direction: &'static str,
    /// The service or upstream.
    pub listener: String,
    pub outcome: Outcome,
    /// The identity of the downstream, or its address.
    pub who: String,
    /// Method and path of a request, without the query, which may hold tokens.
    pub what: Option<String>,
    /// One sentence: why.
    pub cause: String,
}

/// The newest [`KEPT`]. The lock is taken for what went wrong alone.
#[derive(Debug, Default)]
pub struct Problems(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    next: u64,
    list: VecDeque<Problem>,
}

impl Problems {
    /// Newest first.
    #[must_use]
    pub fn newest(&self) -> Vec<Problem> {
        self.lock().list.iter().rev().cloned().collect()
    }

    pub(super) fn connection(&self, record: &ConnectionRecord) {
        if is_problem(record.outcome) {
            let cause = match &record.denied_by {
                Some(rule) => format!("{}: {rule}", record.cause),
                None => record.cause.clone().into_owned(),
            };
            self.push(&record.info, record.outcome, None, cause);
        }
    }

    pub(super) fn request(&self, record: &RequestRecord) {
        let outcome = record.answer.filter(|answer| is_problem(*answer)).unwrap_or(record.outcome);
        if is_problem(outcome) {
            let what = format!("{} {}", record.method, record.uri.path());
            let cause = record.cause.clone().map_or_else(|| outcome.describe().meaning.to_owned(), String::from);
            let secrets = Secrets { providers: record.providers.as_deref() };
            self.push(&record.connection, outcome, Some(what), secrets.hide(&cause).into_owned());
        }
    }

    pub(super) fn handshake(&self, info: &ConnectionInfo, problem: &str) {
        self.push(info, Outcome::Unproved, None, format!("the peer did not prove a mesh identity: {problem}"));
    }

    /// Told once for each source and reason while it is among the newest: one busy caller would push out all else.
    pub(super) fn would_deny(&self, info: &ConnectionInfo, request: Option<(&str, &str)>, reason: &str) {
        let (who, reason) = (who(info), cut(reason));
        let is_same =
            |known: &Problem| known.outcome == Outcome::WouldDeny && known.who == who && known.cause == reason;
        if !self.lock().list.iter().any(is_same) {
            let what = request.map(|(method, path)| format!("{method} {path}"));
            self.push(info, Outcome::WouldDeny, what, reason.to_owned());
        }
    }

    fn push(&self, info: &ConnectionInfo, outcome: Outcome, what: Option<String>, cause: String) {
        let who = who(info);
        let direction = match info.listener {
            Listener::Public(_) => "inbound",
            Listener::Upstream(_) => "outbound",
            Listener::Exposed(_) => "exposed",
        };
        let (at, listener) = (SystemTime::now(), info.listener.name().to_owned());
        let (what, cause) = (what.map(|what| cut(&what).to_owned()), cut(&cause).to_owned());
        let mut kept = self.lock();
        let number = kept.next;
        kept.next += 1;
        if kept.list.len() == KEPT {
            kept.list.pop_front();
        }
        kept.list.push_back(Problem { number, at, direction, listener, outcome, who, what, cause });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The beginning of a text.
fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(LONGEST)]
}

/// The identity of the downstream, or its address.
fn who(info: &ConnectionInfo) -> String {
    let address = || info.remote.as_ref().map_or_else(|| "unix".to_owned(), SocketAddr::to_string);
    info.peer.as_ref().map_or_else(address, |peer| peer.service.clone())
}

/// Something that an operator may want to know of. What a client ends by itself, and what ends in order, is none.
fn is_problem(outcome: Outcome) -> bool {
    match outcome {
        Outcome::Denied
        | Outcome::WouldDeny
        | Outcome::DeniedByDestination
        | Outcome::ProbablyDenied
        | Outcome::BadRequest
        | Outcome::TooLarge
        | Outcome::Method
        | Outcome::NoRoute
        | Outcome::NoInstance
        | Outcome::Unreachable
        | Outcome::Reset
        | Outcome::BadResponse
        | Outcome::LargeResponse
        | Outcome::Overflow
        | Outcome::Timeout
        | Outcome::TryTimeout
        | Outcome::Idle
        | Outcome::IdleUpload => true,
        // Connections without a handshake are reported when it fails; health checks close them without a byte.
        Outcome::Unproved
        | Outcome::Ended
        | Outcome::Aborted
        | Outcome::ClientReset
        | Outcome::Unused
        | Outcome::OtherProtocol
        | Outcome::Drained
        | Outcome::Displaced
        | Outcome::Redirect => false,
    }
}
