//! A tracer that is on.

use std::sync::Arc;

use tokio::sync::{Notify, mpsc};

use super::sampler::Sampler;
use super::span::Span;
use crate::stats::SpanCounts;

/// The settings and the queue for new requests.
#[derive(Debug)]
pub(super) struct Active {
    pub sampler: Sampler,
    /// A server's span has the id of the client's span.
    pub shared: bool,
    /// Ids of traces that begin here have 64 bits.
    pub short_ids: bool,
    pub connections: bool,
    pub queue: mpsc::Sender<Span>,
    /// So many spans make a batch, which is sent at once.
    pub batch: usize,
    pub full: Arc<Notify>,
    pub counts: Arc<SpanCounts>,
}

impl Active {
    /// Never zero.
    pub(super) fn new_trace_id(&self) -> u128 {
        if self.short_ids { fastrand::u64(1..).into() } else { fastrand::u128(1..) }
    }

    /// Never waits: what the queue has no room for is dropped and counted.
    pub(super) fn submit(&self, span: Span) {
        if self.queue.try_send(span).is_err() {
            self.counts.dropped.increment();
        }
        // The task looks by itself, but for when much is there.
        if self.queue.max_capacity() - self.queue.capacity() >= self.batch {
            self.full.notify_one();
        }
    }
}
