//! How soon to ask again, and how often.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use tokio::time::Instant;

/// Requests that may follow each other without a pause.
const BURST: u32 = 10;

/// Exponential backoff with full jitter: from 100 ms, up to a cap.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Longest pause after failures.
    pub(super) const CAP: Duration = Duration::from_secs(15);
    /// First pause after a failure, which doubles with each further one.
    const FIRST: Duration = Duration::from_millis(100);
    /// Shortest pause after a failure: jitter alone may come out as nearly zero.
    const SHORTEST: Duration = Duration::from_millis(20);

    /// The time to wait after one more failure.
    pub(super) fn next(&mut self, cap: Duration) -> Duration {
        let ceiling = Self::FIRST.saturating_mul(1 << self.failures.min(16)).min(cap);
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(random()).max(Self::SHORTEST)
    }

    /// Skips the short delays: the other side asked for time.
    pub(super) fn be_patient(&mut self) {
        self.failures = self.failures.max(4);
    }

    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Evenly spread over 0 to 1. Good enough to keep many programs from doing a thing at the same moment.
pub(super) fn random() -> f64 {
    // Each state has other keys, so that hashing nothing gives another number each time.
    let bits = RandomState::new().build_hasher().finish() >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

/// A token bucket: a few at once, and then one in each `spacing`.
#[derive(Debug)]
pub(super) struct Bucket {
    spacing: Duration,
    tokens: u32,
    since: Instant,
}

impl Bucket {
    pub(super) fn new(spacing: Duration) -> Self {
        Self { spacing, tokens: BURST, since: Instant::now() }
    }

    /// Takes one; gives the time until it is there.
    pub(super) fn take(&mut self) -> Duration {
        let now = Instant::now();
        let refill = (now.saturating_duration_since(self.since).as_millis() / self.spacing.as_millis()) as u32;
        if refill > 0 {
            self.tokens = self.tokens.saturating_add(refill).min(BURST);
            self.since += self.spacing * refill;
        }
        if self.tokens == BURST {
            self.since = now;
        }
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                Duration::ZERO
            }
            None => {
                self.since += self.spacing;
                self.since.saturating_duration_since(now)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_a_few_at_once_and_then_one_in_each_spacing() {
        let mut bucket = Bucket::new(Duration::from_millis(100));
        let free = (0..1000).filter(|_| bucket.take() == Duration::ZERO).count();
        assert_eq!(free, BURST as usize);
        assert!(bucket.take() > Duration::from_millis(100) * 900);
    }

    #[test]
    fn backoff_grows_to_its_cap_and_starts_again() {
        let mut backoff = Backoff::default();
        for failure in 0..100 {
            let ceiling = Duration::from_millis(100 << failure.min(10)).min(Backoff::CAP);
            let delay = backoff.next(Backoff::CAP);
            assert!((Backoff::SHORTEST..=ceiling).contains(&delay), "{delay:?} after {failure}");
        }
        backoff.reset();
        assert!(backoff.next(Backoff::CAP) <= Duration::from_millis(100));
    }
}
