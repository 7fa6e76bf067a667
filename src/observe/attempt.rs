//! Attempts: each time that a connection or a request was sent somewhere.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::outcome::{Fault, Outcome};
use crate::snapshot::{Address, LocalApp, Target};
use crate::stats::ClusterStats;

/// The destination of an attempt.
#[derive(Debug, Clone)]
pub enum Destination {
    LocalApp(LocalApp),
    /// An instance of a target.
    Instance {
        target: Arc<Target>,
        address: Address,
        /// The numbers of the target.
        stats: Arc<ClusterStats>,
    },
}

impl Destination {
    /// The name of Envoy's cluster.
    #[must_use]
    pub fn cluster(&self) -> Cow<'_, str> {
        match self {
            Self::LocalApp(_) => Cow::Borrowed("local_app"),
            Self::Instance { target, .. } => target.cluster(),
        }
    }

    /// The address, as logs show it.
    #[must_use]
    pub fn host(&self) -> String {
        match self {
            Self::LocalApp(app) => app.to_string(),
            Self::Instance { address, .. } => address.to_string(),
        }
    }

    /// Whether it is this instance's address.
    #[must_use]
    pub fn is_instance(&self, other: &Address) -> bool {
        matches!(self, Self::Instance { address, .. } if address == other)
    }
}

/// One try to send a connection or a request to a destination.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub destination: Destination,
    pub started: Instant,
    /// Until `result` was known.
    pub took: Duration,
    pub result: AttemptResult,
}

/// The result of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttemptResult {
    /// Nothing yet, or it was given up for another one.
    Pending,
    /// A connection that carries bytes was made.
    Connected,
    /// A response with this status code began.
    Responded(u16),
    /// `cause` is one clause for logs.
    Failed { outcome: Outcome, cause: String },
}

impl From<&Fault> for AttemptResult {
    fn from(fault: &Fault) -> Self {
        Self::Failed { outcome: fault.outcome, cause: fault.cause.clone().into_owned() }
    }
}

impl Attempt {
    /// One that starts now.
    #[must_use]
    pub fn new(destination: Destination) -> Self {
        Self { destination, started: Instant::now(), took: Duration::ZERO, result: AttemptResult::Pending }
    }

    pub fn end(&mut self, result: AttemptResult) {
        self.took = self.started.elapsed();
        self.result = result;
    }
}

/// Attempts in the order in which they were started. A first one takes no memory of its own.
#[derive(Debug, Default)]
pub struct Attempts {
    first: Option<Attempt>,
    more: Vec<Attempt>,
}

impl Attempts {
    pub fn push(&mut self, attempt: Attempt) {
        if self.first.is_none() {
            self.first = Some(attempt);
        } else {
            self.more.push(attempt);
        }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.first.is_some()) + self.more.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The one that was started last.
    #[must_use]
    pub fn last(&self) -> Option<&Attempt> {
        self.more.last().or(self.first.as_ref())
    }

    pub fn iter(&self) -> impl Iterator<Item = &Attempt> {
        self.first.iter().chain(&self.more)
    }

    /// The one that was started last of those without a result that `matches`.
    pub fn pending(&mut self, matches: impl Fn(&Destination) -> bool) -> Option<&mut Attempt> {
        let all = self.more.iter_mut().rev().chain(&mut self.first);
        all.into_iter().find(|attempt| attempt.result == AttemptResult::Pending && matches(&attempt.destination))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Host;

    #[test]
    fn attempts_end_by_themselves_whatever_their_order() {
        let app = |port| LocalApp::Tcp(Address { host: Host::Ip([127, 0, 0, 1].into()), port });
        let is = |port| move |to: &Destination| matches!(to, Destination::LocalApp(to) if *to == app(port));
        let mut attempts = Attempts::default();
        assert!(attempts.is_empty() && attempts.last().is_none() && attempts.pending(is(1)).is_none());
        for port in [1, 2, 1] {
            attempts.push(Attempt::new(Destination::LocalApp(app(port))));
        }
        attempts.pending(is(1)).unwrap().end(AttemptResult::Responded(200));
        attempts.pending(is(2)).unwrap().end(AttemptResult::Failed { outcome: Outcome::Reset, cause: "x".into() });
        attempts.pending(is(1)).unwrap().end(AttemptResult::Responded(503));
        assert!(attempts.pending(|_| true).is_none());
        let results: Vec<_> = attempts.iter().map(|attempt| attempt.result.clone()).collect();
        let failed = AttemptResult::Failed { outcome: Outcome::Reset, cause: "x".into() };
        assert_eq!(results, [AttemptResult::Responded(503), failed, AttemptResult::Responded(200)]);
        assert_eq!((attempts.len(), attempts.last().unwrap().destination.host()), (3, "127.0.0.1:1".to_owned()));
    }
}
