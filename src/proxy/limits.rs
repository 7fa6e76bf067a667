//! How much may go on with one target at a time.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::snapshot::Limits;
use crate::stats::LimitNow;

/// One of a target's limits, as Consul names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    Connections,
    PendingRequests,
    ConcurrentRequests,
}

/// A limit was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overflow {
    pub limit: Limit,
    /// The configured limit.
    pub maximum: usize,
}

/// Counts towards a limit until it is dropped.
#[derive(Debug)]
pub struct Permit {
    counts: Arc<Counts>,
    limit: Limit,
}

/// Usage of one target, on all threads.
#[derive(Debug, Default)]
pub struct Counts {
    connections: AtomicUsize,
    pending_requests: AtomicUsize,
    concurrent_requests: AtomicUsize,
}

impl Counts {
    /// Counts one more towards `limit` if `limits` allow it; no limit counts too, as one may be set meanwhile.
    pub fn admit(self: &Arc<Self>, limit: Limit, limits: &Limits) -> Result<Permit, Overflow> {
        let maximum = limit.maximum(limits);
        let more = |count: usize| (count < maximum.unwrap_or(usize::MAX)).then(|| count + 1);
        match self.of(limit).fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(Permit { counts: Arc::clone(self), limit }),
            Err(count) => Err(Overflow { limit, maximum: maximum.unwrap_or(count) }),
        }
    }

    /// How much of `limit` is used now.
    pub fn look(&self, limit: Limit, limits: &Limits) -> LimitNow {
        LimitNow { used: self.of(limit).load(Ordering::Relaxed), maximum: limit.maximum(limits) }
    }

    pub fn of(&self, limit: Limit) -> &AtomicUsize {
        match limit {
            Limit::Connections => &self.connections,
            Limit::PendingRequests => &self.pending_requests,
            Limit::ConcurrentRequests => &self.concurrent_requests,
        }
    }
}

impl Limit {
    /// Consul's name for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connections => "max_connections",
            Self::PendingRequests => "max_pending_requests",
            Self::ConcurrentRequests => "max_concurrent_requests",
        }
    }

    fn maximum(self, limits: &Limits) -> Option<usize> {
        match self {
            Self::Connections => limits.max_connections,
            Self::PendingRequests => limits.max_pending_requests,
            Self::ConcurrentRequests => limits.max_concurrent_requests,
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.counts.of(self.limit).fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Overflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "overflow, limits.{} ({}) is reached", self.limit, self.maximum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_admits_so_many_at_a_time_and_zero_is_none_at_all() {
        let counts = Arc::new(Counts::default());
        let limits = Limits { max_connections: Some(2), max_pending_requests: Some(0), max_concurrent_requests: None };
        let one = counts.admit(Limit::Connections, &limits).unwrap();
        let _two = counts.admit(Limit::Connections, &limits).unwrap();
        let overflow = counts.admit(Limit::Connections, &limits).unwrap_err();
        assert_eq!(overflow.to_string(), "overflow, limits.max_connections (2) is reached");
        drop(one);
        let _three = counts.admit(Limit::Connections, &limits).unwrap();
        assert_eq!(counts.admit(Limit::PendingRequests, &limits).unwrap_err().maximum, 0);
        let many: Vec<_> = (0..1000).map(|_| counts.admit(Limit::ConcurrentRequests, &limits).unwrap()).collect();
        assert_eq!(counts.of(Limit::ConcurrentRequests).load(Ordering::Relaxed), many.len());
    }

    #[test]
    fn what_was_admitted_before_a_limit_was_set_counts() {
        let counts = Arc::new(Counts::default());
        let before = counts.admit(Limit::Connections, &Limits::default()).unwrap();
        let limits = Limits { max_connections: Some(1), ..Limits::default() };
        assert!(counts.admit(Limit::Connections, &limits).is_err());
        drop(before);
        assert!(counts.admit(Limit::Connections, &limits).is_ok());
    }
}
