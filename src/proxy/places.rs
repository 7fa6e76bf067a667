//! Places for what strangers begin: when all are taken, the newest gets that of the oldest.
//!
//! A stranger who holds many connections open thus shuts out nobody: who has something to say says it within
//! moments, and the oldest connection is one that has not.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// So many places.
#[derive(Debug)]
pub(super) struct Places {
    limit: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    /// In the order in which they were taken.
    places: BTreeMap<u64, oneshot::Sender<()>>,
    count: u64,
}

/// One place, which is given back when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    number: u64,
    lost: oneshot::Receiver<()>,
}

impl Places {
    #[must_use]
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, taken: Mutex::default() })
    }

    #[must_use]
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Takes a place, if need be from the oldest holder.
    #[must_use]
    pub(super) fn take(self: &Arc<Self>) -> Place {
        let (lose, lost) = oneshot::channel();
        let mut taken = self.taken();
        if taken.places.len() >= self.limit {
            taken.places.pop_first();
        }
        let number = taken.count;
        taken.count += 1;
        taken.places.insert(number, lose);
        drop(taken);
        Place { places: Arc::clone(self), number, lost }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Ends when another has taken it.
    pub(super) async fn lost(&mut self) {
        let _ = (&mut self.lost).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken().places.remove(&self.number);
    }
}

/// One of those that are counted, until it is dropped.
#[derive(Debug)]
pub(super) struct Counted(Arc<AtomicUsize>);

impl Counted {
    /// `None` where there are `limit` already.
    pub(super) fn one(count: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        let counted = Self(Arc::clone(count));
        (count.fetch_add(1, Ordering::Relaxed) < limit).then_some(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_takes_the_place_of_the_oldest() {
        let places = Places::new(2);
        let (mut first, mut second) = (places.take(), places.take());
        drop(second);
        second = places.take();
        let third = places.take();
        first.lost().await;
        drop(first);
        assert_eq!(places.taken().places.len(), 2);
        drop(third);
        let _fourth = places.take();
        assert!(second.lost.try_recv().is_err_and(|e| e == oneshot::error::TryRecvError::Empty));
    }
}
