//! How often a rule decided.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts what one rule decided. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct Hits(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    allowed: AtomicU64,
    denied: AtomicU64,
}

impl Hits {
    /// One more connection of a TCP service, or request of an HTTP service.
    pub fn count(&self, allowed: bool) {
        let counter = if allowed { &self.0.allowed } else { &self.0.denied };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    #[must_use]
    pub fn allowed(&self) -> u64 {
        self.0.allowed.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn denied(&self) -> u64 {
        self.0.denied.load(Ordering::Relaxed)
    }
}

/// What was counted makes no other rule.
impl PartialEq for Hits {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Hits {}
