//! How many retries an upstream bears, so that trouble is not answered with a storm.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Allows retries up to a fifth of the requests of the last ten seconds, and always a few at a time. One for
/// each upstream, for all threads and snapshots.
#[derive(Debug, Default)]
pub struct RetryBudget {
    requests: Recent,
    retries: Recent,
    under_way: AtomicUsize,
}

/// A retry under way, until it is dropped.
#[derive(Debug)]
pub struct Retry(Arc<RetryBudget>);

impl RetryBudget {
    /// Counts a request that is no retry. Time is in milliseconds of the [`Clock`](super::Clock).
    pub fn request(&self, now: u64) {
        self.requests.add(now);
    }

    /// `None` when there were too many retries of late.
    #[must_use]
    pub fn retry(self: &Arc<Self>, now: u64) -> Option<Retry> {
        let few = self.under_way.fetch_add(1, Ordering::Relaxed) < ALWAYS;
        // Gives it back if there is none to give.
        let retry = Retry(Arc::clone(self));
        if !few && self.is_used_up(now) {
            return None;
        }
        self.retries.add(now);
        Some(retry)
    }

    /// Whether a retry would be refused now.
    #[must_use]
    pub fn refuses(&self, now: u64) -> bool {
        self.under_way.load(Ordering::Relaxed) >= ALWAYS && self.is_used_up(now)
    }

    fn is_used_up(&self, now: u64) -> bool {
        (self.retries.sum(now) + 1) * REQUESTS_FOR_A_RETRY > self.requests.sum(now)
    }
}

impl Drop for Retry {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A count over the last seconds: for each a word with the second and its count, both of 32 bits.
#[derive(Debug, Default)]
struct Recent([AtomicU64; SECONDS]);

impl Recent {
    fn add(&self, now: u64) {
        let second = now / 1000;
        if let Some(word) = self.0.get(second as usize % SECONDS) {
            let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
                Some(if word >> 32 == second { word + 1 } else { second << 32 | 1 })
            });
        }
    }

    fn sum(&self, now: u64) -> u64 {
        let second = now / 1000;
        let words = self.0.iter().map(|word| word.load(Ordering::Relaxed));
        let recent = words.filter(|word| second.saturating_sub(word >> 32) < SECONDS as u64);
        recent.map(|word| word & u64::from(u32::MAX)).sum()
    }
}

const SECONDS: usize = 10;
const REQUESTS_FOR_A_RETRY: u64 = 5;
/// Concurrent retries that need no budget: Envoy's default limit of all retries.
const ALWAYS: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_retries_at_a_time_are_always_allowed() {
        let budget = Arc::new(RetryBudget::default());
        assert!(!budget.refuses(0));
        let held: Vec<Retry> = (0..3).map(|_| budget.retry(0).unwrap()).collect();
        assert!(budget.retry(0).is_none() && budget.refuses(0));
        drop(held);
        assert!(!budget.refuses(0));
        assert!(budget.retry(0).is_some());
    }

    #[test]
    fn beyond_those_a_fifth_of_the_recent_requests_may_be_retried() {
        let budget = Arc::new(RetryBudget::default());
        for request in 0..1000 {
            budget.request(request * 9);
        }
        let held: Vec<Retry> = std::iter::from_fn(|| budget.retry(9_000)).collect();
        assert_eq!(held.len(), 200);
        assert!(budget.retry(9_999).is_none());
        // What was long ago does not count any more, neither requests nor retries.
        assert!(budget.retry(30_000).is_none());
        for _ in 0..10 {
            budget.request(30_000);
        }
        assert!(budget.retry(30_000).is_some());
        drop(held);
    }
}
