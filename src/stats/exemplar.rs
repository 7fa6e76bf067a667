//! Traces that stand for values of a histogram.

use std::sync::{Mutex, PoisonError, TryLockError};
use std::time::{Duration, SystemTime};

use super::value::{BOUNDS, bucket};

const BUCKETS: usize = BOUNDS.len() + 1;

/// A value of a histogram, and the trace that it is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exemplar {
    pub trace_id: u128,
    /// The value.
    pub micros: u64,
    /// Microseconds since 1970.
    pub at: u64,
}

/// The newest of each bucket. Only what is traced looks here, and nobody waits: where two come at once, one is kept.
#[derive(Debug, Default)]
pub struct Exemplars(Mutex<Option<Box<[Option<Exemplar>; BUCKETS]>>>);

impl Exemplars {
    pub fn keep(&self, value: Duration, trace_id: u128) {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let exemplar = Exemplar { trace_id, micros: micros(value), at: micros(now) };
        let mut kept = match self.0.try_lock() {
            Ok(kept) => kept,
            Err(TryLockError::Poisoned(kept)) => kept.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        kept.get_or_insert_default()[bucket(exemplar.micros)] = Some(exemplar);
    }

    /// By bucket; empty before there is one.
    #[must_use]
    pub fn get(&self) -> Vec<Option<Exemplar>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.as_ref().map(|kept| kept.to_vec()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_each_bucket_is_kept() {
        let exemplars = Exemplars::default();
        assert!(exemplars.get().is_empty());
        for (ms, trace_id) in [(2, 1), (3, 2), (40, 3)] {
            exemplars.keep(Duration::from_millis(ms), trace_id);
        }
        let kept: Vec<_> = exemplars.get().into_iter().flatten().map(|one| (one.trace_id, one.micros)).collect();
        assert_eq!(kept, [(2, 3_000), (3, 40_000)]);
    }
}
